"""
The dataset format, read: one split of a dataset is one long stream of token ids, cut into shards.

A dataset is a folder of `train_000000.npy` ..., `val_000000.npy` ... (1-D uint16 or uint32, each document
preceded by the end-of-text id, documents running on from one shard into the next) and a `meta.json` that says
which tokenizer made it and lists every shard with its tokens and sha256. Other people's folders are read without
one, as GPT-2 tokens:

    *_train_*.npy                 build-nanogpt
    *_train_*.bin, *_train.bin    llm.c and modded-nanogpt: 256 int32 (20240520, 1, tokens, ...), then uint16
    train.bin                     nanoGPT: uint16 and nothing else

Opening a split looks at every shard's header and size, and at a sample of its ids; every id that is read later is
held against the vocabulary too, so that none outside it ever reaches a model. The rest takes reading it all:

    python -m data.dataset FOLDER       # every sha256, every id
"""
import hashlib
import json
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = {'train': ('*_train_*.npy', '*_train_*.bin', '*_train.bin', 'train.bin'),
           'val': ('*_val_*.npy', '*_val_*.bin', '*_val.bin', 'val.bin')}
BIN_HEADER, BIN_MAGIC, BIN_VERSION = 256, 20240520, 1   # in int32
OPEN_FILES = 128    # per split: macOS allows a process 256, Linux 1,024
SAMPLE = 4096       # ids looked at in the beginning, the middle and the end of each shard at the start


class Shard(NamedTuple):
    path: Path
    dtype: np.dtype
    offset: int         # bytes before the first token
    tokens: int


class Split:
    """
    One split of a dataset. Attributes: folder, tokenizer (its name), vocab_size, eot, dtype, shards, n_tokens.
    `dataset` is the name of a folder under data/, or a path. Exits with one line that names the file, and the way
    out, when the dataset isn't there or is damaged.

    The shards are read, not memory-mapped: mapped pages count as this process's memory, a thread that waits for
    a page holds Python's lock while it does, and a thousand maps are more than many systems allow.
    """

    def __init__(self, dataset, split):
        self.folder = find_folder(dataset)
        meta = read_meta(self.folder)
        self.tokenizer, self.vocab_size, self.eot = meta['tokenizer'], meta['vocab_size'], meta['eot']
        self.shards = [open_shard(path, listed) for path, listed in list_shards(self.folder, meta, split)]
        self.dtype = self.shards[0].dtype
        for shard in self.shards:
            if shard.dtype != self.dtype:
                sys.exit(f'{shard.path} holds {shard.dtype}, the shards before it {self.dtype}')
        self.starts = np.cumsum([0] + [shard.tokens for shard in self.shards])
        self.n_tokens = int(self.starts[-1])
        self.files, self.lock = {}, threading.Lock()
        count = min(SAMPLE, self.n_tokens)
        for begin, end in zip(self.starts, self.starts[1:]):
            sample = np.array([begin, (begin + end - count) // 2, end - count])
            self.read(sample.clip(0, self.n_tokens - count), count)

    def read(self, starts, count):
        """(len(starts), count) ids of self.dtype: from each position in the split, the `count` tokens there."""
        ids = np.empty((len(starts), count), self.dtype)
        shards = np.searchsorted(self.starts, starts, side='right') - 1
        for row, start, k in zip(ids, starts.tolist(), shards.tolist()):
            position = start - int(self.starts[k])
            while len(row):                                     # a row may run on into the next shards
                piece = row[:self.shards[k].tokens - position]
                self.read_shard(k, position, piece)
                row, k, position = row[len(piece):], k + 1, 0
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            position = int(starts[row] + column)
            shard = self.shards[np.searchsorted(self.starts, position, side='right') - 1]
            sys.exit(f'{shard.path} holds the id {ids[row, column]}: outside the vocabulary of {self.vocab_size:,} '
                     f'({self.tokenizer}), so the file is damaged or was made with another tokenizer')
        return ids

    def read_shard(self, k, position, out):
        shard = self.shards[k]
        with self.lock:                                         # training's thread and an evaluation may share us
            if k not in self.files:
                if len(self.files) >= OPEN_FILES:
                    self.files.pop(next(iter(self.files))).close()
                self.files[k] = open(shard.path, 'rb', buffering=0)
            self.files[k].seek(shard.offset + position * shard.dtype.itemsize)
            if self.files[k].readinto(out.view(np.uint8)) != out.nbytes:
                sys.exit(f'{shard.path} has become shorter since it was opened')


def find_folder(dataset):
    """The folder of a dataset, given by its name under data/ or by a path."""
    named, path = ROOT / 'data' / dataset, Path(dataset).expanduser()
    is_name = Path(dataset).name == str(dataset)
    folder = named if is_name and (named.is_dir() or not path.is_dir()) else path
    return folder if folder.is_dir() else no_dataset(folder)


def no_dataset(folder):
    """Exits, naming the folder and the command that fills it."""
    name = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    script = folder / 'prepare.py'
    if script.exists():
        sys.exit(f'no dataset in {name}: run `python {name / "prepare.py"}` to make it')
    if folder == ROOT / 'data' / 'fineweb_edu_10B':
        sys.exit(f'no dataset in {name}: run `python prepare_fineweb.py` to make it')
    sys.exit(f'no dataset in {name}: `python prepare_fineweb.py --help` says how to make one')


def read_meta(folder):
    """meta.json as a dictionary; for a folder without one, what holds for other people's shards."""
    path = folder / 'meta.json'
    if path.exists():
        try:
            meta = json.loads(path.read_text())
            if meta['format'] != 1:
                sys.exit(f'{path} has format {meta["format"]}; this version reads format 1')
            return meta
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f'{path} is damaged: {error!r}')
    if any(folder.glob('train_[0-9]*.npy')) or any(folder.glob('val_[0-9]*.npy')):
        sys.exit(f'{folder} has shards but no meta.json: its preparation was interrupted; run the same command again')
    return {'tokenizer': 'gpt2', 'vocab_size': 50257, 'eot': 50256}


def list_shards(folder, meta, split):
    """[(path, its entry in meta.json or None)] of a split, in order."""
    if 'shards' in meta:
        shards = [(folder / entry['file'], entry | {'dtype': meta['dtype']})
                  for entry in meta['shards'] if entry['file'].startswith(f'{split}_')]
    else:
        found = (sorted(folder.glob(pattern)) for pattern in FOREIGN[split])
        shards = [(path, None) for path in next(filter(None, found), [])]
        if not shards and not any(any(folder.glob(pattern)) for pattern in FOREIGN['train'] + FOREIGN['val']):
            no_dataset(folder)
    return shards or sys.exit(f'{folder} has no {split} split')


def open_shard(path, listed=None):
    """The Shard in a file of any of the formats, held against its own header and against what meta.json lists."""
    if not path.is_file():
        sys.exit(f'{path} is missing: meta.json lists it')
    try:
        shard = npy_shard(path) if path.suffix == '.npy' else bin_shard(path)
        size = path.stat().st_size
        if size != shard.offset + shard.tokens * shard.dtype.itemsize:
            raise ValueError(f'its header promises {shard.tokens:,} tokens, its {size:,} bytes hold another number')
        if shard.tokens == 0:
            raise ValueError('it holds no tokens')
        if listed and (shard.tokens, shard.dtype) != (listed['tokens'], listed['dtype']):
            raise ValueError(f'it holds {shard.tokens:,} tokens of {shard.dtype}, '
                             f'meta.json lists {listed["tokens"]:,} of {listed["dtype"]}')
        return shard
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f'{path} is damaged: {error}')


def npy_shard(path):
    array = np.load(path, mmap_mode='r', allow_pickle=False)
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype not in (np.uint16, np.uint32):
        raise ValueError('not one row of uint16 or uint32')
    return Shard(path, array.dtype, array.offset, len(array))


def bin_shard(path):
    dtype = np.dtype(np.uint16)
    header = np.fromfile(path, np.int32, BIN_HEADER)
    if len(header) == BIN_HEADER and header[0] == BIN_MAGIC:
        if header[1] != BIN_VERSION:
            raise ValueError(f'its header has version {header[1]}, not {BIN_VERSION}')
        return Shard(path, dtype, header.nbytes, int(header[2]))
    if path.name not in ('train.bin', 'val.bin'):       # nanoGPT's have no header to go by
        raise ValueError(f'its header does not begin with {BIN_MAGIC}')
    return Shard(path, dtype, 0, path.stat().st_size // dtype.itemsize)
