"""
Sampling speed: tokens per second of generate, GPT-2's sizes with random weights, beside nanoGPT's.

    python tests/bench_generate.py --peer=../nanoGPT

Everything is measured turn by turn in one process, so that a machine that drifts slows all alike; the rates are the
best of the rounds, and include reading the prompt. bfloat16 is what sample.py does where the hardware has it.
"""

import importlib.util
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from configurator import configure
from common.device import autocast, pick_device, pick_dtype, synchronize
from common.generate import cast_linears
from model import GPT, GPTConfig

peer = ''  # a checkout of nanoGPT
n_layer = 12
n_head = 12
n_embd = 768
batch_size = 1
prompts = '8,512'  # tokens in the prompt
max_new_tokens = 64
rounds = 3
device = 'auto'
config = configure(globals())
device = pick_device(device)


def ours(dtype, cuda_graph=False):
    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).to(device).eval()
    cast_linears(dtype, model)

    def write(idx, n):
        with autocast(dtype, device):
            return model.generate(idx, n, temperature=0.8, top_k=200, cuda_graph=cuda_graph)
    return write


def nanogpt():
    spec = importlib.util.spec_from_file_location('nanogpt', Path(peer, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(vocab_size=50304, dropout=0.0, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    model = module.GPT(config).to(device).eval()
    return lambda idx, n: model.generate(idx, n, temperature=0.8, top_k=200)


torch.manual_seed(1337)
ways = {f'ours {dtype}': ours(dtype) for dtype in dict.fromkeys(('float32', pick_dtype('auto', device)))}
if 'cuda' in device:
    ways |= {f'{name}, CUDA graph': ours(name.split()[1], cuda_graph=True) for name in list(ways)}
if peer:
    ways['nanoGPT'] = nanogpt()
print(f'{torch.__version__}, {torch.cuda.get_device_name() if "cuda" in device else "CPU"}, '
      f'{torch.get_num_threads()} threads, batch {batch_size}, {max_new_tokens} new tokens')
for T in map(int, prompts.split(',')):
    idx = torch.randint(50257, (batch_size, T), device=device)
    best = dict.fromkeys(ways, float('inf'))
    for name, write in ways.items():
        write(idx, 2)
    for _ in range(rounds):
        for name, write in ways.items():
            synchronize(device)
            began = time.perf_counter()
            write(idx, max_new_tokens)
            synchronize(device)
            best[name] = min(best[name], time.perf_counter() - began)
    for name, seconds in best.items():
        ratio = f', {best["nanoGPT"] / seconds:.1f} times nanoGPT' if peer and name != 'nanoGPT' else ''
        print(f'  from {T} tokens, {name}: {batch_size * max_new_tokens / seconds:.1f} tokens/s{ratio}', flush=True)
