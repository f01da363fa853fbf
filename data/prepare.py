"""
The engine behind every prepare script: documents in, a dataset folder out.

    corpus -> texts -> clean, tokenize (on all cores) -> drop duplicates -> shards -> meta.json

A corpus is a function: corpus(mark) yields (texts, mark), some documents and a mark, a dictionary for JSON, from
which another call goes on right behind them; corpus(None) begins at the beginning. The texts go to workers and
come back, in order, as token ids, which run into shards of `shard_size` tokens.

A shard gets its name when it is whole and on the disk, and progress.json then notes where in the corpus it ends,
so that a run that was killed goes on from there. meta.json comes last: a folder that has one is complete.
"""
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import clean as cleaning
from data.download import write
from data.errors import UserError
from data.tokenizer import get_tokenizer

BATCH_CHARS = 1_000_000  # what a worker gets at a time
START_AGAIN = 'delete the .npy and .json files there to start again'
CHARS_UNDER_WAY = 64_000_000  # what waits for the workers, and behind them for us: a bound on memory


def prepare(out_dir, train, val=None, tokenizer='gpt2', source={}, settings={}, shard_size=100_000_000,
            max_tokens=0, num_proc=0, clean=False, dedup='', total=None):
    """
    Make the dataset folder `out_dir` of the corpus `train`, and of the corpus `val` for validation. Without `val`
    the first shard is validation, and of a corpus that fits into one shard the first tenth.

    source, settings: what shaped the dataset, for meta.json; a folder that has shards of others is refused
    max_tokens: stop after so many (0: at the end); num_proc: workers (0: one a core)
    clean, dedup ('', 'exact', 'minhash'): see data/clean.py
    total: how many documents there are, where that is known, for the bar
    """
    if shard_size < 1 or max_tokens < 0 or num_proc < 0:
        raise UserError('shard_size must be at least 1, max_tokens and num_proc at least 0')
    if dedup not in ('', *cleaning.KEYS):
        raise UserError(f"no dedup is called '{dedup}': there are {' and '.join(cleaning.KEYS)}")
    settings = {'tokenizer': get_tokenizer(tokenizer).name, 'shard_size': shard_size, 'max_tokens': max_tokens,
                'clean': clean, 'dedup': dedup, **settings}
    corpora = {'val': val, 'train': train} if val else {'': train}
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with locked(out_dir):
            state = earlier(out_dir, source, settings)
            if 'format' not in state:
                write_shards(out_dir, corpora, state, num_proc or cores(), total)
                state = finish(out_dir, state)
            for path in (out_dir / 'progress.json', out_dir / 'seen.sqlite', *out_dir.glob('*.tmp')):
                path.unlink(missing_ok=True)
    except KeyboardInterrupt:
        raise UserError(f'interrupted: the same command goes on from the last whole shard in {out_dir}')
    except (OSError, sqlite3.OperationalError, concurrent.futures.BrokenExecutor) as error:
        # a full disk, a network that went away, a worker that was killed for its memory
        raise UserError(f'{out_dir}: {error}; the same command goes on from the last whole shard')
    report(out_dir, state)


def write_shards(out_dir, corpora, state, num_proc, total):
    """Tokenize what is left of the corpora, and keep progress.json, which holds `state`, up to date."""
    settings, shards, order = state['settings'], state['shards'], [*corpora, 'end']
    tokenizer, shard_size, max_tokens = (settings[name] for name in ('tokenizer', 'shard_size', 'max_tokens'))
    place = state['place'] or {'split': order[0], 'mark': None, 'skip': 0, 'counts': {'in': 0}}
    seen = cleaning.Seen(out_dir / 'seen.sqlite', place['counts']['in']) if settings['dedup'] else None
    work = functools.partial(tokenize, tokenizer=tokenizer, clean=settings['clean'], dedup=settings['dedup'])
    written = sum(entry['tokens'] for entry in shards)
    shard = Shard(out_dir, get_tokenizer(tokenizer))

    def close_shard(split):
        shards.append(shard.close(split, sum(entry['file'].startswith(split) for entry in shards)))

    def save_progress():
        if seen:
            seen.commit()
        write(out_dir / 'progress.json', json.dumps(state | {'place': place}, indent=1).encode())

    save_progress()
    bar = tqdm(total=max_tokens or None, initial=written, unit='tok', unit_scale=True, disable=None)
    with bar, workers(num_proc, settings['clean'] or settings['dedup']) as pool:
        while (split := place['split']) != 'end':
            for (tokens, keys, counts), mark in in_order(pool, work, corpora[split](place['mark']), num_proc):
                if seen:
                    tokens, counts['duplicate'] = seen.drop(tokens, shard.eot, keys, place['counts']['in'])
                at = place['skip']  # after a restart: these are in the shards already
                tokens = tokens[:at + max_tokens - written] if max_tokens else tokens
                while at < len(tokens):
                    if shard.tokens == shard_size:
                        close_shard(split or ('train' if shards else 'val'))
                        place['skip'] = at
                        save_progress()
                    piece = tokens[at:at + shard_size - shard.tokens]
                    shard.write(piece)
                    at, written = at + len(piece), written + len(piece)
                counts.update(place['counts'])
                place = {'split': split, 'mark': mark, 'skip': 0, 'counts': dict(counts)}
                bar.update(written - bar.n)
                if total and counts['in']:
                    bar.total = round(written / counts['in'] * total)
                if max_tokens and written == max_tokens:
                    break
            one_shard = split == '' and not shards  # of which the first tenth is for validation
            if shard.tokens < 1 + one_shard and not any(entry['file'].startswith(split or 'train') for entry in shards):
                raise UserError(f'{out_dir}: too little text in {place["counts"]["in"]:,} documents')
            if one_shard:
                tokens = shard.take()
                shard.write(tokens[:-(-len(tokens) // 10)])
                close_shard('val')
                shard.write(tokens[-(-len(tokens) // 10):])
            if shard.tokens:
                close_shard(split or 'train')
            place = {'split': order[order.index(split) + 1], 'mark': None, 'skip': 0, 'counts': place['counts']}
            save_progress()
    state['place'] = place


def tokenize(texts, tokenizer, clean, dedup):
    """
    What a worker makes of some texts, where None is a document that could not be read. Returns (tokens, keys,
    counts): the ids, (n,) uint16; for each document in them the keys it is known by, if dedup; what was found.
    """
    counts = collections.Counter({'in': len(texts), 'unreadable': texts.count(None), 'empty': texts.count('')})
    texts = [text for text in texts if text]
    if clean:
        texts, dropped = cleaning.clean(texts)
        counts.update(dropped)
    keys = [cleaning.KEYS[dedup](text) for text in texts] if dedup else None
    return get_tokenizer(tokenizer).encode_documents(texts), keys, counts


@contextlib.contextmanager
def workers(num_proc, processes):
    """
    An executor. Threads, because tiktoken runs without Python's lock and nothing has to be copied; processes where
    the work is Python's own. Spawned, since a fork would copy the reader's locks and connections.
    """
    pool = (concurrent.futures.ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'), die_with_parent)
            if processes else concurrent.futures.ThreadPoolExecutor(num_proc))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def die_with_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent answers for us
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_order(pool, work, batches, num_proc):
    """(work(texts), mark) for each (texts, mark) of batches, in their order, while all workers are busy."""
    under_way = collections.deque()
    for texts, mark in batches:
        chars = sum(len(text) for text in texts if text)
        under_way.append((pool.submit(work, texts), mark, chars))
        while len(under_way) > 3 * num_proc or sum(item[2] for item in under_way) > CHARS_UNDER_WAY:
            future, mark, _ = under_way.popleft()
            yield future.result(), mark
    for future, mark, _ in under_way:
        yield future.result(), mark


def in_batches(documents):
    """A corpus's (texts, mark) from single (text, mark)."""
    texts, chars = [], 0
    for text, mark in documents:
        texts.append(text)
        chars += len(text or '')
        if chars >= BATCH_CHARS or len(texts) >= BATCH_CHARS // 10:
            yield texts, mark
            texts, chars = [], 0
    if texts:
        yield texts, mark


def corpus_of(texts):
    """The corpus of a list of texts, or of a function that returns an iterable of them, the same each time."""
    def corpus(mark):
        begin = mark['documents'] if mark else 0
        documents = enumerate(texts() if callable(texts) else texts)
        yield from in_batches((text, {'documents': i + 1}) for i, text in documents if i >= begin)
    return corpus


class Shard:
    """
    The shard that is being written, as shard.tmp: it gets its name when it is whole and on the disk.
    .tokens: how many it holds
    """

    def __init__(self, folder, tokenizer):
        self.folder, self.eot, self.dtype = folder, tokenizer.eot, np.dtype(tokenizer.dtype)
        self.begin()

    def begin(self):
        self.file, self.tokens, self.documents = open(self.folder / 'shard.tmp', 'w+b'), 0, 0
        self.write_header()

    def write_header(self):  # of the same length for any number: numpy leaves room for it to grow
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file, {'descr': self.dtype.str, 'fortran_order': False, 'shape': (self.tokens,)})

    def write(self, tokens):
        self.file.write(tokens)
        self.tokens += len(tokens)
        self.documents += int(np.count_nonzero(tokens == self.eot))

    def take(self):
        """All tokens written so far, (n,); the shard is empty afterwards."""
        self.file.seek(-self.tokens * self.dtype.itemsize, os.SEEK_CUR)
        tokens = np.frombuffer(self.file.read(), self.dtype)
        self.begin()
        return tokens

    def close(self, split, number):
        """Give the shard its name and begin the next one; returns its entry for meta.json."""
        self.write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        sha256 = hashlib.sha256()
        while piece := self.file.read(1 << 20):
            sha256.update(piece)
        self.file.close()
        name = f'{split}_{number:06d}.npy'
        os.replace(self.file.name, self.folder / name)
        entry = {'file': name, 'tokens': self.tokens, 'documents': self.documents, 'sha256': sha256.hexdigest()}
        self.begin()
        return entry


@contextlib.contextmanager
def locked(folder):
    """Nobody else prepares the folder meanwhile. The system forgets such a lock with the process that holds it."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f'{folder} is being prepared by another process')
    finally:
        os.close(descriptor)


def earlier(out_dir, source, settings):
    """
    What an earlier run left in the folder: meta.json if it is complete, else progress.json, and if there is
    nothing to lose, the beginning. Exits if its shards are made of something else, or are not all there.
    """
    new = json.loads(json.dumps({'source': source, 'settings': settings, 'shards': [], 'place': None}))
    there = {path.name for path in out_dir.glob('*.npy')}
    files = [path for path in (out_dir / 'meta.json', out_dir / 'progress.json') if path.exists()]
    if not files and there:
        raise UserError(f'{out_dir} holds {min(there)}, but nothing says what made it: give another out_dir')
    try:
        state = json.loads(files[0].read_text()) if files else new
        if not state['shards']:
            return new
        different = difference(state['settings'], new['settings']) or difference(state['source'], new['source'])
        damaged = [out_dir / entry['file'] for entry in state['shards']
                   if not holds(out_dir / entry['file'], entry['tokens'])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{files[0]} is damaged ({error!r}): {START_AGAIN}')
    if different:
        raise UserError(f'{out_dir} was begun with {different}: give another out_dir, or {START_AGAIN}')
    if damaged:
        raise UserError(f'{damaged[0]} is missing or damaged, though it was made whole: {START_AGAIN}')
    return state


def holds(path, tokens):
    """Whether a shard is there with so many tokens."""
    try:
        return np.load(path, mmap_mode='r').shape == (tokens,)
    except (OSError, ValueError):  # there is none, or less than its header says
        return False


def earlier_source(out_dir):
    """The source of what is in the folder already, {} if there is nothing."""
    for path in (Path(out_dir) / 'meta.json', Path(out_dir) / 'progress.json'):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads(path.read_text())['source']
    return {}


def difference(old, new):
    """'name=old, not new' for the first name under which two dictionaries differ, or ''."""
    for name in old | new:
        a, b = (d.get(name, 'nothing') for d in (old, new))
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := difference(a, b):
                return f'{name}: {inner}'
        elif a != b:
            return f'{name}={a}, not {b}'
    return ''


def finish(out_dir, state):
    """Write meta.json, which says that the dataset is complete, and return what it holds."""
    tokenizer = get_tokenizer(state['settings']['tokenizer'])
    splits = {split: [entry for entry in state['shards'] if entry['file'].startswith(split)]
              for split in ('train', 'val')}
    meta = {'format': 1, 'tokenizer': tokenizer.name, 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot,
            'dtype': np.dtype(tokenizer.dtype).name,
            'tokens': {split: sum(entry['tokens'] for entry in shards) for split, shards in splits.items()},
            'documents': state['place']['counts'], 'source': state['source'], 'settings': state['settings'],
            'shards': splits['train'] + splits['val']}
    write(out_dir / 'meta.json', json.dumps(meta, indent=1).encode())
    return meta


def report(out_dir, meta):
    counts = meta['documents']
    print(f'{out_dir}: {meta["tokens"]["train"]:,} tokens to train on, {meta["tokens"]["val"]:,} for validation '
          f'({meta["tokenizer"]})')
    if meta['settings']['clean'] or meta['settings']['dedup'] or counts.get('unreadable'):
        print(table(counts))


def table(counts):
    """Documents in, dropped by each rule, out: as lines."""
    dropped = {rule: n for rule, n in counts.items() if rule != 'in'}
    rows = [('documents in', counts['in']), *dropped.items(), ('documents out', counts['in'] - sum(dropped.values()))]
    return '\n'.join(f'{n:>14,}  {name}' for name, n in rows)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
