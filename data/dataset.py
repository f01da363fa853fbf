"""
The dataset format, read: a split of a dataset is one long stream of token ids, cut into shards.

A dataset is a folder of `train_000000.npy` ..., `val_000000.npy` ... (1-D uint16 or uint32; each document preceded
by the end-of-text id and running on from one shard into the next) with a `meta.json` that names the tokenizer and
lists every shard with its tokens and sha256. Other people's shards need none, and are taken as GPT-2's tokens:

    *_train_*.npy                 build-nanogpt
    *_train_*.bin, *_train.bin    llm.c, modded-nanogpt: 256 int32 (20240520, 1, tokens, 0, ...), then uint16
    train.bin                     nanoGPT: uint16 and nothing else

Opening a split checks each shard's header and size, and 3 x 4,096 of its ids; an id outside the vocabulary that
hides elsewhere is found when it is read, before a model sees it. To read it all, each id and sha256:

    python -m data.dataset FOLDER
"""
import hashlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import UserError
from data.tokenizer import GPT2

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = {split: (f'*_{split}_*.npy', f'*_{split}_*.bin', f'*_{split}.bin', f'{split}.bin')
           for split in ('train', 'val')}
BIN_HEADER, BIN_MAGIC, BIN_VERSION = 256, 20240520, 1   # the length is in int32
MEND = 'copy it again, or delete the .npy and .json files there and prepare the dataset anew'
SAMPLE = 4096                                           # ids read at three places of each shard when it is opened
OPEN_FILES = 768 if sys.platform == 'linux' else 128    # at once; the usual limits are 1,024 and, on macOS, 256
OPENED, LOCK = {}, threading.Lock()                     # {shard: descriptor}, for all the threads that read


class Meta(NamedTuple):
    tokenizer: str
    vocab_size: int
    eot: int
    shards: dict        # {file: (tokens, dtype, sha256)}; None where there is no meta.json


class Shard(NamedTuple):
    path: Path
    dtype: np.dtype
    offset: int         # bytes before the first token
    tokens: int
    changed: int        # time of its last change, so that a file which takes its place is another shard


class Split:
    """
    One split of a dataset. Attributes: folder, tokenizer (its name), vocab_size, eot, dtype, shards, n_tokens.
    `dataset` is the name of a folder under data/, or a path. If it isn't there, or is damaged, one line names the
    file and ends the program.

    Shards are read, not memory-mapped: mapped pages count as memory of this process, whoever waits for one keeps
    Python's lock, and every map keeps a file open.
    """

    def __init__(self, dataset, split):
        self.folder = find_folder(dataset)
        meta = read_meta(self.folder)
        self.tokenizer, self.vocab_size, self.eot = meta.tokenizer, meta.vocab_size, meta.eot
        paths = list_shards(self.folder, meta, split)
        if not paths:
            raise UserError(f'the dataset {self.folder} has no {split} split')
        self.shards = [open_shard(path, meta) for path in paths]
        self.dtype = self.shards[0].dtype
        for shard in self.shards:
            if shard.dtype != self.dtype:
                raise UserError(f'{shard.path} holds {shard.dtype}, the shards before it {self.dtype}')
        self.starts = np.cumsum([0] + [shard.tokens for shard in self.shards])
        self.n_tokens = int(self.starts[-1])
        count = min(SAMPLE, self.n_tokens)
        for begin, end in zip(self.starts, self.starts[1:]):
            places = np.array([begin, (begin + end - count) // 2, end - count])
            self.read(places.clip(0, self.n_tokens - count), count)

    def read(self, starts, count):
        """(len(starts), count) ids of self.dtype: the `count` ids from each of these positions of the split on."""
        ids = np.empty((len(starts), count), self.dtype)
        shards = np.searchsorted(self.starts, starts, side='right') - 1
        for row, start, k in zip(ids, starts.tolist(), shards.tolist()):
            position = start - int(self.starts[k])
            while len(row):                                     # what the shard has of it, then on in the next one
                piece = row[:self.shards[k].tokens - position]
                read_ids(self.shards[k], position, piece)
                row, k, position = row[len(piece):], k + 1, 0
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            shard = self.shards[np.searchsorted(self.starts, starts[row] + column, side='right') - 1]
            raise UserError(outside(shard, ids[row, column], self))
        return ids


def read_ids(shard, position, out):
    """Fills `out` with ids from this position of the shard on."""
    try:
        with LOCK:
            if shard not in OPENED:
                if len(OPENED) == OPEN_FILES:
                    os.close(OPENED.pop(next(iter(OPENED))))
                OPENED[shard] = os.open(shard.path, os.O_RDONLY | getattr(os, 'O_BINARY', 0))   # for Windows
            os.lseek(OPENED[shard], shard.offset + position * shard.dtype.itemsize, os.SEEK_SET)
            data = b''
            while len(data) < out.nbytes:  # the system gives 2 GB at most at a time
                piece = os.read(OPENED[shard], out.nbytes - len(data))
                if not piece:
                    raise OSError('it is shorter now')
                data += piece
    except OSError as error:
        raise UserError(f'{shard.path} was there at the start and cannot be read any more: {error}')
    out[:] = np.frombuffer(data, shard.dtype)


def find_folder(dataset):
    """The folder of a dataset, given by its name under data/ or by its path."""
    named, path = ROOT / 'data' / dataset, Path(dataset).expanduser()
    is_name = Path(dataset).name == str(dataset)
    folder = named if is_name and (named.is_dir() or not path.is_dir()) else path
    return folder if folder.is_dir() else no_dataset(folder)


def no_dataset(folder):
    """Exits, naming the folder and the command that fills it."""
    folder = folder.absolute()
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    script = 'prepare_fineweb.py' if folder == ROOT / 'data' / 'fineweb_edu_10B' else place / 'prepare.py'
    if (ROOT / script).exists() and folder != ROOT / 'data':
        raise UserError(f'no dataset in {place}: run `python {script}` to make it')
    raise UserError(f'no dataset in {place}: `python prepare_fineweb.py --out_dir={place}` makes one '
                    'of your --data_files, or of a --dataset on the hub')


def read_meta(folder):
    """What meta.json says, or what holds for a folder without one."""
    path = folder / 'meta.json'
    if path.exists():
        try:
            meta = json.loads(path.read_text())
            if meta['format'] != 1:
                raise ValueError(f'it has format {meta["format"]}, and this version reads format 1')
            shards = {shard['file']: (shard['tokens'], np.dtype(meta['dtype']), shard['sha256'])
                      for shard in meta['shards']}
            return Meta(meta['tokenizer'], int(meta['vocab_size']), int(meta['eot']), shards)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path} cannot be used ({type(error).__name__}: {error})')
    if any(any(folder.glob(name)) for name in ('progress.json', 'train_[0-9]*.npy', 'val_[0-9]*.npy')):
        raise UserError(f'the preparation of {folder} was interrupted: the same command, run again, goes on with it')
    if (folder / 'meta.pkl').exists():
        raise UserError(f"{folder} has ids of characters, by nanoGPT's meta.pkl, and no tokenizer here decodes those: "
                        'prepare its text anew')
    return Meta(GPT2.name, GPT2.vocab_size, GPT2.eot, None)


def list_shards(folder, meta, split):
    """The paths of a split's shards, in order; none if the dataset lacks that split."""
    if meta.shards is not None:
        return [folder / file for file in sorted(meta.shards) if file.startswith(f'{split}_')]
    found = {split: next(filter(None, (sorted(folder.glob(pattern)) for pattern in FOREIGN[split])), [])
             for split in FOREIGN}
    return found.get(split, []) if any(found.values()) else no_dataset(folder)


def open_shard(path, meta):
    """The Shard in a file of any of the formats, held against its own header and against meta.json."""
    if not path.is_file():
        raise UserError(f'{path} is missing, though meta.json lists it: {MEND}')
    try:
        shard = open_npy(path) if path.suffix == '.npy' else open_bin(path)
        stat = path.stat()
        if stat.st_size != shard.offset + shard.tokens * shard.dtype.itemsize:
            raise ValueError(f'its header promises {shard.tokens:,} tokens, and it has {stat.st_size:,} bytes')
        if shard.tokens < 1:
            raise ValueError('it holds no tokens')
        tokens, dtype, _ = meta.shards[path.name] if meta.shards else (shard.tokens, shard.dtype, None)
        if (tokens, dtype) != (shard.tokens, shard.dtype):
            raise ValueError(f'it holds {shard.tokens:,} ids of {shard.dtype}, '
                             f'and meta.json lists {tokens:,} of {dtype}')
        return shard._replace(changed=stat.st_mtime_ns)
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is damaged ({error}): {MEND}')


def open_npy(path):
    array = np.lib.format.open_memmap(path, mode='r')
    if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32):
        raise ValueError(f'it holds {array.ndim}-D {array.dtype}, not 1-D uint16 or uint32')
    return Shard(path, array.dtype, array.offset, len(array), 0)


def open_bin(path):
    header = np.fromfile(path, np.int32, BIN_HEADER)
    if len(header) == BIN_HEADER and header[0] == BIN_MAGIC:
        if header[1] != BIN_VERSION:
            raise ValueError(f'its header has version {header[1]}, not {BIN_VERSION}')
        return Shard(path, np.dtype(np.uint16), header.nbytes, int(header[2]), 0)
    if path.name not in ('train.bin', 'val.bin'):               # nanoGPT's have no header
        raise ValueError(f'its header does not begin with {BIN_MAGIC}')
    return Shard(path, np.dtype(np.uint16), 0, path.stat().st_size // 2, 0)


def outside(shard, token, meta):
    return (f'{shard.path} holds the id {token}, and the vocabulary of {meta.tokenizer} has {meta.vocab_size:,}: '
            'it is damaged, or another tokenizer made it')


def verify(dataset):
    """Reads every shard of a dataset, checks each id and sha256, and says which shards are damaged."""
    folder = find_folder(dataset)
    meta = read_meta(folder)
    paths = [path for split in FOREIGN for path in list_shards(folder, meta, split)]
    damaged = 0
    for path in paths:
        try:
            shard = open_shard(path, meta)
            digest = hashlib.sha256()
            with open(path, 'rb') as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
            if meta.shards and digest.hexdigest() != meta.shards[path.name][2]:
                raise UserError(f'{path} is damaged (its sha256 is not the one in meta.json): {MEND}')
            largest = np.memmap(path, shard.dtype, 'r', shard.offset).max()
            if largest >= meta.vocab_size:
                raise UserError(outside(shard, largest, meta))
            print(f'{path}: {shard.tokens:,} tokens, as they should be')
        except UserError as error:
            print(error, file=sys.stderr)
            damaged += 1
    if damaged:
        raise UserError(f'{damaged} of {len(paths)} shards are damaged')
    print(f'all {len(paths)} shards are whole' + ('' if meta.shards else ', as far as one can tell without meta.json'))


if __name__ == '__main__':
    from configurator import excepthook
    sys.excepthook = excepthook
    if len(sys.argv) != 2:
        raise UserError('usage: python -m data.dataset FOLDER')
    verify(sys.argv[1])
