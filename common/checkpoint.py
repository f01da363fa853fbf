"""
Checkpoints: written so that an interruption never costs the one before, read without running any code.

A checkpoint is a dictionary with nanoGPT's keys (model, model_args, optimizer, iter_num, best_val_loss, config)
and what else a run needs to go on as if it had not stopped (tokenizer, data, random, …). It holds whole tensors by
the names that they have in one process, so how many processes wrote it, and in which layout, leaves no trace.

One too large for a process is written by all: each puts its shards of the tensors into a folder beside ckpt.pt, as
safetensors, and ckpt.pt holds the rest and the folder's name.
"""

import itertools
import os
import pickle
import shutil
import sys
from pathlib import Path

import torch

from common import convert, distributed
from data.errors import UserError

NAME = 'ckpt.pt'  # in out_dir

# -----------------------------------------------------------------------------
# what a checkpoint holds

def sharded_state(model, optimizers, out_dir):
    """As distributed.training_state, but for 'tensors', copies of each process's own shards, which save will write into
    the folder 'shards'."""
    wait()  # the folder before must be there, to leave its name alone
    tensors, groups = distributed.sharded_state(model, optimizers)
    folder = next(name for n in itertools.count() if not Path(out_dir, name := f'shards_{n:06d}').exists())
    return {'model': {}, 'optimizer': {'state': {}, 'param_groups': groups}, 'tensors': tensors,
            'shards': distributed.all_gather(folder)[0]}  # one name for all


def random_state(device):
    """The state of this process's random number generators."""
    state = {'cpu': torch.get_rng_state()}
    if 'cuda' in device:
        state['cuda'] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state, device):
    torch.set_rng_state(state['cpu'].cpu())
    if 'cuda' in device and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'].cpu(), device)

# -----------------------------------------------------------------------------
# writing

writing = None  # the future of the checkpoint that is being written


def save(checkpoint, out_dir, best=False, keep=0):
    """Start to write out_dir/ckpt.pt in the background, once the one before is written. All processes call it.

    best: also as ckpt_best.pt. keep: also as ckpt_000250.pt (the step's number), of which so many stay.
    """
    global writing
    wait()
    if distributed.master or 'shards' in checkpoint:
        writing = distributed.in_background(write, checkpoint, Path(out_dir), best, keep)


def wait():
    """Until the checkpoint that is being written is on the disk. Returns False if it could not be written."""
    return writing is None or distributed.result(writing)


def write(checkpoint, out_dir, best, keep):
    """Write a checkpoint under a temporary name, make sure that it is on the disk, then give it its names, ckpt.pt
    last: what a resume starts from has all that came with it. A full disk is reported, and leaves all as it was."""
    step, temporary = checkpoint['iter_num'], out_dir / f'{NAME}.tmp'
    try:
        if temporary.is_file():
            temporary.unlink()  # a killed run's, and perhaps ckpt_best.pt under another name
        if 'shards' in checkpoint:
            distributed.save_shards(checkpoint.pop('tensors'), out_dir / checkpoint['shards'])
            if not distributed.master:
                return True
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if keep:
            link_atomically(temporary, out_dir / f'ckpt_{step:06d}.pt')
            for path in sorted(out_dir.glob('ckpt_[0-9]*.pt'), key=os.path.getmtime)[:-keep]:
                path.unlink()
        if best:
            link_atomically(temporary, out_dir / 'ckpt_best.pt')
        os.replace(temporary, out_dir / NAME)
        if 'shards' in checkpoint:
            remove_unused_shards(out_dir)
        return True
    except (OSError, RuntimeError) as error:  # torch.save has errors of its own
        if not distributed.master:
            return False
        if 'shards' in checkpoint:
            shutil.rmtree(out_dir / checkpoint['shards'], ignore_errors=True)
        temporary.unlink(missing_ok=True)
        before = f'{out_dir / NAME} is still the one before' if (out_dir / NAME).exists() else 'there is none yet'
        print(f'the checkpoint of step {step} could not be written ({str(error).splitlines()[0]}): {before}',
              file=sys.stderr, flush=True)
        return False


def remove_unused_shards(out_dir):
    """Remove the folders that no checkpoint names any more."""
    try:
        used = {torch.load(path, weights_only=True, mmap=True).get('shards') for path in out_dir.glob('*ckpt*.pt')}
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # somebody else's file: better keep too much
        return
    for folder in out_dir.glob('shards_[0-9]*'):
        if folder.name not in used:
            shutil.rmtree(folder)


def link_atomically(path, name):
    """Give a file a further name, atomically, in no further space where the file system has links."""
    temporary = f'{name}.tmp'
    Path(temporary).unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)

# -----------------------------------------------------------------------------
# reading

def load(path, device='cpu'):
    """The checkpoint at path. Exits with one line if there is none or it cannot be read."""
    if not os.path.isfile(path):
        raise UserError(f'no checkpoint {path}: train first, or set out_dir to the folder that has one')
    peers = [(convert.PeerConfig, f'{module}.GPTConfig') for module in ('__main__', 'train_gpt2')]  # nothing else is let in
    try:
        with torch.serialization.safe_globals(peers):
            checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        raise UserError(f'{path} is no checkpoint that can be read: {str(error).splitlines()[0]}')
    if 'shards' in checkpoint:
        add_shards(checkpoint, Path(path).parent / checkpoint['shards'])
    return checkpoint if 'tokenizer' in checkpoint else convert.from_peer(checkpoint, path)


def add_shards(checkpoint, folder):
    """Put the tensors that sharded_state took out back into their places, whole."""
    try:
        tensors = distributed.load_shards(folder)
    except Exception as error:  # each of the layers below has its own
        raise UserError(f'the shards {folder} cannot be read: {str(error).strip().splitlines()[0]}')
    for name, tensor in tensors.items():
        if name.startswith('model.'):
            checkpoint['model'][name.removeprefix('model.')] = tensor
        else:
            name, key = name.removeprefix('optimizer.').rsplit('.', 1)
            checkpoint['optimizer']['state'].setdefault(name, {})[key] = tensor
    if checkpoint['model_args']['tie_embeddings']:
        checkpoint['model']['lm_head.weight'] = checkpoint['model']['transformer.wte.weight']


def model_from(checkpoint, **overrides):
    """The GPT that a checkpoint holds, on the CPU. overrides: GPTConfig fields that change no weight."""
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(**checkpoint['model_args'] | overrides))
    model.load_state_dict(checkpoint['model'])
    return model


def pretrained(init_from, **overrides):
    """(GPT on the CPU, name of its tokenizer): a checkpoint's file, nanoGPT's ckpt.pt and build-nanogpt's
    model_*.pt too, or what GPT.from_pretrained takes. overrides: GPTConfig fields that change no weight."""
    if init_from.endswith('.pt'):
        checkpoint = load(init_from)
        return model_from(checkpoint, **overrides), checkpoint['tokenizer']
    from model import GPT
    model = GPT.from_pretrained(init_from, **overrides)
    return model, convert.tokenizer_of(model.config.vocab_size, init_from)


def load_model(init_from, out_dir, device):
    """(model, name of its tokenizer) for sampling and evaluation: 'resume' is out_dir/ckpt.pt, else as pretrained."""
    if init_from in ('scratch', 'auto'):
        raise UserError(f'init_from={init_from} is for train.py: give resume, a model\'s name, a folder or a .pt file')
    model, tokenizer = pretrained(os.path.join(out_dir, NAME) if init_from == 'resume' else init_from)
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f'{init_from}: the weights {name} are not finite')
    return model.to(device).eval(), tokenizer

