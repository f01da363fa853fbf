"""Scaling laws: a known law is found again, intervals hold what they say, the published optima are the papers', and the
command from a grid of real runs to plan.py."""

import contextlib
import json
import math
import runpy
import shutil
import sys

import pytest
import torch

from common import laws
from common.laws import CHINCHILLA, Law, fit, predict, resample
from conftest import ROOT, TINY
from data.errors import UserError

F64 = torch.float64


def grid(n, d):
    """Every pair: parameters and tokens, (R,) each."""
    n, d = torch.meshgrid(torch.tensor(n, dtype=F64), torch.tensor(d, dtype=F64), indexing='ij')
    return n.flatten(), d.flatten()


N, D = grid([3e7, 1e8, 3e8, 1e9], [1e9, 3e9, 1e10, 3e10])


def numbers(law):
    return [float(x) for x in vars(law).values()]


@pytest.mark.parametrize('law', [CHINCHILLA, laws.REFIT, Law(0.9, 20.0, 0.25, 3000.0, 0.6)])
def test_a_known_law_is_found_again(law):
    assert numbers(fit(N, D, law.loss(N, D))) == pytest.approx(numbers(law), rel=1e-3)


def test_a_run_gone_wrong_hardly_matters():
    """What the Huber loss is for: least squares would lose E altogether here."""
    losses = CHINCHILLA.loss(N, D)
    losses[5] *= 1.2
    assert float(fit(N, D, losses).E) == pytest.approx(CHINCHILLA.E, rel=0.02)


def test_intervals_hold_unseen_runs_as_often_as_they_say():
    """30 grids with noise of 0.5%; of the runs kept from the fits, two of them larger than any in it, the 90% intervals
    hold about nine in ten, and the law's own numbers too."""
    trials = 30
    torch.manual_seed(0)
    noise = 0.005 * torch.randn(trials, len(N), dtype=F64)
    losses = CHINCHILLA.loss(N, D) * noise.exp()
    law = fit(N, D, losses)
    resampled, residuals = resample(N, D, losses, law, times=60)
    held = []
    for n, d in ((3e9, 1e11), (1e9, 1e11), (2e8, 5e9)):
        _, low, high = predict(law, resampled, residuals, n, d)
        measured = CHINCHILLA.loss(n, d) * (0.005 * torch.randn(trials, dtype=F64)).exp()
        held += ((low <= measured) & (measured <= high)).tolist()
        assert 0.005 < ((high - low) / measured).median() < 0.06  # and aren't just wide
    assert 0.8 <= sum(held) / len(held) <= 0.97
    low, high = resampled.alpha.quantile(torch.tensor([0.05, 0.95], dtype=F64), dim=-1)
    assert 0.75 <= ((low <= CHINCHILLA.alpha) & (CHINCHILLA.alpha <= high)).double().mean()


def test_optima_are_those_of_the_papers_tables():
    """Hoffmann et al., tables 3 and A3: parameters, FLOPs and tokens of each approach, far from the fixed points too."""
    published = {'approach 1': [(400e6, 1.92e19, 8.0e9), (67e9, 5.76e23, 1.5e12), (10e12, 1.30e28, 216.2e12)],
                 'approach 2': [(400e6, 1.84e19, 7.7e9), (67e9, 6.88e23, 1.7e12), (10e12, 1.75e28, 292.0e12)],
                 'approach 3': [(400e6, 2.21e19, 9.2e9), (67e9, 1.71e24, 4.1e12), (10e12, 8.55e28, 1425.5e12)]}
    for name, rows in published.items():
        optimum = next(optimum for key, optimum in laws.OPTIMA.items() if name in key and 'Hoffmann' in key)
        for parameters, flops, tokens in rows:
            n, d = optimum(flops)
            assert n == pytest.approx(parameters, rel=0.1) and d == pytest.approx(tokens, rel=0.1), (name, parameters)


def test_the_optimum_is_the_least_loss_for_its_compute():
    n, d = CHINCHILLA.optimum(1e21)
    assert 6 * n * d == pytest.approx(1e21)
    assert all(CHINCHILLA.loss(n, d) < CHINCHILLA.loss(n * k, d / k) for k in (0.9, 0.99, 1.01, 1.1))


def write_runs(folder, noise=0.003, **changes):
    """Finished runs by the dozen, their losses by a known law."""
    torch.manual_seed(0)
    for n, d in zip(*(x.tolist() for x in (N, D))):
        loss = CHINCHILLA.loss(n, d) * math.exp(noise * torch.randn(()).item())
        config = dict(init_from='scratch', max_iters=100, dataset='x', eval_iters=4, batch_size=4, block_size=8)
        path = folder / f'out-{n:.0e}-{d:.0e}'
        path.mkdir()
        (path / 'log.jsonl').write_text('\n'.join(map(json.dumps, [
            {'step': 0, 'config': config | changes, 'tokens_per_step': d / 100, 'parameters': n},
            {'step': 0, 'val_loss': 10.8}, {'step': 100, 'loss': loss, 'lr': 1e-3}, {'step': 100, 'val_loss': loss}])))


@pytest.fixture
def command(monkeypatch, capsys, forked):
    """Run a script in this process; returns what it prints, or raises what it raises."""
    def command(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *args])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() sets it
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name='__main__')
        return capsys.readouterr().out
    return command


def test_finished_runs_become_a_law_a_picture_and_a_plan(tmp_path, command):
    pytest.importorskip('matplotlib')
    write_runs(tmp_path)
    out = command('scaling.py', f'--runs={tmp_path}/out-*', f'--out_dir={tmp_path}/fit', '--hold_out=3', '--resamples=100',
                  '--predict=7e10:1.4e12')
    assert '13 runs, 30M to 1B parameters, 1B to 30B tokens' in out
    assert out.count('held out: ') == 3 and out.count(', inside') >= 2
    assert '70B parameters, 1.4T tokens: ' in out
    result = json.loads((tmp_path / 'fit' / 'scaling.json').read_text())
    assert result['law']['alpha'] == pytest.approx(CHINCHILLA.alpha, abs=0.08) and len(result['runs']) == 16
    assert (tmp_path / 'fit' / 'scaling.png').read_bytes().startswith(b'\x89PNG')
    out = command('plan.py', '--budget=1e19', f'--fit={tmp_path}/fit/scaling.json')
    n, _ = laws.read(tmp_path / 'fit' / 'scaling.json')[0].optimum(1e19)
    assert f'{n:.3g}' in out and 'your own: ' in out and 'extrapolates' not in out
    assert 'extrapolates' in command('plan.py', '--budget=1e25', f'--fit={tmp_path}/fit/scaling.json')


def test_a_grid_is_trained_once(dataset, tmp_path, command):
    """Real runs of train.py, too few for a law: they are kept, and read the second time."""
    args = ['--sizes=1x16,2x32', '--steps=2', '--hold_out=1', '--grid_head_size=16', '--picture=', *TINY, f'--dataset={dataset}',
            f'--out_dir={tmp_path}/grid']
    logs = []
    for _ in range(2):
        with pytest.raises(UserError, match='there are 1 of 1 and 1'):  # the larger one is held out
            command('scaling.py', *args)
        logs.append({path: path.stat().st_mtime_ns for path in tmp_path.glob('grid/*/log.jsonl')})
    assert len(logs[0]) == 2 and logs[1] == logs[0]
    with pytest.raises(UserError, match='1x16-2 has a run with learning_rate=0.001, not 0.1'):
        command('scaling.py', *args, '--learning_rate=0.1')


@pytest.mark.parametrize('args, words', [
    (['--runs=~/nothing-*'], 'runs=~/nothing-.* names no folder'),
    (['--out_dir=/proc/nope'], 'out_dir=/proc/nope cannot be written: No such file'),
    (['--sizes=4by128'], '4by128 is not layers x channels'),
    (['--sizes=4x100'], 'no multiple of grid_head_size'),
    (['--steps=many'], 'steps=many is not a comma-separated list'),
    (['--predict=124e6'], 'is not parameters:tokens'),
    (['--dataset=/nowhere', '--sizes=1x32'], '1x32-300: .*nowhere'),
])
def test_mistakes_are_named(tmp_path, command, args, words):
    with pytest.raises(UserError, match=words):
        command('scaling.py', f'--out_dir={tmp_path}/out', '--picture=', *args)


def test_runs_that_are_on_no_curve_are_named(tmp_path, command):
    write_runs(tmp_path)
    (tmp_path / 'out-compare').mkdir()
    out = command('scaling.py', f'--runs={tmp_path}/out-*', '--picture=', f'--out_dir={tmp_path}/fit')
    assert f'left out: {tmp_path}/out-compare/log.jsonl: no such log' in out and out.count('left out') == 1
    for folder in tmp_path.glob('out-*'):
        shutil.rmtree(folder)
    write_runs(tmp_path, max_iters=200)
    with pytest.raises(UserError, match='stopped at step 100 of 200'):
        command('scaling.py', f'--runs={tmp_path}/out-*', '--picture=', f'--out_dir={tmp_path}/fit')
    for folder in tmp_path.glob('out-*'):
        shutil.rmtree(folder)
    write_runs(tmp_path, init_from='gpt2')
    with pytest.raises(UserError, match='started from gpt2'):
        command('scaling.py', f'--runs={tmp_path}/out-*', '--picture=', f'--out_dir={tmp_path}/fit')
    path = next(tmp_path.glob('out-*/log.jsonl'))
    path.write_text(path.read_text().replace('gpt2', 'auto') + '\n' + json.dumps({'step': 100, 'val_loss': None}))
    with pytest.raises(UserError, match='has diverged: its final validation loss is not finite'):
        command('scaling.py', f'--runs={path.parent}', '--picture=', f'--out_dir={tmp_path}/fit')


def test_a_budget_plans_no_run_and_says_what_it_would_ignore(tmp_path, command):
    out = command('plan.py', '--budget=1.21e20')
    assert '       1e+09    2.02e+10         20.2   Hoffmann et al. 2022, approach 1' in out
    (tmp_path / 'x.json').write_text('{"law": {"E": 1}}')
    for args, words in ((['--budget=1e19', '--n_layer=3'], 'n_layer would be ignored'), (['--fit=x.json'], 'needs a budget'),
                        (['--budget=1e19', f'--fit={tmp_path}/y.json'], 'cannot be read'),
                        (['--budget=1e19', f'--fit={tmp_path}/x.json'], 'holds no law')):
        with pytest.raises(UserError, match=words):
            command('plan.py', *args)


def test_without_matplotlib_the_line_says_so_before_any_training(tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(UserError, match='needs matplotlib: pip install matplotlib'):
        command('scaling.py', f'--out_dir={tmp_path}/out')
    assert not (tmp_path / 'out').exists()
