"""
Rehearse a run of train.py, in about a minute, before it is paid for.

    python rehearse.py config/gpt2.py
    python rehearse.py config/gpt2_xl.py --parallel=fsdp --processes=8

It takes the run's own arguments. First the checks that need no training: data, disk, tokenizer, HellaSwag, trackers,
weights. Then train.py itself with a narrow model, in a temporary folder, on as many processes and with the layout,
precision, optimizer and data of the run: it evaluates, samples, saves, is killed, resumes, and is exported. Out_dir is
not touched. The exit status is 1 if the run would fail.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

from configurator import UserError, configure, given

import requests
import torch

import hellaswag
import plan
from common import checkpoint, convert, distributed, log
from common.device import pick_device, pick_dtype
from common.settings import divide_step
from data.dataset import Split
from data.loader import Loader, parse_mixture
from data.tokenizer import get_tokenizer
from model import GPT

# -----------------------------------------------------------------------------
processes = 0  # that the run has on each machine; 0: one for each GPU here, or as few as its layout allows
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
LIMIT = 600  # seconds until a rehearsed run that neither saves nor ends counts as hanging


class Minor(UserError):
    """A problem that does not end the run."""


class Table:
    """Prints a row for each check. `failed` lists the names of those that the run would not survive."""

    def __init__(self):
        self.failed = []

    def check(self, name, function, *args):
        """What `function(*args)` finds, whose row is the text that it returns with it; None if it raises UserError or
        ValueError, or if one of the arguments is None, since an earlier check failed."""
        found, mark = None, 'ok'
        try:
            if any(arg is None for arg in args):
                mark, text = '-', 'not tried, because of what failed above'
            else:
                found, text = function(*args)
        except Minor as error:
            mark, text = 'warn', error
        except (UserError, ValueError) as error:
            mark, text = 'FAIL', error
            self.failed.append(name)
        print(f'{mark:<5}{name:<12}{" ".join(str(text).split())}', flush=True)
        return found

# -----------------------------------------------------------------------------
# before any training: each returns (what it found, a line)

def device_for(config, processes):
    """The run's device, or the CPU where there are fewer GPUs than the run will have."""
    few = processes > max(1, torch.cuda.device_count()) or 'cuda' in config['device'] and not torch.cuda.is_available()
    return 'cpu' if few else config['device']


def check_settings(config, processes):
    """(tokens in a step, text)"""
    device = pick_device(device_for(config, processes))
    steps, batch_size, note = divide_step(config, given, processes)
    text = (f'{processes} x {steps} micro-batches of {batch_size} x {config["block_size"]} tokens, {device}, '
            f'{pick_dtype(config["dtype"], device)}' + f' ({note})' * bool(note))
    return steps * batch_size * config['block_size'] * processes, text


def check_data(config, step):
    """(the training data's Loader, text)"""
    train, val = (Loader(config['dataset'], split, config['batch_size'], config['block_size'], seed=config['seed'],
                         shuffle=config['shuffle'] and split == 'train') for split in ('train', 'val'))
    tokens = sum(data.n_tokens for data in train.splits)
    return train, (f'{config["dataset"]}: {tokens:,} tokens, and the run reads {config["max_iters"] * step:,}; '
                   f'{sum(data.n_tokens for data in val.splits):,} to validate on')


def check_tokenizer(data):
    tokenizer = get_tokenizer(data.tokenizer)
    return tokenizer, f'{tokenizer.name}, {tokenizer.vocab_size:,} ids'


def check_model(config, tokenizer):
    """(the run's GPTConfig, text)"""
    source = checkpoint.resolve(config['init_from'], config['out_dir'])
    with torch.device('meta' if source == 'scratch' else 'cpu'):
        model, _, path = checkpoint.initial_model(dict(config), given, tokenizer, tokenizer.vocab_size)
    n = model.get_num_params(non_embedding=False)
    return model.config, f'{n:,} parameters' + f', from {path or source}' * (source != 'scratch')


def empty(gpt):
    with torch.device('meta'):
        return GPT(gpt)


def check_memory(config, gpt, processes):
    need = sum(plan.memory(empty(gpt), config, processes).values())
    text = f'about {need / 1e9:.3g} GB on each of {processes} devices'
    if 'cuda' not in pick_device(device_for(config, processes)):
        return True, f'{text}; plan.py says which GPUs have it'
    total = torch.cuda.get_device_properties(0).total_memory
    if need > plan.USABLE * total:
        change = plan.remedy(plan.remedies(empty(gpt), config, processes), plan.USABLE * total)
        raise Minor(f'{text}, which have {total / 1e9:.3g} GB: ' + (f'try {change}' if change else 'use more GPUs'))
    return True, f'{text} of {total / 1e9:.3g} GB'


def check_disk(config, gpt):
    """Whether the checkpoints fit on out_dir's file system. Nothing is written there."""
    parts = plan.memory(empty(gpt), config | {'parallel': 'ddp'}, 1)
    size, keep = parts['weights'] + parts['optimizer'], config['keep_checkpoints']
    out_dir = Path(config['out_dir']).absolute()
    there = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = 'may not be written' if there.is_dir() else 'is a file'
        raise UserError(f'out_dir={config["out_dir"]} cannot be written: {there} {why}; choose another')
    # ckpt.pt, ckpt_best.pt and one being written; of the numbered ones the oldest goes when the newest is there
    count = 0 if config['eval_only'] else 3 + (keep + 1 if keep else 0)
    free = shutil.disk_usage(there).free
    if config['init_from'] in ('resume', 'auto'):  # the run's own checkpoints are replaced
        free += sum(path.stat().st_size for name in ('ckpt*.pt', 'shards_*/*') for path in out_dir.glob(name))
    text = f'{count} checkpoints of {size / 1e9:.3g} GB, and {there} has {free / 1e9:.3g} GB for them'
    if count * size > free:
        raise UserError(f'{text}: free some, lower keep_checkpoints={keep}, or choose another out_dir')
    return True, text


def check_hellaswag(config, tokenizer, gpt):
    """(the number of items, text). Downloads them if the run would."""
    items, why_none = hellaswag.items_of_run(config, given)
    if not config['hellaswag_interval']:
        return 0, f'not scored: {why_none}'
    if why_none:
        raise Minor(f'not scored: {why_none}')
    return len(hellaswag.prepare(items, tokenizer, gpt.block_size)), f'{len(items):,} items'


def check_trackers(config, folder):
    """Start each tracker offline, so that no service shows a rehearsal; for Weights & Biases, look for a login."""
    names = ','.join(filter(None, (config['log_to'], 'wandb' * config['wandb_log'])))
    mode = os.environ.get('WANDB_MODE', 'online')
    os.environ |= {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'TRACKIO_DIR': str(folder)}
    for tracker in log.start_trackers(names, config['wandb_project'], config['wandb_run_name'], config, str(folder)):
        tracker.close()
        host = os.environ.get('WANDB_BASE_URL', 'https://api.wandb.ai')
        if isinstance(tracker, log.Wandb) and mode == 'online' and not (
                os.environ.get('WANDB_API_KEY') or requests.utils.get_netrc_auth(host)):  # of `wandb login`
            raise UserError('Weights & Biases has no login here: `wandb login`, WANDB_API_KEY, or WANDB_MODE=offline')
    return True, f'{names} can start' if names else 'log.jsonl alone'

# -----------------------------------------------------------------------------
# train.py with a narrow model

def narrow(config, gpt, processes, items, folder):
    """The settings, as train.py's arguments, that turn the run into its rehearsal."""
    packed = any(Split(name, 'train', check=False).block_size for name in parse_mixture(config['dataset']))
    heads, block_size = min(2, gpt.n_head), min(gpt.block_size, config['block_size'], *[] if packed else [256])
    small = {name: value for name, value in asdict(gpt).items() if name in config} | {
        'n_layer': min(2, gpt.n_layer), 'n_head': heads, 'n_kv_head': heads if gpt.n_kv_head == gpt.n_head else 1,
        'n_embd': gpt.n_embd // gpt.n_head * heads, 'n_mlp': max(1, gpt.n_mlp * heads // gpt.n_head),
        'dropout': config['dropout'], 'block_size': block_size}
    small |= {'init_from': 'scratch', 'out_dir': f'{folder}/out', 'log_to': '', 'wandb_log': False, 'batch_size': 2,
              'eval_interval': 2, 'eval_tokens': 4 * block_size * processes, 'log_interval': 1,
              'sample_interval': 2 * bool(config['sample_interval']), 'hellaswag_interval': 2 * bool(items),
              'device': device_for(config, processes)}
    if items:
        small['hellaswag_limit'] = min(items, max(4, processes))
    if small['device'] == 'cpu':
        small['backend'] = 'auto'
    return [*(f'--{name}={value}' for name, value in small.items() if value != config[name]),
            f'--total_batch_size={4 * block_size * processes}']  # given last, it decides how a step is divided


def run_until(ready, command, folder):
    """Run a command until it ends, or until ready(), when it is killed. Its output goes to FOLDER/stdout and
    FOLDER/stderr. Raises UserError, with its own line, if it fails."""
    began = time.monotonic()
    with open(folder / 'stdout', 'a') as out, open(folder / 'stderr', 'w') as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    try:
        while process.poll() is None and not ready():
            if time.monotonic() - began > LIMIT:
                raise UserError(f'no end within {LIMIT} s; the last line: {tail(folder / "stdout")}')
            time.sleep(0.05)
        if process.poll():
            raise UserError(tail(folder / 'stderr') or f'train.py ended with status {process.returncode}')
    finally:
        kill(process, folder)


def tail(path):
    """The last line of a text, before torchrun's report of what failed."""
    lines = takewhile(lambda line: not re.match(r'E\d{4} ', line), path.read_text(errors='replace').splitlines())
    return ([''] + [line for line in lines if line.strip() and not re.match(r'W\d{4} ', line)])[-1].strip()


def kill(process, folder):
    """SIGKILL to the run: first to the process that holds out_dir, then to what started it, which ends the others."""
    if process.poll() is not None:
        return
    with suppress(OSError, TypeError):
        os.kill(int(re.match(r'pid (\d+) ', (folder / 'out' / '.lock').read_text())[1]), signal.SIGKILL)
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def train(config, command, folder):
    """The run until its first checkpoint, and no further: (its log, text)."""
    began = time.monotonic()
    run_until((folder / 'out' / checkpoint.NAME).exists, command, folder)
    entries = [] if config['eval_only'] else log.read(folder / 'out' / 'log.jsonl')
    for entry in entries:
        if entry.get('loss', 0) is None:
            raise UserError(f'the loss of step {entry["step"]} is not finite: '
                            'lower learning_rate, or raise warmup_iters')
    seconds = time.monotonic() - began
    return entries, f'{seconds:.0f} s to the first checkpoint ({config["parallel"]}, {config["optimizer"]})'


def check_evaluation(entries, folder):
    lines = [line for line in (folder / 'stdout').read_text().splitlines() if ' | val loss ' in line]
    if not lines:
        raise UserError('no evaluation was printed')
    return True, lines[0]


def check_sample(config, entries, folder):
    written = [line.strip() for line in (folder / 'stdout').read_text().splitlines() if line.startswith('  > ')]
    if config['sample_interval'] and not written:
        raise UserError('no sample was printed')
    return True, f'{written[0][:72]} …' if written else 'no samples: sample_interval is 0'


def check_resume(entries, command, folder):
    """Continue the killed run for two steps, as a restarting scheduler does."""
    step = checkpoint.load(folder / 'out' / checkpoint.NAME, resume=True)['iter_num']
    run_until(lambda: False, [*command, '--init_from=auto', f'--max_iters={step + 2}', '--profile=False'], folder)
    steps = [entry['step'] for entry in log.read(folder / 'out' / 'log.jsonl') if 'loss' in entry]
    if steps != [*range(1, step + 3)]:
        raise UserError(f'killed and resumed at step {step}, but the log has the steps {steps}')
    return True, f'killed (-9), resumed from the checkpoint of step {step}, trained to step {step + 2}'


def check_export(gpt, resumed, folder):
    try:
        kind = convert.family_of(gpt)
        convert.check_exportable(gpt, kind)
        model, tokenizer = checkpoint.load_model('resume', str(folder / 'out'), 'cpu')
        model.save_pretrained(str(folder / 'export'), tokenizer)
    except UserError as error:
        raise Minor(f'the run finishes, but export.py --folder refuses the model: {error}') from None
    return True, f'as {convert.FAMILIES[kind].kind}'

# -----------------------------------------------------------------------------

def before_training(table, config, processes, folder):
    """(the run's GPTConfig, HellaSwag items), each None if it was not found."""
    step = table.check('settings', check_settings, config, processes)
    data = table.check('data', check_data, config, step or config['total_batch_size'])
    tokenizer = table.check('tokenizer', check_tokenizer, data)
    gpt = table.check('model', check_model, config, tokenizer)
    table.check('memory', check_memory, config, gpt, processes)
    table.check('disk', check_disk, config, gpt)
    items = table.check('hellaswag', check_hellaswag, config, tokenizer, gpt)
    table.check('log_to', check_trackers, config, folder)
    return step and gpt, items


def rehearse(config, arguments, processes):
    """Print the table of a run with these settings, given as `arguments` on train.py's command line. Returns the names
    of the checks that it failed."""
    table = Table()
    launcher = distributed.torchrun(processes) if processes > 1 or config['parallel'] != 'ddp' else []
    with tempfile.TemporaryDirectory(prefix='rehearse-', ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        gpt, items = before_training(table, config, processes, folder)
        command = gpt and [sys.executable, *launcher, ROOT / 'train.py', *arguments,
                           *narrow(config, gpt, processes, items or 0, folder)]
        entries = table.check('train', train, config, command, folder)
        table.check('evaluation', check_evaluation, entries, folder)
        table.check('sample', check_sample, config, entries, folder)
        if not config['eval_only']:
            resumed = table.check('resume', check_resume, entries, command, folder)
            table.check('export', check_export, gpt, resumed, folder)
    return table.failed


if __name__ == '__main__':
    config = configure(globals(), base='train.py')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and remove the temporary folder
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith('--processes=')]
    processes = processes or torch.cuda.device_count() or (1 if config['parallel'] == 'ddp' else 2 * config['replicas'])
    if failed := rehearse(config, arguments, processes):
        raise UserError(f'this run would fail: {", ".join(failed)}')
    print('ready')
