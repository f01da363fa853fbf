"""The dataset format: what is read is what was written, in every format; what is damaged is named in one line."""
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import SHARED, TINY, losses, needs_gpt2
from data import dataset
from data.dataset import Split
from data.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write_dataset(folder, shard_size=700, vocab_size=50257, dtype='uint16', tokenizer='gpt2', **splits):
    """A dataset folder as data/prepare.py makes it: split=ids, cut into shards of shard_size ids."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, ids in splits.items():
        for i, first in enumerate(range(0, len(ids), shard_size)):
            path = folder / f'{split}_{i:06d}.npy'
            np.save(path, np.asarray(ids[first:first + shard_size], dtype))
            shards.append({'file': path.name, 'tokens': len(ids[first:first + shard_size]), 'documents': 1,
                           'sha256': hashlib.sha256(path.read_bytes()).hexdigest()})
    meta = {'format': 1, 'tokenizer': tokenizer, 'vocab_size': vocab_size, 'eot': vocab_size - 1, 'dtype': dtype,
            'tokens': {split: len(ids) for split, ids in splits.items()}, 'source': {}, 'settings': {},
            'shards': shards}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return str(folder)


def ids(n, seed=0, vocab_size=50257):
    return np.random.default_rng(seed).integers(vocab_size, size=n)


def bin_header(tokens, magic=20240520, version=1):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, tokens
    return header.tobytes()


def complaint(function, *arguments):
    """The one line of the UserError that function raises."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def check_reads(split, expected):
    """Reads of many places and lengths, within shards and across them, are what was written."""
    assert split.n_tokens == len(expected)
    for count in (1, 64, len(expected) // 2, len(expected)):
        starts = np.arange(0, len(expected) - count + 1, 37)
        assert (split.read(starts, count) == [expected[start:start + count] for start in starts]).all()


@pytest.mark.parametrize('dtype, vocab_size', [('uint16', 50257), ('uint32', 100_000)])
def test_a_split_is_one_stream_over_its_shards(tmp_path, dtype, vocab_size):
    train, val = ids(5000, 0, vocab_size), ids(900, 1, vocab_size)
    write_dataset(tmp_path, dtype=dtype, vocab_size=vocab_size, train=train, val=val)
    split = Split(str(tmp_path), 'train')
    check_reads(split, train)
    check_reads(Split(str(tmp_path), 'val'), val)
    assert (split.tokenizer, split.vocab_size, split.eot) == ('gpt2', vocab_size, vocab_size - 1)
    assert split.read(np.array([5]), 3).dtype == dtype


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    train = ids(5000)
    write_dataset(tmp_path, shard_size=50, train=train)
    monkeypatch.setattr(dataset, 'OPENED', {})
    monkeypatch.setattr(dataset, 'OPEN_FILES', 3)
    before = len(os.listdir('/dev/fd'))
    check_reads(Split(str(tmp_path), 'train'), train)
    assert len(os.listdir('/dev/fd')) <= before + 3


def test_threads_may_read_at_once(tmp_path, monkeypatch):
    """As the training's thread and an evaluation do."""
    train = ids(5000)
    write_dataset(tmp_path, shard_size=500, train=train)
    monkeypatch.setattr(dataset, 'OPENED', {})
    monkeypatch.setattr(dataset, 'OPEN_FILES', 2)
    split = Split(str(tmp_path), 'train')
    with ThreadPoolExecutor(4) as threads:
        for check in [threads.submit(check_reads, split, train) for _ in range(8)]:
            check.result()


def test_a_new_dataset_in_the_same_place_is_read(tmp_path):
    for seed in (0, 1):
        train = ids(2000, seed)
        for path in tmp_path.glob('*.npy'):
            path.unlink()
        write_dataset(tmp_path, train=train)
        check_reads(Split(str(tmp_path), 'train'), train)


def write_foreign(path, tokens, kind):
    if kind == 'npy':
        np.save(path, tokens)
    else:
        path.write_bytes((bin_header(len(tokens)) if kind == 'bin' else b'') + tokens.tobytes())


FOREIGN = {     # what people have: {project: ({split: files}, how they are written)}
    'build-nanogpt': ({'train': ['edufineweb_train_000001.npy', 'edufineweb_train_000002.npy'],
                       'val': ['edufineweb_val_000000.npy']}, 'npy'),
    'modded-nanogpt': ({'train': ['fineweb_train_000001.bin', 'fineweb_train_000002.bin'],
                        'val': ['fineweb_val_000000.bin']}, 'bin'),
    'llm.c': ({'train': ['tiny_shakespeare_train.bin'], 'val': ['tiny_shakespeare_val.bin']}, 'bin'),
    'nanoGPT': ({'train': ['train.bin'], 'val': ['val.bin']}, 'raw')}


@pytest.mark.parametrize('splits, kind', FOREIGN.values(), ids=FOREIGN)
def test_other_peoples_shards(tmp_path, splits, kind):
    for split, files in splits.items():
        tokens = ids(3000, len(split)).astype(np.uint16)
        for file, part in zip(files, np.array_split(tokens, len(files))):
            write_foreign(tmp_path / file, part, kind)
    for split in splits:
        check_reads(Split(str(tmp_path), split), ids(3000, len(split)))
    assert Split(str(tmp_path), 'val').tokenizer == 'gpt2'
    with pytest.raises(UserError, match='has no test split'):
        Split(str(tmp_path), 'test')


@needs_gpt2
def test_training_and_sampling_from_other_peoples_shards(tmp_path, inside):
    """The same tokens in each format give the same losses, and from the checkpoint comes text."""
    seen = []
    for project in 'build-nanogpt', 'modded-nanogpt', 'nanoGPT':
        splits, kind = FOREIGN[project]
        (tmp_path / project).mkdir()
        for files in splits.values():
            write_foreign(tmp_path / project / files[0], ids(4000).astype(np.uint16), kind)
        out_dir = tmp_path / f'out-{project}'
        inside('train.py', *TINY, '--max_iters=2', f'--dataset={tmp_path / project}', f'--out_dir={out_dir}')
        seen.append(losses(out_dir))
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]
    if not (SHARED / 'tiktoken').is_dir():
        pytest.skip("sampling needs GPT-2's vocabulary")
    assert inside('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=8', '--device=cpu')


def rewrite_meta(**changes):
    def rewrite(path):
        meta = json.loads((path.parent / 'meta.json').read_text())
        meta = {key: value for key, value in (meta | changes).items() if value is not None}
        (path.parent / 'meta.json').write_text(json.dumps(meta))
    return rewrite


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b'12')


def bad_id(path):
    tokens = np.load(path)
    tokens[0] = 50257
    np.save(path, tokens)


def flip(path):
    """Another token, of those the vocabulary has: only the sha256 tells."""
    tokens = np.load(path)
    tokens[350] = (tokens[350] + 1) % 50000
    np.save(path, tokens)


SHARD, META = 'train_000001.npy', 'meta.json'
DAMAGE = {      # what happened to a shard or to meta.json: (how, the file that is named, words of the line)
    'truncated': (cut, SHARD, 'damaged'),
    'too long': (lengthen, SHARD, 'header promises'),
    'empty': (lambda path: path.write_bytes(b''), SHARD, 'damaged'),
    'header only': (lambda path: np.save(path, np.zeros(0, np.uint16)), SHARD, 'no tokens'),
    'a web page': (lambda path: path.write_text('<html>404</html>'), SHARD, 'damaged'),
    'a pickle': (lambda path: np.save(path, np.array([{}, None])), SHARD, 'damaged'),
    'floats': (lambda path: np.save(path, np.zeros(700, np.float32)), SHARD, '1-D float32, not 1-D uint16'),
    'big-endian': (lambda path: np.save(path, np.zeros(700, '>u2')), SHARD, 'not 1-D uint16'),
    'a matrix': (lambda path: np.save(path, np.zeros((7, 100), np.uint16)), SHARD, '2-D uint16'),
    'another dtype': (lambda path: np.save(path, np.zeros(700, np.uint32)), SHARD, 'lists 700 of uint16'),
    'another length': (lambda path: np.save(path, np.zeros(600, np.uint16)), SHARD, 'lists 700 of uint16'),
    'missing': (lambda path: path.unlink(), SHARD, 'is missing'),
    'id outside the vocabulary': (bad_id, SHARD, 'the id 50257'),
    'meta.json cut': (lambda path: cut(path.parent / META), META, 'cannot be used'),
    'meta.json of another kind': (lambda path: (path.parent / META).write_text('[]'), META, 'cannot be used'),
    'meta.json without dtype': (rewrite_meta(dtype=None), META, "'dtype'"),
    'meta.json with a dtype of its own': (rewrite_meta(dtype='tokens'), META, 'tokens'),
    'meta.json of the future': (rewrite_meta(format=2), META, 'format 2'),
    'meta.json without shards': (rewrite_meta(shards=[]), META, 'lists no shards'),
    'meta.json nested too deep': (lambda path: (path.parent / META).write_text('[' * 100_000), META, 'cannot be used'),
    'a path out of the folder': (rewrite_meta(shards=[{'file': '../x.npy', 'tokens': 5, 'sha256': ''}]), META,
                                 '../x.npy'),
    'an absolute path': (rewrite_meta(shards=[{'file': '/x/train_0.npy', 'tokens': 5, 'sha256': ''}]), META, '/x/train_0'),
    'a header too large': (lambda path: path.write_bytes(b'\x93NUMPY\x01\x00\xff\xff' + b'(' * 70_000), SHARD,
                           'damaged'),
}


@pytest.mark.parametrize('harm, file, words', DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_when_training_starts(tmp_path, harm, file, words):
    write_dataset(tmp_path, train=ids(2000))
    harm(tmp_path / SHARD)
    line = complaint(Split, str(tmp_path), 'train')
    assert str(tmp_path / file) in line and words in line


@pytest.mark.parametrize('content, words', [
    (bin_header(500, magic=20240801) + bytes(1000), 'does not begin with 20240520'),
    (bin_header(500, version=2) + bytes(1000), 'version 2'),
    (bin_header(501) + bytes(1000), 'header promises 501'),
    (bin_header(-1) + bytes(1000), 'header promises -1'),
    (bin_header(0), 'no tokens'),
    (b'', 'damaged'),
], ids=['magic', 'version', 'truncated', 'negative', 'no tokens', 'empty'])
def test_damage_of_bin_files(tmp_path, content, words):
    (tmp_path / 'fineweb_train_000001.bin').write_bytes(content)
    line = complaint(Split, str(tmp_path), 'train')
    assert 'fineweb_train_000001.bin' in line and words in line


def test_half_a_token_in_train_bin(tmp_path):
    (tmp_path / 'train.bin').write_bytes(bytes(1001))
    assert 'train.bin is damaged' in complaint(Split, str(tmp_path), 'train')


def test_shards_of_two_dtypes(tmp_path):
    np.save(tmp_path / 'a_train_000001.npy', np.zeros(700, np.uint16))
    np.save(tmp_path / 'a_train_000002.npy', np.zeros(700, np.uint32))
    assert 'a_train_000002.npy holds uint32' in complaint(Split, str(tmp_path), 'train')


def test_a_shard_that_meta_json_does_not_describe_is_refused_each_time(tmp_path):
    write_dataset(tmp_path, train=ids(700))
    split = Split(str(tmp_path), 'train', check=False)
    np.save(tmp_path / 'train_000000.npy', np.zeros(600, np.uint16))
    for _ in range(2):
        with pytest.raises(UserError, match='it holds 600 ids of uint16, and meta.json lists 700 of uint16'):
            split.shards[0].open()


def test_an_id_outside_the_vocabulary_is_found_when_it_is_read(tmp_path):
    """The look at the start sees only a sample of 3 x 4,096 ids a shard."""
    tokens = ids(50_000)
    tokens[7_000] = 50257
    write_dataset(tmp_path, shard_size=25_000, train=tokens)
    split = Split(str(tmp_path), 'train')
    split.read(np.array([7_001]), 100)
    assert f'{tmp_path / "train_000000.npy"} holds the id 50257' in complaint(split.read, np.array([9, 6_950]), 100)


def test_a_shard_that_shrinks_or_goes_while_it_is_in_use(tmp_path):
    write_dataset(tmp_path, train=ids(2000))
    split = Split(str(tmp_path), 'train')
    os.truncate(tmp_path / SHARD, 300)
    assert f'{tmp_path / SHARD} was there at the start' in complaint(split.read, np.array([1300]), 64)


def test_no_dataset(tmp_path, monkeypatch):
    assert 'no dataset in data/stdlib: run `python data/stdlib/prepare.py`' in complaint(
        dataset.no_dataset, ROOT / 'data' / 'stdlib')
    assert 'no dataset in data/fineweb_edu_10B: run `python prepare_fineweb.py`' in complaint(
        dataset.no_dataset, ROOT / 'data' / 'fineweb_edu_10B')
    assert 'no dataset in data/no_such_name: `python prepare_fineweb.py --out_dir=data/no_such_name`' in complaint(
        Split, 'no_such_name', 'train')
    monkeypatch.chdir(ROOT)
    assert 'no dataset in data/none: ' in complaint(Split, './data/none', 'train')
    assert f'no dataset in {tmp_path}' in complaint(Split, str(tmp_path), 'train')
    (tmp_path / 'prepare.py').touch()
    assert f'run `python {tmp_path}/prepare.py`' in complaint(Split, str(tmp_path), 'train')


def test_one_process_checks_for_all(tmp_path, monkeypatch):
    """The others open a shard when they read it, and find its damage then."""
    write_dataset(tmp_path, train=ids(2100))
    opened, read_header = [], dataset.read_header
    monkeypatch.setattr(dataset, 'read_header', lambda path, dtypes: [opened.append(path.name), read_header(path, dtypes)][1])
    Split(str(tmp_path), 'train')
    assert sorted(opened) == ['train_000000.npy', 'train_000001.npy', 'train_000002.npy']
    opened.clear()
    split = Split(str(tmp_path), 'train', check=False)
    assert not opened
    cut(tmp_path / SHARD)
    assert (split.read(np.array([1500]), 64) == ids(2100)[1500:1564]).all() and opened == ['train_000002.npy']
    assert f'{tmp_path / SHARD} is damaged' in complaint(split.read, np.array([800]), 64)


def test_no_such_split(tmp_path):
    write_dataset(tmp_path / 'ours', train=ids(2000))
    assert 'ours has no val split' in complaint(Split, str(tmp_path / 'ours'), 'val')
    np.save(tmp_path / 'a_train_000001.npy', np.zeros(700, np.uint16))
    assert 'has no val split' in complaint(Split, str(tmp_path), 'val')


def test_preparation_was_interrupted(tmp_path):
    write_dataset(tmp_path, train=ids(2000))
    (tmp_path / 'meta.json').unlink()
    line = complaint(Split, str(tmp_path), 'train')     # a lost meta.json, or somebody's own shards
    assert f'{tmp_path} has shards, but no meta.json' in line and 'interrupted' not in line
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / 'progress.json').write_text('{}')
    assert f'the preparation of {tmp_path} was interrupted' in complaint(Split, str(tmp_path), 'train')


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_dataset(tmp_path / 'text', train=ids(1000))
    assert Split('~/text', 'train').folder == tmp_path / 'text'
    assert 'no dataset in' in complaint(Split, '~no_such_user/text', 'train')


def test_characters_of_nanogpt(tmp_path):
    for file in ('train.bin', 'val.bin', 'meta.pkl'):
        (tmp_path / file).write_bytes(bytes(1000))
    assert 'meta.pkl' in complaint(Split, str(tmp_path), 'train')


def test_a_name_means_the_folder_under_data(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, 'ROOT', tmp_path / 'repository')
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / 'text', train=ids(1000, 1))
    assert Split('text', 'train').folder == Path('text')
    write_dataset(tmp_path / 'repository' / 'data' / 'text', train=ids(1000, 2))
    assert Split('text', 'train').folder == tmp_path / 'repository' / 'data' / 'text'
    assert Split('./text', 'train').folder == Path('text')


@pytest.fixture
def verify(capfd):
    """dataset.verify in this process, with the result of a process."""
    def run_here(folder):
        capfd.readouterr()
        try:
            dataset.verify(str(folder))
            status, line = 0, ''
        except UserError as error:
            status, line = error.status, f'{error}\n'
        captured = capfd.readouterr()
        return subprocess.CompletedProcess('verify', status, captured.out, captured.err + line)
    return run_here


def test_the_command_that_verifies(tmp_path):
    write_dataset(tmp_path, train=ids(2000))
    cut(tmp_path / SHARD)
    result = subprocess.run([sys.executable, '-m', 'data.dataset', str(tmp_path)], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert f'{tmp_path / SHARD} is damaged' in result.stderr.splitlines()[0]


def test_verify(tmp_path, verify):
    write_dataset(tmp_path, train=ids(2000), val=ids(800))
    result = verify(tmp_path)
    assert (result.returncode, result.stderr) == (0, '') and 'all 5 shards are intact' in result.stdout
    flip(tmp_path / SHARD)
    (tmp_path / 'val_000001.npy').unlink()
    Split(str(tmp_path), 'train')       # finds nothing
    result = verify(tmp_path)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    sha, missing, summary = result.stderr.splitlines()
    assert f'{tmp_path / SHARD} is damaged' in sha and 'sha256' in sha
    assert f'{tmp_path / "val_000001.npy"} is missing' in missing
    assert summary == '2 of 5 shards are damaged'


def test_verify_reads_each_id(tmp_path, verify):
    tokens = ids(50_000).astype(np.uint16)
    tokens[12_345] = 50257
    np.save(tmp_path / 'a_train_000001.npy', tokens)
    result = verify(tmp_path)
    assert result.returncode == 1 and 'a_train_000001.npy holds the id 50257' in result.stderr
    np.save(tmp_path / 'a_train_000001.npy', np.minimum(tokens, 50256))
    assert verify(tmp_path).returncode == 0
