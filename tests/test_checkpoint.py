"""Checkpoints in process: written whole or not at all, checked when read, compared with the run's settings."""

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common import checkpoint, distributed, files
from common.optimizers import configure_optimizers
from conftest import ROOT, environment
from data import atomic
from data.errors import UserError
from model import GPT, GPTConfig

ARGS = dict(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=8)
SETTINGS = dict(n_layer=2, n_head=2, n_embd=8, block_size=8, dropout=0.0, n_kv_head=0, optimizer='adamw',
                learning_rate=1e-3, weight_decay=0.1, beta1=0.9, max_iters=40, out_dir='out', init_from='scratch')


def trained(optimizer='adamw', **more):
    """A model and its optimizers after one step, and what train.py saves of them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**ARGS))
    optimizers = configure_optimizers(model, optimizer, 1e-3, 0.1, (0.9, 0.95))
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
    for opt in optimizers:
        opt.step()
    state = distributed.training_state(model, optimizers) | {
        'model_args': asdict(model.config), 'tokenizer': 'bytes', 'config': SETTINGS | {'optimizer': optimizer},
        'iter_num': 20, 'best_val_loss': 5.5, 'scaler': {}, 'random': [checkpoint.random_state('cpu')], 'skipped': 0,
        'data': {'stdlib': {'drawn': 3, 'n_blocks': 9, 'seed': 1, 'shuffle': True, 'block_size': 8}}, 'norms': [1.0], 'losses': [5.5]}
    return model, optimizers, state | more


@pytest.fixture(scope='module')
def state():
    return trained()[2]


def write(state, out_dir, step=20, best=False, keep=0):
    return checkpoint.write(state | {'iter_num': step}, out_dir, best, keep)


def step_of(path):
    return torch.load(path, weights_only=True)['iter_num']


def names(folder, pattern='*'):
    return sorted(path.name for path in folder.glob(pattern))


def refusal(path, **how):
    with pytest.raises(UserError) as error:
        checkpoint.load(path, **how)
    assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)
    return str(error.value).replace(str(Path(path).parent), 'out')

# -----------------------------------------------------------------------------
# one run in a folder

HOLD = 'import sys, time; from common import files; lock = files.lock(sys.argv[1]); print(1, flush=True); time.sleep(600)'


def test_a_folder_is_one_run_s_until_it_dies(tmp_path):
    out_dir = tmp_path / 'a' / 'out'
    holder = subprocess.Popen([sys.executable, '-c', HOLD, out_dir], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b'1\n'
    for _ in range(2):
        with pytest.raises(UserError, match=rf'{out_dir} is in use by another run \(pid {holder.pid} on \S+\): '):
            files.lock(out_dir)
    mine, other = out_dir / 'ckpt_best.pt.0123456789ab.tmp', out_dir / 'thesis.tmp'
    mine.write_text('half')
    other.write_text('a')
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    lock = files.lock(out_dir)
    assert not mine.exists() and other.exists()
    with pytest.raises(UserError, match=f'pid {os.getpid()} on'):
        files.lock(out_dir)
    lock.release()
    files.lock(out_dir).release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('a')
    with pytest.raises(UserError, match=f'out_dir={tmp_path}/file cannot be written: '):
        files.lock(tmp_path / 'file')

# -----------------------------------------------------------------------------
# writing

def test_copies_are_independent_files(state, tmp_path):
    assert write(state, tmp_path, 20, best=True, keep=3) and write(state, tmp_path, 30, keep=3)
    shutil.copyfile(tmp_path / 'ckpt_000020.pt', tmp_path / 'ckpt.pt')  # as cp does: into the file that is there
    assert [step_of(tmp_path / name) for name in ('ckpt.pt', 'ckpt_000020.pt', 'ckpt_000030.pt', 'ckpt_best.pt')] == [
        20, 20, 30, 20]


def test_the_last_steps_are_kept_whatever_the_files_dates(state, tmp_path):
    for step in 10, 20, 30:
        write(state, tmp_path, step, keep=2)
        os.utime(tmp_path / f'ckpt_{step:06d}.pt', (0, 1000 - step))
    (tmp_path / 'ckpt_mine.pt').write_text('a')
    write(state, tmp_path, 25, keep=2)  # by a run that continues from step 20: step 30 is not its own
    assert names(tmp_path, 'ckpt_*') == ['ckpt_000020.pt', 'ckpt_000025.pt', 'ckpt_000030.pt', 'ckpt_mine.pt']


def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(state, tmp_path, capfd):
    """A limit on the size of files stands for it: a write fails as far into the file."""
    write(state, tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in 5000, 30000:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert not write(state, tmp_path, 20, best=True, keep=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert capfd.readouterr().err == ('the checkpoint of step 20 could not be written (File too large): the previous '
                                          f'checkpoint is kept ({tmp_path}/ckpt.pt)\n')
        assert names(tmp_path) == ['ckpt.pt'] and step_of(tmp_path / 'ckpt.pt') == 10


def test_a_read_only_disk_is_one_line(state, tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    write(state, tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, 'open', refuse, raising=False)
        for name in 'unlink', 'mkdir':
            patch.setattr(Path, name, refuse)
        assert not write(state, tmp_path)
    assert capfd.readouterr().err.count('\n') == 1
    assert write(state, tmp_path) and step_of(tmp_path / 'ckpt.pt') == 20  # it is well again


def test_a_folder_that_was_removed_is_made_again(state, tmp_path):
    assert write(state, tmp_path / 'a' / 'b') and step_of(tmp_path / 'a' / 'b' / 'ckpt.pt') == 20


@pytest.mark.parametrize('what', ['copy', 'old'])
def test_failed_housekeeping_is_no_failed_checkpoint(state, tmp_path, capfd, what):
    if what == 'copy':
        (tmp_path / 'ckpt_best.pt' / 'a').mkdir(parents=True)
    else:
        (tmp_path / 'ckpt_000010.pt' / 'a').mkdir(parents=True)
    assert write(state, tmp_path, best=True, keep=1) and step_of(tmp_path / 'ckpt.pt') == 20
    name, done = ('ckpt_best.pt', 'written') if what == 'copy' else ('ckpt_000010.pt', 'removed')
    assert re.fullmatch(rf'{tmp_path}/{name} could not be {done}: Is a directory\n', capfd.readouterr().err)
    assert not names(tmp_path, '*.tmp') and step_of(tmp_path / 'ckpt_000020.pt') == 20


def test_the_checkpoint_that_a_run_resumed_from_can_become_the_best(state, tmp_path, monkeypatch):
    """As when the run was killed between a checkpoint and the evaluation that finds it the best."""
    monkeypatch.setattr(checkpoint, 'writing', None)
    write(state, tmp_path)
    checkpoint.keep_best(tmp_path)
    distributed.in_background(int).result()
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_best.pt']


def test_copies_work_without_copy_file_range(tmp_path, monkeypatch):
    (tmp_path / 'a').write_bytes(os.urandom(3 << 20))
    for function in os.copy_file_range, None:
        if function is None:
            monkeypatch.delattr(os, 'copy_file_range')
        files.copy(tmp_path / 'a', tmp_path / 'b')
        assert (tmp_path / 'b').read_bytes() == (tmp_path / 'a').read_bytes() and names(tmp_path) == ['a', 'b']
        (tmp_path / 'b').unlink()

# -----------------------------------------------------------------------------
# reading

def test_damage_is_named_and_the_newest_whole_one_offered(state, tmp_path):
    for step in 10, 20, 30:
        write(state, tmp_path, step, keep=9)
    path, whole = tmp_path / 'ckpt.pt', (tmp_path / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt_000030.pt').write_bytes(whole[:-1000])
    offer = '; --init_from=resume:out/ckpt_000020.pt takes the newest whole one'
    middle = len(whole) // 2
    for data, why in ((b'', 'the file is empty'), (whole[:middle], 'the file is cut short'),
                      (b'PK not really', 'torch.save did not write it'), (b'\x80\x02}q\x00.', 'torch.save did not write it')):
        path.write_bytes(data)
        assert refusal(path) == f'out/ckpt.pt is not a readable checkpoint: {why}{offer}'
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64:])
    assert re.fullmatch(rf'out/ckpt.pt is not a readable checkpoint: the file is damaged \(\S+ has another CRC-32\){offer}',
                        refusal(path))
    path.unlink()
    assert refusal(path) == 'no checkpoint out/ckpt.pt: ' + offer[2:]
    for name in names(tmp_path, 'ckpt_*'):
        (tmp_path / name).rename(tmp_path / f'2.{name}')
    (tmp_path / '2.ckpt.pt').write_bytes(whole)
    assert refusal(path) == 'no checkpoint out/ckpt.pt: --init_from=resume:out/2.ckpt.pt takes the newest whole one'
    assert refusal(tmp_path / 'none' / 'ckpt.pt').endswith('train first, or set out_dir to the folder that has one')


def test_flipped_bits_do_not_load_as_other_values(state, tmp_path):
    write(state, tmp_path)
    path, dice = tmp_path / 'ckpt.pt', random.Random(0)
    whole, right, found = path.read_bytes(), checkpoint.load(path), 0
    for _ in range(60):
        data, bit = bytearray(whole), dice.randrange(8 * len(whole))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded = checkpoint.load(path)
        except UserError:
            found += 1
        else:  # in the padding between the entries
            assert all(torch.equal(w, loaded['model'][name]) for name, w in right['model'].items())
            assert loaded['config'] == right['config']
    assert found > 30


def test_foreign_zip_files_and_objects_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w') as archive:
        archive.writestr('a.txt', 'a')
    assert refusal(tmp_path / 'ckpt.pt').startswith('out/ckpt.pt is not a readable checkpoint: ')
    torch.save({'model': {}, 'path': Path('a')}, tmp_path / 'ckpt.pt')
    assert 'neither tensors nor plain values' in refusal(tmp_path / 'ckpt.pt')


def test_weights_that_are_not_finite_are_named(state, tmp_path):
    bad = state['model'] | {'transformer.ln_f.bias': torch.full((8,), float('nan'))}
    write(state | {'model': bad}, tmp_path)
    assert refusal(tmp_path / 'ckpt.pt') == 'out/ckpt.pt: transformer.ln_f.bias has values that are not finite'


@pytest.mark.parametrize('entry, value, why', [
    ('model', None, 'has no model'), ('model', [1], 'model is not of type dict'), ('tokenizer', 3, 'tokenizer is not of type str'),
    ('model_args', 'a', 'model_args is not of type dict'), ('iter_num', 'a', 'iter_num is not of type int'),
    ('iter_num', -1, 'iter_num is not a step'), ('optimizer', None, 'has no optimizer'),
    ('optimizer', {}, 'optimizer is not of the form'), ('random', [{}], 'random is not a list of random number'),
    ('data', [1], 'data is not of type dict'), ('norms', ['a'], 'norms is not a list'), ('config', {'a': torch.ones(2)}, "config is not a run's settings"),
    ('shards', '../../x', 'shards is not the'),
    ('shards', '/tmp', 'shards is not the'), ('crc32', 3, 'crc32 is not the sums'), ('shards', 3, 'shards is not the'), ('best_val_loss', 'a', 'best_val_loss is not of')])
def test_an_entry_that_is_missing_or_of_another_type_is_named(state, tmp_path, entry, value, why):
    more = {'shards': 'shards_000000'} if entry == 'crc32' else {}
    bad = {k: v for k, v in (state | {entry: value} | more).items() if v is not None}
    with open(tmp_path / 'ckpt.pt', 'wb') as f:
        torch.save(bad, f)
    assert why in refusal(tmp_path / 'ckpt.pt', resume=True)


@pytest.mark.parametrize('args, why', [
    ({'n_layer': '2'}, "n_layer='2' in its model_args is not of type int"), ({'n_foo': 1}, 'n_foo, which GPTConfig in model.py lacks'),
    ({'n_layer': 10**9}, 'make no model: n_layer=1000000000'), ({'n_head': 0}, 'make no model: n_head=0'),
    ({'n_embd': 10**9}, 'does not fit model.py|make no model'), ({'bias': 1}, 'bias=1 in its model_args is not of type bool'),
    ({'n_kv_head': -1}, 'out/ckpt.pt'), ({'n_mlp': -5}, 'out/ckpt.pt')])
def test_model_args_out_of_range_are_named(state, tmp_path, args, why):
    write(state | {'model_args': state['model_args'] | args}, tmp_path)
    assert re.search(why, refusal(tmp_path / 'ckpt.pt'))


def test_a_checkpoint_that_does_not_fit_changed_code_says_where(state, tmp_path):
    weights = dict(state['model'])
    weights['transformer.h.0.new.weight'] = weights.pop('transformer.ln_f.bias')
    weights['transformer.ln_f.weight'] = torch.ones(9)
    write(state | {'model': weights}, tmp_path)
    assert refusal(tmp_path / 'ckpt.pt') == (
        'out/ckpt.pt does not fit model.py: model.py has transformer.ln_f.bias, which the checkpoint lacks; the checkpoint has '
        'transformer.h.0.new.weight, which model.py lacks; the checkpoint has transformer.ln_f.weight (9,) instead of (8,)')

# -----------------------------------------------------------------------------
# resuming

def test_where_to_resume():
    assert checkpoint.resume_path('resume', 'out') == 'out/ckpt.pt'
    assert checkpoint.resume_path('resume:out/ckpt_000020.pt', 'out') == 'out/ckpt_000020.pt'
    assert checkpoint.resume_path('gpt2', 'out') is checkpoint.resume_path('out/ckpt.pt', 'out') is None


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_restored_optimizers_have_the_saved_state_and_this_run_s_hyperparameters(optimizer, tmp_path):
    model, optimizers, state = trained(optimizer)
    write(state, tmp_path)
    saved = checkpoint.load(tmp_path / 'ckpt.pt', resume=True)
    again = checkpoint.model_from(saved)
    new = configure_optimizers(again, optimizer, 1e-3, 0.3, (0.8, 0.95))
    distributed.restore_optimizers(again, new, saved['optimizer'])
    for opt in new:
        assert opt.param_groups[0]['weight_decay'] == 0.3
        assert opt.param_groups[0].get('betas', (0.8, 0.95)) == (0.8, 0.95)
    old, new = (distributed.optimizer_state(*pair)['state'] for pair in ((model, optimizers), (again, new)))
    assert old.keys() == new.keys() and all(old[name].keys() == new[name].keys() for name in old)
    assert all(torch.equal(x, new[name][key]) for name in old for key, x in old[name].items())


def compare(state, given=(), **settings):
    return checkpoint.compare_settings(state, 'out/ckpt.pt', SETTINGS | settings, {name: f'--{name}={settings.get(name)}' for name in given})


def test_settings_that_changed_are_taken_told_or_refused(state):
    assert compare(state) == ({}, {})
    assert compare(state, n_layer=12, n_head=4, learning_rate=3e-4, out_dir='b', init_from='resume', dropout=0.1) == (
        {'n_layer': 2, 'n_head': 2}, {'dropout': (0.0, 0.1), 'learning_rate': (1e-3, 3e-4)})
    assert compare(state, ['n_kv_head', 'n_layer'], n_kv_head=2) == ({}, {})  # 0 stands for n_head, which is 2
    with pytest.raises(UserError, match='--n_layer=12: out/ckpt.pt has n_layer=2'):
        compare(state, ['n_layer', 'n_head', 'learning_rate'], n_layer=12, n_head=3)
    with pytest.raises(UserError, match='out/ckpt.pt has the state of adamw: --init_from=out/ckpt.pt starts from its weights'):
        compare(state, optimizer='muon')
    with pytest.raises(UserError, match='max_iters=19: out/ckpt.pt has reached step 20'):
        compare(state, max_iters=19)
    assert compare(state, max_iters=20) == ({}, {'max_iters': (40, 20)})


def test_shards_are_kept_while_a_file_in_the_folder_is_no_checkpoint(tmp_path):
    (tmp_path / 'shards_000000').mkdir()
    for content in [1], {'shards': {}}, torch.ones(3):
        torch.save(content, tmp_path / 'my_ckpt.pt')
        checkpoint.remove_unused_shards(tmp_path)
    assert (tmp_path / 'shards_000000').is_dir()
    (tmp_path / 'my_ckpt.pt').unlink()
    checkpoint.remove_unused_shards(tmp_path)
    assert not (tmp_path / 'shards_000000').exists()

# -----------------------------------------------------------------------------
# anything at all

def mutate(x, dice):
    """A copy of nested dictionaries and lists with one thing in it changed, missing or more."""
    junk = [None, True, -1, 0, 2**70, 1e400, float('nan'), '', 'a', '../../x', b'a', [], {}, [None], {'a': 1}, (1, 2),
            torch.ones(3), torch.ones(3, dtype=torch.long), torch.full((2,), float('nan')), torch.ones(2, 2).to_sparse()]
    if isinstance(x, dict) and x and dice.random() < 0.85:
        x, key = dict(x), dice.choice(list(x))
        choice = dice.random()
        if choice < 0.15:
            del x[key]
        elif choice < 0.25:
            x[dice.choice(['new', 3, 'a.b'])] = dice.choice(junk)
        else:
            x[key] = mutate(x[key], dice)
        return x
    if isinstance(x, list) and x and dice.random() < 0.7:
        i = dice.randrange(len(x))
        return x[:i] + ([] if dice.random() < 0.2 else [mutate(x[i], dice)]) + x[i + 1:]
    return dice.choice(junk)


def use(path):
    """What commands do with a checkpoint. Returns whether training could."""
    with contextlib.suppress(UserError):
        checkpoint.load(path)
    try:
        saved = checkpoint.load(path, resume=True)
        checkpoint.compare_settings(saved, path, SETTINGS, {})
        model = checkpoint.model_from(saved)
        optimizers = configure_optimizers(model, saved['config'].get('optimizer', 'adamw'), 1e-3, 0.1, (0.9, 0.95))
        distributed.restore_optimizers(model, optimizers, saved['optimizer'])
        checkpoint.set_random_state(saved['random'][0], 'cpu') if saved['random'] else None
        for opt in optimizers:
            opt.step()
        model(torch.zeros(1, 4, dtype=torch.long))
    except UserError as error:
        assert str(error) and '\n' not in str(error)
        return False
    return True


CASES = int(os.environ.get('FUZZ', 100))


def test_mutated_entries_end_in_a_user_error_or_work(state, tmp_path):
    dice, worked = random.Random(1), 0
    for case in range(CASES):
        try:
            torch.save(mutate(state, dice), tmp_path / 'ckpt.pt')
        except Exception:  # nothing that torch.save can write
            continue
        try:
            worked += use(tmp_path / 'ckpt.pt')
        except Exception as error:
            raise AssertionError(f'case {case}') from error
    assert 0 < worked < CASES


def test_mutated_bytes_end_in_a_user_error_or_work(state, tmp_path):
    write(state, tmp_path)
    path, dice = tmp_path / 'ckpt.pt', random.Random(2)
    whole = path.read_bytes()
    for case in range(CASES // 2):
        data, place = bytearray(whole), dice.choice([dice.randrange(len(whole)), len(whole) - dice.randrange(1, 6000)])
        kind = case % 3
        if kind == 0:
            data[place:place + dice.randrange(1, 100)] = dice.randbytes(dice.randrange(100))
        elif kind == 1:
            data[place] = dice.randrange(256)
        else:
            data = data[:place]
        path.write_bytes(data)
        try:
            use(path)
        except Exception as error:
            raise AssertionError(f'case {case}') from error
