"""
How often compare.py claims a difference between a configuration and itself: real runs, which differ by their seed.

    python data/stdlib/prepare.py
    python tests/bench_compare.py

At most 5% of comparisons should. Trains tiny GPTs in this process, and draws the pairs of each comparison from them: different
seeds, since the same would give the same run. Below comparisons * 2 * seeds runs, comparisons share some.
"""
import contextlib
import io
import json
import runpy
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compare import LOOKS, interval
from configurator import configure

comparisons = 10_000
runs = 1000  # to draw from
dataset = 'stdlib'
max_iters = 20  # of 256 tokens
seeds = 5  # pairs at most

SIZES = ['--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=32', '--batch_size=8', '--total_batch_size=256',
         '--learning_rate=1e-2', '--min_lr=1e-3', '--warmup_iters=2', '--eval_interval=1000', '--eval_iters=8',
         '--hellaswag_interval=0', '--sample_interval=0', '--curves=False', '--always_save_checkpoint=False',
         '--log_interval=1000', '--device=cpu', '--dtype=float32', '--compile=False']


def loss(seed, folder):
    """The validation loss of train.py with this seed, run in this process."""
    sys.argv = ['train.py', *SIZES, f'--dataset={dataset}', f'--max_iters={max_iters}', f'--seed={seed}',
                f'--out_dir={folder}/{seed}']
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    log = [json.loads(line) for line in Path(folder, str(seed), 'log.jsonl').read_text().splitlines()]
    return log[-1]['val_loss']


if __name__ == '__main__':
    configure(globals())
    with tempfile.TemporaryDirectory() as folder:
        losses = []
        for seed in range(runs):
            losses.append(loss(seed, folder))
            print(f'run {seed}: {losses[-1]:.4f}', flush=True)
    claims, rng = {look: 0 for look in LOOKS if look <= seeds}, np.random.default_rng(0)
    for _ in range(comparisons):
        a, b = rng.choice(losses, (2, seeds), replace=False)
        for look in claims:
            mean, half = interval(b[:look] - a[:look])
            if abs(mean) > half:
                claims[look] += 1
                break
    total = sum(claims.values())
    print(f'{total} false claims in {comparisons:,} comparisons ({total / comparisons:.1%}) of {max(claims)} pairs at most, from '
          f'{runs} runs of standard deviation {np.std(losses):.4f}; by look: {claims}')
