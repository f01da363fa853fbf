"""compare.py finds what is there, claims nothing that isn't, and continues where it was stopped."""

import json
import math
import re
import runpy
import signal
import sys

import numpy as np
import pytest

import compare
from conftest import ROOT, TINY, finish, run, start
from data.errors import UserError


def looks(differences):
    """(the look at which a comparison stops, its mean, its half-width)"""
    for n in compare.LOOKS:
        mean, half = compare.interval(differences[:n])
        if abs(mean) > half:
            break
    return n, mean, half


def test_claims_of_a_difference_that_is_not_there_are_rare():
    """Whoever stops at the first look that shows one claims one in at most 5 of 100 cases, at the rates stated."""
    noise = np.random.default_rng(0).normal(0, 0.01, (6000, max(compare.LOOKS))).tolist()
    stops = [looks(differences) for differences in noise]
    claims = np.array([n for n, mean, half in stops if abs(mean) > half])
    assert 0.03 < len(claims) / len(noise) <= 0.05
    for n, error in zip(compare.LOOKS, (0.01, 0.025, 0.01, 0.005)):  # each look alone
        intervals = [compare.interval(differences[:n]) for differences in noise]
        rate = np.mean([abs(mean) > half for mean, half in intervals])
        assert rate == pytest.approx(error, abs=3 * math.sqrt(error / len(noise)))


def test_a_difference_that_is_there_is_found_and_its_size_is_in_the_interval():
    noise = np.random.default_rng(1).normal(0.03, 0.01, (1000, max(compare.LOOKS))).tolist()
    stops = [looks(differences) for differences in noise]
    assert np.mean([n <= 5 for n, _, _ in stops]) > 0.9
    assert np.mean([abs(mean - 0.03) <= half for _, mean, half in stops]) > 0.95
    assert compare.verdict(noise[0][:5], 'a', 'b') == 'b is worse than a'
    assert compare.verdict([-x for x in noise[0][:5]], 'a', 'b') == 'b is better than a'


def test_how_many_seeds_would_show_a_difference():
    assert compare.verdict([0.0, 0.0, 0.0], 'a', 'b') == 'a and b are the same'
    for mean, more in (0.2, 'about 2'), (0.12, 'about 7'), (0.08, 'about 17'), (0.01, 'more than 17'):
        differences = [mean - 0.1, mean, mean + 0.1]  # of standard deviation 0.1
        verdict = compare.verdict(differences, 'a', 'b')
        assert verdict == f'no difference shown; {more} more seeds would show one of this size'


def log_of(losses, rate=1000.0, every=10, per_step=512):
    """A log with a validation loss every ten steps from 0 on."""
    entries = []
    for step in range(every * len(losses) - every + 1):
        if step:
            entries.append({'step': step, 'loss': 1.0, 'ms': 1e3 * per_step / rate, 'tokens_per_s': rate})
        if step % every == 0:
            entries.append({'step': step, 'val_loss': losses[step // every]})
    return entries


def test_tokens_and_time_are_by_hand():
    a, b = log_of([5.0, 4.0, 3.0, 2.0]), log_of([5.0, 3.0, 1.5, 1.0], rate=500.0)
    assert compare.tokens_to(2.0, a) == 30 * 512
    assert compare.tokens_to(2.0, b) == pytest.approx((10 + 10 * 2 / 3) * 512)
    assert compare.tokens_to(0.5, b) == math.inf
    assert compare.seconds(a) == pytest.approx(30 * 512 / 1000)
    nan = log_of([5.0, math.nan, 3.0])
    assert compare.tokens_to(4.0, nan) == pytest.approx(10 * 512)  # by the line past it
    lines = compare.ratios('a', 'b', {'a': [a] * 3, 'b': [b] * 3}).splitlines()
    assert lines == ['tokens: b reaches the final loss of a with 0.56 of its tokens',
                     'time: b trains for 2.00 times as long as a']
    assert ('tokens: a does not reach the final loss of b; b reaches that of a with 0.56 of its own tokens'
            in compare.ratios('b', 'a', {'a': [a] * 3, 'b': [b] * 3}))


def config_file(folder, dataset):
    path = folder / 'tiny.py'
    settings = [arg.removeprefix('--').split('=') for arg in [*TINY, f'--dataset={dataset}']]
    path.write_text(''.join(f'{name} = {value if re.fullmatch(r"[0-9.e-]+|False", value) else repr(value)}\n'
                            for name, value in settings))
    return path


def test_a_learning_rate_that_is_worse_is_found_and_a_stop_costs_no_run(dataset, tmp_path):
    file, out_dir = config_file(tmp_path, dataset), tmp_path / 'out'
    args = (file, f'{file} --learning_rate=1e-5 --min_lr=0.0', f'--out_dir={out_dir}', '--seeds=3', '--jobs=2',
            '--n_layer=1', '--log_interval=5')
    process = start('compare.py', *args)
    for line in process.stdout:
        if line.startswith('seed 1:'):
            break
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 143 and 'Traceback' not in process.err
    first = {path: path.read_text() for path in out_dir.glob('*-seed1/log.jsonl')}
    assert len(first) == 2
    out = run('compare.py', *args).out
    assert len(re.findall(r'^seed \d: tiny \d', out, re.MULTILINE)) == 3
    assert 'differ in learning_rate 0.001 and 1e-05, min_lr 0.0001 and 0.0;' in out.splitlines()[0]
    assert out.splitlines()[-2] == 'tiny,learning_rate=1e-5,min_lr=0.0 is worse than tiny'
    assert all(path.read_text() == text for path, text in first.items())
    starts = [[json.loads(line) for line in path.read_text().splitlines()] for path in out_dir.glob('*/log.jsonl')]
    assert len(starts) == 6
    for log in starts:
        config = next(entry['config'] for entry in log if 'config' in entry)
        assert config['learning_rate'] == (1e-5 if 'learning_rate=' in config['out_dir'] else 1e-3)
        assert config['n_layer'] == 1
        assert [entry['step'] for entry in log if 'loss' in entry] == [5, 10, 15, 20]
    assert sorted(path.name for path in out_dir.glob('*.png')) == ['tiny_vs_tiny,learning_rate=1e-5,min_lr=0.0.png']


@pytest.mark.parametrize('args, words', [
    ('', 'takes two configurations'), ('tiny.py', 'takes two configurations'),
    ('tiny.py tiny.py', 'both .* are called tiny'),
    ('tiny.py other.py --seeds=4', 'seeds=4 is not one of 3, 5, 10, 20'),
    ('tiny.py other.py --seed=4', 'each run gets a seed'), ('tiny.py other.py --jobs=0', 'jobs=0'),
    ('tiny.py other.py --out_dir=/proc/nope', 'out_dir=/proc/nope cannot be written: No such file'),
    ('tiny.py gone.py', 'gone.py: no such file'), ('tiny.py gpt2', 'expected a settings'),
    ('tiny.py other.py --learning_rat=1', 'did you mean learning_rate'),
    ('tiny.py other.py', r'tiny-seed1 has a run with n_layer=3, not 2: choose another --out_dir'),
    ('tiny.py other.py --n_layer=3', r'tiny-seed1 has diverged: its final validation loss is not finite'),
    ('other.py tiny.py --n_head=4', r'other-seed1: no dataset in /nowhere'),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, forked, args, words):
    file = config_file(tmp_path, '/nowhere')
    (tmp_path / 'other.py').write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    if 'n_head' not in args:
        config = compare.side('tiny.py', ['--n_layer=3'])[2]
        folder = tmp_path / 'out-compare' / 'tiny-seed1'
        folder.mkdir(parents=True)
        (folder / 'log.jsonl').write_text(json.dumps({'step': 0, 'config': config}) + '\n'
                                          + json.dumps({'step': config['max_iters'], 'val_loss': None}) + '\n')
    monkeypatch.setattr(sys, 'argv', ['compare.py', *args.split()])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    with pytest.raises(UserError, match=words) as error:
        runpy.run_path(str(ROOT / 'compare.py'), run_name='__main__')
    assert '\n' not in str(error.value)
