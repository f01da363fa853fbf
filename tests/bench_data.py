"""
Data: how fast text becomes tokens, and how fast batches of them come.

    python tests/bench_data.py --peer=../build-nanogpt
    python tests/bench_data.py --peer=../nanoGPT

Ours and the peer's run in turns, in one process, on the same random tokens from the page cache; the rates are
medians. Ours draw shuffled blocks and check every id; build-nanogpt slices shards in sequence, and nanoGPT draws
random crops. Texts are the standard library's, in pieces of 4,000 characters, in memory for all; tiktoken alone
and tokenizers alone throw their tokens away; the latter's tokenizer.json is GPT-2's, as export.py writes it.
"""
import ast
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
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
from data.prepare import corpus_of, prepare
from data.tokenizer import get_tokenizer, tokenizer_files

peer = ''  # a checkout of build-nanogpt or nanoGPT
tokens = 100_000_000  # in the dataset
batch_size = 16
block_size = 1024
seconds = 1.0  # of each in turn
rounds = 5
megabytes = 48  # of text to tokenize
num_proc = 2  # workers that tokenize


def bench_tokenizing():
    print(f'tokenizing {megabytes} MB with {num_proc} workers, M tokens/s (bytes: MB/s)')
    files = sorted(Path(sysconfig.get_path('stdlib')).rglob('*.py'))
    text = ''.join(file.read_text(encoding='utf-8', errors='ignore') for file in files)
    pieces = [text[i:i + 4000] for i in range(0, len(text), 4000)]
    texts = (pieces * (megabytes * 1_000_000 // len(text) + 1))[:megabytes * 250]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'tokenizer.json')
        file.write_text(json.dumps(tokenizer_files(get_tokenizer('gpt2'), 1024)[file.name]))
        ways = {('ours', 'gpt2'): lambda: prepare_rate(texts, 'gpt2'),
                ('ours', 'bytes'): lambda: prepare_rate(texts, 'bytes'),
                ('ours', file.name): lambda: prepare_rate(texts, folder),
                ('tiktoken alone', 'gpt2'): lambda: tiktoken_rate(texts),
                ('tokenizers alone', file.name): lambda: tokenizers_rate(texts, file)}
        if (Path(peer) / 'fineweb.py').exists():
            ways[Path(peer).name, 'gpt2'] = lambda: peer_rate(texts)
        report(in_turns(ways))


def prepare_rate(texts, tokenizer):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        prepare(folder, corpus_of(texts), tokenizer=tokenizer, num_proc=num_proc)
        seconds = time.perf_counter() - began
        meta = json.loads(Path(folder, 'meta.json').read_text())
    return sum(meta['tokens'].values()) / seconds / 1e6


def tiktoken_rate(texts):
    """One call a document in each of `num_proc` processes, which have the texts already."""
    global encode_share

    def encode_share(i):
        bpe = get_tokenizer('gpt2').bpe
        return sum(len(bpe.encode_to_numpy(text, disallowed_special=())) for text in texts[i::100])

    with multiprocessing.get_context('fork').Pool(num_proc) as pool:
        began = time.perf_counter()
        return sum(pool.imap_unordered(encode_share, range(100))) / (time.perf_counter() - began) / 1e6


def tokenizers_rate(texts, file):
    """The library's own batch call, in batches of 250 texts, on all cores."""
    import tokenizers
    os.environ['TOKENIZERS_PARALLELISM'] = 'true'  # prepare turns it off
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    began, n = time.perf_counter(), 0
    for i in range(0, len(texts), 250):
        n += sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts[i:i + 250], add_special_tokens=False))
    return n / (time.perf_counter() - began) / 1e6


def peer_rate(texts):
    """build-nanogpt's script as it is, but for where it gets the documents from, and with `num_proc` processes."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'texts.json').write_text(json.dumps(texts))
        Path(folder, 'fineweb.py').write_text((Path(peer) / 'fineweb.py').read_text())
        code = (f'import datasets, json, os, runpy, time\n'
                f'documents = [dict(text=text) for text in json.load(open("texts.json"))]\n'
                f'def load_dataset(*args, **kwargs):\n'
                f'    global began\n'
                f'    began = time.perf_counter()\n'
                f'    return documents\n'
                f'datasets.load_dataset = load_dataset\n'
                f'os.cpu_count = lambda: {2 * num_proc}\n'
                f'runpy.run_path("fineweb.py", run_name="__main__")\n'
                f'print(time.perf_counter() - began)\n')
        done = subprocess.run([sys.executable, '-c', code], cwd=folder, check=True, capture_output=True, text=True)
        shards = Path(folder, 'edu_fineweb10B').glob('*.npy')
        return sum(len(np.load(shard)) for shard in shards) / float(done.stdout.split()[-1]) / 1e6


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
        print(f'  {who:16s} {what:15s} {rate:8.1f}{ratio}')


if __name__ == '__main__':
    configure(globals())
    peer = os.path.abspath(peer) if peer else ''
    bench_tokenizing()
    bench_loader()
