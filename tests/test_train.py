"""train.py as its user meets it: what it prints and writes, how it ends, and one plain line for each mistake."""

import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch

import hellaswag
from conftest import ROOT, TINY, finish, losses, read_log, run, run_ranks, start
from data.errors import UserError
from model import GPT, GPTConfig


def tiny(dataset, out_dir, *args):
    return 'train.py', *TINY, f'--dataset={dataset}', f'--out_dir={out_dir}', *args


def test_a_run_learns_and_leaves_a_log_and_a_checkpoint(dataset, tmp_path):
    out = run(*tiny(dataset, tmp_path / 'out', '--max_iters=60', '--eval_interval=30', '--sample_interval=60',
                    '--learning_rate=1e-2')).out
    steps = re.findall(r'^step (\d+)/60 \| loss ([\d.]+) \| lr (\S+) \| norm (\S+) \| (\d+) ms \| ([\d,]+) tokens/s \| '
                       r'mfu ([\d.]+)% \| \d+:\d\d:\d\d left$', out, re.MULTILINE)
    assert [int(step) for step, *_ in steps] == list(range(1, 61))
    assert len(re.findall(r"^  > ['\"].*['\"]$", out, re.MULTILINE)) == 4  # two samples before the first step, two at the end
    first, *log = [json.loads(line) for line in (tmp_path / 'out' / 'log.jsonl').read_text().splitlines()]
    assert first['config']['max_iters'] == 60 and first['tokens_per_step'] == 256 and first['parameters'] > 0
    assert [entry['step'] for entry in log if 'val_loss' in entry] == [0, 30, 60]
    training = [entry for entry in log if 'loss' in entry]
    assert all({'step', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'mfu'} <= set(entry) for entry in training)
    assert abs(training[0]['loss'] - 5.55) < 0.2  # ln 257
    assert training[-1]['loss'] < 4 and log[-1]['val_loss'] < 4 < log[0]['val_loss']
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert checkpoint['iter_num'] == 60 and checkpoint['tokenizer'] == 'bytes'
    weights = checkpoint['model']
    assert weights['lm_head.weight'].data_ptr() == weights['transformer.wte.weight'].data_ptr()  # tied, and written once
    text = run('sample.py', f'--out_dir={tmp_path / "out"}', '--num_samples=1', '--max_new_tokens=10').out
    assert text.strip()


def test_two_processes_train_as_one(dataset, tmp_path):
    args = ['--total_batch_size=1024', '--grad_clip=0.5']
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, *tiny(dataset, tmp_path / 'one', *args))
        two = pool.submit(run_ranks, *tiny(dataset, tmp_path / 'two', *args), processes=2)
    out = two.result().out
    assert len(re.findall(r'^step 20/20 \| loss', out, re.MULTILINE)) == 1  # one of them prints
    one, two = losses(tmp_path / 'one'), losses(tmp_path / 'two')
    assert len(one) == 20 and one[20] < one[1] - 0.1
    assert all(abs(one[step] - two[step]) < 1e-3 for step in one)
    one, two = (([entry['val_loss'] for entry in read_log(tmp_path / name) if 'val_loss' in entry])
                for name in ('one', 'two'))
    assert one == pytest.approx(two, abs=1e-3)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize('processes', [0, 2], ids=['alone', 'torchrun'])
def test_a_signal_ends_the_step_saves_and_exits(dataset, tmp_path, number, processes):
    process = start(*tiny(dataset, tmp_path, '--max_iters=100000'), processes=processes)
    for line in process.stdout:
        if line.startswith('step 3/'):
            break
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches all its processes
    else:
        process.send_signal(number)
    finish(process)
    assert 'train.py", line' not in process.err  # no traceback of ours
    step = int(re.search(r'saved .*ckpt.pt at step (\d+); --init_from=resume continues from it', process.out)[1])
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['iter_num'] == step == max(losses(tmp_path))
    if not processes:  # torchrun's own status says that it was stopped
        assert process.returncode == 0 and process.err == ''


def test_a_new_run_leaves_an_earlier_one_its_files(dataset, tmp_path):
    for n in (1, 2, 3):
        out = run(*tiny(dataset, tmp_path, f'--seed={n}', '--max_iters=1', '--eval_interval=1')).out
        assert (n > 1) == ('held an earlier run' in out)
    seeds = [torch.load(tmp_path / name, weights_only=True)['config']['seed']
             for name in ('1.ckpt.pt', '2.ckpt.pt', 'ckpt.pt')]
    assert seeds == [1, 2, 3] and (tmp_path / '2.log.jsonl').exists()


MISTAKES = {  # arguments: what the one line must say
    '--batch_size=0': 'batch_size',
    '--batch_size=3': '192 or 288',
    '--gradient_accumulation_steps=-1': 'gradient_accumulation_steps',
    '--max_iters=0': 'max_iters',
    '--eval_interval=0': 'eval_interval',
    '--learning_rate=-1.0': 'learning_rate',
    '--beta1=1.5': 'beta1',
    '--weight_decay=-0.1': 'weight_decay',
    '--grad_clip=-1.0': 'grad_clip',
    '--n_head=5': 'n_embd=32 must be a multiple of n_head=5',
    '--n_layer=0': 'n_layer',
    '--dropout=1.0': 'dropout',
    '--mlp=relu': 'gelu, relu2, swiglu',
    '--position=alibi': 'learned, rope',
    '--optimizer=sgd': 'adamw, muon',
    '--lr_schedule=step': 'cosine, linear, wsd',
    '--wsd_decay=0.0': 'wsd_decay',
    '--dtype=int8': 'bfloat16',
    '--device=tpu': 'tpu.*--device=cpu',
    '--device=7': 'device=7.*--device=cpu',
    '--device': '--device=cpu',
    '--device=cuda:9': 'cuda:9.*--device=cpu',
    '--compile=maybe': 'compile=maybe',
    '--init_from=resume': 'no checkpoint .*ckpt.pt',
    '--init_from=/nowhere': '/nowhere',
    '--dataset=/nowhere': '/nowhere',
    '--dataset=fineweb_edu_10B': 'python prepare_fineweb.py',
    '--block_size=4000000 --total_batch_size=16000000': 'too few',
    '--out_dir=/proc/nowhere': '/proc/nowhere',
    '--seed=-1': 'seed',
    '--max_bad_steps=0': 'max_bad_steps',
    '--cpu_offload': 'cpu_offload',
    '--parallel=fsdp': 'torchrun',
    '--replicas=3 --parallel=fsdp': 'torchrun',
    '--config=x': 'unknown setting config',
    'config/nothing.py': 'no such file',
    '--parallel=tensor': 'ddp, zero1, fsdp',
    '--replicas=2': 'replicas',
    '--activation_checkpointing=yes': 'True or False',
    '--skip_spikes=-1.0': 'skip_spikes',
    '--keep_checkpoints=-1': 'keep_checkpoints',
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_ends_in_one_line(dataset, tmp_path, monkeypatch, mistake):
    """In this process, since starting each in its own would take minutes: the UserError is what the user reads."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, 'argv', list(tiny(dataset, tmp_path / 'out', *mistake.split())))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() installs its own
    precision = torch.get_float32_matmul_precision()
    with pytest.raises(UserError) as exit:
        runpy.run_path('train.py', run_name='__main__')
    torch.set_float32_matmul_precision(precision)
    line = str(exit.value)
    assert '\n' not in line and re.search(MISTAKES[mistake], line)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('[!de]*.py')), ids=lambda path: path.name)
def test_every_configuration_makes_a_model(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, 'argv', ['plan.py', str(path), '--init_from=scratch'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    runpy.run_path('plan.py', run_name='__main__')
    assert 'parameters' in capsys.readouterr().out


def test_a_file_of_nanogpts_settings_runs_unchanged(dataset, tmp_path):
    (tmp_path / 'nano.py').write_text(f"""
out_dir = {str(tmp_path / 'out')!r}
eval_interval = 2
log_interval = 1
eval_iters = 2
eval_only = False
always_save_checkpoint = False
init_from = 'scratch'
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2' + '-mini'
dataset = {str(dataset)!r}
gradient_accumulation_steps = 5 * 2
batch_size = 4
block_size = 32
n_layer = 2
n_head = 2
n_embd = 32
dropout = 0.1
bias = False
learning_rate = 1e-3
max_iters = 4
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0
decay_lr = True
warmup_iters = 1
lr_decay_iters = max_iters
min_lr = learning_rate / 10
backend = 'nccl'
device = 'cpu'
dtype = 'float32'
compile = False
""")
    out = run('train.py', tmp_path / 'nano.py').out
    assert '1,280 tokens a step, 4 steps' in out and sorted(losses(tmp_path / 'out')) == [1, 2, 3, 4]


def test_a_mistake_is_told_once_by_many_processes(dataset, tmp_path):
    late = tmp_path / 'late.py'  # torchrun ends a process a moment after another one has exited
    late.write_text("import os as _os, time as _time\n_time.sleep(_os.environ['RANK'] == '0')\n")
    for mistake, status, line in ('--dataset=/nowhere', 1, 'no dataset in'), ('--batch_sise=3', 2, 'did you mean'):
        process = run(*tiny(dataset, tmp_path), late, mistake, processes=2, expect=1)  # torchrun's own status
        assert process.err.count(line) == 1, process.err
        assert f'exitcode  : {status}' in process.err


def test_slow_steps_and_a_missing_network_are_said(dataset, tmp_path, inside, monkeypatch):
    tell = time.perf_counter
    monkeypatch.setattr(time, 'perf_counter', lambda: 1e5 * tell())
    monkeypatch.setattr(hellaswag, 'URL', 'http://127.0.0.1:9/items.jsonl')  # nothing listens there
    monkeypatch.setattr(hellaswag, 'FILE', tmp_path / 'items.jsonl')
    settings = [setting for setting in TINY if 'hellaswag' not in setting]
    arguments = 'train.py', *settings, f'--dataset={dataset}', '--max_iters=1', '--backend=gloo', f'--out_dir={tmp_path}/out'
    out = inside(*arguments)
    assert re.search(r'a step takes about .* 2 micro-batches of 4 x 32 tokens; a smaller total_batch_size', out)
    assert 'HellaSwag is not scored: http://127.0.0.1:9/items.jsonl could not be fetched' in out
    assert '--hellaswag_interval=0 turns it off' in out
    assert 'not used: backend (there is one process)' in out
    with pytest.raises(UserError, match='could not be fetched'):  # it was asked for
        inside(*arguments, '--hellaswag_interval=5')


def test_a_loss_that_is_no_number_is_shown(dataset, tmp_path):
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32))
    model.lm_head.weight.data.fill_(3e38)  # finite, and their sums are not
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'bytes'}, tmp_path / 'nan.pt')
    out = run(*tiny(dataset, tmp_path / 'out', f'--init_from={tmp_path}/nan.pt', '--eval_only')).out
    assert 'val loss nan' in out


def test_a_process_alone_ends_in_one_line_and_a_status(dataset, tmp_path):
    assert run(*tiny(dataset, tmp_path, '--n_head=5'), expect=1).err == 'n_embd=32 must be a multiple of n_head=5\n'
    assert run(*tiny(dataset, tmp_path, '--n_heads=5'), expect=2).err.count('\n') == 1


@pytest.mark.parametrize('layout, processes', [('ddp', 0), ('ddp', 2), ('fsdp', 2)])
def test_everything_that_scores_works_compiled(dataset, tmp_path, layout, processes):
    """Validation of a mixture, HellaSwag and samples between compiled steps, and a trace of them."""
    items = tmp_path / 'items.jsonl'
    item = {'ctx': 'import', 'label': 2, 'endings': ['os', 'path as p', 'sys', 'the']}
    items.write_text(f'{json.dumps(item)}\n' * 3)
    other = shutil.copytree(dataset, tmp_path / 'other')
    out_dir = tmp_path / 'out'
    args = tiny(dataset, out_dir, f'--dataset={dataset}:3,{other}:1', '--compile=True', f'--parallel={layout}', '--n_layer=1',
                *['--activation_checkpointing'] * (layout == 'fsdp'),
                '--max_iters=8', '--eval_interval=4', '--hellaswag_interval=4', f'--hellaswag_data={items}',
                '--sample_interval=4', '--profile')
    process = run_ranks(*args, processes=processes) if processes else run(*args)
    assert re.findall(r'^step (\d)/8 .* \? left$', process.out, re.MULTILINE) == ['1']  # it compiled
    assert ' compiled' in process.out and process.out.count('hellaswag') == 3 and process.out.count('  > ') == 6
    final = read_log(out_dir)[-1]
    assert final['hellaswag'] in (0, 1)  # the three items are one
    losses, drawn = final['val_losses'].values(), final['drawn'].values()
    assert final['val_loss'] == pytest.approx(sum(w * loss for w, loss in zip((0.75, 0.25), losses)))
    assert sum(part['share'] for part in drawn) == pytest.approx(1) and len(drawn) == 2
    trace = json.loads((out_dir / 'trace.json').read_text())
    assert sum(event.get('name', '').startswith('ProfilerStep') for event in trace['traceEvents']) >= 3
