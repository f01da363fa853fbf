"""Generation: the cache changes nothing, rows do not disturb each other, and each option is what its paper says."""
import gc
import math
import weakref

import pytest
import torch

from common.generate import OneTokenGraph, left_padded, next_token_probs, penalize, stream
from model import GPT, GPTConfig
from test_model import VARIANTS

MODELS = {name: VARIANTS[name] for name in ('gpt2', 'rope', 'grouped heads', 'all at once')}


@pytest.fixture(params=MODELS)
def model(request):
    """A model with a context of 16 and weights so large that a token's choice hangs on all before it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=16, vocab_size=100, n_layer=2, n_head=4, n_embd=32) | MODELS[request.param]
                          | dict(zero_init=False, tie_embeddings=False)))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.4)
    return model.eval()


def prompts(B, T, seed=1):
    return torch.randint(100, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plainly(model, idx, n):
    """The most likely tokens without any cache, the whole window for each: nanoGPT's way."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


# the cache -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('T', [1, 5, 15, 16, 17, 30])
def test_the_cache_changes_no_token(model, T):
    """Greedily and in a batch, to the end of the context of 16 and past it."""
    idx = prompts(3, T)
    out = model.generate(idx, 25, temperature=0)
    assert torch.equal(out, plainly(model, idx, 25))
    assert len(out[:, T:].unique()) > 5  # the models do not just repeat themselves


def test_the_cache_changes_no_logit(model):
    """One by one or in chunks, after what the cache holds, the logits are those of all at once."""
    idx = prompts(2, 16)
    whole, _ = model(idx, idx)  # logits of every position
    for chunks in ([1] * 16, [5, 1, 7, 3], [16]):
        cache, seen = model.new_cache(2), 0
        for T in chunks:
            last = model.head(model.hidden(idx[:, seen:seen + T], cache=cache)[:, -1])
            seen += T
            torch.testing.assert_close(last, whole[:, seen - 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('T', [1, 5, 15, 17])
def test_the_step_of_a_cuda_graph_changes_no_token(model, T):
    """Here without the graph: keys and values at a column that a tensor names, all columns read, a mask."""
    idx, lengths = prompts(3, T), torch.tensor([T, max(1, T - 3), 1])
    assert torch.equal(model.generate(idx, 25, temperature=0, cuda_graph=True), plainly(model, idx, 25))
    assert torch.equal(model.generate(idx, 25, lengths=lengths, seeds=range(3), cuda_graph=True),
                       model.generate(idx, 25, lengths=lengths, seeds=range(3)))


def test_columns_that_are_not_filled_may_hold_anything(model, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, 'empty', lambda *shape, **how: empty(*shape, **how).fill_(math.nan))
    idx = prompts(2, 5)
    assert torch.equal(model.generate(idx, 8, temperature=0, cuda_graph=True), plainly(model, idx, 8))


def test_each_token_costs_one_token(model, monkeypatch):
    """Within the context the model sees the prompt once and then one token at a time; past it, whole windows."""
    seen, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, 'hidden', lambda self, idx, *how: seen.append(idx.size(1)) or hidden(self, idx, *how))
    model.generate(prompts(1, 10), 9)
    assert seen == [10, 1, 1, 1, 1, 1, 1, 16, 16]


def test_the_cache_is_no_larger_than_needed(model):
    layer = model.new_cache(3, 7)[0]
    config = model.config
    assert layer.k.shape == layer.v.shape == (3, config.n_kv_head, 7, config.head_size)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.new_cache(3)[0].k.dtype == torch.bfloat16
        assert model.generate(prompts(2, 5), 5).shape == (2, 10)


# rows of a batch -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [dict(temperature=0), dict(temperature=0, repetition_penalty=1.5),
                                     dict(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.3)],
                         ids=['greedy', 'greedy penalized', 'drawn'])
def test_rows_of_different_lengths_go_on_as_if_alone(model, options):
    """Whatever their neighbours are, to the end of each one's context and past it."""
    alone = [prompts(1, n, seed=n) for n in (3, 12, 1, 16, 20)]
    lengths = torch.tensor([row.size(1) for row in alone])
    idx = torch.full((5, 20), 99)
    for row, prompt in zip(idx, alone):
        row[20 - prompt.size(1):] = prompt[0]
    together = model.generate(idx, 30, **options, lengths=lengths, seeds=range(5))
    for i, (row, prompt) in enumerate(zip(together, alone)):
        expected = model.generate(prompt, 30, **options, seeds=[i])
        assert torch.equal(row[20 - prompt.size(1):], expected[0]), f'row {i}'


def test_an_ignored_token_looks_somewhere():
    """Not every kernel's softmax over nothing is a number."""
    positions, mask = left_padded(torch.tensor([[0], [3]]), 5, 5)
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]] and mask.any(dim=-1).all()
    assert mask[1, 0, 4].tolist() == [False, False, False, True, True]


def test_seeds_decide(model):
    idx = prompts(1, 4).repeat(4, 1)
    first = model.generate(idx, 20, seeds=[7, 8, 7, 9])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(first[[3]], model.generate(idx[:1], 20, seeds=[9]))
    assert torch.equal(first[:, :14], model.generate(idx, 10, seeds=[7, 8, 7, 9]))  # however many are asked for
    assert len(model.generate(idx[:1], 20, temperature=1e6, seeds=[7]).unique()) > 12  # another draw for each token
    torch.manual_seed(3)
    a, b = model.generate(idx, 20), model.generate(idx, 20)
    torch.manual_seed(3)
    assert torch.equal(a, model.generate(idx, 20)) and not torch.equal(a, b)


def test_stream_is_generate(model):
    idx = prompts(2, 4)
    pieces = list(stream(model, idx, 20, seeds=[1, 2]))
    assert all(piece.shape == (2, 1) for piece in pieces)
    assert torch.equal(torch.cat((idx, *pieces), dim=1), model.generate(idx, 20, seeds=[1, 2]))


# the options, on distributions that are known ------------------------------------------------------------------------

P = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.05, 0.05, 0.1, 0.2, 0.6]])


@pytest.mark.parametrize('options, expected', [
    (dict(), P.tolist()),
    (dict(top_k=0), P.tolist()),
    (dict(top_k=5), P.tolist()),
    (dict(top_k=1), [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),
    (dict(top_k=2), [[2 / 3, 1 / 3, 0, 0, 0], [0, 0, 0, 1 / 4, 3 / 4]]),
    (dict(top_p=0.4), [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),
    (dict(top_p=0.7), [[2 / 3, 1 / 3, 0, 0, 0], [0, 0, 0, 1 / 4, 3 / 4]]),
    (dict(top_p=0.85), [[4 / 7, 2 / 7, 1 / 7, 0, 0], [0, 0, 1 / 9, 2 / 9, 6 / 9]]),
    (dict(min_p=0.2), [[4 / 7, 2 / 7, 1 / 7, 0, 0], [0, 0, 0, 1 / 4, 3 / 4]]),
    (dict(min_p=1.0), [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),
    (dict(temperature=0.5), (P**2 / (P**2).sum(dim=1, keepdim=True)).tolist()),
    (dict(temperature=2.0), (P.sqrt() / P.sqrt().sum(dim=1, keepdim=True)).tolist()),
    (dict(temperature=0.5, top_k=2), [[4 / 5, 1 / 5, 0, 0, 0], [0, 0, 0, 1 / 10, 9 / 10]]),
    (dict(top_k=3, top_p=0.6), [[2 / 3, 1 / 3, 0, 0, 0], [0, 0, 0, 0, 1]]),  # top_p of what top_k left
    (dict(temperature=1e-40), [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),
    (dict(temperature=1e-300), [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),  # which is 0 in float32
    (dict(top_p=1e-300), [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),
    (dict(min_p=1e-300), P.tolist()),
])
def test_next_token_probs(options, expected):
    torch.testing.assert_close(next_token_probs(P.log() + 3, **options), torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -1.0, 0.0, 4.0], [2.0, -1.0, 0.0, 4.0]])
    idx = torch.tensor([[0, 1, 1], [3, 3, 2]])
    expected = torch.tensor([[1.0, -2.0, 0.0, 4.0], [2.0, -1.0, 0.0, 2.0]])
    assert torch.equal(penalize(logits, idx, 2.0), expected)
    assert torch.equal(penalize(logits, idx, 1.0), logits)
    for extreme in (1e-300, 1e300):
        assert next_token_probs(penalize(logits, idx, extreme)).isfinite().all()


def test_samples_have_the_probabilities(model):
    """4,000 draws of the next token against the probabilities, by a chi-squared test; what is cut off never comes."""
    prompt = prompts(1, 8)
    logits, _ = model(prompt)
    probs = next_token_probs(logits[:, -1].float(), 1.3, top_k=20, top_p=0.9)[0]
    drawn = model.generate(prompt.repeat(4000, 1), 1, 1.3, top_k=20, top_p=0.9, seeds=range(4000))[:, -1]
    counts = torch.bincount(drawn, minlength=100)
    assert (counts[probs == 0] == 0).all()
    kept = probs > 0
    chi2 = ((counts - 4000 * probs)[kept]**2 / (4000 * probs[kept])).sum().item()
    freedom = kept.sum().item() - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_a_recorded_step_gives_its_memory_back_at_once(model):
    """Without the garbage collector, which a GPU that is full does not ask."""
    cache = model.new_cache(1, 16)
    model.hidden(prompts(1, 4), cache=cache)
    step = OneTokenGraph(model, cache)
    step(prompts(1, 1), 4)
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


def test_training_can_use_what_sampling_made(model):
    """FSDP's gathered parameters, for example."""
    assert not any(token.is_inference() for token in stream(model, prompts(1, 4), 2))


@pytest.mark.parametrize('name, value', [('temperature', -0.1), ('temperature', math.nan), ('top_k', -1), ('top_p', 0.0),
                                         ('top_p', 1.1), ('min_p', -0.1), ('min_p', 1.1), ('repetition_penalty', 0.0)])
def test_values_out_of_range(model, name, value):
    with pytest.raises(ValueError, match=f'{name}={value} must be '):
        model.generate(prompts(1, 3), 1, **{name: value})
