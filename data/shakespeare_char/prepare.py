"""
Tiny Shakespeare, 1.1 MB, a byte a token: in this text, that is a character a token.

    python data/shakespeare_char/prepare.py

The first nine tenths are for training, as in nanoGPT.
"""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from configurator import configure
from data.download import TINY_SHAKESPEARE, download, read_text
from data.prepare import corpus_of, prepare

input = ''  # a copy of the text, instead of the download
tokenizer = 'bytes'  # or 'gpt2'
out_dir = ''  # the dataset's folder; empty: the one of this script
configure(globals())

text = read_text(input or download(*TINY_SHAKESPEARE, Path(__file__).with_name('input.txt')))
cut = int(len(text) * 0.9)
prepare(out_dir or Path(__file__).parent, train=corpus_of([text[:cut]]), val=corpus_of([text[cut:]]),
        tokenizer=tokenizer, num_proc=1,
        source={'dataset': 'Tiny Shakespeare', 'sha256': hashlib.sha256(text.encode()).hexdigest()})
