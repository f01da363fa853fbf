"""
HellaSwag: which of four endings does the model find most likely? (Zellers et al. 2019, arXiv:1905.07830)

Your own checkpoint:   python hellaswag.py --out_dir=out
GPT-2's weights:       python hellaswag.py --init_from=gpt2

The score is the completion-style one: an ending's loss is that of the tokens of ' ' + ending, given the context.
acc counts the items whose right ending has the lowest summed loss, acc_norm those whose right ending has the lowest
mean loss per token; guessing scores 0.25.

The simple way runs an item as four rows, each the context and one ending. Here an item is one row, in which a token
attends to the context and its own ending, up to itself; with a context c of four tokens it begins with

    token     c0 c1 c2   c3 a0 a1   c3 b0   ...    each ending starts with the context's last token, so that
    target     -  -  -   a0 a1 a2   b0 b1   ...    every token of an ending is predicted once
    position   0  1  2    3  4  5    3  4   ...
    segment    0  0  0    1  1  1    2  2   ...

That is half the tokens, with the same losses.
"""

import itertools
import json
import math
import os
from pathlib import Path

from configurator import UserError, configure, given

import numpy as np
import torch
from tqdm import tqdm

from common import distributed
from common.checkpoint import load_model
from common.device import autocast, pick_device, pick_dtype
from data.atomic import write
from data.download import download
from data.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
data = ''  # a file of items, one JSON object per line; empty: the validation set, downloaded once
limit = 0  # score only the first N items; 0 is all (10,042)
out = ''  # also write each item's four losses to this file, one JSON object per line
batch_tokens = 0  # tokens in a forward pass; 0: 1,024 on a CPU, to fit its caches, else 8,192
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32
# -----------------------------------------------------------------------------

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
SHA256 = '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'
FILE = Path(__file__).parent / 'data' / 'hellaswag' / 'hellaswag_val.jsonl'


def load_items(path='', limit=0):
    """The first limit (0: all) items of a file, or of the validation set, which one process per machine downloads:
    dicts with at least ctx, label (0 to 3) and endings (four strings). Raises UserError, naming file and line."""
    option = '--data=FILE (to train.py as --hellaswag_data=FILE)'
    path = path or distributed.first_then_all(lambda: download(URL, SHA256, FILE, option))
    items, where = [], path
    try:
        with open(path, encoding='utf-8') as f:
            for number, line in enumerate(itertools.islice(f, limit or None), 1):
                where = f'{path}:{number}'
                item = json.loads(line)
                missing = [key for key in ('ctx', 'label', 'endings') if key not in item]
                if missing:
                    raise UserError(f'{where}: the item has no {" and no ".join(missing)}')
                item['label'] = int(item['label'])  # Hugging Face's copy has it as a string
                texts = [item['ctx'], *item['endings']]
                if not (len(texts) == 5 and all(type(text) is str for text in texts) and 0 <= item['label'] < 4):
                    raise UserError(f'{where}: ctx must be a string, endings four strings, and label 0 to 3')
                items.append(item)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}')
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # no JSON, no UTF-8, no number
        raise UserError(f'{where}: not an item of HellaSwag: {error}')
    if not items:
        raise UserError(f'{path}: no items in it')
    return items


def items_of_run(config, given):
    """(items, why there are none) for a run of train.py, of its settings. Raises UserError if they can't be loaded and
    one of HellaSwag's settings is among those given, {name: where}."""
    if not config['hellaswag_interval']:
        return [], 'hellaswag_interval is 0'
    try:
        return load_items(config['hellaswag_data'], config['hellaswag_limit']), ''
    except UserError as error:
        if {'hellaswag_interval', 'hellaswag_data', 'hellaswag_limit'} & set(given):
            raise
        return [], f'{error}; --hellaswag_interval=0 turns it off'


def pack(item, tokenizer, block_size):
    """The item's row: (4, T) int64, holding token, target (-1 in the context), position and segment (0 is the
    context, 1 to 4 the endings).

    An item longer than block_size positions loses the beginning of its context, until each ending fits;
    an ending that is too long by itself loses its end.
    """
    context = tokenizer.encode(item['ctx'])
    endings = [tokenizer.encode(' ' + ending)[:block_size] for ending in item['endings']]
    if len(context) == 0:  # the endings begin a document
        context = np.array([tokenizer.eot], tokenizer.dtype)
    context = context[-(block_size + 1 - max(map(len, endings))):]
    T = len(context) - 1
    parts = [(context[:-1], -1, np.arange(T), 0)]
    for segment, ending in enumerate(endings, 1):
        tokens = np.concatenate((context[-1:], ending[:-1]))
        parts.append((tokens, ending, T + np.arange(len(ending)), segment))
    return np.concatenate([np.stack(np.broadcast_arrays(*part)).astype(np.int64) for part in parts], axis=1)


def prepare(items, tokenizer, block_size):
    """[(row, label)], the items as evaluate scores them: tokenized and packed once, for any number of evaluations."""
    return [(pack(item, tokenizer, block_size), item['label']) for item in items]


@torch.no_grad()
def evaluate(model, rows, device='cpu', dtype='float32', batch_tokens=0, progress=False):
    """Score a GPT in evaluation mode on the rows of prepare(), shared among all processes of a distributed run.

    Returns a dict: acc and acc_norm with their standard errors acc_stderr and acc_norm_stderr, and in the items' order
    losses, (N, 4) float64, each ending's summed loss in nats, and lengths, (N, 4) int64, its tokens.
    """
    rows, labels = zip(*rows)
    rank, world_size = distributed.rank, distributed.world_size
    batch_tokens = batch_tokens or (1024 if device == 'cpu' else 8192)
    order = sorted(range(len(rows)), key=lambda i: -rows[i].shape[1])  # by falling length: memory peaks at the start
    losses = torch.zeros(len(rows), 4, dtype=torch.float64)
    with (autocast(dtype, device),
          tqdm(total=len(rows), unit=' items', disable=None if progress else True) as bar):  # None: only at a terminal
        while order:
            T = -(-rows[order[0]].shape[1] // 8) * 8  # fused attention wants multiples of 8
            size = world_size * max(1, batch_tokens // T)
            group, order = order[:size], order[size:]
            share = group[rank::world_size]
            batch = np.zeros((4, max(1, len(share)), T), np.int64)  # a process without a share runs an empty row
            batch[1], batch[3] = -1, 5  # padding is never a target, and is a segment of its own
            for b, i in enumerate(share):
                batch[:, b, :rows[i].shape[1]] = rows[i]
            idx, targets, positions, segments = torch.from_numpy(batch).to(device)  # (B, T) each
            own = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
            mask = (own | (segments == 0)[:, None, :]).tril()[:, None]  # (B, 1, T, T)
            token_losses = model.token_losses(idx, targets, positions, mask)  # (B, T)
            sums = torch.zeros(len(idx), 6, dtype=torch.float64)
            sums.scatter_add_(1, segments.cpu(), token_losses.cpu().double())
            losses[share] = sums[:len(share), 1:5]
            bar.update(len(group))
    if world_size > 1:
        losses = distributed.all_reduce_tensor(losses.to(device)).cpu()  # zeros where other processes have losses
    lengths = torch.tensor([np.bincount(row[3], minlength=5)[1:].tolist() for row in rows])
    result = {'losses': losses, 'lengths': lengths}
    for name, score in ('acc', losses), ('acc_norm', losses / lengths):
        p = (score.argmin(dim=1) == torch.tensor(labels)).double().mean().item()
        result |= {name: p, f'{name}_stderr': math.sqrt(p * (1 - p) / len(rows))}
    return result


if __name__ == '__main__':
    configure(globals())
    folder = os.path.dirname(out) or '.'
    if out and (os.path.exists(out) or not os.access(folder, os.W_OK)):  # before the work
        why = ('it exists' if os.path.exists(out) else f'{folder} is not writable' if os.path.isdir(folder) else
               'there is no such folder')
        raise UserError(f'out={out} cannot be written: {why}')
    items = load_items(data, limit)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    model, tokenizer = load_model(init_from, out_dir, device, given)
    if not model.config.causal:
        raise UserError('HellaSwag scores continuations, and this model fills masks')
    rows = prepare(items, get_tokenizer(tokenizer), model.config.block_size)
    result = evaluate(model, rows, device, dtype, batch_tokens, progress=True)
    print(f'{len(rows):,} items; ± is the standard error')
    for name in 'acc', 'acc_norm':
        print(f'{name:8} {result[name]:.4f} ± {result[f"{name}_stderr"]:.4f}', flush=True)
    if out:
        scored = zip(items, result['losses'].tolist(), result['lengths'].tolist())
        lines = [json.dumps({'ind': item.get('ind'), 'label': item['label'], 'losses': losses, 'tokens': lengths})
                 for item, losses, lengths in scored]
        try:
            write(out, '\n'.join([*lines, '']).encode())
        except OSError as error:
            raise UserError(f'out={out} could not be written: {error.strerror}')
