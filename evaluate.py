"""
How well a GPT predicts a dataset: loss, perplexity and bits per byte of its validation split. Of a masked language
model: its accuracy and pseudo-perplexity.

Your own checkpoint:                            python evaluate.py --out_dir=out --dataset=stdlib
GPT-2 as its paper and others measure it:       python evaluate.py config/eval_gpt2_wikitext2.py

Text longer than the context is read through a window that moves by `stride` tokens; each token is scored once, with at
least block_size - stride tokens before it (except in the first window). A small stride gives every token much context
and takes long; stride = block_size cuts the text into blocks, as train.py's evaluation does. A masked language model
reads each block once for each of its tokens, which takes long: max_tokens=10000 gives a first idea.
"""

import math

from configurator import UserError, configure, given

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import load_model
from common.device import autocast, pick_device, pick_dtype
from data.dataset import Split
from data.tokenizer import get_tokenizer, tokenizer_name

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
dataset = 'fineweb_edu_10B'  # a folder in data/, or a path
split = 'val'  # or 'train'
max_tokens = 0  # only the first N; 0 is all
block_size = 0  # tokens in a window; 0: the model's context
stride = 0  # tokens from one window to the next; 0: block_size
batch_size = 8  # windows in a forward pass
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32


def windows(n_tokens, block_size, stride):
    """Yield (begin, end, first): windows of at most block_size tokens, each scored from `first` on, that together score
    every token but the very first once."""
    scored = 1
    for begin in range(0, n_tokens, stride):
        end = min(begin + block_size + 1, n_tokens)  # one more than fits: the last is only a target
        yield begin, end, scored
        scored = end
        if end == n_tokens:
            return


@torch.inference_mode()
def total_loss(model, tokens, block_size, stride, batch_size=8, device='cpu', dtype='float32'):
    """The summed loss in nats of token ids (N,), all but the first, read through a window that moves by stride."""
    total, todo = 0.0, list(windows(len(tokens), block_size, stride))
    with autocast(dtype, device), tqdm(range(0, len(todo), batch_size), unit=' batches', disable=None) as batches:
        for i in batches:
            batch = todo[i:i + batch_size]
            idx = torch.zeros(len(batch), block_size, dtype=torch.int64)
            targets = torch.full_like(idx, -1)
            for row, (begin, end, first) in enumerate(batch):
                window = torch.from_numpy(tokens[begin:end].astype(np.int64))
                idx[row, :end - begin - 1] = window[:-1]
                targets[row, first - begin - 1:end - begin - 1] = window[first - begin:]
            losses = model.token_losses(idx.to(device), targets.to(device))  # (B, T)
            total += losses.cpu().double().sum().item()
    return total


@torch.inference_mode()
def pseudo_loss(model, tokens, block_size, batch_size=8, device='cpu', dtype='float32'):
    """(summed loss in nats, how many had the highest probability) of token ids (N,), each predicted where it alone is
    masked in its block (Salazar et al. 2020, arXiv:1910.14659, section 2)."""
    total, right = 0.0, 0
    with autocast(dtype, device), tqdm(range(0, len(tokens), block_size), unit=' blocks', disable=None) as begins:
        for begin in begins:
            block = torch.from_numpy(tokens[begin:begin + block_size].astype(np.int64)).to(device)  # (T,)
            for places in torch.arange(len(block), device=device).split(batch_size):
                rows, idx = torch.arange(len(places), device=device), block.repeat(len(places), 1)  # (B, T)
                idx[rows, places] = model.config.vocab_size  # the mask
                logits, targets = model.head(model.hidden(idx)[rows, places]).float(), block[places]  # (B, V), (B,)
                total += F.cross_entropy(logits, targets, reduction='sum').item()
                right += (logits.argmax(dim=-1) == targets).sum().item()
    return total, right


if __name__ == '__main__':
    configure(globals())
    if ',' in dataset:
        raise UserError(f'dataset={dataset} is a mixture: evaluate its datasets one at a time')
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    model, name = load_model(init_from, out_dir, device, given)
    data = Split(dataset, split)
    if data.masked:
        raise UserError(f'{dataset} holds conversations, and only answers are scored: train.py --eval_only does that')
    if tokenizer_name(data.tokenizer) != tokenizer_name(name):
        raise UserError(f'{dataset} is tokenized with {tokenizer_name(data.tokenizer)}, but the model reads '
                        f'{tokenizer_name(name)} tokens')
    block_size = block_size or model.config.block_size
    stride = stride or block_size
    if not stride <= block_size <= model.config.block_size:
        raise UserError(f'stride={stride} must be at most block_size={block_size}, and that at most the model\'s '
                        f'{model.config.block_size}')
    count = min(data.n_tokens, max_tokens or data.n_tokens)
    if count < 2:
        raise UserError(f'{dataset} has {count} tokens to evaluate: there must be two')
    tokens = data.read(np.array([0]), count)[0]
    if not model.config.causal:
        if 'stride' in given:
            raise UserError(f'stride={stride}: the blocks of a masked language model do not overlap')
        loss, right = pseudo_loss(model, tokens, block_size, batch_size, device, dtype)
        print(f'{count:,} tokens, each masked alone in its block of {block_size}')
        print(f'accuracy           {right / count:.4f}')
        print(f'pseudo-perplexity  {math.exp(min(700, loss / count)):.2f}')
    else:
        loss = total_loss(model, tokens, block_size, stride, batch_size, device, dtype)
        tokenizer = get_tokenizer(name)
        lengths = [len(tokenizer.decode_bytes([i])) for i in range(data.vocab_size)]
        if not tokenizer.eot_is_text:
            lengths[data.eot] = 0  # the end of a text is no byte of it
        n_bytes = int(np.bincount(tokens[1:], minlength=data.vocab_size) @ lengths)
        print(f'{count - 1:,} tokens, {n_bytes:,} bytes, windows of {block_size} every {stride}')
        print(f'loss           {loss / (count - 1):.4f} nats a token')
        print(f'perplexity     {math.exp(min(700, loss / (count - 1))):.2f}')
        print(f'bits per byte  {loss / math.log(2) / max(1, n_bytes):.4f}')
