"""
Checkpoints: written so that an interruption never costs the previous one, read without running any code.

A checkpoint is a dictionary with nanoGPT's keys (model, model_args, optimizer, iter_num, best_val_loss, config)
and what else a run needs to continue as if it had not stopped (tokenizer, data, random, …). It holds full tensors
under the names that they have in one process, and does not depend on the number or the layout of those that wrote it.

One too large for a process is written by all: each writes its shards of the tensors to a folder beside ckpt.pt, as
safetensors, and ckpt.pt holds the rest and the folder's name.
"""

import itertools
import numbers
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from dataclasses import asdict, fields
from pathlib import Path

import torch

from common import convert, distributed, files, lora
from common.distributed import print0
from common.extend import extend_context, extend_vocab
from data.errors import UserError, some
from data.tokenizer import CHATML, from_record, keep_files, tokenizer_name

NAME = 'ckpt.pt'  # in out_dir
SHARDS = re.compile(r'shards_\d{6,}')  # a folder in out_dir

# -----------------------------------------------------------------------------
# what a checkpoint holds

def random_state(device):
    """The state of this process's random number generators."""
    state, kind = {'cpu': torch.get_rng_state()}, torch.device(device).type
    if kind != 'cpu':
        state[kind] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state, device):
    kind = torch.device(device).type
    torch.set_rng_state(state['cpu'])
    if kind != 'cpu' and kind in state:
        torch.get_device_module(device).set_rng_state(state[kind], device)

# -----------------------------------------------------------------------------
# writing

writing = None  # the future of the checkpoint that is being written


def save(checkpoint, out_dir, best=False, keep=0):
    """Start to write out_dir/ckpt.pt in the background, once the previous one is written. All processes call it.

    best: also as ckpt_best.pt. keep: also as ckpt_000250.pt (the step); the last `keep` up to this step stay.
    """
    global writing
    wait()
    if 'tensors' in checkpoint:  # of distributed.sharded_state: for a new folder, of one name for all
        folder = next(name for n in itertools.count() if not Path(out_dir, name := f'shards_{n:06d}').exists())
        checkpoint['shards'] = distributed.all_gather(folder)[0]
    if distributed.master or 'shards' in checkpoint:
        writing = distributed.in_background(write, checkpoint, Path(out_dir), best, keep)


def keep_tokenizer(tokenizer, out_dir):
    """Write the files of a tokenizer that has some into out_dir, where load finds them."""
    try:
        keep_files(tokenizer, out_dir)
    except OSError as error:
        raise UserError(f'the tokenizer cannot be written into {out_dir}: {files.reason(error)}') from None


def keep_best(out_dir, path=''):
    """Copy a checkpoint, or else ckpt.pt, to ckpt_best.pt in the background, if the last save wrote it, or this run
    resumed from it. All processes call it."""
    path = Path(path or os.path.join(out_dir, NAME))

    def copy(written=writing):
        if written.result() if written else path.exists():
            warn_if_failed('written', Path(out_dir, 'ckpt_best.pt'), files.copy, path)

    if distributed.master:
        distributed.in_background(copy)


def wait():
    """Until the checkpoint that is being written is on the disk. Returns False if it could not be written."""
    return writing is None or distributed.result(writing)


def write(checkpoint, out_dir, best, keep):
    """Write ckpt.pt and its copies, ckpt.pt last: what a resume starts from has all that came with it. Whatever the
    disk refuses is one line, and the previous files are kept. Returns whether ckpt.pt was written."""
    step = checkpoint['iter_num']
    try:
        out_dir.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
        if 'shards' in checkpoint:
            folder = out_dir / checkpoint['shards']
            distributed.save_shards(checkpoint.pop('tensors'), folder)
            own = folder.glob(f'shard-{distributed.rank + 1:05d}-*')
            sums = distributed.all_gather({path.name: crc32(path) for path in own}, distributed.writers)
            if not distributed.master:
                return True
            checkpoint['crc32'] = {name: crc for part in sums for name, crc in part.items()}
        with files.atomic_write(out_dir / NAME) as f:
            torch.save(checkpoint, f)
            f.flush()
            for name in ['ckpt_best.pt'] * best + [f'ckpt_{step:06d}.pt'] * bool(keep):
                warn_if_failed('written', out_dir / name, files.copy, f.name)
    except (OSError, RuntimeError) as error:  # torch.save has errors of its own
        if not distributed.master:
            return False
        if 'shards' in checkpoint:
            shutil.rmtree(folder, ignore_errors=True)
        path = out_dir / NAME
        print(f'the checkpoint of step {step} could not be written ({files.reason(error)}): '
              + (f'the previous checkpoint is kept ({path})' if path.exists() else 'there is none yet'),
              file=sys.stderr, flush=True)
        return False
    for path in files.numbered(out_dir, step)[keep:] if keep else []:
        warn_if_failed('removed', path, Path.unlink)
    if 'shards' in checkpoint:
        warn_if_failed('cleared of unused shards', out_dir, remove_unused_shards)
    return True


def warn_if_failed(done, path, function, *args):
    """function(*args, path), where a failure costs one line: 'PATH could not be DONE'."""
    try:
        function(*args, path)
    except OSError as error:
        print(f'{path} could not be {done}: {files.reason(error)}', file=sys.stderr, flush=True)


def remove_unused_shards(out_dir):
    """Remove the folders of shards that no checkpoint names any more."""
    try:
        used = {torch.load(path, weights_only=True, mmap=True).get('shards') for path in out_dir.glob('*ckpt*.pt')}
    except (RuntimeError, EOFError, pickle.UnpicklingError, AttributeError, TypeError):
        return  # a file of somebody else: better keep too much
    for folder in out_dir.glob('shards_*'):
        if SHARDS.fullmatch(folder.name) and folder.name not in used:
            shutil.rmtree(folder)


def crc32(path):
    value = 0
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return value

# -----------------------------------------------------------------------------
# reading

def resolve(init_from, out_dir):
    """What 'auto' stands for: 'resume' if out_dir has a checkpoint, else 'scratch'. A run that torchrun restarted
    continues from its own checkpoint too, if it has one by now. The same on all processes."""
    if init_from == 'auto' or init_from.startswith('resume:') and distributed.restarts:
        found = 'resume' if os.path.exists(os.path.join(out_dir, NAME)) else init_from.replace('auto', 'scratch')
        return distributed.all_gather(found)[0]
    return init_from


def resume_path(init_from, out_dir):
    """The checkpoint to continue from: 'resume' is out_dir/ckpt.pt, 'resume:PATH' another one, such as
    out/ckpt_000250.pt. None for any other init_from."""
    if init_from == 'resume':
        return os.path.join(out_dir, NAME)
    if not init_from.startswith('resume:'):
        return None
    folder, name = os.path.split(init_from.removeprefix('resume:'))
    same = os.path.realpath(folder) == os.path.realpath(out_dir)  # in another spelling, perhaps
    return os.path.join(out_dir if same else folder, name)


def load(path, resume=False):
    """The checkpoint at path, on the CPU, checked as a whole: bytes, entries, and that its weights fit model.py.

    resume: it must also hold what continuing a run needs. Raises UserError that names the file and the problem.
    """
    path = str(path)
    if not os.path.isfile(path):
        other = alternative(path) or ('train first, or set out_dir to the folder that has one'
                                      if os.path.basename(path) == NAME else 'there is no such file')
        raise UserError(f'no checkpoint {path}: {other}')
    if damage := find_damage(path):
        other = alternative(path)
        raise UserError(f'{path} is not a readable checkpoint: {damage}; '
                        + (other or 'there is no whole one beside it: copy it again, or rename it and start again'))
    peers = [(convert.PeerConfig, f'{module}.GPTConfig') for module in ('__main__', 'train_gpt2')]
    try:  # no other class is let in
        with torch.serialization.safe_globals(peers):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f'{path} is not a readable checkpoint: it holds objects that are neither tensors nor plain '
                        'values, and these are not loaded, since that could run code') from None
    except Exception as error:  # of a file with other contents than torch.save's: anything
        raise UserError(f'{path} is not a readable checkpoint: {files.reason(error)}') from None
    if not isinstance(checkpoint, dict) or 'tokenizer' not in checkpoint:
        checkpoint = convert.from_peer(checkpoint, path)
    if resume and 'data' not in checkpoint:
        raise UserError(f'{path} holds weights alone, not where a run was: --init_from={path} starts from them')
    check_entries(checkpoint, path, resume)
    if 'shards' in checkpoint:
        add_shards(checkpoint, path)
    check_weights(checkpoint, path)
    checkpoint['tokenizer'] = from_record(checkpoint, os.path.dirname(path))
    return checkpoint


def find_damage(path):
    """Why a file is not a whole file of torch.save's, or None. Every byte is compared with the file's CRC-32 sums,
    which PyTorch writes but does not check."""
    try:
        with open(path, 'rb') as f:
            start = f.read(4)
        if not start:
            return 'the file is empty'
        if not zipfile.is_zipfile(path):
            return 'the file is cut short' if start == b'PK\3\4' else 'torch.save did not write it'
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        return damaged and f'the file is damaged ({damaged} has another CRC-32)'
    except OSError as error:
        return files.reason(error)
    except Exception as error:  # zipfile's and zlib's
        return f'the file is damaged ({files.reason(error)})'


def alternative(path):
    """How to use the newest whole checkpoint beside one that is missing or damaged; '' if there is none."""
    folder = Path(path).parent
    for other in files.numbered(folder) + files.numbered(folder, name=r'(\d+)\.ckpt\.pt'):
        if other != Path(path) and not find_damage(other):
            return f'--init_from=resume:{other} takes the newest whole one'
    return ''


def check_entries(checkpoint, path, resume):
    """Raise UserError unless a checkpoint's entries are there, and of their types."""
    def expect(ok, entry, what):
        if not ok:
            raise UserError(f'{path}: {entry} is not {what}' if entry in checkpoint else f'{path} has no {entry}')

    def is_a(kind, *names):
        for name in names:
            value = checkpoint.get(name)
            expect(isinstance(value, kind) and not isinstance(value, bool), name, f'of type {kind.__name__}')

    def all_are(kinds, values):
        return all(isinstance(x, kinds) for x in values)

    todo = [*checkpoint.items()]
    while todo:
        name, x = todo.pop()
        if isinstance(x, torch.Tensor) and (x.layout != torch.strided or x.is_quantized or x.is_meta
                                            or x.numel() * x.element_size() > x.untyped_storage().nbytes()):
            raise UserError(f'{path}: {name} holds a tensor that is not dense')
        todo += [(name, y) for y in (x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ())]
    is_a(dict, 'model', 'model_args')
    is_a(str, 'tokenizer', *{'tokenizer_sha256'} & checkpoint.keys())
    if 'shards' in checkpoint:
        expect(isinstance(checkpoint['shards'], str) and SHARDS.fullmatch(checkpoint['shards']), 'shards',
               'the name of a folder beside it, such as shards_000000')
        sums = checkpoint.get('crc32', {})
        expect(isinstance(sums, dict) and all_are(str, sums), 'crc32', 'the sums of its shards')
    if resume or {'optimizer', 'shards'} & checkpoint.keys():  # add_shards fills it
        is_a(dict, 'optimizer')
        state, groups = (checkpoint['optimizer'].get(name) for name in ('state', 'param_groups'))
        expect(isinstance(state, dict) and all_are(dict, state.values()) and isinstance(groups, list)
               and all_are(dict, groups) and all_are(list, (group.get('params') for group in groups)), 'optimizer',
               'of the form {state, param_groups}')
    if not resume:
        return
    is_a(dict, 'data', 'config', 'scaler')
    is_a(list, 'random')
    is_a(int, 'iter_num', 'skipped')
    expect(checkpoint['iter_num'] >= 0, 'iter_num', 'a step')
    expect(all_are((bool, int, float, str), checkpoint['config'].values()), 'config', "a run's settings")
    is_a(numbers.Real, 'best_val_loss')
    for name in 'losses', 'norms':  # of the last steps
        past = checkpoint.get(name, [])
        expect(isinstance(past, list) and all_are(float, past), name, 'a list of floats')
    random = checkpoint['random']
    expect(all_are(dict, random) and all('cpu' in states for states in random)
           and all(getattr(x, 'dtype', None) == torch.uint8 for states in random for x in states.values()), 'random',
           "a list of random number generators' states")


def check_weights(checkpoint, path):
    """Raise UserError unless a checkpoint's tensors are finite and fit model.py."""
    from model import GPT, GPTConfig
    args, weights, types = checkpoint['model_args'], checkpoint['model'], {f.name: f.type for f in fields(GPTConfig)}
    if unknown := [name for name in args if name not in types]:
        raise UserError(f'{path}: its model_args have {some(unknown)}, which GPTConfig in model.py lacks')
    for name, value in args.items():
        if not (type(value) is types[name] or types[name] is float and type(value) is int):
            raise UserError(f'{path}: {name}={value!r} in its model_args is not of type {types[name].__name__}')
    for name, w in weights.items():
        if not (isinstance(name, str) and isinstance(w, torch.Tensor) and w.is_floating_point()):
            raise UserError(f'{path}: the weight {name} is not a tensor of floats')
    try:
        config = GPTConfig(**args)
        if config.n_layer > len(weights):
            raise ValueError(f'n_layer={config.n_layer}, and it has {len(weights)} weights')
        with torch.device('meta'):
            expected = GPT(config).state_dict()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f'{path}: its model_args make no model: {files.reason(error)}') from None
    problems = []
    if new := [name for name in expected if name not in weights]:
        problems.append(f'model.py has {some(new)}, which the checkpoint lacks')
    if gone := [name for name in weights if name not in expected]:
        problems.append(f'the checkpoint has {some(gone)}, which model.py lacks')
    if other := [f'{name} {tuple(weights[name].shape)} instead of {tuple(w.shape)}' for name, w in expected.items()
                 if name in weights and weights[name].shape != w.shape]:
        problems.append(f'the checkpoint has {some(other)}')
    if problems:
        raise UserError(f'{path} does not fit model.py: {"; ".join(problems)}')
    bad = [name for name, w in weights.items() if not (w.sum().isfinite() or w.isfinite().all())]  # a sum is quicker
    if bad:
        raise UserError(f'{path}: {some(sorted(bad))} has values that are not finite')
    optimizer = checkpoint.get('optimizer', {})
    for name, state in optimizer.get('state', {}).items():
        for key, x in state.items():
            if not isinstance(x, torch.Tensor) or x.dim() and not (
                    name in weights and x.shape in (weights[name].shape, weights[name].shape[:1] + (1,))):
                raise UserError(f'{path}: {key} of {name} in its optimizer is not a tensor of the weight\'s shape, or '
                                'of a number for each of its rows')
    for group in optimizer.get('param_groups', []):
        if len({frozenset(optimizer['state'].get(name, ())) for name in group['params'] if isinstance(name, str)}) > 1:
            raise UserError(f'{path}: a part of its optimizer\'s state is missing')


def compare_settings(checkpoint, path, config, given):
    """What a resumed run's settings are, beside those that the checkpoint was written with.

    config: {name: value} of this run; given: {name: where} of those that the user set. Returns (taken, changed): the
    model's settings that come from the checkpoint instead, {name: value}, and the settings that take effect from here
    on, {name: (then, now)}. Raises UserError for one that can't take effect.
    """
    from model import GPTConfig
    then, fixed = checkpoint['config'], asdict(GPTConfig(**checkpoint['model_args']))

    def resolve(name):  # n_kv_head=0 and the like stand for another number
        try:
            return getattr(GPTConfig(**fixed | {name: config[name]}), name)
        except ValueError:
            return config[name]

    model = fixed.keys() & config.keys() - {'dropout', 'block_size'}  # these may change
    taken = {name: fixed[name] for name in config if name in model and resolve(name) != fixed[name]}
    if wrong := [name for name in taken if name in given]:
        raise UserError(f'{given[wrong[0]]}: {path} has {wrong[0]}={fixed[wrong[0]]}, not {config[wrong[0]]}')
    if then.get('optimizer', config['optimizer']) != config['optimizer']:
        raise UserError(f'{path} has the state of {then["optimizer"]}: '
                        f'--init_from={path} starts from its weights alone')
    if config['max_iters'] < checkpoint['iter_num']:
        raise UserError(f'max_iters={config["max_iters"]}: {path} has reached step {checkpoint["iter_num"]} already: '
                        'give a larger one')
    return taken, {name: (then[name], now) for name, now in config.items()
                   if name in then and then[name] != now and name not in model | {'out_dir', 'init_from'}}


def resume(path, config, given, script='train.py'):
    """The checkpoint at path, for a run of this script that continues it: config, {name: value}, takes its model's
    settings, and what differs is printed. given: as for compare_settings, which raises UserError."""
    saved = load(path, resume=True)
    its = 'dpo.py' if 'reference' in saved else 'train.py'
    if its != script:
        raise UserError(f'{path} is of a run of {its}: --init_from={path} starts from its weights')
    taken, changed = compare_settings(saved, path, config, given)
    config.update(taken)
    if taken:
        print0(f'from {path}: {", ".join(f"{name}={value}" for name, value in taken.items())}')
    if changed:
        lines = (f'{name}={now} (was {then})' for name, (then, now) in changed.items())
        print0(f'changed since {path}: {", ".join(lines)}')
    return saved


def fit(model, vocabulary, tokenizer, config, given, resumed=''):
    """Give a model that was trained on the tokens of `vocabulary` the run's tokenizer and block_size. resumed: the path
    of the checkpoint that the run continues. Raises UserError if it does not fit the data or the given settings."""
    vocabulary, block_size = tokenizer_name(vocabulary), config['block_size']
    if vocabulary + CHATML == tokenizer.name and not resumed:
        extend_vocab(model, tokenizer.base.vocab_size, tokenizer.vocab_size)
    elif vocabulary != tokenizer.name:
        raise UserError(f'{config["dataset"]} is tokenized with {tokenizer.name}, but the weights were trained on '
                        f'{vocabulary} tokens')
    if block_size > model.config.block_size:
        if resumed:
            raise UserError(f'block_size={block_size} is longer than the {model.config.block_size} of the run: start '
                            f'from its weights with --init_from={resumed}')
        extend_context(model, block_size, **{name: config[name] for name in ('rope_theta', 'rope_type', 'rope_factor')
                                             if name in given})
        return
    for name, value in asdict(model.config).items():
        may_differ = name in ('dropout', 'block_size', 'zero_init') or type(value) is int and config.get(name) == 0
        if name in given and config[name] != value and not may_differ:  # 0 stands for another number
            raise UserError(f'{given[name]}: the weights have {name}={value}, not {config[name]}')
    model.crop_block_size(block_size)


def add_shards(checkpoint, path):
    """Put the tensors that sharded_state took out back into their places, whole."""
    folder = Path(path).parent / checkpoint['shards']
    for name, crc in checkpoint.pop('crc32', {}).items():
        file = folder / Path(name).name
        if not file.is_file():
            raise UserError(f'the shard {file} of {path} is missing')
        if crc32(file) != crc:
            raise UserError(f'the shard {file} of {path} is damaged: it has another CRC-32')
    try:
        tensors = distributed.load_shards(folder)
    except Exception as error:  # each of the layers below has its own
        raise UserError(f'the shards {folder} cannot be read: {files.reason(error)}') from None
    for name, tensor in tensors.items():
        if name.startswith('model.'):
            checkpoint['model'][name.removeprefix('model.')] = tensor
        else:
            name, key = name.removeprefix('optimizer.').rsplit('.', 1)
            checkpoint['optimizer']['state'].setdefault(name, {})[key] = tensor
    if checkpoint['model_args'].get('tie_embeddings') and 'transformer.wte.weight' in checkpoint['model']:
        checkpoint['model']['lm_head.weight'] = checkpoint['model']['transformer.wte.weight']


def initial_model(config, given, tokenizer, vocab_size):
    """(GPT on the CPU, the checkpoint to resume or None, its path or ''), as init_from says, for a run of train.py.

    config, given: as for resume, which updates config. vocab_size: of the run's data, for a model from scratch.
    Raises UserError for settings that don't fit the weights, and ValueError for those that make no model.
    """
    from model import GPT, GPTConfig
    source = resolve(config['init_from'], config['out_dir'])
    if source == 'scratch':
        if config['lora_rank']:
            raise UserError(f'lora_rank={config["lora_rank"]} adapts trained weights: name them with --init_from')
        args = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
        return GPT(GPTConfig(**args, vocab_size=vocab_size, causal=config['objective'] != 'mlm')), None, ''
    path, resumed = resume_path(source, config['out_dir']), None
    if path:
        resumed = resume(path, config, given)
        model, vocabulary = model_from(resumed, dropout=config['dropout']), resumed['tokenizer']
    else:
        model, vocabulary = pretrained(source, dropout=config['dropout'])
        lora.add(model, config['lora_rank'], config['lora_alpha'])
    fit(model, vocabulary, tokenizer, config, given, path)
    return model, resumed, path or ''


def model_from(checkpoint, **overrides):
    """The GPT that a checkpoint holds, on the CPU. overrides: GPTConfig fields that change no weight."""
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(**checkpoint['model_args'] | overrides))
    model.load_state_dict(checkpoint['model'])
    return model


def pretrained(init_from, **overrides):
    """(GPT on the CPU, its tokenizer for get_tokenizer): a checkpoint's file, nanoGPT's ckpt.pt and build-nanogpt's
    model_*.pt too, or what GPT.from_pretrained takes. Its adapters are merged into its weights. overrides: GPTConfig
    fields that change no weight."""
    if init_from.endswith('.pt'):
        checkpoint = load(init_from)
        return lora.merge(model_from(checkpoint, **overrides)), checkpoint['tokenizer']
    from model import GPT
    model = GPT.from_pretrained(init_from, **overrides)
    return model, convert.tokenizer_of(model.config.vocab_size, init_from)


def load_model(init_from, out_dir, device, given=()):
    """(model, its tokenizer for get_tokenizer) for sampling and evaluation. init_from: as resume_path takes it, else as
    pretrained does. given: the settings that the user set."""
    if init_from in ('scratch', 'auto'):
        raise UserError(f'init_from={init_from} is for train.py: give resume, a model\'s name, a folder or a .pt file')
    if 'out_dir' in given and init_from != 'resume':
        print(f'not used: out_dir (init_from is {init_from})', file=sys.stderr)
    model, tokenizer = pretrained(resume_path(init_from, out_dir) or init_from)
    return model.to(device).eval(), tokenizer

