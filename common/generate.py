"""How a GPT writes: one token after the other, each drawn from the probabilities that it gives the next."""

import math

import torch

from common.device import DTYPES, cpu_vector_kernels


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           lengths=None, seeds=None):
    """Yield, max_new_tokens times, the next token of each row of idx as a GPT continues it: (B, 1) int64.

    idx: the prompts, (B, T) int64, at least one token each.
    temperature, top_k, top_p, min_p: as in next_token_probs; temperature 0 takes the likeliest token.
    repetition_penalty: as in penalize; 1 is off.
    lengths: (B,) int64, when prompts differ in length: a row's prompt is its last so many tokens, what stands
        before them is ignored, and the row goes on as it would alone.
    seeds: B ints; a row's draws then depend on its own seed alone. Otherwise they come from torch's generator.

    The keys and values of earlier tokens are kept. Past the end of the context the window slides by one, as if
    all but the last block_size tokens were cut off; every token in it then has another position and must be run
    anew. Raises ValueError for a value out of its range.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    (B, T), block_size, device = idx.shape, model.config.block_size, idx.device
    if seeds is None:
        draws = torch.rand(B, max_new_tokens)
    else:  # drawn on the CPU, so that they are the same on any device
        draws = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
    draws = draws.to(device)
    empty = None
    if lengths is not None and (lengths < T).any():
        empty = (T - lengths.to(device))[:, None]  # columns before each row's prompt, (B, 1)
        # they hold a token that the row has anyway, so that repetition_penalty takes nothing else for seen
        idx = idx[:, -1:].where(torch.arange(T, device=device) < empty, idx)
    cache = model.new_cache(B, min(T + max_new_tokens, block_size), idx.device)
    new = idx
    for i in range(max_new_tokens):
        S = min(T + i, block_size)  # columns in the window
        if T + i > block_size:
            new, cache = idx[:, -S:], None
        positions, mask = None, None
        if empty is not None:  # a window that slides loses its empty columns first
            positions, mask = left_padded((empty - (T + i - S)).clamp(min=0), S, new.size(1))
        with cpu_vector_kernels(new.numel() == 1 and device.type == 'cpu'):
            x = model.hidden(new, positions, mask, cache)[:, -1]  # (B, C)
            logits = penalize(model.head(x).float(), idx, repetition_penalty)  # (B, V)
        if temperature == 0:
            new = logits.argmax(dim=-1, keepdim=True)
        else:
            new = draw(next_token_probs(logits, temperature, top_k, top_p, min_p), draws[:, [i]])
        idx = torch.cat((idx, new), dim=1)
        yield new


def cast_linears(dtype, model):
    """Store the weights of matrix products in dtype, to write with: they are what autocast would make of them, and need
    not be made anew for every token. Everything else stays float32, the token embedding too."""
    embedding = model.transformer.wte
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # else it is the head's
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])


def left_padded(empty, S, T):
    """Where the last T of S tokens stand when the first `empty` (B, 1) of each row are to be ignored: positions (B, T)
    and mask (B, 1, T, S), for forward."""
    columns = torch.arange(S, device=empty.device)
    rows = columns[-T:, None]
    mask = (columns >= empty)[:, None, None] & (columns <= rows)
    mask |= columns == rows  # an ignored token looks at itself: a softmax over nothing may be NaN
    return (columns[-T:] - empty).clamp(min=0), mask


def check_sampling(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Raise ValueError, with one line that says what is allowed, if an argument of stream is out of its range."""
    for name, value, allowed, words in (
            ('temperature', temperature, 0 <= temperature < math.inf, 'at least 0'),
            ('top_k', top_k, top_k is None or top_k >= 0, 'at least 0'),
            ('top_p', top_p, 0 < top_p <= 1, 'above 0 and at most 1'),
            ('min_p', min_p, 0 <= min_p <= 1, 'at least 0 and at most 1'),
            ('repetition_penalty', repetition_penalty, 0 < repetition_penalty < math.inf, 'above 0')):
        if not allowed:
            raise ValueError(f'{name}={value} must be {words}')


def penalize(logits, idx, repetition_penalty):
    """Logits (B, V) in which those of the tokens in idx (B, T) are divided by repetition_penalty where they are
    positive and multiplied by it where they are negative (Keskar et al. 2019, arXiv:1909.05858, section 4.1, in the
    form that takes negative logits too)."""
    if repetition_penalty == 1:
        return logits
    seen = logits.gather(1, idx)
    return logits.scatter(1, idx, torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty))


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Probabilities (B, V) to draw from, of logits (B, V) float32. What is left after each step sums to 1 again.

    temperature: divides the logits; above 0.
    top_k: keeps the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833); None or 0 is off.
    top_p: keeps the fewest likeliest tokens that together reach p (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
    """
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: a low temperature can't overflow
    if top_k and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, [-1]], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0  # what comes before it already reaches p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0)
    return probs / probs.sum(dim=-1, keepdim=True)


def draw(probs, uniform):
    """One token of each row of probs (B, V): the first at which their running sum passes uniform (B, 1), in [0, 1)."""
    exact = torch.float32 if probs.device.type == 'mps' else torch.float64  # so that the sums never fall
    sums = probs.cumsum(dim=-1, dtype=exact)
    return torch.searchsorted(sums, uniform * sums[:, [-1]], right=True)
