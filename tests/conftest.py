"""What the tests that run scripts share: a small dataset, and running a script as a user does."""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

os.environ |= {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}  # processes share the cores; no test talks to the hub
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)  # scripts that start hundreds of times are compiled once, not each time

import pytest

from data.errors import UserError
from data.tokenizer import get_tokenizer
from processes import ROOT, Script, python, rank_environment

SHARED = ROOT.parent / 'shared'
if (SHARED / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))


def has_gpt2():
    try:
        return bool(get_tokenizer('gpt2'))
    except UserError:
        return False


needs_gpt2 = pytest.mark.skipif(not has_gpt2(), reason='no GPT-2 vocabulary here, and no network to fetch it')

# a tiny GPT on the CPU in float32, two micro-batches a step
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--total_batch_size=256',
        '--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_iters=2', '--max_iters=20', '--eval_interval=10',
        '--eval_iters=4', '--hellaswag_interval=0', '--sample_interval=0', '--curves=False', '--device=cpu', '--dtype=float32', '--compile=False']


def environment(**more):
    return {**os.environ, 'PYTHONUNBUFFERED': '1', **more}


def command(script, *args, processes=0, torchrun=()):
    """The command line that runs a script of the repository; under torchrun if processes are given."""
    launcher = [sys.executable]
    if processes:
        launcher += ['-m', 'torch.distributed.run', *(torchrun or ['--standalone']), f'--nproc_per_node={processes}']
    return [*launcher, str(ROOT / script), *map(str, args)]


def start(script, *args, processes=0, torchrun=(), fork=True, **env):
    """The script as a running process (text pipes, a process group of its own), forked but where libraries may read env
    as they are imported."""
    if fork and not env:
        return Script(command(script, *args, processes=processes, torchrun=torchrun)[1:], environment())
    return subprocess.Popen(command(script, *args, processes=processes, torchrun=torchrun), cwd=ROOT, text=True,
                            env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def finish(process, timeout=240):
    """Wait for a process that start() gave, and give it its stdout and stderr as text."""
    with ThreadPoolExecutor(2) as pool:
        texts = [pool.submit(pipe.read) for pipe in (process.stdout, process.stderr)]
        if late := wait(texts, timeout).not_done:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout)
    process.out, process.err = (text.result() for text in texts)
    if late:
        pytest.fail(f'still running after {timeout} s:\n{process.out}\n{process.err}')
    return process


def run_ranks(script, *args, processes):
    """The script on several processes that join as under torchrun, which takes longer to start. Returns the first one,
    finished, with the output of all."""
    from torch.distributed import TCPStore  # here, since the process that hands out the tests needs no torch
    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    started = [Script(command(script, *args)[1:], environment(**rank_environment(r, processes, store.port)))
               for r in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        for process in pool.map(finish, started):
            assert process.returncode == 0, f'exit status {process.returncode}\n{process.out}\n{process.err}'
    started[0].out, started[0].err = (''.join(getattr(process, name) for process in started) for name in ('out', 'err'))
    return started[0]


def run(script, *args, expect=0, **how):
    """The finished process of a script, which must exit with status `expect`."""
    process = finish(start(script, *args, **how))
    assert process.returncode == expect, f'exit status {process.returncode}\n{process.out}\n{process.err}'
    return process


def read_log(out_dir):
    """The entries of a run's log without its settings and what a clock says."""
    entries = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ('ms', 'tokens_per_s', 'mfu', 'eval_s', 'data_ms', 'peak_gb')}
            for entry in entries if 'config' not in entry]


def losses(out_dir):
    """{step: training loss}"""
    return {entry['step']: entry['loss'] for entry in read_log(out_dir) if 'loss' in entry}


def at_step(folder, step, code):
    """A settings file that has train.py run a line of code in a step, just before the gradient is clipped. (A
    settings file is Python, and what it does besides setting is its own affair.)"""
    path = folder / f'at_step_{step}.py'
    path.write_text(f"""
import os, signal, time, torch
_clip, _steps = torch.nn.utils.clip_grad_norm_, []
def _clip_with_accident(*args, **kwargs):
    args = list(args)
    _steps.append(1)
    if len(_steps) == {step}:
        {code}
    return _clip(*args, **kwargs)
torch.nn.utils.clip_grad_norm_ = _clip_with_accident
""")
    return path


def pytest_collection_modifyitems(items):
    """Run the compiled tests first: they are the slowest, and at the end one of them would leave a core idle."""
    items.sort(key=lambda item: 'compile' not in item.name)


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """A settings file, and this process, in which torch.compile traces as always and leaves out the code generation, which
    takes a minute."""
    path = tmp_path / 'traced.py'
    path.write_text("""
import torch
_compile = torch.compile
torch.compile = lambda function, **options: _compile(function, **options, backend='aot_eager')
""")
    import torch
    monkeypatch.setattr(torch, 'compile', torch.compile)  # undone after the test
    runpy.run_path(str(path))
    return path


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """The standard library as bytes: a folder."""
    folder = tmp_path_factory.mktemp('data') / 'stdlib'
    run('data/stdlib/prepare.py', f'--out_dir={folder}')
    return folder


@pytest.fixture(autouse=True)
def signals():
    """A script that runs in this process sets handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def forked(monkeypatch):
    """What a script that runs in this process starts is forked, as what a Script starts is."""
    monkeypatch.setattr(sys, 'executable', python())


@pytest.fixture
def inside(monkeypatch, capsys):
    """inside(script, *args): run a script in this process, which spares the seconds that a new one takes to start.
    Returns what it printed, and raises what it raised."""
    import torch
    from common import distributed, files
    locks, lock = [], files.lock
    monkeypatch.setattr(files, 'lock', lambda *args, **kwargs: locks.append(lock(*args, **kwargs)) or locks[-1])
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() installs its own
    monkeypatch.setattr(distributed, 'stop_signal', 0)
    precision, random = torch.get_float32_matmul_precision(), torch.get_rng_state()

    def run_inside(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        capsys.readouterr()
        try:
            runpy.run_path(script, run_name='__main__')
        finally:  # what the end of a process does
            distributed.background.submit(gc.unfreeze).result()
            while locks:
                locks.pop().release()
        return capsys.readouterr().out

    yield run_inside
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(random)
