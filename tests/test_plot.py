"""plot.py: what it reads out of a log, what it draws, and one plain line for each mistake."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import plot
from conftest import ROOT
from data.errors import UserError

pytest.importorskip('matplotlib')
FINEWEB = {'dataset': 'fineweb_edu_10B', 'hellaswag_limit': 0, 'hellaswag_data': ''}


def write_log(folder, steps=40, every=1, config=None, bad=(), per_step=512, rate=1000.0, hellaswag=False):
    """A log as train.py writes it: (step 20's loss is 5 - 20 / 20 = 4)."""
    entries, skipped = [{'step': 0, 'config': config}] if config else [], 0
    for step in range(steps + 1):
        skipped += step in bad
        if step and (step % every == 0 or step in bad):
            loss = math.nan if step in bad else 5 - step / 20
            entries.append({'step': step, 'loss': loss, 'lr': 1e-3, 'grad_norm': loss, 'ms': 1e3 * per_step / rate,
                            'tokens_per_s': rate, 'skipped': skipped})
        if step % 10 == 0:
            entries.append({'step': step, 'val_loss': 5.5 - step / 20} | ({'hellaswag': 0.25} if hellaswag else {}))
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, 'log.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return entries


def svg(tmp_path, *folders, **options):
    """The text of the picture of some runs."""
    plot.curves(folders, tmp_path / 'curves.svg', **options)
    return (tmp_path / 'curves.svg').read_text()


def comments(text):
    """What matplotlib wrote as text into an SVG: it draws letters as paths, and keeps the text beside them."""
    return re.findall(r'<!-- (.*?) -->', text)


@pytest.mark.parametrize('every', [1, 10])
def test_positions_count_every_step_also_those_that_no_line_tells_of(tmp_path, every):
    entries = write_log(tmp_path, every=every)
    for x, per_step in ('steps', 1), ('tokens', 512), ('time', 0.512):
        run, skipped = plot.series(entries, x)
        assert run['val_loss'][0] == pytest.approx(np.arange(0, 41, 10) * per_step)
        assert run['loss'][0] == pytest.approx(np.arange(every, 41, every) * per_step)
        assert run['loss'][1][-1] == 3 and run['val_loss'][1].tolist() == [5.5, 5, 4.5, 4, 3.5]
        assert len(skipped) == 0 and 'hellaswag' not in run


def test_a_resumed_log_counts_no_step_twice(tmp_path):
    """Also when a killed run left steps behind its checkpoint, and when the resumed one has larger batches."""
    entries = write_log(tmp_path / 'a', 40)
    again = [entry for entry in write_log(tmp_path / 'b', 60, per_step=1024) if entry['step'] > 30]
    run, _ = plot.series(entries + again, 'tokens')
    assert run['loss'][0][[29, -1]].tolist() == [30 * 512, 30 * 512 + 30 * 1024]
    assert len(run['loss'][0]) == 60 and len(run['val_loss'][0]) == 7


def test_steps_without_a_number_are_gaps_and_marked(tmp_path):
    run, skipped = plot.series(write_log(tmp_path, bad={7, 8}), 'steps')
    assert skipped.tolist() == [7, 8]
    where, mean, low, high = plot.thin(*run['loss'])
    assert np.isnan(mean[[6, 7]]).all() and np.isfinite(np.delete(mean, [6, 7])).all()
    smooth = plot.smooth(np.arange(300) / 1.0)
    assert smooth[5:-5] == pytest.approx(np.arange(5, 295), abs=0.6)


def test_a_long_curve_keeps_its_spikes():
    values = np.ones(19_073)
    values[[12_345, 777]] = 50, -50
    where, mean, low, high = plot.thin(np.arange(19_073), values)
    assert len(where) <= plot.POINTS and high.max() == 50 and low.min() == -50 and where[-1] == 19_072


def test_the_picture_names_its_runs_panels_and_units(tmp_path):
    write_log(tmp_path / 'one', hellaswag=True)
    write_log(tmp_path / 'two', steps=0)  # an evaluation and nothing else
    write_log(tmp_path / 'three', bad=set(range(41)))
    write_log(tmp_path / ('long' * 30), steps=1)
    text = comments(svg(tmp_path, *map(str, [tmp_path / 'one', tmp_path / 'two', tmp_path / 'three',
                                             tmp_path / ('long' * 30)])))
    assert {'one', 'two', 'three', 'tokens (thousands)', *plot.PANELS.values()} <= set(text)
    assert any(re.fullmatch('long.*….*long', line) and len(line) <= 44 for line in text)
    for x, unit in ('steps', 'steps'), ('time', 'time (seconds)'):
        assert unit in comments(svg(tmp_path, tmp_path / 'one', x=x))
    plot.curves([tmp_path / 'one'], tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG'
    text = comments(svg(tmp_path, tmp_path / 'one', tmp_path / 'three', labels=['same', 'same']))
    assert text.count('same') == 1 and 'one' not in text
    assert not [path for path in tmp_path.iterdir() if path.suffix in ('.svg', '.png') and path.stem != 'curves']


def test_gpt2s_scores_stand_beside_runs_on_its_data_only(tmp_path):
    write_log(tmp_path / 'fineweb', config=FINEWEB, hellaswag=True)
    write_log(tmp_path / 'own', config=FINEWEB | {'dataset': 'stdlib'}, hellaswag=True)
    write_log(tmp_path / 'part', config=FINEWEB | {'hellaswag_limit': 10}, hellaswag=True)
    logs = {name: plot.log.read(tmp_path / name / 'log.jsonl') for name in ('fineweb', 'own', 'part')}
    assert plot.comparable([logs['fineweb']]) == {'val_loss': 3.2924, 'hellaswag': 0.2945}
    assert plot.comparable([logs['fineweb'], logs['own']]) == {'hellaswag': 0.2945}
    assert plot.comparable([logs['part']]) == {'val_loss': 3.2924}
    assert plot.comparable([logs['fineweb'], [{'step': 1, 'loss': 2.0}]]) == {}  # an old log
    assert "OpenAI's GPT-2 124M" in comments(svg(tmp_path, tmp_path / 'fineweb'))
    assert "OpenAI's GPT-2 124M" not in comments(svg(tmp_path, tmp_path / 'own', tmp_path / 'part'))
    write_log(tmp_path / 'own', config=FINEWEB | {'dataset': 'stdlib'})  # without HellaSwag
    assert "OpenAI's GPT-2 124M" not in comments(svg(tmp_path, tmp_path / 'own'))


def test_the_command_writes_png_and_svg(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / 'one')
    monkeypatch.setattr(sys, 'argv', ['plot.py', str(tmp_path / 'one'), f'--out={tmp_path}/pictures/speed', '--x=time'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    runpy.run_path(str(ROOT / 'plot.py'), run_name='__main__')
    assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == ['speed.png', 'speed.svg']
    assert '1 run' in capsys.readouterr().out


@pytest.mark.parametrize('args, words', [
    ('', 'name'), ('nowhere', 'nowhere/log.jsonl: no such log'), ('empty', 'empty/log.jsonl has nothing to draw'),
    ('one --x=epochs', 'x=epochs is not one of tokens, steps, time'), ('one --y=2', 'unknown setting y'),
    ('one --out=/proc/nowhere/x', '/proc/nowhere/x.png could not be written')])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, args, words):
    write_log(tmp_path / 'one')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'log.jsonl').write_text('{"step": 0, "config": {}}\n{"ste')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['plot.py', *args.split()])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    with pytest.raises(UserError, match=words) as error:
        runpy.run_path(str(ROOT / 'plot.py'), run_name='__main__')
    assert '\n' not in str(error.value)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    write_log(tmp_path)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(UserError, match='pip install matplotlib'):
        plot.curves([tmp_path], tmp_path / 'curves.png')
