"""Preparing data: what comes in is what is in the shards, whoever kills it in between, and every mistake is one line."""
import contextlib
import csv
import gzip
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path
from types import SimpleNamespace

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


def run_here(script, *args, expect=0):
    """A prepare script in this process, as conftest's run() does it in one of its own: .out and .err."""
    out, argv, hook = io.StringIO(), sys.argv, sys.excepthook
    sys.argv = [str(ROOT / script), *map(str, args)]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(sys.argv[0], run_name='__main__')
        status, err = 0, ''
    except UserError as error:
        status, err = error.status, ' '.join(str(error).split()) + '\n'
    finally:
        sys.argv, sys.excepthook = argv, hook
    assert status == expect, err or out.getvalue()
    return SimpleNamespace(out=out.getvalue(), err=err)


def prepare(out_dir, *args, expect=0, tokenizer='bytes'):
    return run_here('prepare_fineweb.py', f'--out_dir={out_dir}', f'--tokenizer={tokenizer}', *args, expect=expect)


def complaint(out_dir, *args, **how):
    """The one line with which preparing fails."""
    return prepare(out_dir, *args, expect=1, **how).err


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
    prepare(tmp_path / 'out', f'--data_files={tmp_path}/a.jsonl', '--shard_size=100')
    expected = BYTES.encode_documents(TEXTS)
    assert len(expected) > 1000
    assert (stream(tmp_path / 'out', 'val', 'train') == expected).all()
    assert [len(np.load(path)) for path in sorted((tmp_path / 'out').glob('val_*'))] == [100]
    sizes = [len(np.load(path)) for path in sorted((tmp_path / 'out').glob('train_*'))]
    assert set(sizes[:-1]) == {100} and sizes[-1] == (len(expected) - 1) % 100 + 1


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
    assert 'intact' in checked.out


def test_small_text_gives_a_tenth_to_validation_and_max_tokens_is_exact(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    prepare(tmp_path / 'out', f'--data_files={tmp_path}/a.jsonl', '--max_tokens=1001')
    assert len(stream(tmp_path / 'out', 'val')) == 101
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(TEXTS)[:1001]).all()
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    documents = sum(shard['documents'] for shard in meta['shards'])
    assert meta['documents']['beyond_max_tokens'] == len(TEXTS) - documents > 0
    prepare(tmp_path / 'one', f'--data_files={tmp_path}/a.jsonl', '--max_tokens=500', '--shard_size=500')
    assert len(stream(tmp_path / 'one', 'val')) == 50       # a single whole shard leaves something to train on


def test_validation_is_at_most_a_tenth(tmp_path):
    """Also where a shard is most of the text, and not a whole one."""
    expected = BYTES.encode_documents(TEXTS)
    for shard_size in len(expected) - 1, len(expected) // 2, len(expected) // 7:
        out = tmp_path / str(shard_size)
        path = write_jsonl(tmp_path / 'a.jsonl', TEXTS)
        report = prepare(out, f'--data_files={path}', f'--shard_size={shard_size}')
        assert len(stream(out, 'val')) == -(-len(expected) // 10)
        assert (stream(out, 'val', 'train') == expected).all()
        assert '10.0%, of the same text' in report.out
        meta = json.loads((out / 'meta.json').read_text())
        assert {path.name for path in out.iterdir()} == {'meta.json', *(shard['file'] for shard in meta['shards'])}


def test_killed_while_the_first_shard_is_cut(tmp_path, monkeypatch):
    """Whatever is the last thing that is written: it continues with the same bytes."""
    how = dict(tokenizer='bytes', shard_size=500, num_proc=1)
    engine.prepare(tmp_path / 'whole', engine.corpus_of(TEXTS), **how)
    replace, count = os.replace, 0

    def dies(source, target):
        nonlocal count
        count += 1
        if count == last:
            raise OSError('killed')
        replace(source, target)
    for last in range(1, 30):
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', dies)
            with contextlib.suppress(UserError):
                engine.prepare(tmp_path / f'{last}', engine.corpus_of(TEXTS), **how)
                break
        engine.prepare(tmp_path / f'{last}', engine.corpus_of(TEXTS), **how)
        assert files_of(tmp_path / f'{last}') == files_of(tmp_path / 'whole')
    assert last > 10


def test_documents_that_come_to_nothing_do_not_end_it(tmp_path):
    engine.prepare(tmp_path / 'out', engine.corpus_of([''] * 250_000 + TEXTS), tokenizer='bytes', num_proc=2)
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(TEXTS)).all()


# -----------------------------------------------------------------------------
# interruption

def killed(script, out_dir, *args, shard_size, times, shards, pause):
    """Start the script and SIGKILL it, a number of times, a few shards and a moment later; then let it finish."""
    chance = random.Random(1)
    args = [f'--out_dir={out_dir}', f'--shard_size={shard_size}', *args]
    for _ in range(times):
        goal = len(list(out_dir.glob('*.npy'))) + chance.randrange(1, shards)
        process = start(script, f'--num_proc={chance.randrange(1, 4)}', *args)
        while process.poll() is None and len(list(out_dir.glob('*.npy'))) < goal:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, pause))
        assert process.poll() is None, f'it ended before it was killed: {process.stderr.read()}'
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        for path in out_dir.glob('*.npy'):
            assert path.stat().st_size == 128 + 2 * len(np.load(path, mmap_mode='r')), f'{path} is not whole'
    assert len(list(out_dir.glob('*.npy'))) > times / 2
    run(script, *args)


def test_killed_twenty_times_ends_with_the_same_bytes(tmp_path):
    few = tmp_path / 'few.py'  # a fifth of the files, and as many shards
    few.write_text('from __main__ import files as _files\n_files[:] = _files[::5]\n')
    run('data/stdlib/prepare.py', few, f'--out_dir={tmp_path}/whole', '--shard_size=20_000')
    killed('data/stdlib/prepare.py', tmp_path / 'killed', few, shard_size=20_000, times=20, shards=4, pause=0.01)
    assert files_of(tmp_path / 'killed') == files_of(tmp_path / 'whole')


@pytest.mark.parametrize('source, cleaning', [('hub', []), ('files', []), ('files', ['--clean'])])
def test_killed_with_other_sources(tmp_path, source, cleaning):
    """The position in the files survives, the duplicates, and the counts; to clean, the workers are processes."""
    words = random.Random(5).choices([f'word{i}' for i in range(5000)], k=250_000)
    texts = [' '.join(words[i:i + 100]) for i in range(0, 250_000, 100)]
    (tmp_path / 'raw').mkdir()
    for i in range(3):      # of 1,000 texts, the first 250 of each file are the last of the one before
        pyarrow.parquet.write_table(pyarrow.table({'text': texts[i * 750:][:1000]}), tmp_path / f'raw/{i}.parquet',
                                    row_group_size=150)
    where = f'--dataset={tmp_path}/raw' if source == 'hub' else f'--data_files={tmp_path}/raw/*'
    args = [where, '--tokenizer=bytes', *cleaning]
    run('prepare_fineweb.py', f'--out_dir={tmp_path}/whole', '--shard_size=25_000', *args)
    killed('prepare_fineweb.py', tmp_path / 'killed', *args, shard_size=25_000, times=3, shards=40, pause=0.01)
    assert files_of(tmp_path / 'killed') == files_of(tmp_path / 'whole')
    counts = json.loads((tmp_path / 'whole/meta.json').read_text())['documents']
    assert counts['in'] == 3000 and counts.get('duplicate', 0) == 500 * len(cleaning)


def test_workers_die_with_their_parent(tmp_path):
    texts = [' '.join(f'word{i * j % 977}' for j in range(300)) for i in range(6_000)]
    write_jsonl(tmp_path / 'a.jsonl', texts)
    process = start('prepare_fineweb.py', f'--out_dir={tmp_path}/out', f'--data_files={tmp_path}/a.jsonl', '--clean',
                    '--tokenizer=bytes', '--num_proc=2', '--shard_size=100_000')
    while not list((tmp_path / 'out').glob('*.npy')) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    if not children.exists():
        pytest.skip('only Linux lists the children of a process')
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
    assert f'{shard} is damaged' in complaint(tmp_path / 'out', *again)
    (tmp_path / 'out/meta.json').unlink()
    assert 'no meta.json says which tokenizer made them' in complaint(tmp_path / 'out', *again)


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
    while len(list((tmp_path / 'out').glob('*.npy'))) < 5 and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process).returncode == 130
    assert process.err == f'interrupted: the same command continues after the last complete shard in {tmp_path}/out\n'
    progress = tmp_path / 'out' / 'progress.json'
    whole = progress.read_text()
    state = json.loads(whole)
    del state['resume']['corpus']
    progress.write_text(json.dumps(state))
    err = run('data/stdlib/prepare.py', f'--out_dir={tmp_path}/out', '--shard_size=50_000', expect=1).err
    assert err.startswith(f'{progress} is damaged') and err.count('\n') == 1
    progress.write_text(whole)
    run('data/stdlib/prepare.py', f'--out_dir={tmp_path}/out', '--shard_size=50_000')


def interrupted_here(out_dir, texts, **how):
    """Prepare in this process, where Ctrl-C comes while `texts` are read."""
    try:
        with pytest.raises(KeyboardInterrupt, match='the same command continues'):
            engine.prepare(out_dir, engine.corpus_of(texts), tokenizer='bytes', shard_size=1_000_000, **how)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL    # a second one ends the process at once
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize('dedup', ['', 'exact'])
@pytest.mark.parametrize('swallow', [None, KeyboardInterrupt])
def test_ctrl_c_that_a_library_swallows_stops_it(tmp_path, swallow, dedup):
    """Callbacks from C, finalizers and broad excepts lose an exception. Threads without dedup, processes with it."""
    def texts(interrupt=True):
        for i in range(5000):
            if i == 2500 and interrupt:
                with contextlib.suppress(swallow or ()):
                    os.kill(os.getpid(), signal.SIGINT)
            yield f'{i} ' + 'abc ' * 250
    interrupted_here(tmp_path / 'out', texts, num_proc=1, dedup=dedup)
    assert not (tmp_path / 'out/meta.json').exists()
    for folder in 'out', 'whole':
        engine.prepare(tmp_path / folder, engine.corpus_of(lambda: texts(False)), tokenizer='bytes',
                       shard_size=1_000_000, num_proc=1, dedup=dedup)
    assert files_of(tmp_path / 'out') == files_of(tmp_path / 'whole')


def test_ctrl_c_that_a_library_turns_into_another_error(tmp_path):
    def texts():
        yield 'abc'
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise UserError('a.parquet cannot be read') from None
    interrupted_here(tmp_path / 'out', texts, num_proc=1)


STUCK = """
import sys, time
from data import prepare
from configurator import excepthook
sys.excepthook = excepthook
def stuck(texts, **settings):
    print('stuck', flush=True)
    time.sleep(1000)
prepare.tokenize = stuck
if __name__ == '__main__':
    prepare.prepare(sys.argv[1], prepare.corpus_of(['text']), tokenizer='bytes', num_proc=1, dedup=sys.argv[2])
"""


def catches_sigint(process):
    status = Path(f'/proc/{process.pid}/status').read_text()
    return int(status.split('SigCgt:')[1].split()[0], 16) >> (signal.SIGINT - 1) & 1


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    """A thread can't be stopped in the middle of a batch."""
    (tmp_path / 'stuck.py').write_text(STUCK)
    process = subprocess.Popen([sys.executable, tmp_path / 'stuck.py', tmp_path / 'out', ''], text=True, cwd=ROOT,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)}, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.stdout.readline() != 'stuck\n':
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    while catches_sigint(process):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process).returncode == -signal.SIGINT
    assert process.err == '' or process.err.startswith('interrupted: ') and process.err.count('\n') == 1  # by the first


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('children', [1, 3])    # the resource tracker; and two workers, which import Python's modules
def test_ctrl_c_while_workers_start_is_one_line(tmp_path, children):
    write_jsonl(tmp_path / 'a.jsonl', [f'{i} ' + 'abc ' * 250 for i in range(5000)])
    process = start('prepare_fineweb.py', f'--out_dir={tmp_path}/out', f'--data_files={tmp_path}/a.jsonl',
                    '--tokenizer=bytes', '--dedup=exact', '--num_proc=2', fork=False)
    listing = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    while len(listing.read_text().split()) < children:
        time.sleep(0.0001)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process).returncode == 130
    assert process.err == f'interrupted: the same command continues after the last complete shard in {tmp_path}/out\n'


def test_a_killed_worker_is_one_line(tmp_path):
    (tmp_path / 'stuck.py').write_text(STUCK.replace('time.sleep(1000)', 'import os; os.kill(os.getpid(), 9)'))
    done = subprocess.run([sys.executable, tmp_path / 'stuck.py', tmp_path / 'out', 'exact'], text=True, cwd=ROOT,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, timeout=240)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'a worker process ended' in done.stderr


# -----------------------------------------------------------------------------
# what else is in the folder

def test_only_its_own_files_are_removed(tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    mine = {'thesis.tmp': 'a', 'seen.sqlite': 'b', 'shard.tmp': 'c', 'notes.json': 'd'}
    for name, content in mine.items():
        (out / name).write_text(content)
    (tmp_path / 'victim').write_text('precious')
    for name in ('.prepare-shard', '.prepare-seen.sqlite'):
        (out / name).symlink_to(tmp_path / 'victim')
    engine.prepare(out, engine.corpus_of(TEXTS), tokenizer='bytes', num_proc=1, dedup='exact')
    assert {name: (out / name).read_text() for name in mine} == mine
    assert (tmp_path / 'victim').read_text() == 'precious'
    assert {path.name for path in out.iterdir()} == {*mine, 'meta.json', 'train_000000.npy', 'val_000000.npy'}


def test_without_the_keys_seen_so_far_duplicates_are_not_let_through(tmp_path):
    def texts(fail=True):
        for i in range(6000):
            if i == 5999 and fail:
                raise OSError('lost')
            yield f'{i % 3000} ' + 'abc ' * 500
    with pytest.raises(UserError, match='lost'):
        engine.prepare(tmp_path, engine.corpus_of(texts), tokenizer='bytes', shard_size=500_000, dedup='exact',
                       num_proc=1)
    assert list(tmp_path.glob('train_*'))
    for spoil, words in ((lambda path: path.write_bytes(b'no database' * 1000), 'is damaged'),
                         (lambda path: path.unlink(), 'is missing')):
        spoil(tmp_path / '.prepare-seen.sqlite')
        with pytest.raises(UserError, match=f'seen.sqlite {words}'):
            engine.prepare(tmp_path, engine.corpus_of(lambda: texts(False)), tokenizer='bytes', shard_size=500_000,
                           dedup='exact', num_proc=1)


def test_a_folder_must_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='out_dir is empty'):
        engine.prepare('', engine.corpus_of(TEXTS), tokenizer='bytes')
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    write_jsonl(tmp_path / 'home/a.jsonl', TEXTS)
    prepare('~/out', '--data_files=~/*.jsonl')
    (tmp_path / 'home/wiki.txt').write_text(' = Title A = \n text \n = Title B = \n text \n')
    run_here('data/wikitext2/prepare.py', '--input=~/wiki.txt', '--out_dir=~/wiki', '--tokenizer=bytes')
    assert (tmp_path / 'home/out/meta.json').exists() and (tmp_path / 'home/wiki/meta.json').exists()
    assert not (tmp_path / '~').exists()


def test_progress_never_leads_out_of_the_folder(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    prepare(tmp_path / 'out', f'--data_files={path}')
    np.save(tmp_path / 'other.npy', np.zeros(5, np.uint16))
    meta = json.loads((tmp_path / 'out/meta.json').read_text())
    for name in '../other.npy', str(tmp_path / 'other.npy'), 'train_/../../other.npy', 'other.npy':
        meta['shards'][0] |= {'file': name, 'tokens': 5}
        (tmp_path / 'out/meta.json').write_text(json.dumps(meta))
        assert 'meta.json is damaged' in complaint(tmp_path / 'out', f'--data_files={path}')


@contextlib.contextmanager
def nobodys_folder():
    """A folder that everyone may enter, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def as_nobody():
    """Without root's rights."""
    euid = os.geteuid()
    try:
        if euid == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(euid)


@pytest.mark.skipif(not hasattr(os, 'geteuid'), reason='needs Unix permissions')
def test_a_permission_error_is_not_damage():
    from data.dataset import Split
    with nobodys_folder() as folder:
        engine.prepare(folder, engine.corpus_of(TEXTS), tokenizer='bytes', num_proc=1)
        for name in 'train_000000.npy', 'meta.json':
            (folder / name).chmod(0)
            for use in (lambda: Split(str(folder), 'train'),
                        lambda: engine.prepare(folder, engine.corpus_of(TEXTS), tokenizer='bytes')):
                with as_nobody(), pytest.raises(UserError) as error:
                    use()
                assert name in str(error.value) and 'ermission denied' in str(error.value)
                assert 'damaged' not in str(error.value) and 'delete' not in str(error.value)
            (folder / name).chmod(0o644)


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
    'b.json': lambda path, texts: path.write_text(json.dumps([{'text': text} for text in texts], indent=1),
                                                  'utf-8-sig'),
    'c.json': lambda path, texts: path.write_text('\n ' + json.dumps([{'text': text} for text in texts])),
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
def test_a_dataset_that_datasets_loads(tmp_path, streaming, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf'))
    (tmp_path / 'raw').mkdir()
    parquet(tmp_path / 'raw/train.parquet', TEXTS)
    prepare(tmp_path / 'out', f'--dataset={tmp_path}/raw', f'--streaming={streaming}')
    assert (stream(tmp_path / 'out', 'val', 'train') == BYTES.encode_documents(TEXTS)).all()
    other = prepare(tmp_path / 'out', f'--dataset={tmp_path}/raw', f'--streaming={not streaming}', expect=1).err
    assert f'streaming={streaming}, not {not streaming}' in other  # which would count on from another place
    err = complaint(tmp_path / 'no', f'--dataset={tmp_path}/raw', '--text_key=body')
    assert "no column 'body'" in err and 'id, text' in err


BAD = {     # a file, and the error with its line
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
    assert 'not one of exact, minhash' in complaint(tmp_path / 'out', own, '--dedup=all')
    assert 'not one of file, line, blank' in complaint(tmp_path / 'out', own, '--txt_split=word')
    assert 'cannot be loaded' in complaint(tmp_path / 'out', '--dataset=no/such')
    (tmp_path / 'empty.jsonl').touch()
    assert 'too little text' in complaint(tmp_path / 'out', f'--data_files={tmp_path}/empty.jsonl')
    assert not [*(tmp_path / 'out').glob('*.npy'), *(tmp_path / 'out').glob('progress.json')]
    assert 'is for FineWeb-Edu' in run('prepare_fineweb.py', own, expect=1).err
    for ignored in '--split=test', '--name=x', '--streaming=False', '--dataset=a/b', '--revision=1':
        assert 'would be ignored' in complaint(tmp_path / 'out', own, ignored)
    assert 'would be ignored' in complaint(tmp_path / 'out', f'--dataset={tmp_path}', '--txt_split=line')
    write_jsonl(tmp_path / 'short.jsonl', ['too short', 'this one too', 'this one too'])
    assert 'in 3 documents (dropped: 3 too_short)' in complaint(
        tmp_path / 'out', f'--data_files={tmp_path}/short.jsonl', '--clean', '--num_proc=1')
    (tmp_path / 'file').touch()
    assert f'out_dir={tmp_path}/file is a file: name a folder' in complaint(tmp_path / 'file', own)


# -----------------------------------------------------------------------------
# the other scripts

def test_shakespeare_as_nanogpt_splits_it(tmp_path):
    text = SHARED / 'data/tinyshakespeare.txt'
    if not text.exists():
        pytest.skip('no copy of Tiny Shakespeare here')
    run('data/shakespeare_char/prepare.py', f'--input={text}', f'--out_dir={tmp_path}/out')
    run_here('data/shakespeare/prepare.py', f'--input={text}', f'--out_dir={tmp_path}/same', '--tokenizer=bytes')
    assert files_of(tmp_path / 'out') == files_of(tmp_path / 'same')
    assert BYTES.decode_bytes(stream(tmp_path / 'out', 'train')[1:]) == text.read_bytes()[:1003854]
    assert BYTES.decode_bytes(stream(tmp_path / 'out', 'val')[1:]) == text.read_bytes()[1003854:]


def test_wikitext_articles_are_documents(tmp_path):
    articles = [f' \n = Title {i} = \n \n Text {i} . \n \n = = Part = = \n \n More . \n' for i in range(20)]
    (tmp_path / 'wiki.txt').write_text(''.join(articles))
    args = [f'--input={tmp_path}/wiki.txt', f'--out_dir={tmp_path}/out', '--tokenizer=bytes']
    assert 'would be ignored' in run_here('data/wikitext2/prepare.py', *args, '--held_out=test', expect=1).err
    run_here('data/wikitext2/prepare.py', *args)
    meta = json.loads((tmp_path / 'out/meta.json').read_text())
    assert [shard['documents'] for shard in meta['shards']] == [18, 2]
    assert BYTES.decode(stream(tmp_path / 'out', 'train')).startswith('<|endoftext|> = Title 0 = \n')


def test_the_standard_library_holds_out_whole_files(dataset):
    train, val = (stream(dataset, split) for split in ('train', 'val'))
    files = json.loads((dataset / 'meta.json').read_text())['source']['files']
    held_out = [Path(json.__file__).parents[1] / file for file in list(files)[::20]]
    documents = BYTES.decode(val).split('<|endoftext|>')[1:]
    assert documents == [text for path in held_out if (text := tokenize.open(path).read())]
    assert (train == BYTES.eot).sum() > 10 * len(documents)
    module = Path(json.__file__).read_text()
    lengths = np.diff(np.flatnonzero(train == BYTES.eot), append=len(train)) - 1
    ends = np.cumsum(lengths + 1)
    assert module in documents or any(BYTES.decode(train[end - n:end]) == module
                                      for n, end in zip(lengths, ends) if n == len(module.encode()))


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


OFFLINE = """
import runpy, sys, time
time.sleep = lambda seconds: None   # between retries
sys.argv = ['prepare_fineweb.py', f'--out_dir={sys.argv[1]}']
runpy.run_path('prepare_fineweb.py', run_name='__main__')
"""


def test_without_network_it_says_so_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, '-c', OFFLINE, tmp_path / 'out'], text=True, cwd=ROOT, capture_output=True,
                          timeout=240, env={**os.environ, 'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': 'http://127.0.0.1:9',
                                            'HF_HOME': str(tmp_path), 'NO_PROXY': '*'})
    assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
    assert 'HuggingFaceFW/fineweb-edu cannot be loaded' in done.stderr and 'go online' in done.stderr
