"""
Everything about training with many processes: joining them, laying the model out over them, collectives, signals, and
ending together. No other file calls torch.distributed or reads RANK.

torchrun starts the processes and numbers them in RANK, LOCAL_RANK and WORLD_SIZE. Without it there is one, and every
function here does what one process needs. FSDP and DTensor take longer to import than a small run takes to start, so
they are imported where they are used.
"""

import inspect
import ipaddress
import math
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from common.device import DTYPES, pick_device
from data.errors import UserError, some

rank = int(os.environ.get('RANK', 0))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))  # by torchrun, after a failure
master = rank == 0  # the process that prints, logs and saves

store = None  # torch.distributed's key-value store, a part of it that belongs to these processes
progress = 0, time.monotonic()  # how many collectives this process has reached, and when it reached the last
busy = failing = ended = False  # in work that the others wait for; printing an error; past the last collective
neighbours = []  # (rank, connection) of the previous and of the next one
background = ThreadPoolExecutor(1)
pending = None  # the last work given to it
writers = None  # the process group in which threads that write shards talk, apart from the training


# -----------------------------------------------------------------------------
# start and end

def init(device, backend='auto', timeout=600, cpu_tensors=False):
    """Join the other processes that torchrun started, if it did. Returns this process's device.

    timeout: seconds to wait for a process before it counts as missing and all end.
    cpu_tensors: collectives on CPU tensors too (cpu_offload). Else GPUs use NCCL alone: gloo connects every process to
    every other, which takes a file descriptor each, and hostnames that don't resolve to loopback.
    """
    global store, neighbours
    if device in ('auto', 'cuda') and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # before anything else touches a GPU
    device = pick_device(device)
    if 'RANK' not in os.environ:
        return device
    if device == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise UserError(f'{torch.cuda.device_count()} GPUs here: lower torchrun\'s --nproc_per_node')
        device = f'cuda:{local_rank}'
    if backend == 'auto':
        backend = 'gloo' if 'cuda' not in device else 'cpu:gloo,cuda:nccl' if cpu_tensors else 'nccl'
    for name in backend.split(','):
        if not dist.is_backend_available(name.split(':')[-1]):
            raise UserError(f'backend={backend}: PyTorch has no {name.split(":")[-1]} here; '
                            'auto takes the one that fits')
    if 'gloo' in backend:
        raise_descriptor_limit()
    store = join(timeout)
    hook = sys.excepthook
    dist.init_process_group(backend, store=dist.PrefixStore('group', store), rank=rank, world_size=world_size,
                            timeout=timedelta(seconds=4 * timeout + 60))  # the watchdog names who is missing before
    sys.excepthook = hook  # init_process_group wraps it, to put the rank before each line
    record_progress()
    neighbours = connect_neighbours()
    threading.Thread(target=watchdog, args=(timeout, os.getppid()), daemon=True).start()
    return device


def raise_descriptor_limit():
    """Raise the limit on open files as far as allowed. Raises UserError if gloo would use more than half of it."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if 2 * world_size > soft / 2:  # the group of all, and another for fsdp's replicas or the writers of shards
        raise UserError(f'gloo opens two connections to each of {world_size} processes, more than half of ulimit -n, '
                        f'{soft}: raise it to {4 * world_size}')


def join(timeout):
    """The part of torchrun's store that these processes share with no earlier ones. Raises UserError that names who is
    missing.

    After a failure the store still holds keys of the failed attempt, and TORCHELASTIC_RESTART_COUNT is no prefix to
    tell attempts apart: each agent counts its own restarts (pytorch/pytorch#135712). So rank 0 draws a name for the
    attempt, and gives it to each process that asks under a name of its own.
    """
    from torch.distributed.rendezvous import rendezvous
    global store
    began, pause = time.monotonic(), 0.05 + world_size / 2000  # one store serves all

    def wait_until(ready, problem):
        while not ready():  # a blocking get would log a C++ traceback when its time is over
            if time.monotonic() - began > timeout:
                raise UserError(f'{problem()} did not join within {timeout} s (dist_timeout)')
            time.sleep(pause)

    try:
        base, *_ = next(rendezvous('env://', timeout=timedelta(seconds=timeout)))
    except ValueError as error:  # RANK alone
        raise UserError(f'RANK is set, but another variable that torchrun sets is missing: {error}')
    store = dist.PrefixStore(f'joining/{os.environ.get("TORCHELASTIC_RESTART_COUNT")}', base)  # for is_first_failure
    me, answered = uuid.uuid4().hex, set()
    if rank == 0:
        attempt = dist.PrefixStore(me, base)
        base.append('asking', '')
    else:
        base.append('asking', f'{me} ')
        wait_until(lambda: base.check([f'attempt/{me}']), lambda: f'rank 0 of {world_size} processes')
        attempt = dist.PrefixStore(base.get(f'attempt/{me}').decode(), base)
    attempt.append('hosts', f'{rank}={socket.gethostname()} ')

    def all_joined():
        for name in set(base.get('asking').decode().split()) - answered:  # a failed attempt's too, which nobody reads
            base.set(f'attempt/{name}', me)
            answered.add(name)
        return len(hosts(attempt)) == world_size

    wait_until(all_joined if rank == 0 else lambda: attempt.check(['complete']),
               lambda: f'{named(set(range(world_size)) - set(hosts(attempt)))} of {world_size} processes')
    attempt.set('complete', '')
    return attempt


def hosts(store):
    """{rank: hostname} of the processes that have joined."""
    return {int(r): host for r, host in (entry.split('=') for entry in store.get('hosts').decode().split())}


def named(ranks, host={}):
    """'rank 1 on HOST, rank 2 on HOST', at most eight of them."""
    return some([f'rank {r}' + (f' on {host[r]}' if r in host else '') for r in sorted(ranks)], 8)


def print0(*args, **kwargs):
    """print, on the first process only, flushed."""
    if master:
        print(*args, **kwargs, flush=True)


def torchrun(processes):
    """Python's arguments that start a script with this number of processes on this machine."""
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']


def shutdown():
    """The normal end, of all processes together."""
    global ended
    if dist.is_initialized():
        all_gather(None)
        ended = True
        for _, connection in neighbours:
            with suppress(OSError):
                connection.send(b'.')  # else its closing would look like a death
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# how the model lies on the devices

def check_layout(layout, replicas=1, cpu_offload=False, sharded_checkpoints=False, planned=0):
    """Raise UserError if these settings make no layout for these processes, or for as many as are planned."""
    if layout != 'fsdp' and (replicas != 1 or cpu_offload or sharded_checkpoints):
        raise UserError(f'replicas, cpu_offload and sharded_checkpoints need --parallel=fsdp, and parallel is {layout}')
    if layout != 'ddp' and not planned and 'RANK' not in os.environ:
        raise UserError(f'parallel={layout} shares the work of several processes: start them with torchrun')
    if (planned or world_size) % replicas:
        raise UserError(f'replicas={replicas} must divide the number of processes, {planned or world_size}')


def wrap(model, device, layout='ddp', dtype='float32', replicas=1, cpu_offload=False, compiled=False):
    """The model on its device, as the training step calls it: a backward pass leaves the mean of the gradients over all
    processes.

    'ddp': each process has the whole model.
    'zero1': each updates 1 / processes of the parameters, with the optimizer state for them, and has the whole model
    while it computes a step (ZeRO stage 1; Rajbhandari et al. 2020, arXiv:1910.02054).
    'fsdp': each has 1 / (processes / replicas) of every parameter, gradient and optimizer state, and gathers a block
    only while it computes it (ZeRO stage 3). The blocks are gathered in dtype and their gradients summed in float32;
    embeddings, head and residual stream stay float32, as under autocast.
    With replicas, only the processes of one replica share a model, which keeps the gathering inside a machine.
    compiled: compile the model; with sharded parameters each block by itself, since the gathering lies between them.
    """
    if layout == 'ddp':
        if compiled:
            model.compile()
        model.to(device)
        if not dist.is_initialized():
            return model
        from torch.nn.parallel import DistributedDataParallel
        names = inspect.signature(DistributedDataParallel).parameters
        sync = 'forward_sync_buffers' if 'forward_sync_buffers' in names else 'broadcast_buffers'  # until PyTorch 2.12
        return DistributedDataParallel(model, device_ids=[device] if 'cuda' in device else None,
                                       **{sync: False},  # they are tables, the same everywhere
                                       gradient_as_bucket_view=True)  # else gradients take their memory twice
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                        register_fsdp_forward_method)
    mesh = init_device_mesh(torch.device(device).type, (replicas, world_size // replicas),
                            mesh_dim_names=('replicate', 'shard'))
    how = {'mesh': mesh if replicas > 1 else mesh['shard'],
           'reshard_after_forward': False if layout == 'zero1' else None,
           'offload_policy': CPUOffloadPolicy(pin_memory='cuda' in device) if cpu_offload else OffloadPolicy()}
    half = MixedPrecisionPolicy()
    if layout == 'fsdp' and dtype != 'float32':  # not cast_forward_inputs: rotary angles must stay float32
        half = MixedPrecisionPolicy(DTYPES[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
    recompute, model.activation_checkpointing = model.activation_checkpointing, False
    for block in model.transformer.h:
        if recompute:  # inside what is compiled
            block.forward = partial(recomputed, block.forward)
        if compiled:
            block.compile(fullgraph=True)
        fully_shard(block, **how, mp_policy=half)
    if compiled:
        model.loss = torch.compile(model.loss)
    model.exchange_once = layout == 'zero1'
    fully_shard(model, **how)
    register_fsdp_forward_method(model, 'hidden')  # generation and HellaSwag call it apart from forward
    return model


def recomputed(forward, *args):
    """forward(*args), recomputed in the backward pass. A function of its own, since torch.compile looks for Python code
    to compile, and passes over PyTorch's own."""
    return checkpoint(forward, *args, use_reentrant=False)


def sync_gradients(model, last):
    """Tell a wrapped model whether the coming backward pass is the last of its step: only then are gradients exchanged,
    once for all micro-batches. (fsdp exchanges them each time, since no process has room for all of them.)"""
    record_progress()
    if hasattr(model, 'require_backward_grad_sync'):  # DistributedDataParallel
        model.require_backward_grad_sync = last
    elif getattr(model, 'exchange_once', False):  # zero1
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def clip_grad_norm(model, max_norm):
    """Scale the gradient down to at most this norm; 0 leaves it. Returns its norm before, a tensor on the device."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf))


def to_local(x):
    """This process's shard of a DTensor; any other tensor unchanged."""
    return x.to_local() if hasattr(x, 'to_local') else x


def full_tensor(x):
    """All of a DTensor, gathered from its processes, which all call this; any other tensor unchanged."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def shard_like(x, like):
    """A copy of x as `like` is: on its device, or this process's shard of it if `like` is a DTensor. x has its shape,
    or one column."""
    if hasattr(like, 'placements'):
        from torch.distributed.tensor import distribute_tensor
        mine = distribute_tensor(x.to(like.device_mesh.device_type), like.device_mesh, like.placements,
                                 src_data_rank=None)
        like = like.detach() if x.shape == like.shape else like.detach()[:, :1]
        copy = torch.empty_like(like, dtype=x.dtype)  # offloaded parameters are on the CPU: from_local would move their
        copy.to_local().copy_(mine.to_local())        # shards to the mesh's device
        return copy
    return x.to(like.device, copy=True)


# -----------------------------------------------------------------------------
# what a checkpoint holds of the model, for any layout

def copy_to_cpu(x):
    return x.detach().to('cpu', copy=True)


def gather_to_cpu(x):
    x = full_tensor(x.detach())
    return x.to('cpu', copy=True) if master else None


def training_state(model, optimizers):
    """{'model': {name: weight}, 'optimizer': …}, whole tensors, copies on the CPU. All processes call it; those after
    the first get None for each tensor."""
    reshard(model)
    weights = {id(p): gather_to_cpu(p) for p in model.parameters()}  # tied ones once
    return {'model': {name: weights[id(p)] for name, p in model.named_parameters(remove_duplicate=False)},
            'optimizer': optimizer_state(model, optimizers)}


def optimizer_state(model, optimizers, copy=gather_to_cpu):
    """{'state': {name: {key: tensor}}, 'param_groups': [{'params': names, …}]} of all optimizers, by the names of the
    model's parameters. copy: what is kept of each tensor."""
    names = {p: name for name, p in model.named_parameters()}
    state = {names[p]: {key: copy(x) for key, x in optimizer.state[p].items()}
             for optimizer in optimizers for group in optimizer.param_groups for p in group['params']}
    return {'state': state, 'param_groups': [group | {'params': [names[p] for p in group['params']]}
                                             for optimizer in optimizers for group in optimizer.param_groups]}


def restore_optimizers(model, optimizers, state):
    """Give the optimizers what optimizer_state gave, or each process its shards of it. Learning rate, weight decay and
    the like stay as they are: this run's settings. Raises UserError if a trained parameter has no state."""
    names = {p: name for name, p in model.named_parameters()}
    if missing := [name for p, name in names.items() if p.requires_grad and name not in state['state']]:
        raise UserError(f'the checkpoint has no optimizer state for {some(missing)}: start from its weights alone')
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group['params']):
            device = to_local(p).device if optimizer.defaults.get('fused') else 'cpu'  # of step counts
            optimizer.state[p] = {key: shard_like(x, p) if x.dim() else x.to(device, copy=True)
                                  for key, x in state['state'][names[p]].items()}


def sharded_state(model, optimizers):
    """As training_state, but the tensors apart, {'model.NAME' or 'optimizer.NAME.KEY': tensor} under 'tensors', copies
    of each process's own shards, for save_shards."""
    global writers
    writers = writers or dist.new_group(backend='gloo')
    reshard(model)
    optimizer = optimizer_state(model, optimizers, copy=copy_to_cpu)
    tensors = {f'model.{name}': copy_to_cpu(p) for name, p in model.named_parameters()}
    tensors |= {f'optimizer.{name}.{key}': x for name, state in optimizer['state'].items() for key, x in state.items()}
    return {'model': {}, 'optimizer': optimizer | {'state': {}}, 'tensors': tensors}


def reshard(model):
    """Let go of gathered parameters: until then a sharded model's parameters are not the optimizers'."""
    for module in model.modules():
        if hasattr(module, 'reshard'):
            module.reshard()


def save_shards(tensors, folder):
    """Write sharded_state's tensors into a folder, as safetensors, each process its own. All processes call it, in the
    background too. Raises OSError if one of them could not write."""
    import torch.distributed.checkpoint as dcp
    try:
        dcp.save(tensors, process_group=writers, storage_writer=dcp.HuggingFaceStorageWriter(
            str(folder), save_distributed=True))
    except dcp.api.CheckpointException as error:
        raise OSError(str(next(iter(error.failures.values()))[0])) from None


def load_shards(folder):
    """{name: whole tensor} of a folder that save_shards wrote. One process is enough; each that calls this has all of
    them in its memory."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(str(folder))
    shapes = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in shapes.items()}
    try:
        with warnings.catch_warnings(action='ignore'):  # about reading without the other processes
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as error:  # not an Exception
        raise OSError(str(error)) from None
    return tensors


# -----------------------------------------------------------------------------
# collectives

def sum_over_ranks(*values, device):
    """Each number, or tensor of one, summed over all processes: a float64 tensor (float32 on mps) on the device."""
    kind = dict(dtype=torch.float32 if 'mps' in device else torch.float64, device=device)
    # full, since as_tensor of a number waits for the device
    total = [v.to(**kind) if isinstance(v, torch.Tensor) else torch.full((), v, **kind) for v in values]
    return all_reduce_tensor(torch.stack(total))


def all_reduce_tensor(x):
    """x, summed over all processes in place, on its device or on this process's GPU."""
    record_progress()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather(value, group=None):
    """What each process has, as a list, on all of them. group: writers, in the threads that write shards."""
    if not dist.is_initialized():
        return [value]
    if not group:
        record_progress()
    values = [None] * world_size
    dist.all_gather_object(values, value, group=group)
    return values


def map_matrices(function, x, like):
    """function of whole matrices; each process computes some of them.

    x: (n, rows, columns), this process's rows of n matrices that lie on the processes as the parameter `like` does.
    Returns the same rows of function's results, on x's device. Each matrix visits one process of those that share it:
    memory for n / processes matrices, in and out.
    """
    if not dist.is_initialized():
        return function(x)
    record_progress()
    if not hasattr(like, 'placements'):  # all processes have all rows
        share = -(-len(x) // world_size)
        mine = x[rank * share:(rank + 1) * share]
        result = x.new_zeros(share, *x.shape[1:])
        if len(mine):
            result[:len(mine)] = function(mine)
        everything = x.new_empty(world_size * share, *x.shape[1:])
        getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)(everything, result)  # new name: PyTorch 2.13
        return everything[:len(x)]
    mesh, (n, rows, columns) = like.device_mesh, x.shape
    group, size = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    share, most = -(-n // size), -(-like.size(0) // size)  # matrices of a process, rows of a shard
    mine = torch.zeros(size * share, most, columns, dtype=x.dtype, device=mesh.device_type)
    mine[:n, :rows] = x
    theirs = torch.empty_like(mine)  # (size, share, most, columns): the rows that each process has of my matrices
    dist.all_to_all_single(theirs, mine, group=group)
    whole = theirs.view(size, share, most, columns).transpose(0, 1).reshape(share, size * most, columns)
    whole[:, :like.size(0)] = function(whole[:, :like.size(0)])
    theirs.copy_(whole.view(share, size, most, columns).transpose(0, 1).reshape(theirs.shape))
    dist.all_to_all_single(mine, theirs, group=group)
    return mine[:n, :rows].to(x.device)


def first_then_all(function):
    """function(), run by the first process of each machine and then by the others, which find what it fetched."""
    if local_rank == 0:
        with working():
            result = function()
    all_gather(None)
    return result if local_rank == 0 else function()


# -----------------------------------------------------------------------------
# work in the background

def in_background(function, *args):
    """Start function(*args) in a thread, after what was started before. Returns its future."""
    global pending
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    pending = background.submit(on_gpu, gpu, function, *args)
    return pending


def on_gpu(gpu, function, *args):
    if gpu is None:
        return function(*args)
    torch.cuda.set_device(gpu)  # each thread starts with GPU 0
    with torch.cuda.stream(torch.cuda.Stream()):  # writing shards waits for its stream, which is not the training's
        return function(*args)


def result(future):
    """The result of in_background's future; the watchdog does not count a process that waits here as missing."""
    with working():
        return future.result()


@contextmanager
def working():
    """While in it, this process does what the others wait for, however long it takes."""
    global busy
    busy = True
    try:
        yield
    finally:
        busy = False
        record_progress()


# -----------------------------------------------------------------------------
# signals

stop_signal = stop_time = 0  # the number of the signal that asked this process to stop, and when


def stop_on_signals():
    """From now on SIGINT and SIGTERM ask for a stop, which sets stop_signal; the second one stops at once."""
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)


def stop_agreed(device):
    """Was any process asked to stop? The same answer for all."""
    return sum_over_ranks(stop_signal > 0, device=device).item() > 0


def request_stop(number, frame):
    global stop_signal, stop_time
    if not stop_signal:
        stop_signal, stop_time = number, time.monotonic()
        if master:  # print may be in the middle of a line, and raises when it is called again
            name = signal.Signals(number).name
            os.write(1, f'\n{name}: finishing this step, then saving (again to stop at once)\n'.encode())
    elif time.monotonic() - stop_time > 2:  # earlier it is torchrun, passing on what the terminal told every process
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


# -----------------------------------------------------------------------------
# failure

def record_progress():
    """Note for the watchdog that this process has reached the next collective."""
    global progress
    progress = progress[0] + 1, time.monotonic()


def connect_neighbours():
    """[(rank, connection)] of the previous and of the next one. The kernel closes the connections when a process ends,
    however it ends, and TCP's keepalive does when its machine is gone. Without them, only ranks that wait for data from
    that process would notice, and NCCL's not before its timeout."""
    if world_size == 1:
        return []
    dual = socket.has_dualstack_ipv6()
    previous, following = (rank - 1) % world_size, (rank + 1) % world_size
    try:
        master_address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        with socket.create_connection(master_address, timeout=60) as probe:
            address = probe.getsockname()[0].split('%')[0]
        if ipaddress.ip_address(address).is_loopback:  # on rank 0's machine
            address = master_address[0]
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(('', 0), family=family, dualstack_ipv6=dual) as server:
            server.settimeout(60)
            secret = uuid.uuid4().hex
            store.set(f'address/{rank}', f'{address} {server.getsockname()[1]} {secret}')
            host, port, other_secret = store.get(f'address/{following}').decode().split()
            to_next = socket.create_connection((host, int(port)), timeout=60)
            to_next.sendall(other_secret.encode())
            while True:
                from_previous, _ = server.accept()
                from_previous.settimeout(60)
                if from_previous.recv(len(secret), socket.MSG_WAITALL) == secret.encode():
                    break
                from_previous.close()  # somebody else's
    except OSError as error:
        print(f'rank {rank} has no connection to ranks {previous} and {following} ({error}): if they die, it may take '
              'dist_timeout to notice', file=sys.stderr, flush=True)
        return []
    for connection in from_previous, to_next:
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in ('TCP_KEEPIDLE', 10), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 6):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
    return [(previous, from_previous), (following, to_next)]


def watchdog(timeout, parent):
    """Runs beside the training and ends this process when another one died, or torchrun, or when a rank has not
    reached a collective in which others wait for longer than timeout seconds.

    PyTorch's own timeouts don't name that rank: monitored_barrier does, but only for those that reach the barrier
    rather than hang in the collective before it (pytorch/pytorch#53773), and needs gloo; NCCL's abort each rank with
    its own state (NVIDIA/nccl#1260). So a process that waits too long raises an alarm in the store, each process
    answers it with how many collectives it has reached, and who is behind or doesn't answer is missing: a few store
    operations a process.
    """
    interval = min(10, timeout / 10)
    agent, watched = 'TORCHELASTIC_RUN_ID' in os.environ, {connection: other for other, connection in neighbours}
    alarm, alarm_time, look_time, verdict = 0, -math.inf, 0, None  # verdict: when to count the answers to our alarm
    try:
        while not ended:
            for connection in multiprocessing.connection.wait(watched, min(1, interval)):
                try:
                    alive = connection.recv(1)  # shutdown() sends a byte
                except OSError:
                    alive = b''
                other = watched.pop(connection)
                if not alive and not ended:
                    abort(f'{named([other], hosts(store))} has died; aborting')
            if agent and os.getppid() != parent:
                abort('torchrun has ended; aborting', grace=0)  # its successor may be training already
            now = time.monotonic()
            if now - look_time < interval:
                continue
            look_time, (count, since) = now, progress
            waiting = now - since > timeout and not busy
            if (latest := store.add('alarms', 0)) > alarm:
                alarm, alarm_time = latest, now
                store.append(f'answers/{alarm}', f'{rank}={math.inf if busy else count} ')
            elif waiting and now - alarm_time > 6 * interval and store.add(f'raised/{alarm}', 1) == 1:
                store.add('alarms', 1)
                verdict = alarm + 1, now + 4 * interval
            elif verdict and now > verdict[1]:
                answers = dict(entry.split('=') for entry in store.get(f'answers/{verdict[0]}').decode().split())
                missing = [r for r in range(world_size) if float(answers.get(str(r), -1)) < count]
                if waiting and missing:
                    abort(f'{named(missing, hosts(store))} missed a collective for {timeout} s (dist_timeout); '
                          'aborting')
                verdict = None
    except RuntimeError:  # the store has ended; at the normal end, this process will in a moment
        time.sleep(1)
        if not ended:
            abort(f'rank {rank} lost the store at {os.environ["MASTER_ADDR"]}, with torchrun or rank 0 there; aborting',
                  grace=0)


def abort(message, grace=20):
    """End this process, and with it the others, whatever its main thread waits for. grace: seconds for the checkpoint
    that is being written."""
    if failing:  # the main thread knows, and prints
        time.sleep(max(1, grace))
    elif is_first_failure():
        print(message, file=sys.stderr, flush=True)
    wait([pending] if pending else [], timeout=grace)
    os._exit(1)


def is_first_failure():
    """True for the first process that asks: of many that fail alike, or because another did, only one prints; before
    they have joined, and once the store has ended with the process that had it, one on each machine."""
    global failing
    failing = True
    with suppress(RuntimeError):
        if store:
            return store.add('failed', 1) == 1
    if not store and local_rank:
        time.sleep(10)  # torchrun ends the others when one exits: let that be the one that prints
    return local_rank == 0


def describe(error):
    """One line for an error that is not a bug: out of memory, or another process is gone. Any other: None."""
    text = str(error).strip().split('\n')[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (f'out of memory on rank {rank}: halve batch_size (the step stays the same, unless '
                'gradient_accumulation_steps is fixed), or try --activation_checkpointing=True, or --parallel=fsdp on '
                f'several GPUs. {text}')
    if dist.is_initialized() and (
            isinstance(error, dist.DistError) or 'gloo' in text.lower() or 'Connection' in text):
        return f'rank {rank} lost its connection to the other processes; one has probably died: {text}'
    return None
