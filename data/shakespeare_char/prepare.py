"""
Tiny Shakespeare, 1.1 MB, a byte a token: in this text, that is a character a token.

    python data/shakespeare_char/prepare.py

It is data/shakespeare/prepare.py with another tokenizer and folder.
"""
import runpy
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
sys.argv[1:1] = ['--tokenizer=bytes', f'--out_dir={folder}']  # before the user's own, which win
runpy.run_path(str(folder.parent / 'shakespeare' / 'prepare.py'), run_name='__main__')
