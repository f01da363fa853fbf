"""
The order in which training reads tokens.

A split is cut into blocks of `block_size` tokens. An epoch is a permutation of all blocks that follows from the seed
and the epoch's number: the same for any number of processes, computed where it is needed, stored nowhere. A position
in this endless order is one integer, the number of blocks drawn so far. From the second epoch on, the blocks start at
another offset, so that each epoch cuts the same text elsewhere. A mixture draws each block from one of several
datasets; each keeps its own order and position.

    loader = Loader('fineweb_edu_10B:0.7,code:0.3', 'train', batch_size=16, block_size=1024)
    x, y = loader.next_batch()
"""
import functools
import math
import os
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.dataset import Split
from data.errors import UserError, some
from data.tokenizer import tokenizer_name

AHEAD = 4       # batches prepared at once while the model is busy with the previous ones
ROUNDS = 6      # of the permutation's Feistel network
SMALL = 50      # datasets with fewer blocks are permuted by sorting: a small network doesn't reach every order


class Loader:
    """
    Batches of a split of a dataset, or of a mixture ('a:0.7,b:0.3').

    Micro-batch m of all processes together is blocks [m * W * B, (m + 1) * W * B) of the order, for W = world_size
    and B = batch_size, and process `rank` takes the rank-th B of them: a run reads the same blocks whatever its
    number of processes. Rank 0 checks all shards, the others check a shard when they first read it.

    move_blocks: from the second epoch on, start the blocks at another offset (only with shuffle, and not those of
    conversations, which are packed to block_size)

    Attributes: tokenizer (for get_tokenizer), vocab_size, eot; names and weights, of the datasets. Raises UserError if
    a dataset is missing, damaged or too small, or if the mixture is invalid.
    """

    def __init__(self, dataset, split, batch_size, block_size, rank=0, world_size=1, seed=1337, shuffle=True,
                 device='cpu', move_blocks=True):
        mixture = parse_mixture(dataset)
        self.splits = [Split(name, split, check=rank == 0) for name in mixture]
        self.names, self.weights = short_names(dataset, list(mixture), self.splits), list(mixture.values())
        first = self.splits[0]
        self.tokenizer, self.vocab_size, self.eot = first.tokenizer, first.vocab_size, first.eot
        for data in self.splits:
            names = [tokenizer_name(split.tokenizer) for split in (first, data)]
            if names[0] != names[1]:
                raise UserError(f'{first.folder} has the tokenizer {names[0]} and {data.folder} has {names[1]}: '
                                'a mixture needs one tokenizer')
            if data.block_size not in (0, block_size):
                raise UserError(f'{data.folder} is packed for block_size={data.block_size}, not {block_size}: '
                                'train with that, or prepare it with another --block_size')
            if data.n_tokens <= block_size - (data.block_size > 0):
                raise UserError(f'the {split} split of {data.folder} has {data.n_tokens:,} tokens, too few for one '
                                f'block of block_size={block_size} and the token that follows it')
        self.batch_size, self.block_size, self.rank, self.world_size = batch_size, block_size, rank, world_size
        self.seed, self.shuffle, self.device = seed, shuffle, torch.device(device)
        if self.device.type == 'cuda' and self.device.index is None:    # in a new thread, cuda means cuda:0
            self.device = torch.device('cuda', torch.cuda.current_device())
        # after the last packed block follows the first: no block needs the beginning of the next one's conversation
        self.n_blocks = [(data.n_tokens - (not data.block_size)) // block_size for data in self.splits]
        # a dataset alone has stream 0; in a mixture the name decides, or datasets of one size share one permutation
        self.orders = [{'version': 2, 'stream': zlib.crc32(name.encode()) if len(mixture) > 1 else 0,
                        'move_blocks': move_blocks and not data.block_size}
                       for name, data in zip(self.names, self.splits)]
        self.drawn = [0] * len(mixture)     # blocks drawn from each dataset by all processes: the position
        self.ready, self.coming, self.thread = deque(), None, ThreadPoolExecutor(1)

    def next_batch(self):
        """x, y: (B, T) int64 on the device; y is what follows each token of x, -1 where it is not scored."""
        if not self.ready:
            self.coming = self.coming or self.thread.submit(self.fetch, self.drawn)
            self.ready.extend(self.coming.result())
            self.coming = self.thread.submit(self.fetch, self.ready[-1][2])
        x, y, self.drawn = self.ready.popleft()
        return x, y

    def fetch(self, drawn):
        """The AHEAD batches that follow this position: [(x, y, the position after them)]."""
        W, B, T = self.world_size, self.batch_size, self.block_size
        choice = self.choose(sum(drawn), AHEAD * W * B)
        mine = choice.reshape(AHEAD, W, B)[:, self.rank]        # (AHEAD, B): the dataset of each of our blocks
        pairs = np.empty((AHEAD, B, 2, T), np.int64)  # x and y of each block
        after = np.empty((AHEAD, len(drawn)), np.int64)
        for k in range(len(drawn)):
            count = drawn[k] + np.cumsum(choice == k)
            places = count.reshape(AHEAD, W, B)[:, self.rank] - 1
            pairs[mine == k] = self.blocks(k, self.block_starts(k, places[mine == k]))
            after[:, k] = count[W * B - 1::W * B]
        return [(*self.to_device(pairs[m]), after[m].tolist()) for m in range(AHEAD)]

    def choose(self, first, count):
        """(count,) int64: the dataset that each of these blocks of the whole order comes from."""
        number = np.arange(first, first + count, dtype=np.uint64)
        chance = hash64(number, stream_keys(self.seed, 'mixture')[0]) / 2**64       # in [0, 1)
        return np.searchsorted(np.cumsum(self.weights)[:-1], chance, side='right')

    def blocks(self, k, starts):
        """(n, 2, T) int64: x and y of the blocks of dataset k that start at these tokens."""
        ids = self.splits[k].read(starts, self.block_size + 1).astype(np.int64)
        targets = ids
        if self.splits[k].masked:
            targets = np.where(self.splits[k].scored(starts, self.block_size + 1), ids, -1)
        return np.stack((ids[:, :-1], targets[:, 1:]), axis=1)

    def block_starts(self, k, places):
        """(n,) int64: the tokens of dataset k at which the blocks at these places of its endless order start."""
        epochs, index = np.divmod(places, self.n_blocks[k])
        for epoch in set(epochs.tolist()):
            index[epochs == epoch] = self.starts(k, epoch, index[epochs == epoch])
        return index

    def starts(self, k, epoch, index):
        """(n,) int64: the token at which the index-th blocks, (n,), of an epoch of dataset k start."""
        if not self.shuffle:
            return index * self.block_size
        order, n = self.orders[k], self.n_blocks[k]
        keys = stream_keys(self.seed, epoch, order['stream'])
        index = (permute_by_sorting if n < SMALL and order['version'] > 1 else permute)(index, n, keys)
        offset = int(hash64(keys[:1], keys[1])[0] % self.block_size) if epoch and order['move_blocks'] else 0
        return (index * self.block_size + offset) % self.splits[k].n_tokens

    def to_device(self, pairs):
        """(n, 2, T) int64 -> x, y: (B, T) int64 on the device; rows from n on are padding (y = -1)."""
        batch = np.zeros((2, self.batch_size, self.block_size), np.int64)
        batch[1] = -1
        batch[:, :len(pairs)] = pairs.swapaxes(0, 1)
        batch, cuda = torch.from_numpy(batch), self.device.type == 'cuda'
        if cuda:
            torch.cuda.set_device(self.device)      # this thread's; pinning makes a context on it
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=cuda).unbind()

    def eval_batches(self, n_blocks, k=0):
        """
        The first n_blocks blocks of dataset k (fewer if it has fewer) in sequence, the same at each call,
        divided among the processes. Every process gets the same number of x, y: (B, T), since all take part in
        each forward pass; rows without a block have y = -1.
        """
        B, T = self.batch_size, self.block_size
        total = min(n_blocks, self.n_blocks[k])
        for first in range(0, total, B * self.world_size):
            mine = np.arange(first + self.rank * B, first + (self.rank + 1) * B)
            yield self.to_device(self.blocks(k, mine[mine < total] * T))

    def stats(self):
        """{name: {'share': of all blocks drawn so far, 'epochs': of this dataset}}"""
        return {name: {'share': drawn / max(1, sum(self.drawn)), 'epochs': drawn / n}
                for name, drawn, n in zip(self.names, self.drawn, self.n_blocks)}

    def state_dict(self):
        """For each dataset, the position, what the order depends on, and the shards' fingerprints: plain integers and
        strings. Batches that are only prefetched don't count."""
        common = {'seed': self.seed, 'shuffle': self.shuffle, 'block_size': self.block_size}
        return {name: {'drawn': drawn, 'n_blocks': n, **common, **order, 'shards': data.fingerprint()}
                for name, drawn, n, order, data in zip(self.names, self.drawn, self.n_blocks, self.orders, self.splits)}

    def load_state_dict(self, state):
        """
        Continue from that position, in the order in which it was reached. Rank 0 prints the datasets whose shards
        have changed since, and those that start from the beginning, since their order is another one or they are new.
        """
        self.ready, self.coming, self.drawn = deque(), None, [0] * len(self.names)
        for k, (name, now) in enumerate(self.state_dict().items()):
            if (then := state.get(name)) is None:
                self.print0(f'{name} is new in this run, and read from its beginning')
                continue
            if (not isinstance(then, dict)
                    or any(type(then.get(key, value)) is not type(value) for key, value in now.items())
                    or 'drawn' not in then or min(then['drawn'], then.get('stream', 0)) < 0):
                raise UserError(f"the checkpoint's position in {name} is damaged: use an earlier checkpoint")
            changed = [f'{key} was {then.get(key)}, is {now[key]}'
                       for key in ('n_blocks', 'seed', 'shuffle', 'block_size') if then.get(key) != now[key]]
            if changed:
                self.print0(f'{name} is read in another order from here on, from its beginning: {", ".join(changed)}')
                continue
            self.drawn[k] = then['drawn']
            first_version = {'version': 1, 'stream': 0, 'move_blocks': False}   # checkpoints without these
            self.orders[k] = {key: then.get(key, value) for key, value in first_version.items()}
            shards = then.get('shards', now['shards'])
            if files := sorted(str(f) for f in shards | now['shards'] if shards.get(f) != now['shards'].get(f)):
                self.print0(f'{self.splits[k].folder}: {some(files)} changed since the checkpoint; '
                            'training continues with what they hold now')

    def print0(self, line):
        if self.rank == 0:
            print(line)


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
    """The folders' names, which stay when the data moves; what the user wrote if two are the same."""
    if len({data.folder.resolve() for data in splits}) < len(splits):
        raise UserError(f'dataset={dataset}: two of these are the same folder')
    short = [os.path.basename(os.path.abspath(data.folder)) for data in splits]
    return short if len(set(short)) == len(short) else names


def permute(index, n, keys):
    """
    Where the permutation of range(n) that belongs to `keys` takes each of `index` (int64), without storing it.

    A Feistel network on the pairs (i // b, i % b), a few more than n; cycle-walk until below n (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains").
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


def permute_by_sorting(index, n, keys):
    """permute() for a small n, where each of the n! orders is equally likely: sorts n random numbers."""
    return np.argsort(hash64(hash64(np.arange(n, dtype=np.uint64), keys[0]), keys[1]))[index]


def hash64(x, key):
    """uint64 -> uint64 that look random: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(64)
def stream_keys(seed, epoch, stream=0):
    """ROUNDS random uint64 for an epoch of a dataset, or for the choices of a mixture (epoch='mixture')."""
    words = [0] if epoch == 'mixture' else [1, epoch, stream] if stream else [1, epoch]
    return np.random.SeedSequence([seed % 2**64, *words]).generate_state(ROUNDS, np.uint64)
