"""
The standard library of the Python that runs this: real text, on every machine, without a download.

    python data/stdlib/prepare.py

Each .py file is a document: code, comments and documentation (pydoc_data holds much of the language reference).
Every twentieth is held out for validation.
"""
import os
import platform
import sys
import sysconfig
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from configurator import UserError, configure
from data.prepare import corpus_of, prepare

tokenizer = 'bytes'  # or 'gpt2'
out_dir = ''  # the dataset's folder; empty: the one of this script
shard_size = 100_000_000  # tokens
num_proc = 0  # workers; 0: one per core

SKIP = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test',  # not the library itself
        'encodings'}  # tables, more than text


def read(path):
    """The file's text, or None: some are unreadable on purpose."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def modules(root):
    """The paths of the library's .py files, as text, relative to its folder."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - SKIP  # site-packages may hold many times the library's files
        yield from (Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith('.py'))


root = Path(sysconfig.get_path('stdlib'))
files = sorted(modules(root))
if not files:
    raise UserError(f'{root} has no .py files: this Python comes without its source')
held_out = files[::20]

if __name__ == '__main__':
    configure(globals())
    prepare(out_dir or Path(__file__).parent,
            train=corpus_of(lambda: (read(root / file) for file in files if file not in set(held_out))),
            val=corpus_of(lambda: (read(root / file) for file in held_out)),
            tokenizer=tokenizer, shard_size=shard_size, num_proc=num_proc,
            source={'dataset': "Python's standard library", 'version': platform.python_version(),
                    'files': {file: (root / file).stat().st_size for file in files}})
