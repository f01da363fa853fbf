"""Everything particular to training with many processes: who they are, what they share, how they end."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from device import pick_device

rank = int(os.environ.get('RANK', 0))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0  # the process that prints, logs and saves


def start(device, backend):
    """Join the other processes that torchrun started, if it did. Returns this process's device."""
    device = pick_device(device)
    if device == 'cuda' and 'RANK' in os.environ:
        if local_rank >= torch.cuda.device_count():
            sys.exit(f'{torch.cuda.device_count()} GPUs here: lower torchrun\'s --nproc_per_node')
        device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)
    if 'RANK' in os.environ:
        backend = ('nccl' if 'cuda' in device else 'gloo') if backend == 'auto' else backend
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model, device):
    """The model as the training step calls it: gradients averaged over all processes after each backward pass."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[local_rank] if 'cuda' in device else None)


def all_sum(*values, device):
    """Each number, or tensor of one, summed over all processes, as floats."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64 if device != 'mps' else torch.float32, device=device)
                         for v in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather(value):
    """What each process has, as a list, on all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def sync_gradients(model, last):
    """Tell a wrapped model whether the coming backward pass is the last of its step: only then are gradients
    sent round, once for all micro-batches."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
