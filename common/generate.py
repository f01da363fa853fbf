"""Generation: one token after another, each drawn from the probabilities that a GPT gives the next."""

import itertools
import math

import torch

from common.device import DTYPES, cpu_vector_kernels
from data.chatml import encode
from data.errors import UserError


@torch.no_grad()  # not inference_mode: FSDP keeps what it gathers, for training
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           lengths=None, seeds=None, cuda_graph=False, cache=None):
    """Yield, max_new_tokens times, the next token of each row of idx as a GPT continues it: (B, 1) int64.

    idx: the prompts, (B, T) int64, at least one token each.
    temperature, top_k, top_p, min_p: as in next_token_probs; temperature 0 takes the most likely token.
    repetition_penalty: as in penalize; 1 disables it.
    lengths: (B,) int64, the lengths of prompts that differ: a row's prompt is its last lengths[b] tokens, what stands
        before them is ignored, and the row continues as it would alone.
    seeds: B ints; a row's draws then depend on its own seed alone. Without, they come from torch's generator.
    cuda_graph: replay the step of one token as a CUDA graph, which saves launching its kernels one at a time.
    cache: from model.new_cache(), with the keys and values of the first tokens of idx, which are not computed again.

    Keys and values of earlier tokens are cached. Past the end of the context the window slides by one, as if all but
    the last block_size tokens were cut off; every token in it then has another position and is computed again.
    Raises ValueError for a value outside its range.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if not model.config.causal:
        raise ValueError('this is a masked language model, which generates no text')
    (B, T), block_size, device = idx.shape, model.config.block_size, idx.device
    generators = [None] * B if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
    empty = None
    if lengths is not None and (lengths < T).any():
        empty = (T - lengths.to(device))[:, None]  # columns before each row's prompt, (B, 1)
        # they hold a token that the row has anyway, so that repetition_penalty counts no other one as seen
        idx = idx[:, -1:].where(torch.arange(T, device=device) < empty, idx)
    max_len = min(T + max_new_tokens, block_size)
    if cache is None:
        aligned = -(-max_len // 64) * 64 if cuda_graph else max_len  # for masked kernels
        cache = model.new_cache(B, aligned, device)
    new, step = idx[:, cache[0].length:], None
    for i in range(max_new_tokens):
        S = min(T + i, block_size)  # columns in the window
        if T + i > block_size:
            new, cache = idx[:, -S:], None
        if i % 256 == 0:  # drawn on the CPU, so that they are the same on any device
            draws = torch.stack([torch.rand(256, generator=generator) for generator in generators]).to(device)
        if cuda_graph and cache and i:
            step = step or OneTokenGraph(model, cache, empty)
            logits = step(new, S - 1)
        else:
            positions, mask = None, None
            if empty is not None:  # a window that slides loses its empty columns first
                positions, mask = left_padded((empty - (T + i - S)).clamp(min=0), S, new.size(1))
            with cpu_vector_kernels(new.numel() == 1 and device.type == 'cpu'):
                logits = model.head(model.hidden(new, positions, mask, cache)[:, -1])  # (B, V)
        logits = penalize(logits.float(), idx, repetition_penalty)
        if temperature == 0:
            new = logits.argmax(dim=-1, keepdim=True)
        else:
            new = draw(next_token_probs(logits, temperature, top_k, top_p, min_p), draws[:, [i % 256]])
        idx = torch.cat((idx, new), dim=1)
        yield new


class Conversation:
    """A conversation with a model that knows its tokenizer's chat template. Its keys and values stay in a cache: of
    each question and answer only the new tokens are computed.

    note: what the user is to know of the last answer, a line, often empty
    """

    def __init__(self, model, tokenizer):
        """Raises UserError for a tokenizer without a chat template."""
        self.model, self.tokenizer, self.note = model, tokenizer, ''
        self.eot, *_ = encode([], tokenizer)[0].tolist()
        self.cache = model.new_cache(1, -(-model.config.block_size // 64) * 64)  # aligned, for masked kernels
        self.turns = []  # the ids of each question and its answer

    def ask(self, text, max_new_tokens, **options):
        """Yield the ids of the answer; options: those of stream. Closed early, the answer ends there. Where the context
        is full, the oldest turns are dropped. Raises UserError if the text does not fit."""
        block_size, before = self.model.config.block_size, len(self.turns)
        question = encode([{'role': 'user', 'content': text}], self.tokenizer, answer=True)[0].tolist()[1:]
        room = block_size - 1 - len(question)
        if room < 1:
            raise UserError(f'a question of {len(question)} tokens does not fit into the context of {block_size}')
        while self.turns and sum(map(len, self.turns)) + min(max_new_tokens, block_size // 4) > room:
            self.turns.pop(0)
            self.forget_after(0)
        dropped, answer, end = before - len(self.turns), [], (self.tokenizer.im_end, self.tokenizer.eot)
        ids = [self.eot, *itertools.chain(*self.turns), *question]
        idx = torch.tensor([ids], device=self.cache[0].k.device)  # (1, T)
        known, limit = self.cache[0].length, min(max_new_tokens, block_size - idx.size(1))
        try:
            for new in stream(self.model, idx, limit, cache=self.cache, **options):
                answer.append(new.item())
                if answer[-1] in end:
                    break
                yield answer[-1]
        finally:
            self.forget_after(idx.size(1) + len(answer) - 1 if answer else known)  # the last id was not read yet
            ended = bool(answer) and answer[-1] in end
            answer = answer[:-1] if ended else answer
            self.turns.append(question + answer + [self.tokenizer.im_end, *self.tokenizer.encode('\n').tolist()])
            self.note = '' if ended else f'… (cut at {limit} tokens)'
            if dropped:
                self.note += (f' (the context of {block_size} tokens is full: the {dropped} oldest of {before} '
                              'questions are forgotten)')

    def forget_after(self, length):
        for layer in self.cache:
            layer.length = length


class OneTokenGraph:
    """The step of one token after a prompt, recorded as a CUDA graph and replayed for each token. Its kernels find
    everything at the same addresses: the token and its column in tensors of one element a row, keys and values in
    caches that are read to their end, behind a mask. On a CPU the same step runs as it is."""

    def __init__(self, model, cache, empty=None):
        """cache: what hidden() has filled with the prompts. empty: ignored columns at the start of each row, (B, 1)."""
        B, _, S, _ = cache[0].k.shape
        device, self.graph = cache[0].k.device, None
        self.new = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.column = torch.full((1,), cache[0].length, device=device)
        columns = torch.arange(S, device=device)
        empty = torch.zeros_like(self.new) if empty is None else empty
        for layer in cache:
            layer.k[:, :, layer.length:], layer.v[:, :, layer.length:] = 0, 0  # masked, but 0 * NaN would be NaN
        cache = [FixedCache(layer, self.column) for layer in cache]
        new, column = self.new, self.column  # a step that held self would keep the graph's memory until gc.collect()

        def step():
            mask = (columns >= empty) & (columns <= column)  # (B, S)
            return model.head(model.hidden(new, column - empty, mask[:, None, None], cache)[:, -1])

        self.step = step
        if device.type == 'cuda':
            self.record(device)

    def record(self, device):
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a weight cast outside the graph may be gone when it is replayed
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries allocate on first use, which no graph can record
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.step()
        torch.set_autocast_cache_enabled(cached)

    def __call__(self, new, column):
        """Logits (B, V) after the tokens new (B, 1) at an int column of the cache; the next call overwrites them."""
        self.new.copy_(new)
        self.column.fill_(column)
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return self.logits


class FixedCache:
    """One layer's keys and values, written at the column that a tensor (1,) holds and returned whole."""

    def __init__(self, layer, column):
        self.k, self.v, self.column = layer.k, layer.v, column

    def append(self, k, v):
        self.k.index_copy_(2, self.column, k.type_as(self.k))
        self.v.index_copy_(2, self.column, v.type_as(self.v))
        return self.k, self.v


def cast_linears(dtype, model):
    """Cast Linear weights once, for inference, as autocast would for every token. The rest stays float32, the token
    embedding included."""
    embedding = model.transformer.wte
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # no longer tied to the head
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])


def left_padded(empty, S, T):
    """Positions (B, T) and mask (B, 1, T, S), for hidden(), of the last T of S tokens when the first `empty` (B, 1) of
    each row are to be ignored."""
    columns = torch.arange(S, device=empty.device)
    rows = columns[-T:, None]
    mask = (columns >= empty)[:, None, None] & (columns <= rows)
    mask |= columns == rows  # an ignored token attends to itself: a softmax over nothing may be NaN
    return (columns[-T:] - empty).clamp(min=0), mask


def check_sampling(temperature, top_k, top_p, min_p, repetition_penalty):
    """Raise ValueError, with one line that says what is allowed, if an argument of stream is outside its range."""
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
    repetition_penalty = min(max(repetition_penalty, 1e-30), 1e30)  # neither 0 nor infinity in float32
    seen = logits.gather(1, idx)
    return logits.scatter(1, idx, torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty))


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Probabilities (B, V) to draw from, of logits (B, V) float32. What is left after each step sums to 1 again.

    temperature: divides the logits; above 0.
    top_k: keeps the k most likely tokens (Fan et al. 2018, arXiv:1805.04833); None or 0 disables it.
    top_p: keeps the fewest most likely tokens that together reach p (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: keeps tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082).
    """
    temperature = max(temperature, torch.finfo(torch.float32).tiny)  # smaller values underflow to 0
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: a low temperature can't overflow
    if top_k and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, [-1]], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        cut = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before already reach p
        cut[:, 0] = False  # always keep the most likely: a tiny top_p underflows to 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(cut, 0))
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0)
    return probs / probs.sum(dim=-1, keepdim=True)


def draw(probs, uniform):
    """One token of each row of probs (B, V): the first at which their running sum passes uniform (B, 1), in [0, 1)."""
    exact = torch.float32 if probs.device.type == 'mps' else torch.float64  # so that the sums never fall
    sums = probs.cumsum(dim=-1, dtype=exact)
    return torch.searchsorted(sums, uniform * sums[:, [-1]], right=True)
