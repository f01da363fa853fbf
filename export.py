"""
A folder that transformers, and what is built on it, opens: config.json, model.safetensors and the tokenizer; or a page
that writes, in one file for any browser.

Your own checkpoint:        python export.py --out_dir=out --folder=out/gpt
nanoGPT's, build-nanogpt's: python export.py --init_from=../nanoGPT/out/ckpt.pt --folder=gpt
One page, to send around:   python export.py --out_dir=out --html=gpt.html

The other way is --init_from=FOLDER, which train.py, sample.py and hellaswag.py have.
"""

import os

from configurator import UserError, configure, given

from common import convert, page
from common.checkpoint import load_model
from data.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder, a .pt file
folder = ''  # the folder to write
dtype = 'float32'  # of the weights in it; or 'bfloat16', 'float16'
html = ''  # write this page instead: weights, tokenizer and JavaScript in one file
html_dtype = 'int8'  # of the weights in it; or 'float16'
configure(globals())
# -----------------------------------------------------------------------------

if bool(folder) == bool(html):
    raise UserError('give --folder=FOLDER or --html=FILE.html')
if (unused := 'html_dtype' if folder else 'dtype') in given:
    raise UserError(f'{unused} is for --{"html" if folder else "folder"} alone')
if folder:
    convert.check_folder(folder)
elif not os.path.isdir(os.path.dirname(html) or '.'):
    raise UserError(f'html={html} cannot be written: there is no such folder')
model, tokenizer = load_model(init_from, out_dir, 'cpu', given)
size = f'{model.get_num_params() / 1e6:.2f}M parameters'
if folder:
    model.save_pretrained(folder, tokenizer, dtype)
    print(f'{folder}: {size} in {dtype}, tokenizer {tokenizer}')
else:
    n_bytes = page.write(html, model, get_tokenizer(tokenizer), html_dtype)
    print(f'{html}: {size} in {html_dtype}, {n_bytes / 1e6:.1f} MB, tokenizer {tokenizer}')
