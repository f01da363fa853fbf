"""Functions run on several processes without torchrun: forked from one that has imported torch already."""

import multiprocessing
import os
import pickle
import sys
import traceback
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from data.errors import UserError

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['torch', 'torch.distributed.fsdp', 'torch.distributed.tensor', 'common.checkpoint',
                                'common.optimizers', 'model'])


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
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world_size), 'MASTER_ADDR': '127.0.0.1',
                   'MASTER_PORT': str(port), 'TORCHELASTIC_USE_AGENT_STORE': 'True'}
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
