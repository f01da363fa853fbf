"""
The dataset format, read: a split of a dataset is one stream of token ids, stored in shards.

A dataset is a folder of `train_000000.npy` ..., `val_000000.npy` ... (1-D uint16 or uint32; the end-of-text id precedes
each document, and a document may continue in the next shard) with a `meta.json` that names the tokenizer and lists
every shard with its tokens and sha256. A tokenizer from a file has a copy there, tokenizer.json, and its sha256 in
meta.json. Conversations have a mask beside each shard (train_000000.mask.npy, uint8, with its sha256 in meta.json):
1 for an id that is scored as a target, 0 for one that is only read. They are packed into blocks of meta.json's
block_size, each whole in its block. Other projects' shards need no meta.json and are read as GPT-2's tokens, or as
nanoGPT's meta.pkl says:

    *_train_*.npy                 build-nanogpt
    *_train_*.bin, *_train.bin    llm.c, modded-nanogpt: 256 int32 (20240520, 1, tokens, 0, ...), then uint16
    train.bin                     nanoGPT: uint16 without a header

Opening a split checks each shard's header and size and 3 x 4,096 of its ids; an id outside the vocabulary elsewhere
is found when it is read, before a model sees it. To check every id and sha256:

    python -m data.dataset FOLDER
"""
import hashlib
import json
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import UserError
from data.tokenizer import GPT2, from_record, get_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARD_NAME = re.compile(r'(train|val)_\d+\.npy')        # a name in meta.json is never a path out of the folder
FOREIGN = {split: (f'*_{split}_*.npy', f'*_{split}_*.bin', f'*_{split}.bin', f'{split}.bin')
           for split in ('train', 'val')}
BIN_HEADER, BIN_MAGIC, BIN_VERSION = 1024, 20240520, 1  # the length is in bytes
START_OVER = 'delete the .npy and .json files there to prepare it from scratch'
IDS = np.uint16, np.uint32
SAMPLE = 4096                                           # ids checked at three places of each shard
OPEN_FILES = 512 if sys.platform == 'linux' else 128    # half of the usual limits: 1,024 and, on macOS, 256
OPENED, LOCK = {}, threading.Lock()                     # {shard: file}, for all reading threads


class Meta(NamedTuple):
    tokenizer: str      # what get_tokenizer takes
    vocab_size: int
    eot: int
    shards: list        # a Shard for each file that meta.json lists; None without meta.json
    block_size: int = 0  # of blocks of whole conversations, one after the other; 0: documents lie anywhere


@dataclass(eq=False)
class Shard:
    """One file of a split, as meta.json describes it, or its own header where there is no meta.json."""
    path: Path
    tokens: int
    dtype: np.dtype
    fingerprint: str    # the sha256 in meta.json; without meta.json, size and modification time
    mask: 'Shard' = None  # which of the ids are scored, uint8; None: all
    offset: int = None  # of the first token, in bytes; known once the file was opened

    def open(self):
        """The file, unbuffered. The first time, raises UserError unless it is the shard described here."""
        if self.offset is None:
            tokens, dtype, offset = read_header(self.path, IDS if self.dtype in IDS else [self.dtype])
            if (tokens, dtype) != (self.tokens, self.dtype):
                raise damaged(self.path, f'it holds {tokens:,} ids of {dtype}, '
                                         f'and meta.json lists {self.tokens:,} of {self.dtype}')
            self.offset = offset
        return open(self.path, 'rb', buffering=0)


class Split:
    """
    One split of a dataset. Attributes: folder, tokenizer (for get_tokenizer), vocab_size, eot, dtype, shards, n_tokens,
    block_size (of packed conversations, else 0), masked (not all ids are scored).

    dataset: the name of a folder under data/, or a path
    check: open every shard and check a sample of its ids. Without it, a shard that meta.json lists is first opened
    when it is read: of many processes, one checks for all.

    Raises UserError, naming the file, if the dataset is missing or damaged.

    Shards are read, not memory-mapped: mapped pages count as memory of this process, a page fault holds Python's
    lock, and every map keeps a file open.
    """

    def __init__(self, dataset, split, check=True):
        self.folder = find_folder(dataset)
        meta = read_meta(self.folder)
        self.tokenizer, self.vocab_size, self.eot, _, self.block_size = meta
        self.shards = list_shards(self.folder, meta, split)
        if not self.shards:
            raise UserError(f'the dataset {self.folder} has no {split} split')
        self.dtype, self.masked = self.shards[0].dtype, self.shards[0].mask is not None
        for shard in self.shards:
            if shard.dtype != self.dtype:
                raise UserError(f'{shard.path} holds {shard.dtype}, the shards before it {self.dtype}')
        self.starts = np.cumsum([0] + [shard.tokens for shard in self.shards])
        self.n_tokens = int(self.starts[-1])
        count = min(SAMPLE, self.n_tokens)
        for begin, end in zip(self.starts, self.starts[1:]) if check else ():
            places = np.array([begin, (begin + end - count) // 2, end - count]).clip(0, self.n_tokens - count)
            self.read(places, count)
            self.scored(places, count)

    def read(self, starts, count):
        """(len(starts), count) ids of self.dtype: `count` ids from each of these positions; past the last token of the
        split follows its first."""
        ids = self.gather(self.shards, starts, count)
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            position = (starts[row] + column) % self.n_tokens
            shard = self.shards[np.searchsorted(self.starts, position, side='right') - 1]
            raise bad_id(shard, ids[row, column], self)
        return ids

    def scored(self, starts, count):
        """(len(starts), count) bool: which of the ids that read() gives are scored as targets."""
        if not self.masked:
            return np.ones((len(starts), count), bool)
        return self.gather([shard.mask for shard in self.shards], starts, count) > 0

    def gather(self, shards, starts, count):
        """(len(starts), count) of what these shards, or their masks, hold from each of these positions."""
        out = np.empty((len(starts), count), shards[0].dtype)
        first = np.searchsorted(self.starts, starts, side='right') - 1
        for row, start, k in zip(out, starts.tolist(), first.tolist()):
            position = start - int(self.starts[k])
            while len(row):
                piece = row[:shards[k].tokens - position]
                read_ids(shards[k], position, piece)
                row, k, position = row[len(piece):], (k + 1) % len(shards), 0
        return out

    def fingerprint(self):
        """{file name: sha256, or size and modification time}: what tells this split from another one."""
        masks = [shard.mask for shard in self.shards if shard.mask]
        return {shard.path.name: shard.fingerprint for shard in self.shards + masks}


def read_ids(shard, position, out):
    """Fill `out`, (n,) of the shard's dtype, from the token `position` of a shard on."""
    view = memoryview(out).cast('B')
    try:
        with LOCK:
            if shard not in OPENED:
                if len(OPENED) >= OPEN_FILES:
                    OPENED.pop(next(iter(OPENED))).close()
                OPENED[shard] = shard.open()
            file = OPENED[shard]
            file.seek(shard.offset + position * shard.dtype.itemsize)
            while view:
                n = file.readinto(view)  # 2 GB at most at a time
                if not n:
                    raise OSError('it is shorter now')
                view = view[n:]
    except OSError as error:
        raise UserError(f'{shard.path} was there at the start and cannot be read any more: {error}') from None


def find_folder(dataset):
    """The folder of a dataset, given by its name under data/ or by its path."""
    named, path = ROOT / 'data' / dataset, Path(os.path.expanduser(dataset))
    is_name = Path(dataset).name == str(dataset)
    folder = named if is_name and (os.path.isdir(named) or not os.path.isdir(path)) else path
    return folder if os.path.isdir(folder) else no_dataset(folder)


def no_dataset(folder):
    """Raises UserError with the command that fills this folder."""
    folder = folder.absolute()
    name = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    script = 'prepare_fineweb.py' if folder == ROOT / 'data' / 'fineweb_edu_10B' else name / 'prepare.py'
    if os.path.exists(ROOT / script) and folder != ROOT / 'data':
        raise UserError(f'no dataset in {name}: run `python {script}` to make it, or choose another with --dataset')
    raise UserError(f'no dataset in {name}: `python prepare_fineweb.py --out_dir={name}` makes one '
                    'of your --data_files, or of a --dataset on the hub')


def read_meta(folder):
    """The Meta of a folder. Raises UserError if meta.json is damaged, or missing though it should be there."""
    path = folder / 'meta.json'
    try:
        meta = json.loads(path.read_text())
        if meta['format'] != 1:
            raise ValueError(f'it has format {meta["format"]}, and this version reads format 1')
        if not (isinstance(meta['tokenizer'], str) and type(meta['vocab_size']) is type(meta['eot']) is int):
            raise ValueError('tokenizer must be a string, vocab_size and eot integers')
        tokenizer = from_record(meta, folder)
        if meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'dtype is {meta["dtype"]}, not uint16 or uint32')
        check_entries(meta['shards'])
        shards = [listed_shard(folder, entry, meta['dtype']) for entry in meta['shards']]
        block_size = meta.get('block_size', 0)
        if type(block_size) is not int or block_size < 0 or len({shard.mask is None for shard in shards}) > 1:
            raise ValueError('block_size must be an integer, and all shards have masks or none')
        return Meta(tokenizer, meta['vocab_size'], meta['eot'], shards, block_size)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{path} cannot be used ({type(error).__name__}: {error})') from None
    if os.path.exists(folder / 'progress.json'):
        raise UserError(f'the preparation of {folder} was interrupted: run the same command again to continue it')
    if any(any(folder.glob(name)) for name in ('train_[0-9]*.npy', 'val_[0-9]*.npy')):
        raise UserError(no_meta(folder))
    if os.path.exists(folder / 'meta.pkl'):
        tokenizer = get_tokenizer(str(folder / 'meta.pkl'))
        return Meta(str(folder / 'meta.pkl'), tokenizer.vocab_size, tokenizer.eot, None)
    return Meta(GPT2.name, GPT2.vocab_size, GPT2.eot, None)


def no_meta(folder):
    return (f'{folder} has shards, but no meta.json says which tokenizer made them: copy meta.json from where they '
            f'are from, give another folder, or {START_OVER}')


def check_entries(entries, *more_names):
    """Raises ValueError unless `entries` are those of shards, as in meta.json, each a file in its folder."""
    if not isinstance(entries, list) or not entries:
        raise ValueError('it lists no shards')
    for entry in entries:
        name = entry['file']
        if not (isinstance(name, str) and (SHARD_NAME.fullmatch(name) or name in more_names)):
            raise ValueError(f'{name!r} is not the name of a shard, such as train_000000.npy')
        if type(entry['tokens']) is not int or entry['tokens'] < 1 or not isinstance(entry['sha256'], str):
            raise ValueError(f'{name} needs a number of tokens and a sha256')
        if not isinstance(entry.get('mask_sha256', ''), str):
            raise ValueError(f'the mask_sha256 of {name} is not a string')


def listed_shard(folder, entry, dtype):
    """The Shard of an entry of meta.json's."""
    path, mask = Path(folder, entry['file']), None
    if 'mask_sha256' in entry:
        mask = Shard(path.with_suffix('.mask.npy'), entry['tokens'], np.dtype(np.uint8), entry['mask_sha256'])
    return Shard(path, entry['tokens'], np.dtype(dtype), entry['sha256'], mask)


def list_shards(folder, meta, split):
    """A split's shards in order; none if the dataset lacks that split."""
    if meta.shards is not None:
        return sorted((shard for shard in meta.shards if shard.path.name.startswith(f'{split}_')),
                      key=lambda shard: shard.path)
    found = {split: next(filter(None, (sorted(folder.glob(pattern)) for pattern in FOREIGN[split])), [])
             for split in FOREIGN}
    return [foreign_shard(path) for path in found.get(split, [])] if any(found.values()) else no_dataset(folder)


def foreign_shard(path):
    """The Shard in a file of another project."""
    tokens, dtype, _ = read_header(path)
    stat = os.stat(path)
    return Shard(path, tokens, dtype, f'{stat.st_size} bytes, {stat.st_mtime_ns}')


def read_header(path, dtypes=IDS):
    """(tokens, dtype, offset of the first token in bytes) of a shard in any of the formats. dtypes: those that a .npy
    file may have."""
    try:
        with open(path, 'rb', buffering=0) as file:
            tokens, dtype, offset = npy_header(file, dtypes) if path.suffix == '.npy' else bin_header(file)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f'{path} is missing: copy it again, or {START_OVER}') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from None
    except Exception as error:  # numpy's parser of headers has many kinds
        raise damaged(path, error) from None
    if size != offset + tokens * dtype.itemsize:
        raise damaged(path, f'its header promises {tokens:,} tokens, and it has {size:,} bytes')
    if tokens < 1:
        raise damaged(path, 'it holds no tokens')
    return tokens, dtype, offset


def npy_header(file, dtypes):
    """(tokens, dtype, offset) of a .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if len(shape) != 1 or dtype not in dtypes:
        raise ValueError(f'it holds {len(shape)}-D {dtype}, not 1-D {" or ".join(np.dtype(d).name for d in dtypes)}')
    return shape[0], dtype, file.tell()


def bin_header(file):
    """(tokens, dtype, offset) of a .bin file."""
    magic, version, tokens = np.frombuffer(file.read(12).ljust(12, b'\0'), np.int32).tolist()
    if magic == BIN_MAGIC:
        if version != BIN_VERSION:
            raise ValueError(f'its header has version {version}, not {BIN_VERSION}')
        return tokens, np.dtype(np.uint16), BIN_HEADER
    if os.path.basename(file.name) not in ('train.bin', 'val.bin'):     # nanoGPT's have no header
        raise ValueError(f'its header does not begin with {BIN_MAGIC}')
    return os.fstat(file.fileno()).st_size // 2, np.dtype(np.uint16), 0


def damaged(path, why):
    return UserError(f'{path} is damaged ({" ".join(str(why).split())}): copy it again, or {START_OVER}')


def bad_id(shard, token, meta):
    return UserError(f'{shard.path} holds the id {token}, and the vocabulary of {meta.tokenizer} has '
                     f'{meta.vocab_size:,}: it is damaged, or another tokenizer made it')


def verify(dataset):
    """Check every id and sha256 of a dataset and print which shards are damaged. Raises UserError if any is."""
    folder = find_folder(dataset)
    meta = read_meta(folder)
    shards = [shard for split in FOREIGN for shard in list_shards(folder, meta, split)]
    shards += [shard.mask for shard in shards if shard.mask]
    failed = 0
    for shard in shards:
        try:
            with shard.open() as file:
                file.seek(0)
                digest, largest = hashlib.sha256(file.read(shard.offset)), 0
                while chunk := file.read(2**20):
                    digest.update(chunk)
                    largest = max(largest, np.frombuffer(chunk, shard.dtype).max())
            if meta.shards and digest.hexdigest() != shard.fingerprint:
                raise damaged(shard.path, 'its sha256 is not the one in meta.json')
            if shard.dtype == np.uint8 and largest > 1:
                raise damaged(shard.path, f'it holds {largest}, not 0 and 1 alone')
            if largest >= meta.vocab_size:
                raise bad_id(shard, largest, meta)
            print(f'{shard.path}: {shard.tokens:,} tokens, undamaged')
        except UserError as error:
            print(error, file=sys.stderr)
            failed += 1
    if failed:
        raise UserError(f'{failed} of {len(shards)} shards are damaged')
    print(f'all {len(shards)} shards are intact' + ('' if meta.shards else ', as far as headers and ids can tell'))


if __name__ == '__main__':
    import configurator  # its hook prints a UserError as one line
    if len(sys.argv) != 2:
        raise UserError('usage: python -m data.dataset FOLDER')
    verify(sys.argv[1])
