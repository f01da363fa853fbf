"""A run that is stopped, killed, starved of disk or fed with nonsense ends where the undisturbed run ends."""

import functools
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common import checkpoint
from conftest import TINY, at_step, finish, losses, read_log, run, run_ranks, start

KILLS = 20


def tiny(dataset, out_dir, *args):
    return 'train.py', *TINY, f'--dataset={dataset}', f'--out_dir={out_dir}', *args


def read(out_dir, name='ckpt.pt'):
    return torch.load(out_dir / name, weights_only=True)


def differences(a, b, where=''):
    """Where two checkpoints are not bit for bit the same."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [d for key in a for d in differences(a[key], b[key], f'{where}.{key}')]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f'{where}[{i}]')]
    return [] if a == b or where in ('.config.out_dir', '.config.init_from') else [where]


@pytest.mark.parametrize('settings', [['--optimizer=adamw'], ['--optimizer=muon'],
                                      ['--dtype=float16', '--skip_spikes=9.0']], ids=lambda settings: settings[0][2:])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(dataset, tmp_path, settings):
    """Losses, weights, optimizer, data order, dropout, validation, samples."""
    args = ['--dropout=0.2', '--eval_interval=5', '--sample_interval=5', '--total_batch_size=256', *settings]
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(run, *tiny(dataset, tmp_path / 'whole', *args))
        run(*tiny(dataset, tmp_path / 'cut', *args), at_step(tmp_path, 7, 'os.kill(os.getpid(), signal.SIGTERM)'))
        assert read(tmp_path / 'cut')['iter_num'] == 7
        rest = run(*tiny(dataset, tmp_path / 'cut', *args), '--init_from=resume')
    whole = whole.result()
    assert read_log(tmp_path / 'cut') == read_log(tmp_path / 'whole')
    assert differences(read(tmp_path / 'whole'), read(tmp_path / 'cut')) == []
    texts = whole.out.splitlines()
    assert [line for line in rest.out.splitlines() if line.startswith('  > ')] == [
        line for line in texts[texts.index(next(line for line in texts if line.startswith('step 7/'))):]
        if line.startswith('  > ')] != []


def test_another_number_of_processes_goes_on_with_the_same_data(dataset, tmp_path):
    run(*tiny(dataset, tmp_path / 'one', '--keep_checkpoints=2'))
    for name, processes in ('two', 2), ('alone', 1):
        (tmp_path / name).mkdir()
        source = tmp_path / 'one' / 'ckpt_000010.pt' if name == 'two' else tmp_path / 'two' / 'ckpt_000015.pt'
        (tmp_path / name / 'ckpt.pt').write_bytes(source.read_bytes())
        run_ranks(*tiny(dataset, tmp_path / name, '--init_from=resume', '--eval_interval=5', '--keep_checkpoints=2'),
                  processes=processes)
        one, other = losses(tmp_path / 'one'), losses(tmp_path / name)
        assert min(other) == (11 if name == 'two' else 16) and max(other) == 20
        assert all(abs(one[step] - other[step]) < 1e-3 for step in other)
        assert read(tmp_path / 'one')['data'] == read(tmp_path / name)['data']


def test_twenty_kills_end_where_no_kill_ends(dataset, tmp_path):
    args = ['--max_iters=100', '--eval_interval=3', '--eval_iters=1', '--dropout=0.1', '--keep_checkpoints=2',
            '--log_interval=1', '--n_layer=1']

    def train(out_dir, kill_after=0, delay=0.0):
        """Run to the end, or kill after some steps and seconds. Returns the finished process."""
        process = start(*tiny(dataset, out_dir, *args), '--init_from=auto')
        for line in process.stdout:
            if re.match(r'step \d+/100 \| loss', line):
                kill_after -= 1
                if kill_after == 0:
                    time.sleep(delay)
                    process.kill()
        return finish(process)

    def killed(seed):
        dice, out_dir = random.Random(seed), tmp_path / f'killed-{seed}'
        for _ in range(KILLS // 2):  # it may then write, log, evaluate or do anything else
            process = train(out_dir, dice.randrange(2, 13), dice.uniform(0, 0.05))
            assert process.returncode == -signal.SIGKILL, process.err
            if (out_dir / 'ckpt.pt').exists():
                assert read(out_dir)['iter_num'] % 3 == 0
        process = train(out_dir)
        assert process.returncode == 0, process.err
        return out_dir

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(killed, (1, 2)))
    run(*tiny(dataset, tmp_path / 'whole', *args))
    for folder in folders:
        assert read_log(folder) == read_log(tmp_path / 'whole')
        assert differences(read(tmp_path / 'whole'), read(folder)) == []
        assert differences(read(tmp_path / 'whole', 'ckpt_best.pt'), read(folder, 'ckpt_best.pt')) == []


def test_torchrun_restarts_a_run_of_which_a_worker_died(dataset, tmp_path):
    args = ['--eval_interval=3', '--init_from=auto']
    die = at_step(tmp_path, 8, "if os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10': "
                               "os.kill(os.getpid(), signal.SIGKILL)")
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(run, *tiny(dataset, tmp_path / 'whole', *args))
        out = run(*tiny(dataset, tmp_path / 'cut', *args), die, processes=2,
                  torchrun=['--standalone', '--max_restarts=2']).out
    whole.result()
    assert [line.split()[1] for line in out.splitlines() if ' | val loss ' in line] == [
        f'{step}/20' for step in (0, 3, 6, 6, 9, 12, 15, 18, 20)]  # killed after 6, which it read
    whole, cut = read_log(tmp_path / 'whole'), read_log(tmp_path / 'cut')
    assert [list(entry) for entry in whole] == [list(entry) for entry in cut]
    for a, b in zip(whole, cut):
        assert a['step'] == b['step'] and abs(a.get('loss', 0) - b.get('loss', 0)) < 1e-3


def test_the_best_and_the_last_checkpoints_are_kept(dataset, tmp_path):
    run(*tiny(dataset, tmp_path, '--max_iters=40', '--eval_interval=5', '--keep_checkpoints=3', '--learning_rate=3.0',
              '--warmup_iters=40', '--min_lr=0.0'))  # with such a learning rate it gets worse
    assert sorted(path.name for path in tmp_path.glob('ckpt*')) == [
        'ckpt.pt', 'ckpt_000030.pt', 'ckpt_000035.pt', 'ckpt_000040.pt', 'ckpt_best.pt']
    assert all(read(tmp_path, f'ckpt_0000{step}.pt')['iter_num'] == step for step in (30, 35, 40))
    scores = {entry['step']: entry['val_loss'] for entry in read_log(tmp_path) if entry.get('val_loss') and entry['step']}
    best = min(scores, key=scores.get)
    assert best != 40  # else this test would show nothing
    assert read(tmp_path, 'ckpt_best.pt')['iter_num'] == best and read(tmp_path)['iter_num'] == 40


@pytest.mark.parametrize('settings', [[], ['--always_save_checkpoint=False']], ids=['always', 'best'])
def test_going_back_archives_what_came_later(dataset, tmp_path, settings):
    """Whole, though the evaluation before the first step is the best so far; out_dir may be spelled otherwise."""
    args = ['--eval_interval=5', '--keep_checkpoints=9', '--learning_rate=3.0', '--warmup_iters=40', '--min_lr=0.0']
    run(*tiny(dataset, tmp_path, *args))
    best = read(tmp_path, 'ckpt_best.pt')['iter_num']
    assert best < 15  # it gets worse
    run(*tiny(dataset, tmp_path, *args, *settings, f'--init_from=resume:{tmp_path}/./ckpt_{best:06d}.pt', '--max_iters=15'))
    found = {path.name: read(tmp_path, path.name)['iter_num'] for path in tmp_path.glob('*ckpt*.pt')}
    assert (found['1.ckpt.pt'], found['1.ckpt_best.pt'], found['ckpt_best.pt']) == (20, best, best)
    assert found.get('ckpt.pt', 15) == 15 and f'ckpt_{best:06d}.pt' in found and f'1.ckpt_{best:06d}.pt' not in found


def test_what_a_kill_leaves_is_no_kept_checkpoint_under_another_name(tmp_path):
    """The kept ones are links to the file that is written aside: a killed run may leave that link, too."""
    write = functools.partial(checkpoint.write, out_dir=tmp_path, keep=2)
    assert write({'iter_num': 1}, best=True)
    os.link(tmp_path / 'ckpt_best.pt', tmp_path / 'ckpt.pt.tmp')
    assert write({'iter_num': 2}, best=False)
    assert [read(tmp_path, name)['iter_num'] for name in ('ckpt_best.pt', 'ckpt_000001.pt', 'ckpt.pt')] == [1, 1, 2]


# opening the temporary file of a checkpoint opens a full disk, once
FULL = """import data.atomic as F
        F.open = lambda path, *mode: (delattr(F, 'open'), open('/dev/full', 'wb'))[1] if 'ckpt' in str(path) else open(path, *mode)"""


def test_a_full_disk_costs_only_the_checkpoint_that_did_not_fit(dataset, tmp_path):
    process = run(*tiny(dataset, tmp_path, '--max_iters=30', '--keep_checkpoints=9'), at_step(tmp_path, 12, FULL))
    assert process.err == ('the checkpoint of step 20 could not be written (No space left on device): the previous '
                           f'checkpoint is kept ({tmp_path}/ckpt.pt)\n')
    assert sorted(path.name for path in tmp_path.glob('ckpt_0*')) == ['ckpt_000010.pt', 'ckpt_000030.pt']
    assert read(tmp_path)['iter_num'] == 30
    run(*tiny(dataset, tmp_path, '--init_from=resume', '--max_iters=35', '--eval_interval=100'), at_step(tmp_path, 5, FULL),
        expect=1)
    assert read(tmp_path)['iter_num'] == 30  # the last one did not fit, and the exit status says so
    full = at_step(tmp_path, 2, "os.remove(LOG); os.symlink('/dev/full', LOG)".replace('LOG', repr(str(tmp_path / 'log.jsonl'))))
    process = run(*tiny(dataset, tmp_path, '--init_from=resume', '--max_iters=33'), full)
    assert set(process.err.splitlines()) == {f'{tmp_path}/log.jsonl could not be written: No space left on device'}
    assert read(tmp_path)['iter_num'] == 33


def test_a_checkpoint_of_another_optimizer_is_named(dataset, tmp_path):
    run(*tiny(dataset, tmp_path, '--max_iters=1'))
    err = run(*tiny(dataset, tmp_path, '--init_from=resume', '--optimizer=muon'), expect=1).err
    assert err == (f'{tmp_path}/ckpt.pt has the state of adamw: --init_from={tmp_path}/ckpt.pt starts from its weights '
                   'alone\n')
    resumed = run(*tiny(dataset, tmp_path, '--init_from=resume', '--dtype=float16', '--max_iters=2')).out
    assert 'step 2/2' in resumed  # with a gradient scaler, which the run before had not


def test_what_is_no_checkpoint_is_said_to_be_none(dataset, tmp_path):
    (tmp_path / 'ckpt.pt').write_bytes(b'PK not really')
    process = run(*tiny(dataset, tmp_path, '--init_from=resume'), expect=1)
    assert process.err.startswith(f'{tmp_path}/ckpt.pt is not a readable checkpoint') and process.err.count('\n') == 1


def test_a_bad_step_of_one_process_is_skipped_by_all(dataset, tmp_path):
    """The loss of one of two processes is not a number once: one update is left out, and nothing else is lost."""
    bad = at_step(tmp_path, 5, "if os.environ['RANK'] == '1': args[0] = list(args[0]); "
                               "args[0][0].grad.fill_(float('nan'))")
    out = run_ranks(*tiny(dataset, tmp_path / 'out'), bad, processes=2).out
    assert [line.split()[1] for line in out.splitlines() if 'skipped' in line] == ['5/20']
    log = [entry for entry in read_log(tmp_path / 'out') if 'loss' in entry]
    assert [entry['skipped'] for entry in log] == [0] * 4 + [1] * 16
    assert log[-1]['loss'] < log[0]['loss'] and read(tmp_path / 'out')['skipped'] == 1
    assert all(torch.isfinite(w).all() for w in read(tmp_path / 'out')['model'].values())


def test_a_spike_is_skipped(dataset, tmp_path):
    spike = at_step(tmp_path, 120, 'args[0] = list(args[0]); [p.grad.mul_(1e3) for p in args[0]]')
    args = '--max_iters=125', '--eval_interval=125', '--learning_rate=1e-4', '--total_batch_size=128'
    run(*tiny(dataset, tmp_path / 'skip', *args, '--skip_spikes=50.0'), spike)
    log = {entry['step']: entry for entry in read_log(tmp_path / 'skip') if 'loss' in entry}
    assert log[119]['skipped'] == 0 and log[120]['skipped'] == log[125]['skipped'] == 1
    assert log[120]['grad_norm'] > 500 * log[119]['grad_norm']


def test_too_many_bad_steps_end_the_run_with_the_last_good_checkpoint(dataset, tmp_path):
    wild = at_step(tmp_path, 15, "from __main__ import model; model.lm_head.weight.data.fill_(float('inf'))")
    process = run(*tiny(dataset, tmp_path, '--max_iters=60', '--max_bad_steps=8'), wild, expect=1)
    assert process.err.count('\n') == 1
    assert '8 steps in a row' in process.err and f'the last good checkpoint is {tmp_path}/ckpt.pt' in process.err
    assert read(tmp_path)['iter_num'] == 10
    assert torch.isfinite(read(tmp_path)['model']['lm_head.weight']).all()
