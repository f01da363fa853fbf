"""
The sections of tests/gpu.sh. Each prints its part of the report, as Markdown.

    python tests/gpu_report.py --section=rates
    python tests/gpu_report.py --section=rates --device=cpu --toy=True     the same code at toy size
"""

import ast
import contextlib
import gc
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import hellaswag
from common.device import autocast, peak_flops, synchronize
from common.distributed import torchrun
from common.generate import cast_linears
from common.optimizers import configure_optimizers
from configurator import configure
from data.tokenizer import TOKENIZERS, get_tokenizer
from model import GPT, GPTConfig


section = 'machine'
device = 'cuda'
toy = False  # tiny models
quick = False  # fewer batch sizes, steps and layouts
seconds = 540.0  # time for this section; what would take longer is skipped, where a section can skip
nanogpt = os.environ.get('NANOGPT', '')  # a checkout to compare with
build_nanogpt = os.environ.get('BUILD_NANOGPT', '')
hellaswag_data = os.environ.get('HELLASWAG', '')  # hellaswag_val.jsonl; random words if empty
configure(globals())

CUDA = 'cuda' in device
TOKENIZER = 'gpt2' if os.environ.get('TIKTOKEN_CACHE_DIR') else 'bytes'  # fetching GPT-2's needs a network
SIZE = dict(n_layer=2, n_head=2, n_embd=64, block_size=64) if toy else {}
BATCH = 4 if toy else 64
GPT2, FAST = 'GPT-2', 'fast'  # config/gpt2.py, config/gpt2_fast.py
BEGAN = time.perf_counter()


def row(*cells):
    print('|', ' | '.join(str(cell) for cell in cells), '|', flush=True)


def header(*cells):
    print()
    row(*cells)
    row(*['---'] * len(cells))


@contextlib.contextmanager
def guarded(what):
    """Report an exception as a line, and go on."""
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = f'{type(error).__name__}: {error}'.strip().splitlines()
        print(f'\n**{what} failed**\n\n```\n' + '\n'.join(lines[:2] + lines[2:][-12:]) + '\n```\n', flush=True)
    gc.collect()  # after the frames of the exception are gone
    if CUDA:
        torch.cuda.empty_cache()


def gib(n):
    return f'{n / 2**30:.1f}' if CUDA else '-'


# -----------------------------------------------------------------------------
# models and their training step

def our_model(recipe, **changes):
    """A GPT of a recipe, on the device."""
    known = {field.name for field in fields(GPTConfig)}
    settings = runpy.run_path(str(ROOT / 'config/gpt2_fast.py')) if recipe == FAST else {}
    config = {k: v for k, v in settings.items() if k in known}
    return GPT(GPTConfig(**{**config, **SIZE, **changes})).to(device)


def peer_model(folder):
    """A GPT of nanoGPT's model.py or build-nanogpt's train_gpt2.py, on the device; the script itself does not run."""
    file = next(path for name in ('train_gpt2.py', 'model.py') if (path := Path(folder, name)).exists())
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))
                 and getattr(node, 'module', '') != 'hellaswag']
    module = sys.modules[file.stem + '_of_peer'] = ModuleType(file.stem + '_of_peer')  # dataclasses look it up
    exec(compile(tree, str(file), 'exec'), vars(module))
    with contextlib.redirect_stdout(sys.stderr):
        return module.GPT(module.GPTConfig(vocab_size=50304, **SIZE)).to(device)


class Trial:
    """One model with its optimizer, stepped on the same random batch as train.py steps it."""

    def __init__(self, name, model, batch_size, optimizers=None, compiled=True):
        self.name, self.model, self.times = name, model, []
        decay, rest = ([p for p in model.parameters() if (p.dim() >= 2) == d] for d in (True, False))
        self.optimizers = optimizers or [torch.optim.AdamW(
            [{'params': decay, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}],
            lr=6e-4, betas=(0.9, 0.95), fused=True)]
        self.options = {'return_logits': False} if isinstance(model, GPT) else {}
        if compiled:
            model.compile(dynamic=False)
        tokens = torch.randint(50257, (2, batch_size, model.config.block_size), generator=torch.manual_seed(1337))
        self.x, self.y = tokens.to(device)

    def step(self):
        with autocast('bfloat16', device):
            _, loss = self.model(self.x, self.y, **self.options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def warm_up(self, steps=3):
        """Seconds of the first step, which compiles, and peak memory of these steps, without what was there before
        the optimizer's state."""
        synchronize(device)
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated() - sum(p.nbytes for p in self.model.parameters())
        began = time.perf_counter()
        self.step()
        synchronize(device)
        self.compile_seconds = time.perf_counter() - began
        if CUDA:
            torch.cuda.reset_peak_memory_stats()  # the compiler allocates too
        for _ in range(steps - 1):
            self.step()
        synchronize(device)
        self.memory = torch.cuda.max_memory_allocated() - before if CUDA else 0

    def measure(self, steps):
        """Add the milliseconds of some steps to times; one before them is not counted."""
        for counted in [False] + [True] * steps:
            synchronize(device)
            began = time.perf_counter()
            self.step()
            synchronize(device)
            if counted:
                self.times.append((time.perf_counter() - began) * 1e3)

    @property
    def ms(self):
        return statistics.median(self.times)


def measured(makers, rounds=4, steps=4):
    """Trials of these {name: function that makes a Trial}, measured in turn."""
    torch._dynamo.reset()
    trials = []
    for name, make in makers.items():
        with guarded(name):
            trial = make()
            trial.warm_up()
            trials.append(trial)
    for _ in range(rounds):
        for trial in list(trials):
            with guarded(trial.name):
                trial.measure(steps)
    return [trial for trial in trials if trial.times]


def muon(model):
    return configure_optimizers(model, 'muon', 2e-3, 0.1, (0.9, 0.95))


# -----------------------------------------------------------------------------
# runs of train.py

def run(*command, **env):
    """Standard output and error of a command in the repository's root, which must succeed."""
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True,
                            env={**os.environ, 'HF_HUB_OFFLINE': '1', **env})
    if result.returncode:
        last = (result.stdout + result.stderr).strip().splitlines()[-10:]
        raise RuntimeError(f'exit status {result.returncode}\n' + '\n'.join(last))
    return result.stdout, result.stderr


def dataset(folder, name='bytes'):
    """Make a dataset of random tokens, common ones and rare ones, in folder/data."""
    tokenizer, path, shards = TOKENIZERS[name], Path(folder, 'data'), []
    path.mkdir()
    ids = np.random.default_rng(1337).zipf(1.3, 2**22) % tokenizer.vocab_size
    for file, part in ('train_000000.npy', ids[2**20:]), ('val_000000.npy', ids[:2**20]):
        np.save(path / file, part.astype(np.uint16))
        digest = hashlib.sha256((path / file).read_bytes()).hexdigest()
        shards.append({'file': file, 'tokens': len(part), 'sha256': digest})
    (path / 'meta.json').write_text(json.dumps({'format': 1, 'tokenizer': name, 'vocab_size': tokenizer.vocab_size,
                                                'eot': tokenizer.eot, 'dtype': 'uint16', 'shards': shards}))
    return path


def log_of(out_dir):
    """{step: log entry} of a run's steps."""
    entries = map(json.loads, Path(out_dir, 'log.jsonl').read_text().splitlines())
    return {entry['step']: entry for entry in entries if 'loss' in entry}


SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=64', '--batch_size=4', '--learning_rate=2e-3',
         "--warmup_iters=2", f"--device={device}", "--eval_iters=2", "--hellaswag_interval=0",
         "--sample_interval=0", *(['--compile=False'] if toy else [])]


def train(folder, name, *options, processes=0):
    """Losses {step: loss} of a small run of 20 steps in folder/name, with a checkpoint of step 10."""
    launcher = torchrun(processes) if processes else []
    run(*launcher, 'train.py', f'--dataset={folder}/data', f'--out_dir={folder}/{name}', *SMALL,
        f'--total_batch_size={4 * 64 * 2 * max(1, processes)}', '--max_iters=20', '--eval_interval=10',
        '--keep_checkpoints=9', *options, OMP_NUM_THREADS='1', TORCHINDUCTOR_COMPILE_THREADS='2')
    return {step: entry['loss'] for step, entry in log_of(f'{folder}/{name}').items()}


def train_and_resume(folder, name, *options, processes=0):
    """(last loss, largest difference of a loss of steps 11 to 20 when they run again from step 10's checkpoint)."""
    before = train(folder, name, *options, processes=processes)
    shutil.copy(f'{folder}/{name}/ckpt_000010.pt', f'{folder}/{name}/ckpt.pt')
    after = train(folder, name, *options, '--init_from=resume', processes=processes)
    return before[20], max(abs(before[step] - after[step]) for step in range(11, 21))


def at_once(jobs):
    """Yield (name, function that returns the result or raises) of {name: job}, run a few at a time."""
    with ThreadPoolExecutor(4 if CUDA and torch.cuda.device_count() == 1 else 1) as pool:
        for name, future in {name: pool.submit(job) for name, job in jobs.items()}.items():
            yield name, future.result


# -----------------------------------------------------------------------------
# the sections

def machine():
    print(f'{sys.version.split()[0]}, torch {torch.__version__}, {torch.get_num_threads()} threads')
    if CUDA:
        import triton
        print(f'\nCUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, '
              f'triton {triton.__version__}\n')
        print(torch.cuda.get_device_properties(0), '\n')
        with guarded('nvidia-smi'):
            query = '--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit'
            print(subprocess.run(['nvidia-smi', query, '--format=csv,noheader'], capture_output=True, text=True).stdout)
    n = 256 if toy else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(30):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - began)
    flops = 2 * n**3 / statistics.median(times[5:])
    print(f'\n{n}³ bfloat16: {flops / 1e12:.1f} TFLOP/s, {flops / peak_flops("bfloat16", device):.1%} of the peak')


def rates():
    print('A training step of 124M in bfloat16, AdamW unless named, median of 16 steps measured in turn.')
    header('batch', 'model', 'ms', 'fastest', 'tokens/s', 'MFU', 'GiB', 'first step, s')
    peak, flops = peak_flops('bfloat16', device), our_model(GPT2).flops_per_token()
    took = 0
    for batch in [BATCH] if quick else [BATCH, BATCH // 4, BATCH // 2]:
        if time.perf_counter() - BEGAN + took > seconds * 0.45:
            print(f'\nbatch {batch} skipped: no time left')
            continue
        began = time.perf_counter()
        kept, trial = {}, None

        def ours(recipe, optimizer=None):
            model = kept.get(recipe) or kept.setdefault(recipe, our_model(recipe))
            return Trial(f'{recipe}{", muon" if optimizer else ""}', model, batch, optimizer and optimizer(model),
                         compiled=optimizer is None)

        makers = {GPT2: partial(ours, GPT2), FAST: partial(ours, FAST), 'muon': partial(ours, FAST, muon)}
        for folder, name in (nanogpt, 'nanoGPT'), (build_nanogpt, 'build-nanogpt'):
            if folder:
                makers[name] = lambda folder=folder, name=name: Trial(name, peer_model(folder), batch)
        if build_nanogpt:
            makers['eager'] = lambda: Trial('build-nanogpt, eager', peer_model(build_nanogpt), batch, compiled=False)
        for trial in measured(makers):
            rate = trial.x.numel() / trial.ms * 1e3
            own = trial.model.flops_per_token() if isinstance(trial.model, GPT) else flops
            row(batch, trial.name, f'{trial.ms:.1f}', f'{min(trial.times):.1f}', f'{rate:,.0f}',
                f'{rate * own / peak:.1%}', gib(trial.memory), f'{trial.compile_seconds:.0f}')
        del trial, makers, ours, kept
        took = time.perf_counter() - began


GROUPS = {'triton': '^triton_', 'attention': 'flash|fmha|sdpa|attention',  # triton's names list what is fused
          'optimizer and clipping': 'multi_tensor|adam',
          'matmul': 'gemm|nvjet|cutlass|cublas|xmma|splitk|aten::mm|aten::addmm'}


def profile():
    for recipe in GPT2, FAST:
        with guarded(recipe), tempfile.TemporaryDirectory() as folder:
            torch._dynamo.reset()
            trial, steps = Trial(recipe, our_model(recipe), BATCH), 3
            trial.warm_up()
            trial.measure(5)
            activity = torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU
            with torch.profiler.profile(activities=[activity]) as profiler:
                for _ in range(steps):
                    trial.step()
                synchronize(device)
            profiler.export_chrome_trace(f'{folder}/trace.json')
            kernels, groups, launches = {}, {}, 0
            for event in json.loads(Path(folder, 'trace.json').read_text())['traceEvents']:
                if event.get('cat') in (('kernel', 'gpu_memcpy', 'gpu_memset') if CUDA else ('cpu_op',)):
                    name, ms = event['name'], event['dur'] / 1e3 / steps
                    group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name.lower())), 'other')
                    total, count = kernels.get((group, name), (0, 0))
                    kernels[group, name] = total + ms, count + 1
                    groups[group] = groups.get(group, 0) + ms
                    launches += 1
            busy = sum(groups.values())
            print(f'\n### {recipe}, batch {BATCH}\n\n{trial.ms:.1f} ms a step without the profiler; kernels {busy:.1f} '
                  f'ms, {launches / steps:.0f} launches')
            header('group', 'ms a step', 'share')
            for group, ms in sorted(groups.items(), key=lambda item: -item[1]):
                row(group, f'{ms:.2f}', f'{ms / busy:.1%}')
            header('kernel', 'group', 'ms a step', 'calls a step')
            for (group, name), (ms, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:15]:
                row(f'`{name[:100].replace("|", "/")}`', group, f'{ms:.2f}', f'{count / steps:.0f}')


def loop():
    print('train.py itself: its own milliseconds a step (median from step 6), graph breaks and recompilations of a run '
          'with evaluations, HellaSwag and samples between the steps.')
    if TOKENIZER == 'bytes':
        print('\nNo TIKTOKEN_CACHE_DIR: on bytes, with a head of 257 tokens.')
    header('config', 'ms', 'tokens/s', 'MFU', 'graph breaks', 'recompilations', 'losses')
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        data, items = dataset(folder, TOKENIZER), items_file(folder)
        size = [f'--{k}={v}' for k, v in SIZE.items()] + (['--compile=False'] if toy else [])
        for config in ['gpt2'] if quick else ['gpt2', 'gpt2_fast']:
            with guarded(config):
                out, err = run('train.py', f'config/{config}.py', *size, f'--batch_size={BATCH}', f'--device={device}',
                               f'--total_batch_size={BATCH * SIZE.get("block_size", 1024)}', f'--dataset={data}',
                               f'--out_dir={folder}/{config}', '--max_iters=20', '--eval_interval=10', '--eval_iters=4',
                               '--hellaswag_interval=10', f'--hellaswag_limit={4 if toy else 40}',
                               f'--hellaswag_data={items}',
                               '--sample_interval=10', '--warmup_iters=5', TORCH_LOGS='recompiles,graph_breaks')
                log = log_of(f'{folder}/{config}')
                rate, mfu, ms = (statistics.median(entry[key] for step, entry in log.items() if step > 5)
                                 for key in ('tokens_per_s', 'mfu', 'ms'))
                row(config, f'{ms:.1f}', f'{rate:,.0f}', f'{mfu:.1%}', err.count('Graph break in user code'),
                    err.count('Recompiling function'), f'{log[1]["loss"]:.3f} … {log[20]["loss"]:.3f}')
                reasons = [line.split('] ', 1)[-1] for line in err.splitlines()
                           if 'Recompiling function' in line or 'triggered by' in line or '    - ' in line
                           or 'Graph break in' in line]
                notes += [config, *reasons[:24], *(line for line in out.splitlines() if 'val loss' in line)]
    print('\n```\n' + '\n'.join(note[:200] for note in notes) + '\n```')


def layouts():
    processes = torch.cuda.device_count() if CUDA else 2
    print(f'{processes} processes on {device}: 20 steps with a checkpoint of step 10, then resumed from it.')
    header('layout', 'result', 'last loss', 'largest difference after the resume')
    eager = '--compile=False'
    ways = {'ddp': [], 'ddp, document_mask': ['--document_mask=True'], 'zero1': ['--parallel=zero1', eager],
            'fsdp': ['--parallel=fsdp'], 'fsdp, document_mask': ['--parallel=fsdp', '--document_mask=True'],
            'fsdp, activation_checkpointing': ['--parallel=fsdp', '--activation_checkpointing=True'],
            'fsdp, cpu_offload': ['--parallel=fsdp', '--cpu_offload=True', eager],
            'fsdp, sharded_checkpoints': ['--parallel=fsdp', '--sharded_checkpoints=True', eager]}
    if not quick:
        ways |= {f'{parallel}, muon': [f'--parallel={parallel}', '--optimizer=muon', eager]
                 for parallel in ('ddp', 'zero1', 'fsdp')}
    with tempfile.TemporaryDirectory() as folder:
        dataset(folder)
        for name, result in at_once({name: partial(train_and_resume, folder, name.replace(', ', '-'), *options,
                                                   processes=processes) for name, options in ways.items()}):
            report_resume(name, result)


def report_resume(name, result):
    try:
        loss, difference = result()
        row(name, 'pass' if difference < 1e-2 else '**FAIL**', f'{loss:.4f}', f'{difference:.2e}')
    except Exception as error:
        row(name, '**FAIL**', '-', '`' + str(error).replace('|', '/').replace('\n', '`<br>`') + '`')


def resume():
    print('20 steps, and the last 10 again from the checkpoint of step 10: largest difference of a loss.')
    header('run', 'result', 'last loss', 'difference')
    with tempfile.TemporaryDirectory() as folder:
        dataset(folder)
        runs = {'bfloat16': [], 'bfloat16, muon, dropout': ['--optimizer=muon', '--dropout=0.1'],
                'float16': ['--dtype=float16'], 'fast recipe': ['--position=rope', '--norm=rmsnorm', '--qk_norm=True']}
        for name, result in at_once({name: partial(train_and_resume, folder, f'run{i}', *options)
                                     for i, (name, options) in enumerate(runs.items())}):
            report_resume(name, result)


def float16():
    print('Losses of 20 steps of a small model; the difference is the largest one from float32 (TF32 on a GPU).')
    header('optimizer', 'dtype', 'step 1', 'step 10', 'step 20', 'difference', 'result')
    with tempfile.TemporaryDirectory() as folder:
        dataset(folder)
        jobs = {(optimizer, dtype): partial(train, folder, f'{optimizer}-{dtype}', f'--optimizer={optimizer}',
                                            f'--dtype={dtype}', '--n_layer=4', '--n_embd=128')
                for optimizer in ('adamw', 'muon') for dtype in ('float32', 'bfloat16', 'float16')}
        exact = {}
        for (optimizer, dtype), result in at_once(jobs):
            with guarded(f'{optimizer}, {dtype}'):
                losses = result()
                exact.setdefault(optimizer, losses)
                good = all(np.isfinite(list(losses.values()))) and losses[20] < losses[1]
                row(optimizer, dtype, *(f'{losses[step]:.4f}' for step in (1, 10, 20)),
                    f'{max(abs(losses[s] - exact[optimizer][s]) for s in losses):.2e}', 'pass' if good else '**FAIL**')


def dpo():
    processes, chat = torch.cuda.device_count() if CUDA else 2, get_tokenizer('bytes+chatml')
    print('dpo.py: 20 steps from random weights, whose loss is 0.6931 at the start.')
    header('run', 'result', 'losses')
    ways = {'bfloat16': [], 'bfloat16, muon': ['--optimizer=muon'], 'float16': ['--dtype=float16'],
            'fsdp': ['--parallel=fsdp']}
    with tempfile.TemporaryDirectory() as folder:
        config = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=chat.vocab_size)
        torch.save({'model': GPT(config).state_dict(), 'model_args': asdict(config), 'tokenizer': chat.name},
                   f'{folder}/base.pt')
        Path(folder, 'pairs.jsonl').write_text(''.join(
            json.dumps({'prompt': f'{i}?', 'chosen': f'yes {i}', 'rejected': f'no {i}'}) + '\n' for i in range(64)))

        def losses(name, options):
            run(*(torchrun(processes) if name == 'fsdp' else []), 'dpo.py', f'--init_from={folder}/base.pt',
                f'--out_dir={folder}/{name.replace(", ", "-")}', f'--pairs={folder}/pairs.jsonl',
                f'--val_pairs={folder}/pairs.jsonl', f'--gradient_accumulation_steps={2 * processes}',
                '--learning_rate=1e-3', '--warmup_iters=2', '--max_iters=20', f'--device={device}', *options,
                *(['--compile=False'] if toy else []), OMP_NUM_THREADS='1', TORCHINDUCTOR_COMPILE_THREADS='2')
            log = map(json.loads, Path(folder, name.replace(', ', '-'), 'log.jsonl').read_text().splitlines())
            return [entry['val_loss'] for entry in log if 'val_loss' in entry]

        for name, result in at_once({name: partial(losses, name, options) for name, options in ways.items()}):
            with guarded(name):
                first, last = result()
                good = abs(first - 0.6931) < 1e-3 and last < 0.6
                row(name, 'pass' if good else '**FAIL**', f'{first:.4f} … {last:.4f}')


def items_file(folder):
    """HellaSwag's items, or random words in their place: a path."""
    if hellaswag_data:
        return hellaswag_data
    words, path = random.Random(1337), Path(folder, 'items.jsonl')
    text = lambda n: ' '.join(words.choices(('the', 'man', 'then', 'takes', 'water', 'a', 'and', 'walks'), k=n))
    path.write_text(''.join(json.dumps({'ctx': text(60), 'endings': [text(25) for _ in range(4)], 'label': 0}) + '\n'
                            for _ in range(1000)))
    return str(path)


def hellaswag_rate():
    model, n = our_model(GPT2).eval(), 20 if toy else 1000
    tokenizer = get_tokenizer(TOKENIZER)
    with tempfile.TemporaryDirectory() as folder:
        rows = hellaswag.prepare(hellaswag.load_items(items_file(folder), n), tokenizer, model.config.block_size)
    for dtype in 'bfloat16', 'float32':
        hellaswag.evaluate(model, rows[:n // 5], device=device, dtype=dtype)
        synchronize(device)
        began = time.perf_counter()
        hellaswag.evaluate(model, rows, device=device, dtype=dtype)
        synchronize(device)
        each = (time.perf_counter() - began) / len(rows)
        print(f'\n{dtype}: {each * 1e3:.2f} ms an item of {len(rows)}, {tokenizer.name}; all 10,042 in '
              f'{each * 10042:.1f} s', flush=True)


def generate():
    print('Tokens/s of sampling (top_k=50) from GPT-2 124M with random weights, bfloat16; the better of two.')
    header('model', 'batch', 'prompt', 'new tokens', 'tokens/s', 'ms a token')
    models = {'ours': our_model(GPT2)} | ({'nanoGPT': peer_model(nanogpt)} if nanogpt else {})
    cast_linears('bfloat16', models['ours'])
    limit = SIZE.get('block_size', 1024)
    new = limit // 8 if quick or toy else 200
    for batch in (1, 16):
        for prompt in (8, limit // 2):
            for name, model in models.items():
                with guarded(name), torch.no_grad(), autocast('bfloat16', device):
                    idx, best = torch.randint(50257, (batch, prompt), device=device), float('inf')
                    how = {'cuda_graph': CUDA} if name == 'ours' else {}
                    for _ in range(2):
                        synchronize(device)
                        began = time.perf_counter()
                        model.eval().generate(idx, new, top_k=50, **how)
                        synchronize(device)
                        best = min(best, time.perf_counter() - began)
                    row(name, batch, prompt, new, f'{batch * new / best:,.0f}', f'{best / new * 1e3:.2f}')


def ablations():
    layers = 2 if toy else 4
    print(f'A compiled step at batch {BATCH} with {layers} layers of 124M, and what a layer more or less costs by it.')
    base = {}
    header('model', 'ms', 'against the first, ms a layer', 'GiB')
    changes = {'GPT-2': {}, 'RoPE': {'position': 'rope'}, 'RMSNorm': {'norm': 'rmsnorm'}, 'no biases': {'bias': False}}
    makers = {name: lambda name=name: Trial(name, our_model(GPT2, **changes[name], n_layer=layers), BATCH)
              for name in (list(changes)[:3] if quick else changes)}
    for trial in measured(makers):
        base.setdefault('ms', trial.ms)
        row(trial.name, f'{trial.ms:.2f}', f'{(trial.ms - base["ms"]) / layers:+.3f}', gib(trial.memory))


if __name__ == '__main__':
    print(f'\n## {section}\n', flush=True)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(1337)
    {'machine': machine, 'rates': rates, 'profile': profile, 'loop': loop, 'layouts': layouts, 'float16': float16,
     'resume': resume, 'dpo': dpo, 'hellaswag': hellaswag_rate, 'generate': generate, 'ablations': ablations}[section]()
