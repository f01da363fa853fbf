"""
A folder that transformers, and what is built on it, opens: config.json, model.safetensors and the tokenizer; or a page
that writes, in one file for any browser.

Your own checkpoint:        python export.py --out_dir=out --folder=out/gpt
nanoGPT's, build-nanogpt's: python export.py --init_from=../nanoGPT/out/ckpt.pt --folder=gpt
One page, to send around:   python export.py --out_dir=out --html=gpt.html

The other way is --init_from=FOLDER, which train.py, sample.py and hellaswag.py have.
"""

import os

from common import page
from common.checkpoint import load_model
from configurator import UserError, configure
from data.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder, a .pt file
folder = ''  # what to write
html = ''  # write this page instead: weights, tokenizer and JavaScript in one file
html_dtype = 'int8'  # of its weights, or 'float16'
config = configure(globals())
# -----------------------------------------------------------------------------

if bool(folder) == bool(html):
    raise UserError('either --folder=FOLDER or --html=FILE.html says where to write')
if os.path.exists(os.path.join(folder, 'config.json')):
    raise UserError(f'{folder} holds a model already: give another folder')
model, tokenizer = load_model(init_from, out_dir, device='cpu')
try:
    if html:
        size = page.write(html, model, get_tokenizer(tokenizer), html_dtype)
    else:
        model.save_pretrained(folder, tokenizer)
except OSError as error:
    raise UserError(f'{folder} cannot be written: {error}')
print(f'{folder or f"{html} ({size / 1e6:.1f} MB)"}: {model.get_num_params() / 1e6:.2f}M parameters, tokenizer {tokenizer}')
