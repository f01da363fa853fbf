"""Preparing data: what comes in is what is in the shards, whoever kills it in between, and every mistake is one line."""
import csv
import gzip
import json
import os
import random
import signal
import time
import tokenize
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SHARED, finish, run, start

from data import prepare as engine
from data.errors import UserError
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer('bytes')
TEXTS = [f'Document {i}: ' + 'né 漢 🙂 \n' * (i % 7) for i in range(60)]


def prepare(out_dir, *args, expect=0, tokenizer='bytes', **how):
    return run('prepare_fineweb.py', f'--out_dir={out_dir}', f'--tokenizer={tokenizer}', *args, expect=expect, **how)


def complaint(out_dir, *args, **how):
    """The one line on stderr with which preparing fails."""
    err = prepare(out_dir, *args, expect=1, **how).err
    assert err.count('\n') == 1, err
    return err


def stream(folder, *splits):
    """All token ids of the splits, one shard after the other."""
    return np.concatenate([np.load(path) for split in splits for path in sorted(folder.glob(f'{split}_*.npy'))])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path, texts, key='text'):
    path.write_text(''.join(json.dumps({key: text}) + '\n' for text in texts))
    return path


# -----------------------------------------------------------------------------
# the shards

def test_first_shard_is_validation_and_documents_run_on(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    prepare(tmp_path / 'out', f'--data_files={tmp_path}/a.jsonl', '--shard_size=500')
    expected = BYTES.encode_documents(TEXTS)
    assert (stream(tmp_path / 'out', 'val', 'train') == expected).all()
    assert [len(np.load(path)) for path in sorted((tmp_path / 'out').glob('val_*'))] == [500]
    sizes = [len(np.load(path)) for path in sorted((tmp_path / 'out').glob('train_*'))]
    assert set(sizes[:-1]) == {500} and sizes[-1] == (len(expected) - 1) % 500 + 1


def test_meta_says_what_is_there(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    prepare(tmp_path / 'out', f'--data_files={path}', '--shard_size=700')
    meta = json.loads((tmp_path / 'out/meta.json').read_text())
    assert (meta['format'], meta['tokenizer'], meta['vocab_size'], meta['eot'], meta['dtype']) == \
        (1, 'bytes', 257, 256, 'uint16')
    assert meta['tokens'] == {split: len(stream(tmp_path / 'out', split)) for split in ('train', 'val')}
    assert sum(shard['documents'] for shard in meta['shards']) == meta['documents']['in'] == len(TEXTS)
    assert meta['source']['files'] == {str(path): path.stat().st_size}
    assert meta['settings']['shard_size'] == 700 and meta['settings']['text_key'] == 'text'
    assert {path.name for path in (tmp_path / 'out').iterdir()} == \
        {'meta.json', *(shard['file'] for shard in meta['shards'])}
    checked = run('data/dataset.py', tmp_path / 'out', PYTHONPATH=str(ROOT))
    assert 'whole' in checked.out


def test_small_text_gives_a_tenth_to_validation_and_max_tokens_is_exact(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    prepare(tmp_path / 'out', f'--data_files={tmp_path}/a.jsonl', '--max_tokens=1001')
    assert len(stream(tmp_path / 'out', 'val')) == 101
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(TEXTS)[:1001]).all()
    prepare(tmp_path / 'one', f'--data_files={tmp_path}/a.jsonl', '--max_tokens=500', '--shard_size=500')
    assert len(stream(tmp_path / 'one', 'val')) == 50       # a single whole shard leaves something to train on


def test_documents_that_come_to_nothing_do_not_end_it(tmp_path):
    engine.prepare(tmp_path / 'out', engine.corpus_of([''] * 250_000 + TEXTS), tokenizer='bytes', num_proc=2)
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(TEXTS)).all()


# -----------------------------------------------------------------------------
# interruption

def killed(script, out_dir, *args, shard_size, times, shards, pause):
    """Start the script and SIGKILL it, so many times, a few shards and a moment later; then let it finish."""
    chance = random.Random(1)
    args = [f'--out_dir={out_dir}', f'--shard_size={shard_size}', *args]
    for _ in range(times):
        goal = len(list(out_dir.glob('*.npy'))) + chance.randrange(shards)
        process = start(script, f'--num_proc={chance.randrange(1, 4)}', *args)
        while process.poll() is None and not ((out_dir / 'shard.tmp').exists()
                                              and len(list(out_dir.glob('*.npy'))) >= goal):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, pause))
        assert process.poll() is None, f'it ended before it was killed: {process.stderr.read()}'
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for path in out_dir.glob('*.npy'):
            assert path.stat().st_size == 128 + 2 * len(np.load(path, mmap_mode='r')), f'{path} is not whole'
    assert len(list(out_dir.glob('*.npy'))) > times / 2
    run(script, *args)


def test_killed_twenty_times_ends_with_the_same_bytes(tmp_path):
    run('data/stdlib/prepare.py', f'--out_dir={tmp_path}/whole', '--shard_size=100_000')
    killed('data/stdlib/prepare.py', tmp_path / 'killed', shard_size=100_000, times=20, shards=4, pause=0.01)
    assert files_of(tmp_path / 'killed') == files_of(tmp_path / 'whole')


@pytest.mark.parametrize('source, cleaning', [('hub', []), ('files', []), ('files', ['--clean'])])
def test_killed_with_other_sources(tmp_path, source, cleaning):
    """The place in the files survives, the duplicates, and the counts; to clean, the workers are processes."""
    words = random.Random(5).choices([f'word{i}' for i in range(5000)], k=500_000)
    texts = [' '.join(words[i:i + 100]) for i in range(0, 500_000, 100)]
    (tmp_path / 'raw').mkdir()
    for i in range(3):      # of 2,000 texts, the first 500 of each file are the last of the one before
        pyarrow.parquet.write_table(pyarrow.table({'text': texts[i * 1500:][:2000]}), tmp_path / f'raw/{i}.parquet',
                                    row_group_size=300)
    where = f'--dataset={tmp_path}/raw' if source == 'hub' else f'--data_files={tmp_path}/raw/*'
    args = [where, '--tokenizer=bytes', *cleaning]
    run('prepare_fineweb.py', f'--out_dir={tmp_path}/whole', '--shard_size=50_000', *args)
    killed('prepare_fineweb.py', tmp_path / 'killed', *args, shard_size=50_000, times=3, shards=40, pause=0.01)
    assert files_of(tmp_path / 'killed') == files_of(tmp_path / 'whole')
    counts = json.loads((tmp_path / 'whole/meta.json').read_text())['documents']
    assert counts['in'] == 6000 and counts.get('duplicate', 0) == 1000 * len(cleaning)


def test_workers_die_with_their_parent(tmp_path):
    texts = [' '.join(f'word{i * j % 977}' for j in range(300)) for i in range(20_000)]
    write_jsonl(tmp_path / 'a.jsonl', texts)
    process = start('prepare_fineweb.py', f'--out_dir={tmp_path}/out', f'--data_files={tmp_path}/a.jsonl', '--clean',
                    '--tokenizer=bytes', '--num_proc=2', '--shard_size=100_000')
    while not list((tmp_path / 'out').glob('*.npy')) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    if not children.exists():
        pytest.skip('only Linux tells who a process has begotten')
    children = [Path('/proc') / child for child in children.read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.time() + 30
    while any(child.exists() and 'Z' not in (child / 'stat').read_text().split()[2] for child in children):
        assert time.time() < deadline, 'workers outlive their parent'
        time.sleep(0.05)


def test_other_settings_are_refused(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    prepare(tmp_path / 'out', f'--data_files={path}', '--shard_size=500')
    before = files_of(tmp_path / 'out')
    again = [f'--data_files={path}', '--shard_size=500']
    assert 'shard_size=500, not 600' in complaint(tmp_path / 'out', f'--data_files={path}', '--shard_size=600')
    assert 'max_tokens=0, not 9' in complaint(tmp_path / 'out', *again, '--max_tokens=9')
    assert 'tokens to train on' in prepare(tmp_path / 'out', *again, '--num_proc=1').out
    write_jsonl(path, TEXTS[1:])
    assert 'a.jsonl=' in complaint(tmp_path / 'out', *again)
    assert files_of(tmp_path / 'out') == before
    shard = tmp_path / 'out/train_000000.npy'
    shard.write_bytes(shard.read_bytes()[:-1])
    write_jsonl(path, TEXTS)
    assert f'{shard} is missing or damaged' in complaint(tmp_path / 'out', *again)
    (tmp_path / 'out/meta.json').unlink()
    assert 'nothing says what made it' in complaint(tmp_path / 'out', *again)


def test_two_at_once_are_refused(tmp_path):
    process = start('data/stdlib/prepare.py', f'--out_dir={tmp_path}/out', '--shard_size=50_000')
    while not (tmp_path / 'out/progress.json').exists() and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGSTOP)
    err = run('data/stdlib/prepare.py', f'--out_dir={tmp_path}/out', '--shard_size=50_000', expect=1).err
    os.killpg(process.pid, signal.SIGCONT)
    assert err == f'{tmp_path}/out is being prepared by another process\n'
    assert finish(process).returncode == 0


def test_ctrl_c_is_one_line(tmp_path):
    process = start('data/stdlib/prepare.py', f'--out_dir={tmp_path}/out', '--shard_size=50_000')
    while not list((tmp_path / 'out').glob('*.npy')) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process).returncode == 1
    assert process.err == f'interrupted: the same command goes on from the last whole shard in {tmp_path}/out\n'


# -----------------------------------------------------------------------------
# kinds of input

def parquet(path, texts):
    pyarrow.parquet.write_table(pyarrow.table({'id': range(len(texts)), 'text': texts}), path)


def csv_file(path, texts):
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([('id', 'text'), *enumerate(texts)])


def zst(path, texts):
    write_jsonl(path, texts)
    content = path.read_bytes()
    with pyarrow.output_stream(str(path), compression='zstd') as file:
        file.write(content)


WRITERS = {
    'a.jsonl': write_jsonl,
    'a.json': lambda path, texts: path.write_text(json.dumps([{'text': text} for text in texts])),
    'a.jsonl.gz': lambda path, texts: path.write_bytes(gzip.compress(write_jsonl(path, texts).read_bytes())),
    'a.jsonl.zst': zst,
    'a.parquet': parquet,
    'a.csv': csv_file,
}


@pytest.mark.parametrize('name', WRITERS)
def test_each_kind_of_file(tmp_path, name):
    WRITERS[name](tmp_path / name, TEXTS)
    prepare(tmp_path / 'out', f'--data_files={tmp_path}/*')
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(TEXTS)).all()


@pytest.mark.parametrize('split, documents', [
    ('file', ['one\ntwo\n\n\nthree\n', 'four']),
    ('line', ['one', 'two', 'three', 'four']),
    ('blank', ['one\ntwo', 'three', 'four'])])
def test_text_files(tmp_path, split, documents):
    (tmp_path / 'a.txt').write_text('one\ntwo\n\n\nthree\n')
    (tmp_path / 'b.txt').write_text('four')
    prepare(tmp_path / 'out', f'--data_files={tmp_path}/*.txt', f'--txt_split={split}')
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(documents)).all()


@pytest.mark.parametrize('streaming', [True, False])
def test_a_dataset_that_datasets_loads(tmp_path, streaming):
    (tmp_path / 'raw').mkdir()
    parquet(tmp_path / 'raw/train.parquet', TEXTS)
    prepare(tmp_path / 'out', f'--dataset={tmp_path}/raw', f'--streaming={streaming}', HF_HOME=str(tmp_path / 'hf'))
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(TEXTS)).all()
    other = prepare(tmp_path / 'out', f'--dataset={tmp_path}/raw', f'--streaming={not streaming}', expect=1,
                    HF_HOME=str(tmp_path / 'hf')).err
    assert f'streaming={streaming}, not {not streaming}' in other  # which would count on from another place
    err = complaint(tmp_path / 'no', f'--dataset={tmp_path}/raw', '--text_key=body')
    assert "no column 'body'" in err and 'id, text' in err


BAD = {     # a file and what is said about it, where
    'a.jsonl': (b'{"text": "fine"}\n{"text": \n{"text": "good"}\n', 'a.jsonl:2: not JSON'),
    'b.jsonl': (b'{"text": "fine"}\n{"body": "x"}\n{"text": "good"}\n', "b.jsonl:2: no 'text' in it, but body"),
    'c.jsonl': (b'{"text": "fine"}\n\n{"text": 7}\n{"text": "good"}\n', 'c.jsonl:3: text is of type int'),
    'd.jsonl': (b'{"text": "fine"}\n{"text": "\xff"}\n{"text": "good"}\n', 'd.jsonl:2: not JSON'),
    'e.csv': (b'text,b\nfine,1\nx,2,3\ngood,4\n', 'e.csv:3: more fields'),
    'f.txt': (b'fine\ngo\xffod\ngood\n', 'f.txt:2: not UTF-8'),
    'f.csv': (b'text,b\nfine,1\ngo\xffod,2\ngood,3\n', 'f.csv:3: not UTF-8'),
    'g.jsonl': (b'{"text": "fine"}\n[1]\n{"text": "good"}\n', 'g.jsonl:2: not an object'),
}
BAD_FILES = {
    'h.parquet': (b'{"text": "fine"}\n', 'h.parquet:1: '),
    'i.jsonl.gz': (b'{"text": "fine"}\n', 'i.jsonl.gz:1: '),
    'i.json': (b'[' * 100_000, 'i.json:1: '),
    'j.jsonl.gz': (gzip.compress(os.urandom(1000))[:900], 'j.jsonl.gz:1: '),
    'k.csv': (b'body\nx\n', "k.csv:2: no 'text' in it, but body"),
}


@pytest.mark.parametrize('name', BAD | BAD_FILES)
def test_what_cannot_be_read_is_named_or_skipped(tmp_path, name):
    content, where = (BAD | BAD_FILES)[name]
    (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / 'z.jsonl', ['after'])
    args = [f'--data_files={tmp_path}/*.*', '--txt_split=line']
    assert f'{tmp_path}/{where}' in complaint(tmp_path / 'out', *args)
    skipped = prepare(tmp_path / 'out', *args, '--skip_bad')
    expected = ['fine', 'good', 'after'] if name in BAD else ['after']
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(expected)).all()
    assert '1  unreadable' in skipped.out


def test_mistakes_are_one_line(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    own = f'--data_files={tmp_path}/a.jsonl'
    assert 'no file is named' in complaint(tmp_path / 'out', f'--data_files={tmp_path}/b.jsonl')
    assert 'try' in complaint(tmp_path / 'out', f'--data_files={tmp_path}')
    assert 'gpt2 and bytes' in complaint(tmp_path / 'out', own, tokenizer='gpt5')
    assert 'shard_size' in complaint(tmp_path / 'out', own, '--shard_size=0')
    assert 'exact and minhash' in complaint(tmp_path / 'out', own, '--dedup=all')
    assert 'file, line and blank' in complaint(tmp_path / 'out', own, '--txt_split=word')
    assert 'cannot be loaded' in complaint(tmp_path / 'out', '--dataset=no/such')
    (tmp_path / 'empty.jsonl').touch()
    assert 'too little text' in complaint(tmp_path / 'out', f'--data_files={tmp_path}/empty.jsonl')
    assert 'is for FineWeb-Edu' in run('prepare_fineweb.py', own, expect=1).err
    (tmp_path / 'file').touch()
    assert 'file' in complaint(tmp_path / 'file', own)


# -----------------------------------------------------------------------------
# the other scripts

def test_shakespeare_as_nanogpt_splits_it(tmp_path):
    text = SHARED / 'data/tinyshakespeare.txt'
    if not text.exists():
        pytest.skip('no copy of Tiny Shakespeare here')
    run('data/shakespeare_char/prepare.py', f'--input={text}', f'--out_dir={tmp_path}/out')
    assert BYTES.decode_bytes(stream(tmp_path / 'out', 'train')[1:]) == text.read_bytes()[:1003854]
    assert BYTES.decode_bytes(stream(tmp_path / 'out', 'val')[1:]) == text.read_bytes()[1003854:]


def test_wikitext_articles_are_documents(tmp_path):
    articles = [f' \n = Title {i} = \n \n Text {i} . \n \n = = Part = = \n \n More . \n' for i in range(20)]
    (tmp_path / 'wiki.txt').write_text(''.join(articles))
    run('data/wikitext2/prepare.py', f'--input={tmp_path}/wiki.txt', f'--out_dir={tmp_path}/out', '--tokenizer=bytes')
    meta = json.loads((tmp_path / 'out/meta.json').read_text())
    assert [shard['documents'] for shard in meta['shards']] == [18, 2]
    assert BYTES.decode(stream(tmp_path / 'out', 'train')).startswith('<|endoftext|> = Title 0 = \n')


def test_the_standard_library_holds_out_whole_files(dataset):
    train, val = (BYTES.decode(stream(dataset, split)).split('<|endoftext|>')[1:] for split in ('train', 'val'))
    files = json.loads((dataset / 'meta.json').read_text())['source']['files']
    held_out = [Path(json.__file__).parents[1] / file for file in list(files)[::20]]
    assert val == [text for path in held_out if (text := tokenize.open(path).read())]
    assert len(train) > 10 * len(val) and Path(json.__file__).read_text() in train + val


def test_a_download_is_checked(tmp_path, monkeypatch):
    import http.server
    import threading

    from data.download import download
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'served.txt').write_text('hello')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/served.txt'
    sha256 = '2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824'
    monkeypatch.setenv('NO_PROXY', '*')
    try:
        with pytest.raises(UserError, match='not what it was'):
            download(url, '0' * 64, tmp_path / 'wrong.txt')
        with pytest.raises(UserError, match='--input=FILE'):
            download(url + 'x', sha256, tmp_path / 'wrong.txt')
        assert download(url, sha256, tmp_path / 'right.txt').read_text() == 'hello'
    finally:
        server.shutdown()
    assert {path.name for path in tmp_path.iterdir()} == {'served.txt', 'right.txt'}
