"""Scripts and functions in real processes, forked from one that has imported torch already, which spares seconds."""

import atexit
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from data.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OURS = {'common', 'data', *(path.stem for path in ROOT.glob('*.py'))}

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['torch._dynamo', 'torch._inductor.compile_fx', 'torch.distributed.fsdp', 'tiktoken', 'datasets',
                                'common.checkpoint', 'common.optimizers', 'model'])


class Script:
    """A script of the repository as a process of its own, with the names of subprocess.Popen."""

    def __init__(self, args, env):
        out, err = context.Pipe(duplex=False), context.Pipe(duplex=False)
        self.args, self.process = args, context.Process(target=run_script, args=(args, env, out[1], err[1]))
        self.process.start()
        self.pid = self.process.pid
        self.stdout, self.stderr = (open(os.dup(end.fileno()), encoding='utf-8') for end, _ in (out, err))
        for end in *out, *err:
            end.close()
        while self.poll() is None and os.getpgid(self.pid) != self.pid:  # killpg needs its session
            time.sleep(0.001)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run_script(args, env, out, err):
    """What `python *args` does, in a session of its own, with this environment."""
    os.setsid()
    for fd, pipe in (1, out), (2, err):
        os.dup2(pipe.fileno(), fd)
        pipe.close()
    sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, encoding='utf-8') for fd in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    for name in [name for name in sys.modules if name.partition('.')[0] in OURS]:
        del sys.modules[name]  # they read the environment
    sys.path[:] = [os.path.dirname(args[0]), *(path for path in sys.path if path not in ('', str(ROOT), str(ROOT / 'tests')))]
    sys.argv = args
    try:
        runpy.run_path(args[0], run_name='__main__')
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def rank_environment(rank, world_size, port):
    """What torchrun sets for a rank, with a store at this port."""
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world_size), 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port), 'TORCHELASTIC_USE_AGENT_STORE': 'True'}


def on_processes(world_size, function, *args, timeout=60, init=True, missing=(), stderr=None):
    """[function(*args), or the exception that it raised, or None if it was ended] of each rank but the missing ones.

    init: join the others first, with timeout as dist_timeout. stderr: a file for what they print there.
    """
    board = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    there = [r for r in range(world_size) if r not in missing]
    pipes = {r: context.Pipe(duplex=False) for r in there}
    processes = [context.Process(target=work, args=(r, world_size, board.port, pipes[r][1], timeout, init, stderr,
                                                      function, args))
                 for r in there]
    for process in processes:
        process.start()
    for _, end in pipes.values():
        end.close()
    results = []
    for r, process in zip(there, processes):
        try:
            results.append(pickle.loads(pipes[r][0].recv_bytes()))
        except EOFError:  # it was ended
            results.append(None)
        process.join()
    return results


def work(rank, world_size, port, pipe, timeout, init, stderr, function, args):
    if stderr:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= rank_environment(rank, world_size, port)
    torch.set_num_threads(1)
    from common import distributed
    distributed.rank, distributed.local_rank, distributed.world_size = rank, rank, world_size
    distributed.master = rank == 0
    try:
        if init:
            distributed.init('cpu', timeout=timeout)
        result = function(*args)
        if init:
            distributed.shutdown()
        pipe.send_bytes(pickle.dumps(result))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(error))
        if not isinstance(error, UserError):
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)
