"""Settings, as a user makes them: a small script, run with files and settings on its command line."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = '''
"""A script that trains."""
import json
from math import tau as circle
from configurator import configure

# about nothing

# -----------------------------------------------------------------------------
# input and output
out_dir = 'out'  # where it goes, '#1' say
start = ''  # of it all
# training,
# step by step
batch_size = 5 * 8  # sequences
learning_rate = 6e-4  # the highest
always_save_checkpoint = True
compile = 'auto'  # True, False,
# --- not settings ---
_hidden, LOUD, numbers, nothing = 1, 2, [3], None
config = configure(globals())
# -----------------------------------------------------------------------------
late = 4
assert config == {name: globals()[name] for name in config}
start = start or 'the beginning'  # which --help does not tell
print(json.dumps(config))
'''

DEFAULTS = {'out_dir': 'out', 'start': '', 'batch_size': 40, 'learning_rate': 6e-4,
            'always_save_checkpoint': True, 'compile': 'auto'}


@pytest.fixture
def run(tmp_path):
    """run(*arguments, **files) runs SCRIPT in a folder that holds FILE.py for each of files."""
    def run(*arguments, **files):
        for name, text in {'script': SCRIPT, **files}.items():
            (tmp_path / f'{name}.py').write_text(text)
        return subprocess.run([sys.executable, 'script.py', *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '80'})
    return run


def changed(done):
    """What differs from the defaults in a run that went well."""
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config.keys() == DEFAULTS.keys()
    return {k: v for k, v in config.items() if (v, type(v)) != (DEFAULTS[k], type(DEFAULTS[k]))}


def complaint(done):
    """The one line of a run that found something wrong."""
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.count('\n') == 1, done.stderr
    return done.stderr.strip()


def test_settings_are_the_plain_lowercase_globals(run):
    assert changed(run()) == {}


@pytest.mark.parametrize('argument, value', [
    ('--batch_size=12', 12), ('--learning_rate=1e-3', 1e-3), ('--learning_rate=1', 1.0),
    ('--out_dir=123', '123'), ('--start=hello world', 'hello world'), ('--start=--a=b', '--a=b'), ('--out_dir=', ''),
    ('--always_save_checkpoint=False', False), ('--always_save_checkpoint=false', False),
    ('--always_save_checkpoint=0', False), ('--compile', True), ('--compile=False', False), ('--compile=max', 'max')])
def test_a_value_takes_its_settings_type(run, argument, value):
    key = argument[2:].partition('=')[0]
    config = changed(run(argument))
    assert config == {key: value} and type(config[key]) is type(value)


@pytest.mark.parametrize('argument', ['--always_save_checkpoint', '--always_save_checkpoint=True',
                                      '--always_save_checkpoint=true', '--always_save_checkpoint=1'])
def test_ways_to_say_true(run, argument):
    assert changed(run('--always_save_checkpoint=False', argument)) == {}


def test_the_last_wins(run):
    files = {'small': 'batch_size = 2\nlearning_rate = 1\n', 'large': 'batch_size = 200\n'}
    assert changed(run('small.py', 'large.py', **files)) == {'batch_size': 200, 'learning_rate': 1.0}
    assert changed(run('large.py', 'small.py', '--batch_size=3', **files)) == {'batch_size': 3, 'learning_rate': 1.0}
    config = changed(run('--batch_size=3', 'small.py', **files))
    assert config == {'batch_size': 2, 'learning_rate': 1.0} and type(config['learning_rate']) is float


def test_a_file_is_python_and_sees_the_settings_so_far(run):
    file = '''
import time
from math import pi

def double(x):
    y = 2 * x
    return y

_half = 0.5
THIRD = 1 / 3
for i in range(3):
    learning_rate = learning_rate * _half
if batch_size > 5:
    batch_size = double(batch_size)
compile = False
out_dir: str = 'out-' + str(time.time())
'''
    config = changed(run('--batch_size=6', 'file.py', file=file))
    assert config.pop('out_dir').startswith('out-1')
    assert config == {'batch_size': 12, 'learning_rate': 6e-4 / 8, 'compile': False}


@pytest.mark.parametrize('argument, words', [
    ('--batchsize=3', 'unknown setting batchsize; did you mean batch_size?'),
    ('--zzz=3', 'unknown setting zzz; --help'),
    ('--late=3', 'unknown setting late'),
    ('--_hidden=3', 'unknown setting _hidden'),
    ('--LOUD=3', 'unknown setting LOUD'),
    ('--circle=3', 'unknown setting circle'),
    ('--batch_size=1e3', 'batch_size takes an int'),
    ('--batch_size=2.0', 'batch_size takes an int'),
    ('--batch_size=True', 'batch_size takes an int'),
    ('--batch_size', '--batch_size: batch_size takes an int (its default is 40): --batch_size=40'),
    ('--learning_rate=fast', 'learning_rate takes a float'),
    ('--learning_rate', 'learning_rate takes a float'),
    ('--always_save_checkpoint=yes', 'always_save_checkpoint takes True or False'),
    ('--out_dir', 'out_dir takes a string'),
    ('config/gone.py', 'config/gone.py: no such file'),
    ('gpt2', 'gpt2: expected a settings file (FILE.py) or --key=value'),
    ('-batch_size=3', '-batch_size=3: expected a settings file')])
def test_a_wrong_argument_is_one_line(run, argument, words):
    line = complaint(run(argument))
    assert line.startswith(argument) and words in line


@pytest.mark.parametrize('text, words', [
    ('\nbatchsize = 3\n', 'file.py:2: unknown setting batchsize; did you mean batch_size?'),
    ('\n\nbatch_size = 3.0\n', 'file.py:3: batch_size takes an int (its default is 40)'),
    ('batch_size = True\n', 'file.py:1: batch_size takes an int'),
    ('always_save_checkpoint = 1\n', 'file.py:1: always_save_checkpoint takes True or False'),
    ('learning_rate = "1e-3"\n', 'file.py:1: learning_rate takes a float'),
    ('out_dir = None\n', 'file.py:1: out_dir takes a string'),
    ('start = "a"\nbatch_size = = 3\n', 'file.py:2: SyntaxError: invalid syntax'),
    ('start = "a"\n\nbatch_size = bach_size\n', "file.py:3: NameError: name 'bach_size' is not defined"),
    ('def f():\n    return 1 / 0\nbatch_size = f()\n', 'file.py:2: ZeroDivisionError'),
    ('import nowhere_to_be_found\n', 'file.py:1: ModuleNotFoundError'),
    ('raise ValueError("two\\nlines")\n', 'file.py:1: ValueError: two lines')])
def test_what_is_wrong_in_a_file_is_one_line_that_names_it(run, text, words):
    line = complaint(run('file.py', file=text))
    assert line.startswith(words)
    assert line.count('file.py') == 1


@pytest.mark.parametrize('argument, words', [
    ('--batch_size=-1', 'batch_size=-1 must be at least 1 and at most 2147483647'),
    ('--batch_size=1000000000000', 'batch_size=1000000000000 must be at least 1'),
    ('--learning_rate=nan', 'learning_rate=nan must be at least 0 and finite'),
    ('--learning_rate=inf', 'learning_rate=inf must be at least 0 and finite')])
def test_a_value_outside_its_range_is_one_line(run, argument, words):
    done = run(argument)
    assert done.returncode == 1 and done.stderr.startswith(words) and done.stderr.count('\n') == 1


@pytest.mark.parametrize('text, words', [
    ('if True:\n    batchsize = 3\n', 'file.py:2: unknown setting batchsize; did you mean batch_size?'),
    ('BATCH_SIZE = 3\n', 'file.py:1: unknown setting BATCH_SIZE; did you mean batch_size?')])
def test_a_name_that_would_be_ignored_is_refused(run, text, words):
    assert complaint(run('file.py', file=text)).startswith(words)


def test_a_home_folder_is_expanded(run):
    assert changed(run('--out_dir=~/x')) == {'out_dir': os.path.expanduser('~/x')}


def test_help(run):
    done = run('--batch_size=nonsense', '--help')
    assert done.returncode == 0 and done.stderr == ''
    assert done.stdout == '''A script that trains.

usage: python script.py [FILE.py ...] [--setting=value ...]

input and output
  --out_dir='out'                where it goes, '#1' say
  --start=''                     of it all

training,
step by step
  --batch_size=40                sequences
  --learning_rate=0.0006         the highest
  --always_save_checkpoint=True
  --compile='auto'               True, False,
'''
    assert run('-h').stdout == done.stdout


def commands():
    """Every script that has settings, below the root and in data/."""
    paths = sorted([*ROOT.glob('*.py'), *ROOT.glob('data/*/*.py')])
    return [path for path in paths if re.search(r'^ *(config = )?configure\(globals\(\)', path.read_text(), re.M)
            and path.name != 'configurator.py']


def test_without_its_packages_a_command_is_one_line():
    """As in a new terminal, where the virtual environment is not active."""
    for path in commands():
        done = subprocess.run([sys.executable, '-S', str(path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == '', path
        assert re.search('is not installed in this Python.*pip install -r requirements.txt', done.stderr), path
        assert done.stderr.count('\n') == 1, done.stderr


def test_commands_import_the_configurator_first():
    """From there on Ctrl-C, while PyTorch is imported too, is one line."""
    assert len(commands()) > 12
    for path in commands():
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                 for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert next(name for name in names if name.split('.')[0] not in sys.stdlib_module_names) == 'configurator', path
