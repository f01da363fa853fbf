"""
HellaSwag's speed: seconds an item, beside build-nanogpt's way (one item of four rows a forward pass, float32), for
a GPT-2 124M with the same random weights, turn by turn, so that a machine that drifts slows all alike.

    python tests/bench_hellaswag.py --data=../shared/data/hellaswag_val_1000.jsonl --peer=../build-nanogpt
"""

import contextlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import hellaswag
from configurator import configure
from data.tokenizer import get_tokenizer
from common.device import pick_device, synchronize
from model import GPT, GPTConfig

peer = ''  # a checkout of build-nanogpt
data = ''  # a file of items; nothing: the validation set
items = 40  # as many, taken evenly from the file, since its first thousand are shorter than the rest
batch_tokens = 0  # as in hellaswag.py
rounds = 3  # of each in turn; the medians are printed
device = 'auto'
configure(globals())
device = pick_device(device)

everything = hellaswag.load_items(data)
chosen = [everything[i * len(everything) // items] for i in range(items)]
model = GPT(GPTConfig()).to(device).eval()
tokenizer = get_tokenizer('gpt2')


def ours(dtype):
    synchronize(device)
    start = time.perf_counter()
    rows = hellaswag.prepare(chosen, tokenizer, model.config.block_size)
    result = hellaswag.evaluate(model, rows, device, dtype, batch_tokens)
    seconds = time.perf_counter() - start
    return seconds / items, round(result['acc_norm'] * items)


def theirs(folder):
    """The peer's own evaluate() on our weights and items, from its first item on."""
    spec = importlib.util.spec_from_file_location('peer_hellaswag', Path(peer, 'hellaswag.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    start = []

    def examples(split):
        start.append(time.perf_counter())
        yield from chosen

    module.iterate_examples = examples
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.evaluate(folder, device)
    seconds = time.perf_counter() - start[0]
    last = [line for line in printed.getvalue().splitlines() if 'acc_norm' in line][-1]  # '40 acc_norm: 9/40=0.2250'
    return seconds / items, int(last.split()[2].split('/')[0])


with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    ways = {'ours, float32': lambda: ours('float32'), 'ours, bfloat16': lambda: ours('bfloat16')}
    if peer:
        ways = {'build-nanogpt, float32': lambda: theirs(folder), **ways}
    measured = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            measured[name].append(way())

seconds = {name: statistics.median(s for s, _ in runs) for name, runs in measured.items()}
slowest = next(iter(seconds.values()))
print(f'{items} items on {device}, {torch.get_num_threads()} threads')
for name, s in seconds.items():
    print(f'{name:24} {s:.4f} s an item, {slowest / s:5.2f} x, all 10,042 in {10042 * s / 60:.1f} min, '
          f'{measured[name][0][1]} right by acc_norm')
