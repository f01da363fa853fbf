"""
A folder that transformers, and what is built on it, opens: config.json, model.safetensors and the tokenizer.

Your own checkpoint:        python export.py --out_dir=out --folder=out/gpt
nanoGPT's, build-nanogpt's: python export.py --init_from=../nanoGPT/out/ckpt.pt --folder=gpt

The other way is --init_from=FOLDER, which train.py, sample.py and hellaswag.py have.
"""

from common import convert
from common.checkpoint import load_model
from configurator import UserError, configure

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder, a .pt file
folder = ''  # the folder to write
dtype = 'float32'  # of the weights in it; or 'bfloat16', 'float16'
config = configure(globals())
# -----------------------------------------------------------------------------

if not folder:
    raise UserError('--folder=FOLDER says where to write')
convert.check_folder(folder)
model, tokenizer = load_model(init_from, out_dir, device='cpu')
model.save_pretrained(folder, tokenizer, dtype)
print(f'{folder}: {model.get_num_params() / 1e6:.2f}M parameters in {dtype}, tokenizer {tokenizer}')
