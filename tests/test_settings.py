"""Each setting does what its line says: it is used, refused, or printed as not used."""

import re

import pytest

from common import distributed
from common.settings import divide_step
from configurator import settings_of
from conftest import ROOT, read_log
from data.errors import UserError

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=32', '--batch_size=4', '--total_batch_size=128',
         '--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_iters=1', '--max_iters=3', '--eval_interval=100',
         '--eval_tokens=640', '--hellaswag_interval=0', '--sample_interval=0', '--curves=False', '--device=cpu',
         '--dtype=float32', '--compile=False']


@pytest.fixture
def train(inside, dataset, tmp_path):
    """train(*args): run train.py, small, and return what it printed."""
    def run(*args):
        return inside('train.py', *SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', *args)
    return run


def val_losses(tmp_path):
    return [entry['val_loss'] for entry in read_log(tmp_path / 'out') if 'val_loss' in entry]


# -----------------------------------------------------------------------------
# the validation set

def test_the_validation_set_does_not_depend_on_the_micro_batch(train, dataset):
    """Of 20 blocks, batches of 16 and of 64 score the same, and 20 is a multiple of neither."""
    outs = [train('--eval_only', f'--batch_size={size}', '--total_batch_size=2048') for size in (16, 64)]
    losses = [re.search(r'val loss ([\d.]+)', out)[1] for out in outs]
    assert losses[0] == losses[1]


def test_eval_iters_counts_batches_and_the_later_of_it_and_eval_tokens_wins(train, tmp_path):
    file = tmp_path / 'nano.py'
    file.write_text('eval_iters = 3\n')
    assert 'evaluating on 384 tokens' in train('--eval_only', file)  # 3 * 4 * 32
    assert 'evaluating on 640 tokens' in train('--eval_only', file, '--eval_tokens=640')
    out = train('--eval_only', '--eval_tokens=640', file)
    assert 'evaluating on 384 tokens' in out and 'eval_iters=3 replaces eval_tokens=640, given before it' in out


# -----------------------------------------------------------------------------
# tokens in a step

STEP = dict(batch_size=16, block_size=128, total_batch_size=2048, gradient_accumulation_steps=0)


@pytest.mark.parametrize('given, processes, expected, words', [
    ({}, 1, (1, 16), ''),
    ({'total_batch_size': 8192}, 2, (2, 16), ''),
    ({'total_batch_size': 2048}, 2, (1, 8), 'batch_size=8: 2 processes divide'),  # config/quickstart.py
    ({'gradient_accumulation_steps': 6}, 2, (3, 16), ''),
    ({'gradient_accumulation_steps': 6, 'total_batch_size': 4096}, 1, (2, 16),
     'replaces gradient_accumulation_steps=6'),
    ({'total_batch_size': 4096, 'gradient_accumulation_steps': 6}, 1, (6, 16), 'replaces total_batch_size=4096'),
    ({'batch_size': 12}, 1, (1, 12), 'total_batch_size=1536 instead of 2048')])
def test_how_a_step_is_divided(given, processes, expected, words):
    *result, note = divide_step(STEP | given, given, processes)
    assert tuple(result) == expected and (words in note if words else note == '')


@pytest.mark.parametrize('given, words', [
    ({'gradient_accumulation_steps': 3}, 'use 4, or total_batch_size'),
    ({'total_batch_size': 5000}, 'the nearest are 4096 or 8192')])
def test_a_step_that_two_processes_cannot_divide(given, words):
    with pytest.raises(UserError, match=words):
        divide_step(STEP | given, given, 2)


# -----------------------------------------------------------------------------
# intervals

@pytest.mark.parametrize('interval, shown', [('sample', '  > '), ('hellaswag', 'hellaswag ')])
def test_an_interval_alone_runs_its_own_evaluation_and_no_other(train, tmp_path, interval, shown):
    items = tmp_path / 'items.jsonl'
    items.write_text('{"ctx": "import", "label": 1, "endings": ["a", "b", "c", "d"]}\n')
    more = [f'--hellaswag_data={items}'] if interval == 'hellaswag' else []
    out = train(f'--{interval}_interval=2', '--max_iters=3', '--eval_interval=3', *more)
    before = out[:out.index('step 3/3 | loss')]
    assert shown in before[before.index('step 2/3 | loss'):] and before.count('val loss') == 1  # before the first step
    assert [entry['step'] for entry in read_log(tmp_path / 'out') if 'val_loss' in entry] == [0, 3]


def test_train_py_alone_is_config_gpt2():
    defaults, config = settings_of(ROOT / 'train.py'), {}
    exec((ROOT / 'config' / 'gpt2.py').read_text(), config)
    differ = {name for name in defaults if name in config and config[name] != defaults[name]}
    assert differ == {'out_dir', 'wandb_run_name'}
    assert defaults['hellaswag_interval'] == defaults['sample_interval'] == defaults['eval_interval'] == 250
    assert defaults['eval_tokens'] == 10_485_760 and defaults['dataset'] == 'fineweb_edu_10B'


# -----------------------------------------------------------------------------
# ignored in silence: never

def test_a_resume_lists_what_changed_and_uses_it(train, dataset, tmp_path):
    train()
    out = train('--init_from=resume', '--max_iters=4', '--weight_decay=0.3', '--beta2=0.5', '--adam_eps=1e-6',
                '--dropout=0.5')
    line, = (line for line in out.splitlines() if line.startswith('changed since'))
    for change in ('max_iters=4 (was 3)', 'weight_decay=0.3 (was 0.1)', 'beta2=0.5 (was 0.95)',
                   'adam_eps=1e-06 (was 1e-08)'):
        assert change in line
    import torch
    groups = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['optimizer']['param_groups']
    assert {group['weight_decay'] for group in groups} == {0.3, 0.0}
    assert {(group['betas'], group['eps']) for group in groups} == {((0.9, 0.5), 1e-6)}
    for refused, words in (('--n_layer=2', 'n_layer=1'), ('--max_iters=2', 'reached step 4'),
                           ('--optimizer=muon', 'adamw'), ('--bias=False', 'bias=True')):
        with pytest.raises(UserError, match=words):
            train('--init_from=resume', '--max_iters=4', refused)


def test_a_model_setting_that_weights_contradict_is_refused(train, tmp_path):
    train('--max_iters=1')
    (tmp_path / 'out' / 'ckpt.pt').rename(tmp_path / 'weights.pt')
    for setting, words in (('--n_layer=2', 'n_layer=1'), ('--bias=False', 'bias=True'),
                           ('--norm_eps=1e-3', 'norm_eps=1e-05'), ('--tie_embeddings=False', 'tie_embeddings=True')):
        with pytest.raises(UserError, match=words):
            train(f'--init_from={tmp_path}/weights.pt', setting)
    train(f'--init_from={tmp_path}/weights.pt', '--bias=True', '--n_kv_head=0', '--n_mlp=64', '--max_iters=1')


@pytest.mark.parametrize('args, line', [
    (['--wsd_decay=0.5'], 'not used: wsd_decay (lr_schedule is cosine)'),
    (['--decay_lr=False'], 'not used: warmup_iters, min_lr (decay_lr is False)'),
    (['--hellaswag_limit=3'], 'not used: hellaswag_limit (hellaswag_interval is 0)'),
    (['--wandb_project=x'], 'not used: wandb_project (wandb_log is False)'),
    (['--rope_theta=500'], 'not used: rope_theta (position is learned)'),
    (['--position=rope', '--rope_factor=4', '--rope_theta=500'], 'not used: rope_factor (rope_type is default)'),
    (['--eval_only', '--keep_checkpoints=3'], 'not used: keep_checkpoints (eval_only is True)'),
    (['--warmup_iters=9'], 'warmup_iters=9 is longer than the run (max_iters=1)')])
def test_what_is_not_used_is_printed(train, args, line):
    assert line in train('--max_iters=1', *args)


@pytest.mark.parametrize('args, words', [
    (['--document_mask', '--objective=mlm'], 'document_mask is for objective=next_token'),
    (['--min_lr=1.0'], 'min_lr=1.0 must be at most learning_rate=0.001'),
    (['--profile'], 'profile'), (['--out_dir='], 'out_dir is empty: name a folder'),
    (['--device=meta'], '--device=cpu'), (['--seed=18446744073709551616'], 'seed='),
    (['--max_iters=4294967296'], 'max_iters='),
    (['--batch_size=1000000000000'], 'batch_size='), (['--n_mlp=-5'], 'n_mlp=-5'), (['--n_kv_head=-1'], 'n_kv_head=-1'),
    (['--softcap=nan'], 'softcap=nan'), (['--lr_decay_iters=-1'], 'lr_decay_iters=-1'),
    (['--hellaswag_limit=-1'], 'hellaswag_limit=-1')])
def test_what_makes_no_run_is_refused(train, tmp_path, args, words):
    with pytest.raises(UserError, match=words):
        train(*args)
    assert not (tmp_path / 'out').exists()


def test_every_field_of_the_model_is_a_setting():
    from dataclasses import fields
    from model import GPTConfig
    settings = settings_of(ROOT / 'train.py')
    assert {f.name for f in fields(GPTConfig)} - settings.keys() == {'vocab_size', 'causal'}  # the data's, and objective's
    assert all(settings[f.name] == f.default for f in fields(GPTConfig) if f.name in settings)


def test_the_tail_of_wsd_is_the_share_that_its_comment_says(train, tmp_path):
    """Of the 8 steps from warmup_iters=2 to lr_decay_iters=10, the last half decays."""
    train('--max_iters=10', '--warmup_iters=2', '--lr_schedule=wsd', '--wsd_decay=0.5', '--min_lr=0')
    lr = [entry['lr'] for entry in read_log(tmp_path / 'out') if 'lr' in entry]  # of step 1 to 10
    assert lr[2:7] == [1e-3] * 5 and lr[7:] == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3]) and lr[0] < lr[1] < 1e-3


# -----------------------------------------------------------------------------
# a stop

def test_ctrl_c_between_micro_batches_repeats_the_step(train, dataset, tmp_path, monkeypatch):
    import signal
    import torch
    from data.loader import Loader
    train('--total_batch_size=512', '--dropout=0.1')
    whole = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    real, calls = Loader.next_batch, []

    def next_batch(self):
        calls.append(1)
        if len(calls) == 6:  # of the second step's four micro-batches, which are read before they are run
            signal.raise_signal(signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Loader, 'next_batch', next_batch)
    out = train('--total_batch_size=512', '--dropout=0.1')
    assert 'at step 1; --init_from=resume' in out and len(calls) == 8
    monkeypatch.setattr(distributed, 'stop_signal', 0)
    train('--total_batch_size=512', '--dropout=0.1', '--init_from=resume')
    resumed = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert resumed['iter_num'] == 3 and resumed['data'] == whole['data']
    assert all(torch.equal(w, resumed['model'][name]) for name, w in whole['model'].items())


def test_a_signal_during_an_evaluation_ends_it_and_loses_nothing(train, tmp_path, monkeypatch):
    import signal
    import torch
    from data.loader import Loader
    real, scored = Loader.eval_batches, []

    def eval_batches(self, n_blocks, k):
        scored.append(0)
        for batch in real(self, n_blocks, k):
            if len(scored) == 2:  # the evaluation of step 2
                signal.raise_signal(signal.SIGTERM)
            scored[-1] += 1
            yield batch

    monkeypatch.setattr(Loader, 'eval_batches', eval_batches)
    out = train('--eval_interval=2', '--max_iters=4')
    assert 'ckpt.pt at step 2; --init_from=resume' in out and 'step 2/4 | val loss' not in out and scored == [5, 1]
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 2
    monkeypatch.setattr(distributed, 'stop_signal', 0)
    assert 'step 2/4 | val loss' in train('--eval_interval=2', '--max_iters=4', '--init_from=resume')


# -----------------------------------------------------------------------------
# an earlier run in out_dir

def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


@pytest.mark.parametrize('accident', ['hellaswag', 'tracker', 'first step', 'mlflow'])
def test_a_start_that_fails_leaves_the_run_before_in_its_place(train, tmp_path, monkeypatch, accident):
    train('--max_iters=1')
    before = files_in(tmp_path / 'out')
    args = {'hellaswag': ['--hellaswag_interval=1', f'--hellaswag_data={tmp_path}/nothing'],
            'tracker': ['--log_to=wandb', '--wandb_project=a/b'], 'mlflow': ['--log_to=mlflow']}.get(accident, [])
    if accident == 'first step':
        import torch
        def too_large(*args, **kwargs):
            raise torch.OutOfMemoryError('out of memory')
        monkeypatch.setattr(torch.Tensor, 'backward', too_large)
    with pytest.raises((UserError, RuntimeError)):
        train('--max_iters=1', *args)
    assert files_in(tmp_path / 'out') == before


def test_a_missing_checkpoint_names_the_one_of_the_run_before(train, tmp_path):
    train('--max_iters=1')
    (tmp_path / 'out' / 'ckpt.pt').rename(tmp_path / 'out' / '1.ckpt.pt')
    with pytest.raises(UserError, match='--init_from=resume:.*/1.ckpt.pt'):
        train('--init_from=resume')


def test_two_runs_in_one_folder(train, tmp_path):
    from common import files
    lock = files.lock(tmp_path / 'out')
    with pytest.raises(UserError, match='in use by another run'):
        train()
    lock.release()
