"""
The engine behind every prepare script: documents in, a dataset folder out.

    corpus -> texts -> clean, tokenize (on all cores) -> drop duplicates -> shards -> meta.json

A corpus is a function: corpus(state) yields (texts, state), some documents and a resume state, a dictionary for JSON,
with which another call continues right after them; corpus(None) starts at the beginning. The texts go to workers and
come back, in order, as token ids, which fill shards of `shard_size` tokens.

A shard gets its name when it is complete and on the disk, and progress.json then records where in the corpus it ends,
so that a killed run continues from there. meta.json comes last: a folder that has one is complete. Until then all that
is written has a temporary name, and nothing else is ever removed.
"""
import collections
import contextlib
import functools
import hashlib
import json
import os
import sqlite3
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import clean as cleaning
from data.atomic import remove_leftovers, write
from data.dataset import START_OVER, check_entries, listed_shard, no_meta
from data.errors import UserError
from data.tokenizer import get_tokenizer, keep_files, to_record
from data.workers import in_order, interruptible, workers

TEMPORARY = '.prepare-'  # begins the names of files in the making
BATCH_CHARS = 1_000_000  # what a worker gets at a time
FIRST = TEMPORARY + 'first.npy'  # the first shard, until the number of tokens tells how much of it is for validation


def prepare(out_dir, train, val=None, tokenizer='gpt2', source={}, settings={}, shard_size=100_000_000,
            max_tokens=0, num_proc=0, clean=False, dedup='', total=None, encode=None):
    """
    Make the dataset folder `out_dir` from the corpus `train`, and from the corpus `val` for validation. Without `val`,
    validation is the beginning of `train`: a tenth of its tokens, and at most a shard.

    source, settings: recorded in meta.json; a folder that has shards of others is refused
    max_tokens: stop after this many tokens (0: no limit); num_proc: workers (0: one per core)
    clean, dedup ('', 'exact', 'minhash'): see data/clean.py
    total: the number of documents, if it is known, for the progress bar
    encode: what a worker does instead of tokenize, without clean and dedup; ids with a mask are (n,) of fields id and
    scored

    Returns what meta.json holds. Raises UserError, and KeyboardInterrupt for Ctrl-C; the same call then continues.
    """
    if dedup not in ('', *cleaning.KEYS):
        raise UserError(f'dedup={dedup} is not one of {", ".join(cleaning.KEYS)}')
    if not str(out_dir):
        raise UserError('out_dir is empty: name the folder to write to')
    if os.path.isfile(out_dir):
        raise UserError(f'out_dir={out_dir} is a file: name a folder')
    tokenizer = get_tokenizer(tokenizer)
    settings = {'tokenizer': tokenizer.name, 'shard_size': shard_size, 'max_tokens': max_tokens,
                'clean': clean, 'dedup': dedup, **settings}
    corpora = {'val': val, 'train': train} if val else {'': train}
    out_dir = Path(os.path.expanduser(out_dir))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with locked(out_dir), interruptible() as check_interrupt:
            state = load_state(out_dir, source, settings, corpora, tokenizer.dtype)
            if 'format' not in state:
                num_proc = num_proc or cores()
                print(f'tokenizing into {out_dir} with {num_proc} workers (Ctrl-C stops, the same command continues)',
                      flush=True)
                encode = encode or functools.partial(tokenize, clean=clean, dedup=dedup)
                work = functools.partial(encode, tokenizer=keep_files(tokenizer, out_dir))
                write_shards(out_dir, corpora, state, tokenizer.eot, work, num_proc, total, check_interrupt)
                state = write_meta(out_dir, state, tokenizer)
            for path in (out_dir / 'progress.json', *out_dir.glob(TEMPORARY + '*')):
                path.unlink(missing_ok=True)
            remove_leftovers(out_dir, r'\w+\.jsonl?')
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'interrupted: the same command continues after the last complete shard in {out_dir}'
                                ) from None
    except (OSError, sqlite3.OperationalError) as error:  # a full disk, a lost network, a worker out of memory
        raise UserError(f'{out_dir}: {error}; the same command continues after the last complete shard') from None
    report(out_dir, state, 'its own text' if val else 'of the same text')
    return state


def write_shards(out_dir, corpora, state, eot, work, num_proc, total, check_interrupt):
    """Tokenize the rest of the corpora, and keep progress.json, which holds `state`, up to date. work: what a worker
    does with some texts."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism, num_proc of them
    settings, shards, order = state['settings'], state['shards'], [*corpora, 'end']
    shard_size, max_tokens = settings['shard_size'], settings['max_tokens']
    resume = state['resume'] or {'split': order[0], 'corpus': None, 'skip': 0, 'counts': {'in': 0}}
    seen = cleaning.Seen(out_dir / f'{TEMPORARY}seen.sqlite', resume['counts']['in']) if settings['dedup'] else None
    written = count_tokens(shards)
    shard = ShardWriter(out_dir, eot)

    def close_shard():
        split = resume['split']
        number = sum(entry['file'].startswith(split) for entry in shards)
        shards.append(shard.close(f'{split or "train"}_{number:06d}.npy' if split or shards else FIRST))

    def save_progress():
        if seen:
            seen.commit()
        write(out_dir / 'progress.json', json.dumps(state | {'resume': resume}, indent=1).encode())

    save_progress()
    bar = tqdm(total=max_tokens or None, initial=written, unit='tok', unit_scale=True, disable=None)
    with bar, workers(num_proc, work, settings['clean'] or settings['dedup']) as submit:
        while (split := resume['split']) != 'end':
            batches = in_order(submit, corpora[split](resume['corpus']), num_proc)
            for (tokens, keys, counts), corpus_state in batches:
                check_interrupt()
                if seen:
                    tokens, counts['duplicate'] = seen.drop(tokens, eot, keys, resume['counts']['in'])
                at = resume['skip']  # after a restart, these are in the shards already
                if max_tokens and len(tokens) > (end := at + max_tokens - written):
                    counts['beyond_max_tokens'] = int(np.count_nonzero(tokens[end:] == eot))
                    tokens = tokens[:end]
                while at < len(tokens):
                    if shard.tokens == shard_size:
                        close_shard()
                        resume['skip'] = at
                        save_progress()
                    piece = tokens[at:at + shard_size - shard.tokens]
                    shard.write(piece)
                    at, written = at + len(piece), written + len(piece)
                counts.update(resume['counts'])
                resume = {'split': split, 'corpus': corpus_state, 'skip': 0, 'counts': dict(counts)}
                bar.update(written - bar.n)
                if total and counts['in']:
                    bar.total = round(written / counts['in'] * total)
                if max_tokens and written == max_tokens:
                    break
            check_interrupt()
            if shard.tokens:
                close_shard()
            if count_tokens(shards, split) < (1 if split else 2):
                made = [out_dir / entry['file'] for entry in shards]  # there is nothing to continue from
                for path in (out_dir / 'progress.json', *made, *(path.with_suffix('.mask.npy') for path in made)):
                    path.unlink(missing_ok=True)
                more = f'; held_out={settings["held_out"]}: lower it, or add some' if 'held_out' in settings else ''
                raise UserError(f'{out_dir}: too little text{" for validation" * (split == "val")} in '
                                + describe(resume['counts']) + more)
            if not split:
                cut_first(out_dir, shard, shards)
            resume = {**resume, 'split': order[order.index(split) + 1], 'corpus': None, 'skip': 0}
            save_progress()
    state['resume'] = resume


def cut_first(out_dir, shard, shards):
    """Cut the first shard into validation, at most a tenth of all tokens, and the rest of it, to train on."""
    ids = np.load(out_dir / FIRST, mmap_mode='r')
    n_val = min(len(ids), -(-count_tokens(shards) // 10))
    shard.write(ids[:n_val])
    pieces = [shard.close('val_000000.npy')]
    if n_val < len(ids):
        shard.write(ids[n_val:])
        pieces.append(shard.close('train_000000.npy'))
    shards[:1] = pieces


def tokenize(texts, tokenizer, clean, dedup):
    """
    What a worker makes of some texts, where None is a document that could not be read. Returns (tokens, keys, counts):
    the ids, (n,) of the tokenizer's dtype; with dedup, a list of keys for each document in them; documents in, dropped.
    """
    counts = collections.Counter({'in': len(texts), 'unreadable': texts.count(None), 'empty': texts.count('')})
    texts = [text for text in texts if text]
    if clean:
        texts, dropped = cleaning.clean(texts)
        counts.update(dropped)
    keys = [cleaning.KEYS[dedup](text) for text in texts] if dedup else None
    return get_tokenizer(tokenizer).encode_documents(texts), keys, counts


def in_batches(documents):
    """A corpus's (texts, state) from single (text, state)."""
    texts, chars = [], 0
    for text, state in documents:
        texts.append(text)
        chars += len(text or '')
        if chars >= BATCH_CHARS or len(texts) >= BATCH_CHARS // 10:
            yield texts, state
            texts, chars = [], 0
    if texts:
        yield texts, state


def corpus_of(texts):
    """The corpus of a list of texts, or of a function that returns an iterable of them, the same each time."""
    def corpus(state):
        first, = position(state, 'documents')
        documents = enumerate(texts() if callable(texts) else texts)
        yield from in_batches((text, {'documents': i + 1}) for i, text in documents if i >= first)
    return corpus


def position(state, *names):
    """These numbers of a corpus's resume state, or zeros at the beginning."""
    numbers = [state.get(name) for name in names] if state else [0] * len(names)
    if not all(map(is_count, numbers)):
        raise UserError(f'progress.json is damaged (there is no position such as {state}): {START_OVER}')
    return numbers


class ShardWriter:
    """
    The shard that is being written; it gets its name when it is complete and on the disk.
    .tokens: how many it holds
    """

    def __init__(self, folder, eot):
        self.folder, self.eot = folder, eot
        self.begin()

    def begin(self):
        self.files, self.tokens, self.documents = {}, 0, 0  # files: of the ids ('') and of their mask ('.mask')

    def write_header(self, file, dtype):  # of the same length for any number: numpy leaves room for it to grow
        file.seek(0)
        header = {'descr': dtype.str, 'fortran_order': False, 'shape': (self.tokens,)}
        np.lib.format.write_array_header_1_0(file, header)

    def write(self, tokens):
        """tokens: (n,) ids, or (n,) with the fields id and scored."""
        columns = {'': tokens}
        if tokens.dtype.names:
            columns = {'': np.ascontiguousarray(tokens['id']), '.mask': np.ascontiguousarray(tokens['scored'])}
        for suffix, column in columns.items():
            if suffix not in self.files:
                path = self.folder / f'{TEMPORARY}shard{suffix}'
                path.unlink(missing_ok=True)
                self.files[suffix] = open(path, 'x+b'), column.dtype
                self.write_header(*self.files[suffix])
            self.files[suffix][0].write(column)
        self.tokens += len(tokens)
        self.documents += int(np.count_nonzero(columns[''] == self.eot))

    def close(self, name):
        """Give the shard, and its mask, their names and begin the next one; returns its entry for meta.json."""
        entry = {'file': name, 'tokens': self.tokens, 'documents': self.documents}
        for suffix, (file, dtype) in reversed(self.files.items()):  # the ids come last: a named shard is complete
            self.write_header(file, dtype)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            entry['mask_sha256' if suffix else 'sha256'] = hashlib.file_digest(file, 'sha256').hexdigest()
            file.close()
            os.replace(file.name, (self.folder / name).with_suffix(f'{suffix}.npy'))
        self.begin()
        return entry


@contextlib.contextmanager
def locked(folder):
    """Keeps other processes from preparing the folder. The system releases the lock of a process that ends."""
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
        raise UserError(f'{folder} is being prepared by another process') from None
    finally:
        os.close(descriptor)


def load_state(out_dir, source, settings, corpora, dtype):
    """
    The state of an earlier run in the folder: meta.json if it is complete, else progress.json, else the beginning.
    Raises UserError if its shards were made from something else, or are missing or damaged.
    """
    new = json.loads(json.dumps({'source': source, 'settings': settings, 'shards': [], 'resume': None}))
    path = next((path for path in (out_dir / 'meta.json', out_dir / 'progress.json') if path.exists()), None)
    if not path:
        if any(out_dir.glob('*.npy')):
            raise UserError(no_meta(out_dir))
        return new
    try:
        state = json.loads(path.read_text())
        if path.name == 'meta.json':
            if state['format'] != 1:
                raise ValueError(f'it has format {state["format"]}')
            check_entries(state['shards'])
            counts = state['documents']
        elif not state['shards']:
            return new
        else:
            check_entries(state['shards'], FIRST)
            resume, counts = state['resume'], state['resume']['counts']
            if not (resume['split'] in (*corpora, 'end') and is_count(resume['skip'])
                    and isinstance(resume['corpus'], (dict, type(None)))):
                raise ValueError(f'there is no position such as {resume}')
        if 'in' not in counts or not all(map(is_count, counts.values())):
            raise ValueError(f'these are no counts of documents: {counts}')
        different = difference(state['settings'], new['settings']) or difference(state['source'], new['source'])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({error!r}): {START_OVER}') from None
    if different:
        raise UserError(f'{out_dir} was started with {different}: give another out_dir, or {START_OVER}')
    for entry in state['shards']:
        shard = listed_shard(out_dir, entry, dtype)
        for file in filter(None, (shard, shard.mask)):
            file.open().close()
    return state


def is_count(n):
    return type(n) is int and n >= 0


def earlier_source(out_dir):
    """The source recorded in the folder, {} if there is none."""
    for name in 'meta.json', 'progress.json':
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return dict(json.loads(Path(out_dir, name).read_text())['source'])
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


def count_tokens(shards, split=''):
    return sum(entry['tokens'] for entry in shards if entry['file'].startswith(split))


def write_meta(out_dir, state, tokenizer):
    """Write meta.json, which says that the dataset is complete, and return its content."""
    shards = sorted(state['shards'], key=lambda entry: entry['file'])
    meta = {'format': 1, **to_record(tokenizer), 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot,
            'dtype': np.dtype(tokenizer.dtype).name,
            'tokens': {split: count_tokens(shards, split) for split in ('train', 'val')},
            'documents': state['resume']['counts'], 'source': state['source'], 'settings': state['settings'],
            'shards': shards}
    if 'block_size' in state['settings']:
        meta['block_size'] = state['settings']['block_size']
    write(out_dir / 'meta.json', json.dumps(meta, indent=1).encode())
    return meta


def report(out_dir, meta, val_from):
    counts, settings = meta['documents'], meta['settings']
    train, val = (count_tokens(meta['shards'], split) for split in ('train', 'val'))
    print(f'{out_dir}: {train:,} tokens to train on, {val:,} for validation '
          f'({val / (train + val):.1%}, {val_from}), by the tokenizer {settings["tokenizer"]}')
    if settings['clean'] or settings['dedup'] or counts.get('unreadable'):
        dropped = dropped_by(counts)
        rows = {'documents in': counts['in'], **dropped, 'documents out': counts['in'] - sum(dropped.values())}
        print('\n'.join(f'{n:>14,}  {name}' for name, n in rows.items()))


def dropped_by(counts):
    """{rule: documents}; data/conversation.py counts more than documents."""
    return {rule: n for rule, n in counts.items() if rule not in ('in', 'cut', 'scored', 'padding')}


def describe(counts):
    """'8 documents (7 too_short, 1 duplicate)': how many came in, and what was dropped."""
    dropped = ', '.join(f'{n:,} {rule}' for rule, n in dropped_by(counts).items() if n)
    return f'{counts["in"]:,} documents' + f' (dropped: {dropped})' * bool(dropped)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
