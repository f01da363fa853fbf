"""
The order in which training reads tokens.

A split is cut into blocks of `block_size` tokens. An epoch is a permutation of them all that follows from the seed
and the epoch's number: the same for any number of processes, computed where it is needed, held nowhere. A position
in that endless order is one integer, the blocks drawn so far. A mixture draws each block from one of several
datasets, and each of them keeps its own position.

    loader = Loader('fineweb_edu_10B:0.7,code:0.3', 'train', batch_size=16, block_size=1024)
    x, y = loader.next_batch()
"""
import functools
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.dataset import Split
from data.errors import UserError

AHEAD = 4       # batches made at once while the model is busy with the last ones
ROUNDS = 6      # of the permutation's Feistel network; with 4, not every order of three blocks is as likely


class Loader:
    """
    Batches of a split of a dataset, or of a mixture ('a:0.7,b:0.3').

    Micro-batch m of the whole job holds the blocks [m * W * B, (m + 1) * W * B) of the order, for W = world_size
    and B = batch_size, and process `rank` takes the rank-th B of them: the job reads the same blocks whatever its
    number of processes. Attributes: tokenizer (its name), vocab_size, eot. A dataset that is missing, damaged or
    too small, or a mixture that makes no sense, ends the program with one line that says so.
    """

    def __init__(self, dataset, split, batch_size, block_size, rank=0, world_size=1, seed=1337, shuffle=True,
                 device='cpu'):
        self.arguments = split, batch_size, block_size, rank, world_size, seed, shuffle, device
        mixture = parse_mixture(dataset)
        self.splits = [Split(name, split) for name in mixture]
        self.names, self.weights = short_names(dataset, list(mixture), self.splits), list(mixture.values())
        self.tokenizer, self.vocab_size, self.eot = (
            self.splits[0].tokenizer, self.splits[0].vocab_size, self.splits[0].eot)
        for data in self.splits:
            if data.tokenizer != self.tokenizer:
                raise UserError(f'{self.splits[0].folder} has the tokenizer {self.tokenizer} and {data.folder} has '
                                f'{data.tokenizer}: a mixture needs one tokenizer')
            if data.n_tokens <= block_size:
                raise UserError(f'the {split} split of {data.folder} has {data.n_tokens:,} tokens, too few for one block '
                                f'of block_size={block_size} and the token that follows it')
        self.batch_size, self.block_size, self.rank, self.world_size = batch_size, block_size, rank, world_size
        self.seed, self.shuffle, self.device = seed, shuffle, torch.device(device)
        if self.device.type == 'cuda' and self.device.index is None:    # in a new thread, cuda means cuda:0
            self.device = torch.device('cuda', torch.cuda.current_device())
        self.n_blocks = [(data.n_tokens - 1) // block_size for data in self.splits]
        self.drawn = [0] * len(mixture)     # blocks of each dataset that the whole job was given: the position
        self.ready, self.coming, self.thread = deque(), None, ThreadPoolExecutor(1)

    @functools.cached_property
    def parts(self):
        """[(name, weight, Loader)]: the datasets of the mixture one by one, to evaluate them."""
        if len(self.names) == 1:
            return [(self.names[0], 1.0, self)]
        return [(name, weight, Loader(str(data.folder), *self.arguments))
                for name, weight, data in zip(self.names, self.weights, self.splits)]

    def next_batch(self):
        """x, y: (B, T) int64 on the device; y is what follows each token of x."""
        if not self.ready:
            self.coming = self.coming or self.thread.submit(self.fetch, self.drawn)
            self.ready.extend(self.coming.result())
            self.coming = self.thread.submit(self.fetch, self.ready[-1][2])
        x, y, self.drawn = self.ready.popleft()
        return x, y

    def fetch(self, drawn):
        """The AHEAD batches that follow this position: [(x, y, the position behind them)]."""
        W, B, T = self.world_size, self.batch_size, self.block_size
        choice = self.choose(sum(drawn), AHEAD * W * B)
        mine = choice.reshape(AHEAD, W, B)[:, self.rank]        # (AHEAD, B): the dataset of each of our blocks
        ids = np.empty((AHEAD, B, T + 1), np.result_type(*(data.dtype for data in self.splits)))
        after = np.empty((AHEAD, len(drawn)), np.int64)
        for k in range(len(drawn)):
            count = drawn[k] + np.cumsum(choice == k)
            places = count.reshape(AHEAD, W, B)[:, self.rank] - 1
            ids[mine == k] = self.blocks(k, places[mine == k])
            after[:, k] = count[W * B - 1::W * B]
        return [(*self.to_device(ids[m]), after[m].tolist()) for m in range(AHEAD)]

    def choose(self, first, count):
        """(count,) int64: the dataset that each of these blocks of the whole order comes from."""
        if len(self.weights) == 1:
            return np.zeros(count, np.int64)
        number = np.arange(first, first + count, dtype=np.uint64)
        chance = hash64(number, stream_keys(self.seed, 'mixture')[0]) / 2**64       # in [0, 1)
        return np.searchsorted(np.cumsum(self.weights)[:-1], chance, side='right')

    def block_numbers(self, k, places):
        """(n,) int64: the blocks of dataset k, numbered as they stand in it, at these places of its endless order."""
        epochs, blocks = np.divmod(places, self.n_blocks[k])
        if self.shuffle:
            for epoch in set(epochs.tolist()):
                now = epochs == epoch
                blocks[now] = permute(blocks[now], self.n_blocks[k], stream_keys(self.seed, epoch))
        return blocks

    def blocks(self, k, places):
        """(n, T + 1) ids: the blocks of dataset k at these places of its endless order."""
        return self.splits[k].read(self.block_numbers(k, places) * self.block_size, self.block_size + 1)

    def to_device(self, ids):
        """(n, T + 1) ids -> x, y: (B, T) int64 on the device; rows from n on are there to be ignored (y = -1)."""
        batch = np.empty((2, self.batch_size, self.block_size), np.int64)
        batch[0, :len(ids)], batch[1, :len(ids)] = ids[:, :-1], ids[:, 1:]
        batch[0, len(ids):], batch[1, len(ids):] = 0, -1
        batch = torch.from_numpy(batch)
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)      # this thread's; pinning makes a context on it
            x, y = batch.pin_memory().to(self.device, non_blocking=True)
        else:
            x, y = batch.to(self.device)
        return x, y

    def eval_batches(self, n_blocks):
        """
        The first n_blocks blocks of the split (fewer if it has fewer) in sequence, the same ones at each
        call, shared among the processes. Every process gets the same number of x, y: (B, T), since all must take
        part in each forward pass; a row that no block is left for has y = -1. A mixture goes by its `parts`.
        """
        assert len(self.splits) == 1, 'evaluate the parts of a mixture'
        B, T = self.batch_size, self.block_size
        total = min(n_blocks, self.n_blocks[0])
        for first in range(0, total, B * self.world_size):
            mine = np.arange(first + self.rank * B, first + (self.rank + 1) * B)
            yield self.to_device(self.splits[0].read(mine[mine < total] * T, T + 1))

    def stats(self):
        """{name: {'share': of all blocks drawn so far, 'epochs': of this dataset}}"""
        return {name: {'share': drawn / max(1, sum(self.drawn)), 'epochs': drawn / n}
                for name, drawn, n in zip(self.names, self.drawn, self.n_blocks)}

    def state_dict(self):
        """The position, in plain integers; batches made ahead don't count."""
        order = {'seed': self.seed, 'shuffle': self.shuffle, 'block_size': self.block_size}
        return {name: {'drawn': drawn, 'n_blocks': n, **order}
                for name, drawn, n in zip(self.names, self.drawn, self.n_blocks)}

    def load_state_dict(self, state):
        """Goes on at that position. A dataset with another order now, or new in the mixture, begins anew."""
        self.ready, self.coming, self.drawn = deque(), None, [0] * len(self.names)
        for k, (name, now) in enumerate(self.state_dict().items()):
            then = state.get(name, {})
            if {**then, 'drawn': 0} == now:
                self.drawn[k] = then['drawn']
            elif self.rank == 0:
                changed = ', '.join(f'{key} was {then[key]}, is {now[key]}' for key in then
                                    if key != 'drawn' and then[key] != now[key])
                print(f'{name} is read in another order from here on, from its beginning: {changed}' if then else
                      f'{name} is new in this run, and read from its beginning')


def parse_mixture(dataset):
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}, with weights that sum to 1; 'a' -> {'a': 1}."""
    mixture = {}
    for item in dataset.split(','):
        name, _, weight = item.strip().rpartition(':')
        try:
            weight = float(weight)
        except ValueError:
            if ',' not in dataset:
                return {dataset: 1.0}           # a folder, whatever its name
            weight = 0.0
        if not name or not 0 < weight < math.inf:
            raise UserError(f"dataset={dataset}: '{item.strip()}' should be a dataset and a positive weight, "
                            'as in a:0.7,b:0.3')
        if name in mixture:
            raise UserError(f'dataset={dataset}: {name} is there twice')
        mixture[name] = weight
    return {name: weight / sum(mixture.values()) for name, weight in mixture.items()}


def short_names(dataset, names, splits):
    """The folders' names, which outlive a move to another place; what the user wrote if two are the same."""
    if len({data.folder.resolve() for data in splits}) < len(splits):
        raise UserError(f'dataset={dataset}: two of these are the same folder')
    short = [os.path.basename(os.path.abspath(data.folder)) for data in splits]
    return short if len(set(short)) == len(short) else names


def permute(index, n, keys):
    """
    Where the permutation of range(n) that belongs to `keys` takes each of `index` (int64), without holding it.

    A Feistel network on the pairs (i // b, i % b), a few more than n; what lands on n or beyond walks on until it
    doesn't (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    high, low = np.divmod(index.astype(np.uint64), np.uint64(b))
    for r, key in enumerate(keys):
        if r % 2:
            high = (high + hash64(low, key)) % np.uint64(a)
        else:
            low = (low + hash64(high, key)) % np.uint64(b)
    out = (high * np.uint64(b) + low).astype(np.int64)
    beyond = out >= n
    if beyond.any():
        out[beyond] = permute(out[beyond], n, keys)
    return out


def hash64(x, key):
    """uint64 -> uint64 that look random: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(64)
def stream_keys(seed, stream):
    """ROUNDS random uint64 for an epoch, or for 'mixture'."""
    stream = [0] if stream == 'mixture' else [1, stream]
    return np.random.SeedSequence([seed % 2**64, *stream]).generate_state(ROUNDS, np.uint64)
