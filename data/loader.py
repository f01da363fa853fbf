"""
The order in which training reads tokens.

A split is cut into blocks of `block_size` tokens. Each epoch is a permutation of all of them that follows from the
seed and the epoch's number, so the order is the same for any number of processes, costs no memory, and a position
in it is one integer: the blocks drawn so far. A mixture draws each block from one of several datasets, each of
which keeps its own position.
"""
import functools
import math
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data.dataset import Split

AHEAD = 2       # batches prepared while the model is busy with another
ROUNDS = 6      # of the permutation's Feistel network


def hash64(x, key):
    """uint64 array -> uint64 array that looks random: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x + key
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=64)
def round_keys(seed, stream):
    return np.random.SeedSequence([seed % 2**64, stream]).generate_state(ROUNDS, np.uint64)


def permute(index, n, seed, epoch):
    """
    Where a permutation of range(n), one for each (seed, epoch), takes each of index (uint64 array), without ever
    holding the permutation: a Feistel network on pairs (i // b, i % b), which covers a few more numbers than n;
    one that lands beyond n walks on until it doesn't (Black & Rogaway 2002, "Ciphers with arbitrary finite
    domains").
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    high, low = index // b, index % b
    for r, key in enumerate(round_keys(seed, epoch)):
        if r % 2:
            high = (high + hash64(low, key)) % a
        else:
            low = (low + hash64(high, key)) % b
    index = high * b + low
    beyond = index >= n
    if beyond.any():
        index[beyond] = permute(index[beyond], n, seed, epoch)
    return index


def parse_mixture(dataset):
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}; one dataset alone has the weight 1."""
    mixture = {}
    for item in str(dataset).split(','):
        name, colon, weight = item.strip().rpartition(':')
        if not colon and ',' not in str(dataset):
            return {str(dataset): 1.0}
        try:
            weight = float(weight)
        except ValueError:
            weight = 0.0
        if not (name and 0 < weight < math.inf):
            sys.exit(f"dataset '{dataset}': {item.strip()!r} should be a name and a positive weight, as in a:0.7,b:0.3")
        if name in mixture:
            sys.exit(f"dataset '{dataset}': {name} stands there twice")
        mixture[name] = weight
    return {name: weight / sum(mixture.values()) for name, weight in mixture.items()}


class Loader:
    """
    Batches of a split of a dataset, or of a mixture of them ('a:0.7,b:0.3').

    Micro-batch m of the whole job holds the blocks [m * world_size * batch_size, (m + 1) * world_size * batch_size)
    of the order; process `rank` takes the rank-th part of them. Attributes: tokenizer (name), vocab_size, eot.
    """

    def __init__(self, dataset, split, batch_size, block_size, rank=0, world_size=1, seed=1337, shuffle=True,
                 device='cpu'):
        mixture = parse_mixture(dataset)
        self.names, self.weights = list(mixture), list(mixture.values())
        self.splits = [Split(name, split) for name in self.names]
        self.split, self.batch_size, self.block_size = split, batch_size, block_size
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.device = torch.device(device)
        if self.device.type == 'cuda' and self.device.index is None:    # a new thread would take 0 for 'cuda'
            self.device = torch.device('cuda', torch.cuda.current_device())
        for name, s in zip(self.names, self.splits):
            if s.tokenizer != self.splits[0].tokenizer:
                sys.exit(f'{self.names[0]} has the tokenizer {self.splits[0].tokenizer}, {name} has {s.tokenizer}: '
                         f'a mixture needs the same')
            if s.n_tokens <= block_size:
                sys.exit(f'the {split} split of {name} has {s.n_tokens:,} tokens, less than one block of {block_size:,} '
                         f'and the token after it: take a smaller block_size or more text')
        self.tokenizer, self.vocab_size, self.eot = (
            self.splits[0].tokenizer, self.splits[0].vocab_size, self.splits[0].eot)
        self.n_blocks = [(s.n_tokens - 1) // block_size for s in self.splits]
        self.drawn = [0] * len(self.names)      # blocks the whole job was given, by dataset: the position
        self.planned = list(self.drawn)         # the same, with the batches prepared ahead
        self.ahead, self.thread = deque(), ThreadPoolExecutor(1)

    @property
    def parts(self):
        """[(name, weight, Loader)] of the datasets of the mixture, to evaluate each by itself."""
        if len(self.names) == 1:
            return [(self.names[0], 1.0, self)]
        return [(name, weight, Loader(name, self.split, self.batch_size, self.block_size, self.rank, self.world_size,
                                      self.seed, self.shuffle, self.device))
                for name, weight in zip(self.names, self.weights)]

    def next_batch(self):
        """x, y: (B, T) int64 on the device, y one token further than x."""
        while len(self.ahead) <= AHEAD:
            plan = self.plan()
            self.ahead.append((self.thread.submit(self.fetch, plan), list(self.planned)))
        batch, drawn = self.ahead.popleft()
        x, y = batch.result()
        self.drawn = drawn
        return x, y

    def plan(self):
        """The next micro-batch of this process: [(dataset, its rows in the batch, their places in the order)]."""
        B, total = self.batch_size, self.batch_size * self.world_size
        mine = slice(self.rank * B, (self.rank + 1) * B)
        first = np.uint64(sum(self.planned))
        chance = hash64(np.arange(total, dtype=np.uint64) + first, round_keys(self.seed, 0)[0]) / 2.0**64
        choice = np.searchsorted(np.cumsum(self.weights)[:-1], chance, side='right')
        plan = []
        for k in range(len(self.names)):
            places = self.planned[k] + np.cumsum(choice == k) - 1
            rows = np.flatnonzero(choice[mine] == k)
            plan.append((k, rows, places[mine][rows]))
            self.planned[k] += int((choice == k).sum())
        return plan

    def fetch(self, plan):
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        ids = np.empty((self.batch_size, self.block_size + 1), np.int64)
        for k, rows, places in plan:
            ids[rows] = self.blocks(k, places)
        return self.to_device(ids)

    def blocks(self, k, places):
        """(len(places), T + 1) ids: the blocks at these places of the endless order of dataset k."""
        n = self.n_blocks[k]
        epochs, index = places // n, (places % n).astype(np.uint64)
        if self.shuffle:
            for epoch in np.unique(epochs).tolist():
                index[epochs == epoch] = permute(index[epochs == epoch], n, self.seed, epoch)
        return self.splits[k].read(index.astype(np.int64) * self.block_size, self.block_size + 1)

    def to_device(self, ids):
        batch = torch.from_numpy(np.stack((ids[:, :-1], ids[:, 1:])))           # (2, B, T)
        if self.device.type == 'cuda':
            batch = batch.pin_memory()
        x, y = batch.to(self.device, non_blocking=True)
        return x, y

    def eval_batches(self, n_batches):
        """
        The first n_batches * B blocks of the split (all of them if it has fewer) in sequence, the same at every
        call, shared among the processes: every process gets the same number of x, y: (B, T), and the rows that
        it has no block for have y = -1.
        """
        assert len(self.splits) == 1, 'a mixture is evaluated part by part: see parts'
        B, T = self.batch_size, self.block_size
        total = min(n_batches * B, self.n_blocks[0])
        for first in range(self.rank * B, total + self.rank * B, B * self.world_size):
            starts = np.arange(first, max(first, min(first + B, total))) * T
            ids = np.full((B, T + 1), -1, np.int64)
            ids[:len(starts)] = self.splits[0].read(starts, T + 1)
            x, y = self.to_device(ids)
            yield x.clamp(min=0), y

    def stats(self):
        """{name: {'share': of the blocks drawn so far, 'epochs': of this dataset}}"""
        total = max(1, sum(self.drawn))
        return {name: {'share': drawn / total, 'epochs': drawn / n}
                for name, drawn, n in zip(self.names, self.drawn, self.n_blocks)}

    def state_dict(self):
        return {'drawn': dict(zip(self.names, self.drawn))}

    def load_state_dict(self, state):
        self.drawn = [state['drawn'].get(name, 0) for name in self.names]
        self.planned = list(self.drawn)
        self.ahead.clear()
