"""
A folder that transformers, and what is built on it, opens: config.json, model.safetensors and the tokenizer.

Your own checkpoint:        python export.py --out_dir=out --folder=out/gpt
nanoGPT's, build-nanogpt's: python export.py --init_from=../nanoGPT/out/ckpt.pt --folder=gpt

The other way is --init_from=FOLDER, which train.py, sample.py and hellaswag.py have.
"""

import os

from common.checkpoint import load_model
from configurator import UserError, configure

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder, a .pt file
folder = ''  # what to write
config = configure(globals())
# -----------------------------------------------------------------------------

if not folder:
    raise UserError('--folder=FOLDER says where to write')
if os.path.exists(os.path.join(folder, 'config.json')):
    raise UserError(f'{folder} holds a model already: give another folder')
model, tokenizer = load_model(init_from, out_dir, device='cpu')
try:
    model.save_pretrained(folder, tokenizer)
except OSError as error:
    raise UserError(f'{folder} cannot be written: {error}')
print(f'{folder}: {model.get_num_params() / 1e6:.2f}M parameters, tokenizer {tokenizer}')
