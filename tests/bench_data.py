"""
Data: how fast batches come.

    python tests/bench_data.py --peer=../build-nanogpt
    python tests/bench_data.py --peer=../nanoGPT

Ours and the peer's run in turns, in one process, on the same random tokens from the page cache; the rates are
medians. Ours draw shuffled blocks and check every id; build-nanogpt slices shards in sequence, and nanoGPT draws
random crops.
"""
import ast
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import configure
from data.loader import Loader

peer = ''  # a checkout of build-nanogpt or nanoGPT
tokens = 100_000_000  # in the dataset
batch_size = 16
block_size = 1024
seconds = 1.0  # of each in turn
rounds = 5


def bench_loader():
    print(f'loading {batch_size} x {block_size} tokens at a time, M tokens/s')
    with tempfile.TemporaryDirectory() as folder:
        folders = {n_shards: write_shards(Path(folder, str(n_shards)), n_shards) for n_shards in (1, 1000)}
        loaders = {('ours', f'{n_shards:,} shards'): Loader(str(path), 'train', batch_size, block_size).next_batch
                   for n_shards, path in folders.items()}
        if peer:
            loaders |= peer_loaders(Path(peer), folders)
        report(in_turns({name: lambda load=load: batches_per_second(load) * batch_size * block_size / 1e6
                         for name, load in loaders.items()}))


def write_shards(folder, n_shards):
    """Random tokens as shards that build-nanogpt and we read, and in one file as nanoGPT has it."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(50257, size=tokens, dtype=np.uint16)
    for i, shard in enumerate(np.array_split(ids, n_shards)):
        np.save(folder / f'edufineweb_train_{i:06d}.npy', shard)
    ids.tofile(folder / 'train.bin')
    return folder


def peer_loaders(checkout, folders):
    """{(who, what): a function that loads a batch}: the peer's own code, without the training around it."""
    settings = dict(batch_size=batch_size, block_size=block_size, device='cpu', device_type='cpu',
                    master_process=False, data_dir=folders[1])
    if (checkout / 'train.py').exists():
        names = definitions(checkout / 'train.py', settings)
        return {(checkout.name, '1 shards'): lambda: names['get_batch']('train')}
    loaders = {}
    for n_shards, folder in folders.items():
        os.chdir(folder)
        Path('edu_fineweb10B').symlink_to(folder)       # where this loader looks for its shards
        (folder / 'train.bin').unlink()
        names = definitions(checkout / 'train_gpt2.py', settings)
        loader = names['DataLoaderLite'](batch_size, block_size, 0, 1, 'train')
        loader.shards = [folder / shard for shard in loader.shards]
        loaders[checkout.name, f'{n_shards:,} shards'] = loader.next_batch
    return loaders


def definitions(file, settings):
    """The classes and functions of a script that is not run, with these settings for its globals."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    names = {'np': np, 'os': os, 'torch': torch, 'nn': torch.nn, 'dataclass': dataclass} | settings
    exec(compile(tree, str(file), 'exec'), names)
    return names


def batches_per_second(next_batch):
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        next_batch()
        count += 1
    return count / (time.perf_counter() - began)


def in_turns(ways):
    """{name: median over the rounds} of the rate that each function returns, the first round not counted."""
    results = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            results[name].append(way())
    return {name: statistics.median(values[1:]) for name, values in results.items()}


def report(rates):
    """A line for each, with the ratio where ours and a peer did the same."""
    for (who, what), rate in rates.items():
        ratio = '' if who == 'ours' else f'   ratio {rates["ours", what] / rate:.2f}'
        print(f'  {who:15s} {what:15s} {rate:8.1f}{ratio}')


if __name__ == '__main__':
    configure(globals())
    bench_loader()
