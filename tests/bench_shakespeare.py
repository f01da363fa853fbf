"""
Tiny Shakespeare by characters on a CPU: the validation loss and the seconds of nanoGPT's own command, beside ours.

    python tests/bench_shakespeare.py --peer=../nanoGPT --input=input.txt

Each seed runs nanoGPT's command, then config/shakespeare_char.py with the same sizes, then
config/shakespeare_char_fast.py. A run's seconds are those of its whole process. All train on the first 90% of the
file; the losses, in nats a character, are over the same tenth: random crops for nanoGPT, all of it in sequence for ours.
"""

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import configure

peer = ''  # a checkout of nanoGPT; nothing: only ours
input = ''  # Tiny Shakespeare, if it cannot be fetched
seeds = 3
SIZES = ['--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128', '--max_iters=2000',
         '--lr_decay_iters=2000', '--dropout=0.0', '--device=cpu', '--compile=False', '--eval_iters=20']


def timed(command, cwd, pattern):
    """(seconds, the last number in the output that pattern finds)"""
    began = time.perf_counter()
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    found = re.findall(pattern, result.stdout)
    if result.returncode or not found:
        sys.exit(f'{" ".join(map(str, command))} failed:\n{result.stderr}')
    return seconds, float(found[-1])


def nanogpt(seed, folder):
    """nanoGPT's command for a CPU, from its README, in a copy whose seed is another."""
    copy = folder / f'nanogpt-{seed}'
    shutil.copytree(peer, copy, ignore=shutil.ignore_patterns('.git'))
    script = copy / 'train.py'
    script.write_text(script.read_text().replace('manual_seed(1337', f'manual_seed({1337 + seed}'))
    if input:
        shutil.copy(input, copy / 'data' / 'shakespeare_char' / 'input.txt')
    subprocess.run([sys.executable, 'data/shakespeare_char/prepare.py'], cwd=copy, check=True, capture_output=True)
    return timed(['train.py', 'config/train_shakespeare_char.py', '--log_interval=100', *SIZES], copy, r'val loss ([\d.]+)')


def ours(config, seed, folder, *sizes):
    return timed(['train.py', f'config/{config}.py', f'--dataset={folder / "shakespeare"}', f'--seed={1337 + seed}',
                  f'--out_dir={folder / config}-{seed}', '--sample_interval=0', *sizes], ROOT, r'val loss ([\d.]+)')


if __name__ == '__main__':
    configure(globals())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare = ['data/shakespeare_char/prepare.py', f'--out_dir={folder / "shakespeare"}', f'--input={input}']
        subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True, capture_output=True)
        runs = {'nanoGPT': lambda seed: nanogpt(seed, folder)} if peer else {}
        runs['ours, the same sizes'] = lambda seed: ours('shakespeare_char', seed, folder, *SIZES, '--total_batch_size=768')
        runs['ours, fast'] = lambda seed: ours('shakespeare_char_fast', seed, folder, '--device=cpu')
        results = {name: [] for name in runs}
        for seed in range(seeds):
            for name, run in runs.items():
                results[name].append(run(seed))
                print('seed {}: {:22} {:6.1f} s   validation loss {:.4f}'.format(seed, name, *results[name][-1]), flush=True)
        for name, pairs in results.items():
            seconds, losses = zip(*pairs)
            print(f'{name:30} {statistics.median(seconds):6.1f} s   validation loss {statistics.median(losses):.4f}')
