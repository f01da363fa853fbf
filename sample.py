"""
Text from a trained GPT.

From your own checkpoint:   python sample.py --out_dir=out
From GPT-2's weights:       python sample.py --init_from=gpt2-xl --start='What is the answer to life?'
From a file's text:         python sample.py --start=FILE:prompt.txt
"""

import sys

import torch

from checkpoint import load_model
from configurator import configure
from data.tokenizer import get_tokenizer
from device import autocast, pick_device, pick_dtype

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
start = ''  # the text to continue, or FILE:prompt.txt; nothing: a new document
num_samples = 5  # drawn together, as one batch
max_new_tokens = 500  # in each sample
temperature = 0.8  # 1.0 as the model learned it, less is more careful, 0 takes the likeliest token
top_k = 200  # only the so many likeliest tokens; 0 is off
top_p = 1.0  # only the likeliest tokens that together reach this probability; 1.0 is off
seed = 1337
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32
config = configure(globals())
# -----------------------------------------------------------------------------

if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
    sys.exit('temperature and top_k must be at least 0, and top_p above 0 and at most 1')
if num_samples < 1 or max_new_tokens < 1:
    sys.exit('num_samples and max_new_tokens must be at least 1')
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'cannot read the prompt {start[5:]}: {error}')

device = pick_device(device)
dtype = pick_dtype(dtype, device)
torch.manual_seed(seed)
model, tokenizer_name = load_model(init_from, out_dir, device)
tokenizer = get_tokenizer(tokenizer_name)

prompt = tokenizer.encode(start).tolist() or [tokenizer.eot]
idx = torch.tensor([prompt], device=device).repeat(num_samples, 1)  # (num_samples, T)
with autocast(dtype, device):
    rows = model.generate(idx, max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p)
for row in rows.tolist():
    print(tokenizer.decode(row[0 if start else 1:]))
    print('---------------')
