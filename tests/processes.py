"""Scripts and functions in real processes, forked from one that has imported torch already, which spares seconds."""

import atexit
import ctypes
import fcntl
import functools
import json
import multiprocessing
import os
import pickle
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import traceback
import weakref
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

from data.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OURS = {'common', 'data', *(path.stem for path in ROOT.glob('*.py'))}

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['torch._dynamo', 'torch._inductor.compile_fx', 'torch.distributed.fsdp', 'tiktoken', 'datasets',
                                'common.checkpoint', 'common.optimizers', 'model'])


class Script:
    """A script of the repository as a process of its own, with the names of subprocess.Popen. terminal: a file descriptor,
    instead of the pipes."""

    def __init__(self, args, env, terminal=None):
        if terminal is None:
            (self.stdout, out), (self.stderr, err) = (pipe() for _ in range(2))
            streams = out, err
        else:
            streams = tuple(Connection(os.dup(terminal)) for _ in range(3))
        self.args = args
        self.process = context.Process(target=run_script, args=(args, env, python(), ROOT, *streams))
        self.process.start()
        self.pid = self.process.pid
        for stream in streams:
            stream.close()
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


def pipe():
    """(a text file to read from, the Connection to write to)"""
    end, other = context.Pipe(duplex=False)
    with end:
        return open(os.dup(end.fileno()), encoding='utf-8'), other


def run_script(args, env, executable, cwd, *streams):
    """What `executable *args` does, in a session of its own, with this environment. streams: its stdin, which may be left
    out, stdout, and stderr."""
    forget_exit_handlers()
    os.setsid()
    for number, stream in enumerate(streams, start=3 - len(streams)):
        os.dup2(stream.fileno(), number)
        stream.close()
    if len(streams) == 3:
        sys.stdin = open(0, encoding='utf-8')
        if sys.stdin.isatty():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C is for this session
    sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, encoding='utf-8') for fd in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    import torch
    torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    for name in [name for name in sys.modules if name.partition('.')[0] in OURS]:
        del sys.modules[name]  # they read the environment
    sys.path[:] = [os.path.dirname(args[0]), *(path for path in sys.path if path not in ('', str(ROOT), str(ROOT / 'tests')))]
    sys.executable = executable  # of the processes that it starts
    sys.argv = args[1:] if args[0] == '-m' else args
    try:
        if args[0] == '-m':
            runpy.run_module(args[1], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(args[0], run_name='__main__')
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def forget_exit_handlers():
    """Those of the imported libraries, which take a tenth of a second. What the script registers will run."""
    atexit._clear()
    for finalizer in list(weakref.finalize._registry):
        finalizer.detach()
    atexit.register(weakref.finalize._exitfunc)


@functools.cache
def python():
    """A path that stands for sys.executable, for scripts that start others: python.py forks them instead."""
    folder = tempfile.TemporaryDirectory(prefix='python-')
    address, path = f'{folder.name}/socket', Path(folder.name, 'python')
    path.write_text('#!/bin/sh\nexec ' + shlex.join([sys.executable, '-I', str(ROOT / 'tests' / 'python.py'), address])
                    + ' "$@"\n')
    path.chmod(0o755)
    ready = context.Event()
    server = context.Process(target=serve, args=(address, str(path), ready))
    server.start()
    ready.wait()
    atexit.register(folder.cleanup)
    atexit.register(server.terminate)
    return str(path)


def serve(address, executable, ready):
    """Fork a process for each python.py that asks at this socket, until the tests end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        ready.set()
        while listener in wait([listener, multiprocessing.parent_process().sentinel]):
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                attend(connection, executable)
            connection.close()


def attend(connection, executable):
    """Fork a script, tell python.py its process and how it ends, and end it when python.py is killed."""
    _, fds, _, _ = socket.recv_fds(connection, 1, 3)
    args, env, cwd, pid = json.loads(connection.makefile().readline())
    if os.path.exists(network := f'/proc/{pid}/ns/net'):
        with open(network) as file:
            ctypes.CDLL(None).setns(file.fileno(), 0)  # python.py's network may be another one
    streams = [Connection(fd) for fd in fds]
    process = multiprocessing.get_context('fork').Process(target=run_script, args=(args, env, executable, cwd, *streams))
    process.start()
    for stream in streams:
        stream.close()
    with suppress(ConnectionError):
        connection.sendall(b'%d\n' % process.pid)
        if process.sentinel not in wait([connection, process.sentinel]):
            process.kill()
        process.join()
        connection.sendall(b'%d\n' % process.exitcode)
    os._exit(0)


def rank_environment(rank, world_size, port):
    """What torchrun sets for a rank, with a store at this port."""
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world_size), 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port), 'TORCHELASTIC_USE_AGENT_STORE': 'True'}


def on_processes(world_size, function, *args, timeout=60, init=True, missing=(), stderr=None):
    """[function(*args), or the exception that it raised, or None if it was ended] of each rank but the missing ones.

    init: join the others first, with timeout as dist_timeout. stderr: a file for what they print there.
    """
    from torch.distributed import TCPStore
    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    there = [r for r in range(world_size) if r not in missing]
    pipes = {r: context.Pipe(duplex=False) for r in there}
    processes = [context.Process(target=work, args=(r, world_size, store.port, pipes[r][1], timeout, init, stderr,
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
    import torch
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
