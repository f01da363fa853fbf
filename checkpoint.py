"""
Checkpoints: written so that an interruption never costs the one before, read without running any code.

A checkpoint is a dictionary with nanoGPT's keys (model, model_args, optimizer, iter_num, best_val_loss, config)
and what else a run needs to go on as if it had not stopped (tokenizer, data, random).
"""

import itertools
import json
import os
import pickle
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig


def save(checkpoint, path):
    """Write a checkpoint beside path, make sure that it is on the disk, then give it its name."""
    temporary = f'{path}.tmp'
    with open(temporary, 'wb') as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load(path, device='cpu'):
    """The checkpoint at path. Exits with one line if there is none or it cannot be read."""
    if not os.path.isfile(path):
        sys.exit(f'no checkpoint {path}: train first, or set out_dir to the folder that has one')
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        sys.exit(f'{path} is no checkpoint that can be read: {str(error).splitlines()[0]}')


def model_from(checkpoint):
    """The GPT that a checkpoint holds, on the CPU."""
    model = GPT(GPTConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['model'])
    return model


def load_model(init_from, out_dir, device):
    """(model, name of its tokenizer) for sampling and evaluation: 'resume' is out_dir/ckpt.pt, 'gpt2*' a model of
    the Hugging Face hub, anything else a folder that save_pretrained wrote."""
    if init_from == 'resume':
        checkpoint = load(os.path.join(out_dir, 'ckpt.pt'))
        model, tokenizer = model_from(checkpoint), checkpoint['tokenizer']
    else:
        model, tokenizer = GPT.from_pretrained(init_from), 'gpt2'
    return model.to(device).eval(), tokenizer


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


def set_aside(out_dir):
    """Give what an earlier run left in out_dir other names, so that a new one overwrites nothing."""
    earlier = [path for path in (Path(out_dir, 'ckpt.pt'), Path(out_dir, 'log.jsonl')) if path.exists()]
    if earlier:
        n = next(n for n in itertools.count(1) if not any(path.with_name(f'{n}.{path.name}').exists() for path in earlier))
        for path in earlier:
            path.rename(path.with_name(f'{n}.{path.name}'))
        print(f'{out_dir} held an earlier run: its files are now {" and ".join(f"{n}.{path.name}" for path in earlier)}')


def rewind_log(path, step):
    """Drop from the log what a run that resumes at step will do, and log, again."""
    if os.path.exists(path):
        with open(path) as f:
            entries = [json.loads(line) for line in f if line.endswith('\n')]  # a killed run may leave half a line
        with open(f'{path}.tmp', 'w') as f:
            f.writelines(json.dumps(entry) + '\n' for entry in entries
                         if entry['step'] < step or entry['step'] == step and 'loss' in entry)
        os.replace(f'{path}.tmp', path)
