"""Every layout trains the same model, reads the others' checkpoints, and ends as one."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

from common import distributed
from conftest import ROOT, TINY, at_step, command, environment, finish, losses, read_log, run, run_ranks, start
from data.errors import UserError
from processes import Script, on_processes

LAYOUTS = {  # name: (processes, settings)
    'zero1': (2, ['--parallel=zero1']),
    'fsdp': (2, ['--parallel=fsdp', '--activation_checkpointing']),
    'offload': (2, ['--parallel=fsdp', '--cpu_offload']),
    'hsdp': (4, ['--parallel=fsdp', '--replicas=2', '--batch_size=2', '--eval_iters=8']),
}


def tiny(dataset, out_dir, *args):
    return 'train.py', *TINY, '--total_batch_size=512', f'--dataset={dataset}', f'--out_dir={out_dir}', *args


def run_here(script, *args):
    """Run a script in this process, which has imported torch already."""
    kept = sys.argv, sys.excepthook, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sys.argv = [script, *map(str, args)]
        runpy.run_path(str(ROOT / script), run_name='__main__')
    finally:
        sys.argv, sys.excepthook, handlers = kept
        for number, handler in handlers.items():
            signal.signal(number, handler)


def assert_same_losses(a, b, first=1):
    a, b = losses(a), losses(b)
    assert list(b) == list(range(first, 21))
    assert all(abs(a[step] - b[step]) < 2e-3 for step in b), [(a[step], b[step]) for step in b]


@pytest.fixture(scope='module')
def alone(dataset, tmp_path_factory):
    """What one process makes of 20 steps, with Muon for some parameters and AdamW for the others: (its folder, its
    settings)."""
    out_dir = tmp_path_factory.mktemp('layouts') / 'alone'
    settings = ['--optimizer=muon', '--keep_checkpoints=2', '--learning_rate=3e-3']
    run_here(*tiny(dataset, out_dir, *settings))
    return out_dir, settings


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_layout_trains_as_one_process_and_one_process_goes_on(dataset, alone, layout):
    folder, settings = alone
    processes, layout_settings = LAYOUTS[layout]
    out_dir = folder.parent / layout
    run_ranks(*tiny(dataset, out_dir, *settings, *layout_settings), processes=processes)
    assert_same_losses(folder, out_dir)
    theirs = [entry['val_loss'] for entry in read_log(folder) if 'val_loss' in entry]
    assert [entry['val_loss'] for entry in read_log(out_dir) if 'val_loss' in entry] == pytest.approx(theirs, abs=2e-3)

    (out_dir / 'on').mkdir()
    shutil.copy(out_dir / 'ckpt_000010.pt', out_dir / 'on' / 'ckpt.pt')
    run_here(*tiny(dataset, out_dir / 'on', *settings, '--init_from=resume'))
    assert_same_losses(folder, out_dir / 'on', first=11)


def test_a_checkpoint_goes_from_layout_to_layout(dataset, alone):
    """Written by one process, continued by zero1, by fsdp, then sampled from on one device."""
    folder, settings = alone
    shutil.copytree(folder, folder.parent / 'journey')
    for step, layout in (10, 'zero1'), (15, 'fsdp'):
        (folder.parent / 'journey' / f'ckpt_{step:06d}.pt').replace(folder.parent / 'journey' / 'ckpt.pt')
        run_ranks(*tiny(dataset, folder.parent / 'journey', *settings, *LAYOUTS[layout][1], '--init_from=resume',
                        '--eval_interval=5'), processes=2)
        assert_same_losses(folder, folder.parent / 'journey')
    ours, theirs = (torch.load(out_dir / 'ckpt.pt', weights_only=True) for out_dir in (folder, folder.parent / 'journey'))
    assert ours['model'].keys() == theirs['model'].keys()
    assert ours['optimizer']['state'].keys() == theirs['optimizer']['state'].keys()
    assert max((ours['model'][name] - w).abs().max().item() for name, w in theirs['model'].items()) < 2e-3
    assert run('sample.py', f'--out_dir={folder.parent / "journey"}', '--num_samples=1', '--max_new_tokens=9').out


def test_each_process_writes_its_shards_and_one_reads_them(dataset, alone):
    folder, settings = alone
    out_dir = folder.parent / 'sharded'
    settings = [*settings, '--eval_interval=5']
    run_ranks(*tiny(dataset, out_dir, *settings, '--parallel=fsdp', '--sharded_checkpoints'), processes=2)
    used = {torch.load(path, weights_only=True)['shards'] for path in out_dir.glob('ckpt*.pt')}
    assert {path.name for path in out_dir.glob('shards_*')} == used and len(used) == 2  # the others are gone
    assert all(len(list((out_dir / name).iterdir())) == 2 for name in used)
    assert (out_dir / 'ckpt.pt').stat().st_size < (folder / 'ckpt.pt').stat().st_size / 10
    assert run('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=9').out
    (out_dir / 'ckpt_000015.pt').replace(out_dir / 'ckpt.pt')
    run_here(*tiny(dataset, out_dir, *settings, '--init_from=resume'))
    assert_same_losses(folder, out_dir)


def test_shards_that_do_not_fit_leave_the_checkpoint_before(dataset, tmp_path):
    full = at_step(tmp_path, 12, f"""import resource
        while not os.path.exists({str(tmp_path / 'ckpt.pt')!r}):  # of step 10, written in the background
            time.sleep(0.01)
        os.environ['RANK'] == '1' and resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file beyond""")
    err = run(*tiny(dataset, tmp_path, '--parallel=fsdp', '--sharded_checkpoints'), full, processes=2, expect=1).err
    assert err.count('the checkpoint of step 20 could not be written') == 1 and 'train.py", line' not in err, err
    assert f'the previous checkpoint is kept ({tmp_path}/ckpt.pt)' in err
    run_here(*tiny(dataset, tmp_path, '--init_from=resume'))
    assert list(losses(tmp_path)) == list(range(1, 21))


def test_bfloat16_blocks_train_as_autocast_does(dataset, tmp_path):
    for layout in 'ddp', 'fsdp':
        run_ranks(*tiny(dataset, tmp_path / layout, '--dtype=bfloat16', '--position=rope', '--total_batch_size=256',
                        f'--parallel={layout}'), processes=2)
    ddp, fsdp = losses(tmp_path / 'ddp'), losses(tmp_path / 'fsdp')
    assert all(abs(ddp[step] - fsdp[step]) < 1e-2 for step in ddp) and ddp != fsdp


@pytest.mark.parametrize('accident', ['time.sleep(1000)', 'os.kill(os.getpid(), signal.SIGSTOP)'], ids=['slow', 'frozen'])
def test_who_waits_too_long_names_who_is_missing(dataset, tmp_path, accident):
    pid = tmp_path / 'pid'
    late = at_step(tmp_path, 3, f"if os.environ['RANK'] == '1': open({str(pid)!r}, 'w').write(str(os.getpid())); {accident}")
    process = start(*tiny(dataset, tmp_path / 'out', '--dist_timeout=4'), late, processes=2)
    seen = ''
    for line in process.stderr:
        seen += line
        if 'missed a collective' in line:
            break
    with suppress(ProcessLookupError):  # one that is not frozen has ended with the others
        os.kill(int(pid.read_text()), signal.SIGKILL)  # torchrun would give it 30 seconds
    finish(process)
    assert re.fullmatch(r'rank 1 on \S+ missed a collective for 4 s \(dist_timeout\); aborting\n', line), seen


def test_an_error_of_one_process_is_told_once(dataset, tmp_path):
    bug = at_step(tmp_path, 3, "if os.environ['RANK'] == '1': raise RuntimeError('a bug')")
    err = run(*tiny(dataset, tmp_path), bug, processes=2, expect=1).err
    assert err.count('train.py", line') == err.count('RuntimeError: a bug') == err.count('on rank 1:') == 1, err


@pytest.mark.parametrize('missing', [(0,), (1, 3)], ids=['first', 'others'])
def test_a_process_that_never_joins_is_named(missing):
    results = on_processes(4, distributed.join, 2, init=False, missing=missing)
    assert {type(result) for result in results} == {UserError}
    names = ', '.join(f'rank {r}' for r in missing)
    assert {str(result) for result in results} == {f'{names} of 4 processes did not join within 2 s (dist_timeout)'}


def test_a_sum_never_waits_for_the_device(monkeypatch):
    """As as_tensor of a number does on a GPU."""
    monkeypatch.delattr(torch, 'as_tensor')
    assert distributed.sum_over_ranks(1, 2.5, True, torch.tensor(3.0), device='cpu').tolist() == [1, 2.5, 1, 3]


def fetch(folder):
    distributed.local_rank = distributed.rank % 2  # two machines of two processes

    def found():
        names = sorted(path.name for path in folder.iterdir())
        (folder / str(distributed.rank)).touch()
        return names
    return distributed.first_then_all(found)


def test_one_process_of_each_machine_fetches_for_all(tmp_path):
    first, *others = on_processes(4, fetch, tmp_path)
    assert set(first) | set(others[1]) <= {'0', '2'}
    assert {'0', '2'} <= set(others[0]) and {'0', '2'} <= set(others[2])


def die_unless_asleep(victim):
    if distributed.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
    return 'not noticed'


def test_a_death_ends_processes_that_wait_for_nobody(tmp_path):
    """With NCCL, no process but a neighbour in the ring notices either, before the collective times out."""
    assert on_processes(3, die_unless_asleep, 1, stderr=tmp_path / 'err') == [None] * 3
    assert re.fullmatch(r'rank 1 on \S+ has died; aborting\n', (tmp_path / 'err').read_text())


def write_slowly():
    if distributed.master:
        distributed.result(distributed.in_background(time.sleep, 4))
    return distributed.first_then_all(lambda: time.sleep(4 if distributed.master else 0))


def test_a_process_whose_disk_is_slow_is_not_missing(tmp_path):
    assert on_processes(2, write_slowly, timeout=2, stderr=tmp_path / 'err') == [None, None]
    assert (tmp_path / 'err').read_text() == ''


def test_a_missing_rank_is_named_among_1024_by_few_store_operations(monkeypatch):
    """All but rank 700 have reached the third collective. It answers nothing, is behind, or is writing a checkpoint."""
    calls, answers = [], ' '.join(f'{r}=3' for r in range(1024) if r != 700)

    class Store:
        def __init__(self):
            self.store = torch.distributed.HashStore()

        def __getattr__(self, name):
            return lambda *args: (calls.append(name), getattr(self.store, name)(*args))[1]

    def messages(answer, seconds):
        found = []
        store = Store()
        store.set('hosts', ' '.join(f'{r}=host{r}' for r in range(1024)))
        for alarm in range(1, 10):
            store.append(f'answers/{alarm}', f'{answers} {answer} ')
        calls.clear()
        monkeypatch.setattr(distributed, 'abort', lambda message, grace=20: (
            found.append(message), setattr(distributed, 'ended', True)))
        for name, value in dict(store=store, neighbours=[], world_size=1024, progress=(3, time.monotonic() - 1), ended=False).items():
            monkeypatch.setattr(distributed, name, value)
        thread = threading.Thread(target=distributed.watchdog, args=(0.5, os.getppid()))
        thread.start()
        thread.join(seconds)
        monkeypatch.setattr(distributed, 'ended', True)
        thread.join()
        assert len(calls) < 100
        return found

    named = ['rank 700 on host700 missed a collective for 0.5 s (dist_timeout); aborting']
    assert messages('', 30) == messages('700=2', 30) == named
    assert messages('700=inf', 1) == []


def test_workers_end_when_torchrun_is_killed(dataset, tmp_path):
    """It cannot end them, and one started in its place would train beside them."""
    line = command(*tiny(dataset, tmp_path, '--max_iters=1000000', '--eval_interval=1000000'), processes=2)
    process = Script(line[1:], environment(PYTHON_EXEC=sys.executable))  # torchrun starts the workers itself
    for line in process.stdout:
        if line.startswith('step 3/'):
            break
    process.kill()
    finish(process)  # until the last of the workers has closed its pipes
    assert re.search('aborting|lost its connection', process.err) and 'Traceback' not in process.err


def test_a_second_signal_ends_at_once_but_not_torchruns_copy(monkeypatch):
    monkeypatch.setattr(distributed, 'stop_signal', 0)
    raised = []
    monkeypatch.setattr(signal, 'raise_signal', raised.append)
    monkeypatch.setattr(signal, 'signal', lambda number, handler: raised.append(handler))
    assert not distributed.stop_signal
    distributed.request_stop(signal.SIGINT, None)
    distributed.request_stop(signal.SIGTERM, None)  # within two seconds
    assert distributed.stop_signal == signal.SIGINT and raised == []
    monkeypatch.setattr(distributed, 'stop_time', time.monotonic() - 3)
    distributed.request_stop(signal.SIGINT, None)
    assert raised == [signal.SIG_DFL, signal.SIGINT]


def test_no_other_file_calls_torch_distributed_or_reads_ranks():
    for path in [*ROOT.glob('*.py'), *ROOT.glob('common/*.py'), *ROOT.glob('data/*.py')]:
        if path != ROOT / 'common' / 'distributed.py':
            code = '\n'.join(line.partition('#')[0] for line in path.read_text().splitlines())
            assert not re.search(r"torch\.distributed|import dist\b|'(LOCAL_)?RANK'|WORLD_SIZE", code), path


def test_importing_takes_no_time_for_what_only_many_processes_need():
    """(PyTorch's optimizers import torch._dynamo, and that FSDP, when the first one is made: sampling never does.)"""
    code = ("import sys; from common import checkpoint, distributed, optimizers; import model; "
            "distributed.wrap(model.GPT(model.GPTConfig(16, 64, 1, 1, 8)), 'cpu'); "
            "print([name for name in sys.modules if name.startswith(('torch.distributed.tensor.', 'torch.distributed.fsdp',"
            "'torch.distributed.checkpoint', 'torch.distributed.optim'))])")
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert process.stdout == '[]\n', process.stdout + process.stderr


def test_two_machines_train_as_one_process(dataset, alone, tmp_path, forked):
    """Two torchrun agents: in two network namespaces, joined by a cable, where that is allowed; else on loopback."""
    folder, settings = alone
    hosts, address = namespaces()
    try:
        agents = []
        for node, host in enumerate(hosts):
            torchrun = ['--nnodes=2', f'--node_rank={node}', f'--master_addr={address}', '--master_port=29517']
            line = command(*tiny(dataset, tmp_path / 'out', *settings, '--parallel=fsdp'), processes=1, torchrun=torchrun)
            agents.append(subprocess.Popen([*host, *line], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                           env=environment(GLOO_SOCKET_IFNAME=f'cable{node}' if host else 'lo'),
                                           start_new_session=True))
        for agent in agents:
            finish(agent)
            assert agent.returncode == 0, agent.err
            assert 'has no connection to ranks' not in agent.err
    finally:
        for host in hosts:
            if host:
                subprocess.run(['ip', 'netns', 'del', host[-1]])
    assert_same_losses(folder, tmp_path / 'out')


def namespaces():
    """([command prefix of each host], address of the first)"""
    names = [f'host{node}-{os.getpid()}' for node in (0, 1)]
    commands = [f'ip netns add {names[0]}', f'ip netns add {names[1]}',
                f'ip link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}']
    for node, name in enumerate(names):
        commands += [f'ip -n {name} addr add 10.77.0.{node + 1}/24 dev cable{node}',
                     f'ip -n {name} link set cable{node} up', f'ip -n {name} link set lo up']
    try:
        for line in commands:
            subprocess.run(line.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):  # not root, or no ip
        for name in names:
            if shutil.which('ip'):
                subprocess.run(['ip', 'netns', 'del', name], capture_output=True)
        return [[], []], '127.0.0.1'
    return [['ip', 'netns', 'exec', name] for name in names], '10.77.0.1'


def test_gloo_stays_within_half_of_the_descriptors(monkeypatch):
    import resource
    limits = []
    monkeypatch.setattr(resource, 'getrlimit', lambda _: (256, 1024))
    monkeypatch.setattr(resource, 'setrlimit', lambda _, limit: limits.append(limit))
    monkeypatch.setattr(distributed, 'world_size', 256)
    distributed.raise_descriptor_limit()
    assert limits == [(1024, 1024)]
    monkeypatch.setattr(distributed, 'world_size', 257)
    with pytest.raises(UserError, match='ulimit -n, 1024: raise it to 1028'):
        distributed.raise_descriptor_limit()
