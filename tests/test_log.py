"""The log and the trackers: nothing that happens to a disk or a service ends a run, and what is there can be read."""

import errno
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest

import configurator
from common import log
from data import atomic
from data.errors import UserError


def read(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in Path(path).read_text().splitlines()]


def fail(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

# -----------------------------------------------------------------------------
# log.jsonl

def test_an_entry_is_a_line_of_json(tmp_path):
    run_log = log.Log(tmp_path / 'log.jsonl')
    run_log.write({'step': 1, 'loss': math.nan, 'val_losses': {'a': math.inf, 'b': 2.0}})
    run_log.write({'step': 2, 'loss': 1.5})
    assert read(tmp_path / 'log.jsonl') == [  # before it is closed
        {'step': 1, 'loss': None, 'val_losses': {'a': None, 'b': 2.0}}, {'step': 2, 'loss': 1.5}]
    run_log.close()


def test_an_entry_never_joins_half_a_line(tmp_path):
    path = tmp_path / 'log.jsonl'
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    run_log = log.Log(path)
    run_log.write({'step': 2})
    run_log.write({'step': 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 2}\n{"step": 3}\n'


def test_a_full_disk_is_told_once_and_leaves_a_gap(tmp_path, capfd):
    path = tmp_path / 'log.jsonl'
    run_log = log.Log(path)
    run_log.write({'step': 1})
    path.rename(tmp_path / 'aside')
    path.symlink_to('/dev/full')
    for step in 2, 3, 4:
        run_log.write({'step': step})
    assert capfd.readouterr().err == f'{path} could not be written: No space left on device\n'
    (tmp_path / 'aside').replace(path)
    with open(path, 'a') as f:
        f.write('{"step": 2')  # what did fit
    run_log.write({'step': 5})
    assert capfd.readouterr().err == f'{path} is written again; 3 entries are missing\n'
    assert path.read_text() == '{"step": 1}\n{"step": 2\n{"step": 5}\n'


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    run_log = log.Log(tmp_path / 'out' / 'log.jsonl')
    run_log.write({'step': 1})
    (tmp_path / 'out' / 'log.jsonl').unlink()
    (tmp_path / 'out').rmdir()
    run_log.write({'step': 2})
    assert read(tmp_path / 'out' / 'log.jsonl') == [{'step': 2}]


def test_rewinding_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / 'log.jsonl'
    lines = [b'{"step": 1, "loss": 2}', b'{"step": 2, "val_loss": NaN}', b'{"step": 2, "loss": 1}', b'{"step": 3, "loss": 1}']
    path.write_bytes(b'\n'.join(lines + [b'{"step": 1, "lo']))
    log.rewind(path, 2)
    assert path.read_bytes().splitlines() == [lines[0], lines[2]]
    log.rewind(tmp_path / 'none.jsonl', 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['log.jsonl']


def test_rewinding_reads_anything(tmp_path, capfd):
    path = tmp_path / 'log.jsonl'
    odd = [b'{"note": "mine"}', b'{"step": "a"}', b'[1, 2]', b'3']
    path.write_bytes(b'\n'.join([b'\xff\xfe', b'[' * 100_000, *odd, b'\0\0', b'{"step": 9}']))
    log.rewind(path, 2)
    assert path.read_bytes().splitlines() == odd and capfd.readouterr().err == ''


def test_rewinding_on_a_disk_that_refuses_is_one_line(tmp_path, capfd, monkeypatch):
    path = tmp_path / 'log.jsonl'
    path.write_text('{"step": 1}\n{"step": 9}\n')
    monkeypatch.setattr(atomic, 'open', fail, raising=False)
    log.rewind(path, 2)
    assert capfd.readouterr().err == (f'{path} could not be rewound to step 2 (Read-only file system), and is continued as '
                                      'it is\n')
    assert len(read(path)) == 2


def test_a_new_run_overwrites_nothing(tmp_path, capsys):
    log.archive_previous_run(tmp_path)
    for n in 1, 2:
        for name in 'ckpt.pt', 'ckpt_best.pt', 'ckpt_000010.pt', 'log.jsonl':
            (tmp_path / name).write_text(f'{n}')
        log.archive_previous_run(tmp_path)
        assert capsys.readouterr().out == f'{tmp_path} held an earlier run: its files are now called {n}.*\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'{n}.{name}' for n in (1, 2) for name in (
        'ckpt.pt', 'ckpt_000010.pt', 'ckpt_best.pt', 'log.jsonl')]


def test_a_run_that_continues_from_a_numbered_checkpoint_keeps_what_led_there(tmp_path):
    for name in 'ckpt.pt', 'ckpt_best.pt', 'ckpt_000010.pt', 'ckpt_000020.pt', 'ckpt_000030.pt':
        (tmp_path / name).write_text('a')
    (tmp_path / 'log.jsonl').write_text('{"step": 20, "loss": 1}\n{"step": 30, "loss": 1}\n')
    log.archive_previous_run(tmp_path, after=20)
    log.rewind(tmp_path / 'log.jsonl', 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        '1.ckpt.pt', '1.ckpt_000030.pt', '1.ckpt_best.pt', '1.log.jsonl', 'ckpt_000010.pt', 'ckpt_000020.pt', 'log.jsonl']
    assert len(read(tmp_path / '1.log.jsonl')) == 2 and len(read(tmp_path / 'log.jsonl')) == 1


def test_archiving_on_a_disk_that_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'ckpt.pt').write_text('a')
    monkeypatch.setattr(Path, 'rename', fail)
    with pytest.raises(UserError, match=r'ckpt.pt, of an earlier run, could not be renamed to 1.ckpt.pt \(Read-only file'):
        log.archive_previous_run(tmp_path)

# -----------------------------------------------------------------------------
# trackers

def start(names, out_dir, project='gpt2'):
    return log.start_trackers(names, project, 'a run', {'n_layer': 2}, str(out_dir))


def test_a_tracker_that_cannot_start_is_named(tmp_path, monkeypatch):
    assert start('', tmp_path) == start(' , ', tmp_path) == []
    with pytest.raises(UserError, match='log_to=mlflow is not one of wandb, tensorboard, trackio'):
        start('mlflow', tmp_path)
    with pytest.raises(UserError, match="wandb_project=a/b: Weights & Biases allows no '/' in a project's name"):
        start('wandb', tmp_path, 'a/b')
    for name in 'wandb', 'trackio', 'tensorboard':
        monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if name == 'tensorboard' else name, None)
        if name == 'tensorboard':
            monkeypatch.setitem(sys.modules, 'tensorboard', None)
        with pytest.raises(UserError, match=f'log_to={name} needs the package {name}: pip install {name}'):
            start(name, tmp_path)


def test_tensorboard(tmp_path):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    run_log = log.Log(tmp_path / 'log.jsonl', start('tensorboard', tmp_path))
    run_log.write({'step': 1, 'loss': 2.5, 'val_losses': {'a': 1.5}})
    run_log.write({'step': 2, 'loss': math.nan})
    run_log.write({'step': 3, 'loss': 1.5})
    run_log.close()
    events = reader.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert [(event.step, event.value) for event in events.Scalars('loss')] == [(1, 2.5), (3, 1.5)]
    assert [event.value for event in events.Scalars('val_losses/a')] == [1.5]


def test_wandb(tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip('wandb')
    for name in 'WANDB_API_KEY', 'WANDB_MODE':
        monkeypatch.delenv(name, raising=False)
    for name in 'HOME', 'XDG_CONFIG_HOME', 'NETRC':
        monkeypatch.setenv(name, str(tmp_path / 'nobody'))
    monkeypatch.setenv('WANDB_SILENT', 'true')
    with pytest.raises(UserError, match='log_to=wandb: .*wandb login'):
        start('wandb', tmp_path)
    wandb.teardown()  # a process reads its environment once
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setattr(sys, 'excepthook', configurator.excepthook)
    trackers = start('wandb,wandb', tmp_path)
    run_log = log.Log(tmp_path / 'log.jsonl', trackers)
    run_log.write({'step': 1, 'loss': 2.5})
    run_log.close()
    file, = (tmp_path / 'wandb').glob('offline-run-*/run-*.wandb')
    for _ in range(600):  # a process of wandb's own writes it
        if b'2.5' in file.read_bytes():
            break
        time.sleep(0.1)
    assert len(trackers) == 1 and b'loss' in file.read_bytes() and b'2.5' in file.read_bytes()
    capfd.readouterr()
    with pytest.raises(SystemExit):
        sys.excepthook(UserError, UserError('one line'), None)
    assert capfd.readouterr().err == 'one line\n'


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path))  # read when it is imported
    pytest.importorskip('trackio')
    run_log = log.Log(tmp_path / 'log.jsonl', start('trackio', tmp_path, 'a'))
    run_log.write({'step': 1, 'loss': 2.5})
    run_log.close()
    import sqlite3
    file, = tmp_path.glob('**/*.db')
    rows = sqlite3.connect(file).execute('select step, metrics from metrics').fetchall()
    assert [(step, json.loads(metrics)['loss']) for step, metrics in rows] == [(1, 2.5)]


def test_a_service_that_fails_ends_nothing(tmp_path, capfd):
    class Down(log.Tracker):
        def send(self, values, step):
            raise ConnectionError('no answer')
        finish = send
    run_log = log.Log(tmp_path / 'log.jsonl', [Down()])
    for step in 1, 2:
        run_log.write({'step': step})
    run_log.close()
    assert capfd.readouterr().err == 'Down could not be reached (no answer); training continues\n'
    assert len(read(tmp_path / 'log.jsonl')) == 2


@pytest.mark.parametrize('width, shown', [(200, 'mfu'), (80, 'tokens/s'), (60, 'left')])
def test_a_steps_line_fits_the_terminal_and_says_less_when_it_must(monkeypatch, width, shown):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.setenv('COLUMNS', str(width))
    entry = {'step': 12345, 'loss': 3.14159, 'lr': 6e-4, 'grad_norm': 1.5, 'ms': 12345.0,
             'tokens_per_s': 1_234_567.0, 'mfu': 0.4}
    line = log.step_line(entry, 19073, '1 day, 3:45:10')
    assert len(line) < width and shown in line and line.startswith('step 12345/19073 | loss 3.1416')
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: False)
    assert 'mfu' in log.step_line(entry, 19073, '3:45:10')  # a file has all of it
