"""
Everything particular to training with many processes: who they are, how the model is laid out over them, what they
tell each other, and how they end together.

torchrun starts the processes and names each one in RANK, LOCAL_RANK and WORLD_SIZE. Without it there is one, and
every function here does what one process needs.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.device import DTYPES, pick_device
from data.errors import UserError

rank = int(os.environ.get('RANK', 0))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0  # the process that prints, logs and saves

store = None  # what the processes write on a common board, without waiting for each other
progress = 0, time.monotonic()  # how often this process has met the others, and when it last did


def init(device, backend='auto', timeout=600):
    """Join the other processes that torchrun started, if it did. Returns this process's device.

    timeout: seconds after which a process that still waits for the others names those that are missing and ends.
    """
    global store
    if device in ('auto', 'cuda') and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # before anything else touches a GPU
    device = pick_device(device)
    if 'RANK' not in os.environ:
        return device
    if device == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise UserError(f'{torch.cuda.device_count()} GPUs here: lower torchrun\'s --nproc_per_node')
        device = f'cuda:{local_rank}'
    if backend == 'auto':  # what stays on the CPU is exchanged too, when the optimizer's state is offloaded
        backend = 'cpu:gloo,cuda:nccl' if 'cuda' in device else 'gloo'
    for name in backend.split(','):
        if not dist.is_backend_available(name.split(':')[-1]):
            raise UserError(f'backend={backend}: PyTorch has no {name.split(":")[-1]} here; auto takes the one that fits')
    try:
        board, *_ = next(rendezvous('env://', timeout=timedelta(seconds=timeout)))
    except ValueError as error:  # RANK alone
        raise UserError(f'RANK is set, but not what else torchrun sets: {error}')
    store = private_store(board, timeout)
    hook = sys.excepthook
    dist.init_process_group(backend, store=dist.PrefixStore('group', store), rank=rank, world_size=world_size,
                            timeout=timedelta(seconds=2 * timeout + 60))  # the watchdog speaks first, and plainer
    sys.excepthook = hook  # init_process_group wraps it, to put the rank before each line
    threading.Thread(target=watchdog, args=(timeout,), daemon=True).start()
    return device


def private_store(board, timeout):
    """A part of the board for these processes alone. torchrun hands the same board to the processes that it starts
    after a failure, with all that the dead have written, and who read their addresses would wait for them."""
    me = uuid.uuid4().hex
    if rank > 0:  # give the first process a name that nobody had before, and wait for its answer to that
        board.set(f'hello/{rank}', me)
        part = board.get(f'part/{me}').decode()
        board.add(f'came/{part}', 1)
        return dist.PrefixStore(part, board)
    began = time.monotonic()
    while (came := board.add(f'came/{me}', 0) + 1) < world_size:
        for other in range(1, world_size):
            if board.check([f'hello/{other}']):  # perhaps a dead one's, whose answer nobody reads
                board.set(f'part/{board.get(f"hello/{other}").decode()}', me)
        if time.monotonic() - began > timeout:
            raise UserError(f'only {came} of {world_size} processes have come in {timeout} s (dist_timeout)')
        time.sleep(0.05)
    return dist.PrefixStore(me, board)


def print0(*args, **kwargs):
    """print, on the first process only, flushed."""
    if master:
        print(*args, **kwargs, flush=True)


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# how the model lies on the devices

def check_layout(layout, replicas, cpu_offload, sharded_checkpoints):
    """Exit with one line if these settings make no layout for this number of processes."""
    if layout != 'fsdp' and (replicas != 1 or cpu_offload or sharded_checkpoints):
        raise UserError(f'replicas, cpu_offload and sharded_checkpoints need --parallel=fsdp, and parallel is {layout}')
    if layout != 'ddp' and 'RANK' not in os.environ:
        raise UserError(f'parallel={layout} shares the work of several processes: start them with torchrun')
    if world_size % replicas:
        raise UserError(f'replicas={replicas} must divide the number of processes, {world_size}')


def wrap(model, device, layout='ddp', dtype='float32', replicas=1, cpu_offload=False):
    """The model on its device, as the training step calls it: the gradients that a backward pass leaves are the mean
    over all processes.

    'ddp' and 'zero1': each process has the whole model (the optimizer is what zero1 shards, see optimizers.py).
    'fsdp': each has 1 / (processes / replicas) of every parameter, gradient and optimizer state, and gathers a block
    only while it computes it (ZeRO stage 3; Rajbhandari et al. 2020, arXiv:1910.02054). The blocks are gathered
    in dtype and their gradients summed in float32; normalisations, embeddings and head stay float32, as under autocast,
    and so does the residual stream.
    With replicas, only the processes of one replica share a model, which keeps the gathering inside a machine.
    """
    if layout == 'fsdp':
        mesh = init_device_mesh(torch.device(device).type, (replicas, world_size // replicas),
                                mesh_dim_names=('replicate', 'shard'))
        how = {'mesh': mesh if replicas > 1 else mesh['shard'],
               'offload_policy': CPUOffloadPolicy(pin_memory='cuda' in device) if cpu_offload else OffloadPolicy()}
        # not cast_forward_inputs: rotary angles must stay float32
        half = MixedPrecisionPolicy(DTYPES[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            if dtype != 'float32':
                fully_shard([block.ln_1, block.ln_2], **how)
            fully_shard(block, **how, mp_policy=half if dtype != 'float32' else MixedPrecisionPolicy())
        fully_shard(model, **how)
        for method in 'generate', 'token_losses':  # called beside forward
            register_fsdp_forward_method(model, method)
        return model
    model.to(device)
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device] if 'cuda' in device else None,
                                   broadcast_buffers=False,  # tables, the same everywhere
                                   gradient_as_bucket_view=True)  # else gradients take their memory twice


def sync_gradients(model, last):
    """Tell a wrapped model whether the coming backward pass is the last of its step: only then are gradients
    sent round, once for all micro-batches. (fsdp sends them each time, since it has no room to keep them whole.)"""
    record_progress()
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last


def clip_grad_norm(model, longest):
    """Scale the gradient down to at most this length. Returns the length that it had, a tensor on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), longest or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# -----------------------------------------------------------------------------
# what the processes tell each other

def all_sum(*values, device):
    """Each number, or tensor of one, summed over all processes, as floats."""
    record_progress()
    total = torch.stack([torch.as_tensor(v, dtype=torch.float32 if 'mps' in device else torch.float64, device=device)
                         for v in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def all_reduce(x, device):
    """The tensor x summed over all processes, on the device on which it is."""
    if not dist.is_initialized():
        return x
    record_progress()
    total = x.to(device)
    dist.all_reduce(total)
    return total.to(x.device)


def first_then_all(fn):
    """fn() by one process of each machine first, then by its others, for what the first one leaves there: a file."""
    result = fn() if local_rank == 0 else None
    all_gather(None)
    return fn() if local_rank else result


def all_gather(value):
    """What each process has, as a list, on all of them."""
    if not dist.is_initialized():
        return [value]
    record_progress()
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


# -----------------------------------------------------------------------------
# how they end together

def record_progress():
    """Note for the watch that this process has come as far as the next exchange."""
    global progress
    progress = progress[0] + 1, time.monotonic()


def watchdog(timeout):
    """Runs beside the training and says on the board how far this process has come. Once it has waited longer than
    timeout seconds, it looks who has come less far, or has stopped telling, and ends the program."""
    pause = min(10, timeout / 10)

    def tell():
        store.set(f'alive/{rank}', f'{progress[0]} {time.monotonic()} {socket.gethostname()}')

    def told():
        return {r: store.get(f'alive/{r}').decode() if store.check([f'alive/{r}']) else '-1 0 ?'
                for r in range(world_size)}

    while True:
        try:
            tell()
            time.sleep(pause)
            met, since = progress
            if time.monotonic() - since < timeout:
                continue
            before = told()
            for _ in range(3):
                time.sleep(pause)
                tell()
            after = told()
            missing = {r: line.split()[2] for r, line in after.items()
                       if int(line.split()[0]) < met or r != rank and line == before[r]}
            reason = ', '.join(f'rank {r} on {host}' for r, host in missing.items())
        except RuntimeError:  # the board was on the first process's machine
            missing, reason = {0}, 'rank 0, or its machine,'
        if progress[0] == met and missing and rank not in missing:
            if is_first_failure():
                print(f'{reason} has not come for {timeout} s (dist_timeout), and the others cannot go on without',
                      file=sys.stderr, flush=True)
            os._exit(1)


def is_first_failure():
    """True for the first process that asks: of many that fail alike, or because another did, only one prints."""
    try:
        return store.add('failed', 1) == 1 if store else master
    except RuntimeError:  # the board is gone, with the process that had it
        return False


def describe(error):
    """One line for an error that is not a bug: out of memory, or another process is gone. Any other: None."""
    text = str(error).strip().split('\n')[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (f'out of memory on rank {rank}: halve batch_size (the step stays the same, unless '
                'gradient_accumulation_steps is fixed), or try --activation_checkpointing=True, or --parallel=fsdp on '
                f'several GPUs. {text}')
    if not dist.is_initialized():
        return None
    if isinstance(error, dist.DistError) or 'gloo' in text.lower() or 'Connection' in text:
        return f'rank {rank} lost its connection to the other processes; one has probably died: {text}'
    return None

# -----------------------------------------------------------------------------
# signals

stop_signal, stopped_at = 0, 0.0  # the first SIGINT or SIGTERM, and when it came


def catch_signals():
    """From now on the first SIGINT or SIGTERM only asks for an end (stop_requested); a second one ends the process."""
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)


def request_stop(number, frame):
    global stop_signal, stopped_at
    if stop_signal:
        if time.monotonic() - stopped_at > 2:  # sooner it is torchrun, which passes on what the terminal sent to all
            os._exit(128 + number)
        return
    stop_signal, stopped_at = number, time.monotonic()
    print0(f'\n{signal.Signals(number).name}: saving, then ending (again: end at once)')


def stop_requested():
    """The signal that asked this process to end, or 0."""
    return stop_signal


def stop_agreed(device):
    """Was any process asked to end? The same answer for all."""
    return all_sum(stop_signal > 0, device=device)[0] > 0

# -----------------------------------------------------------------------------
# how a step is divided

def divide_step(config, given, processes):
    """(micro-batches that each process runs in a step, sequences in each, a line for the user or '').

    config: settings with total_batch_size (tokens in a step), gradient_accumulation_steps (micro-batches in a step over
    all processes; 0: total_batch_size decides), batch_size and block_size. given: those that the user set, in the order
    of setting; the later of the two wins. Raises UserError if they can't be divided by the number of processes.
    """
    batch_size, block_size = config['batch_size'], config['block_size']
    total, steps = config['total_batch_size'], config['gradient_accumulation_steps']
    order, note = list(given), ''
    if steps and 'total_batch_size' in order:
        if order.index('total_batch_size') > order.index('gradient_accumulation_steps'):
            note = f'total_batch_size={total} replaces gradient_accumulation_steps={steps}, given before it'
            steps = 0
        else:
            note = f'gradient_accumulation_steps={steps} replaces total_batch_size={total}, given before it'
    if steps:
        if steps % processes:
            raise UserError(f'gradient_accumulation_steps={steps} is not a multiple of the {processes} processes: use '
                            f'{-(-steps // processes) * processes}, or total_batch_size')
        return steps // processes, batch_size, note
    micro_batch = batch_size * block_size * processes  # tokens, over all processes
    if total % micro_batch == 0:
        return total // micro_batch, batch_size, note
    if total < micro_batch and total % (block_size * processes) == 0:
        batch_size = total // (block_size * processes)
        return 1, batch_size, f'batch_size={batch_size}: {processes} processes divide a step of {total:,} tokens'
    if 'total_batch_size' not in order:  # a default gives way to what was set
        steps = max(1, round(total / micro_batch))
        return steps, batch_size, (f'total_batch_size={steps * micro_batch} instead of {total}, which is not a multiple of '
                                   f'batch_size * block_size * processes = {micro_batch}')
    below = total // micro_batch * micro_batch
    near = ' or '.join(f'{n}' for n in (below, below + micro_batch) if n > 0)
    raise UserError(f'total_batch_size={total} is not a multiple of batch_size * block_size * processes = '
                    f'{batch_size} * {block_size} * {processes} = {micro_batch}: the nearest are {near}')
