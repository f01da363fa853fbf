"""Which parameter gets which update, and Muon beside PyTorch's own."""

import pytest
import torch

from model import GPT, GPTConfig
from common.optimizers import Muon, SkipRule, configure_optimizers, orthogonalize, schedule, step

TINY = dict(block_size=16, vocab_size=257, n_layer=2, n_head=4, n_embd=64)


def grouped(model, optimizer):
    """{parameter's name: (class of its optimizer, its weight decay)}"""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (type(opt).__name__, group['weight_decay'])
            for opt in configure_optimizers(model, optimizer, 1e-3, 0.1, (0.9, 0.95))
            for group in opt.param_groups for p in group['params']}


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_every_parameter_is_updated_once_and_only_matrices_decay(optimizer):
    model = GPT(GPTConfig(**TINY))
    groups = grouped(model, optimizer)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert groups[name][1] == (0.1 if p.dim() == 2 else 0.0), name


def test_muon_takes_the_matrices_in_the_blocks_and_adamw_the_rest():
    kinds = {name: kind for name, (kind, _) in grouped(GPT(GPTConfig(**TINY)), 'muon').items()}
    assert kinds['transformer.h.1.mlp.c_fc.weight'] == kinds['transformer.h.0.attn.c_attn.weight'] == 'Muon'
    assert kinds['transformer.wte.weight'] == kinds['transformer.wpe.weight'] == kinds['transformer.ln_f.weight'] == 'AdamW'


def test_orthogonalize_makes_all_singular_values_about_one():
    torch.manual_seed(0)
    x = torch.randn(3, 32, 64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(y.flatten(1), (u @ vh).flatten(1)).min() > 0.97


def test_muon_makes_the_steps_of_pytorchs():
    torch.manual_seed(0)
    start = [torch.randn(48, 32), torch.randn(32, 48), torch.randn(48, 32)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = (Muon(ours, [(len(p),) for p in ours], lr=0.02, weight_decay=0.1, beta2=0),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn='match_rms_adamw'))
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for opt in optimizers:
            opt.step()
    for p, q, x in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - x).norm()  # PyTorch iterates in bfloat16


def test_queries_keys_and_values_are_matrices_of_their_own():
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.zeros(96, 32))
    parts = [torch.nn.Parameter(torch.zeros(32, 32)) for _ in range(3)]
    whole.grad = torch.randn(96, 32) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(32)[:, None]
    for p, grad in zip(parts, whole.grad.split(32)):
        p.grad = grad.clone()
    Muon([whole], [(32, 32, 32)], lr=1.0).step()
    Muon(parts, [(32,)] * 3, lr=1.0).step()
    assert torch.allclose(whole, torch.cat(list(parts)), atol=1e-6)


def test_each_row_of_an_update_is_divided_by_the_root_of_its_mean_square():
    torch.manual_seed(0)
    plain, ours = (torch.nn.Parameter(torch.zeros(48, 32)) for _ in range(2))
    optimizers = Muon([plain], [(48,)], lr=1.0, weight_decay=0, beta2=0), Muon([ours], [(48,)], lr=1.0, weight_decay=0)
    squares, scale = torch.full((48,), 0.04), torch.linspace(0, 1, 48)[:, None]
    for _ in range(20):
        plain.grad = torch.randn(48, 32) * scale
        ours.grad = plain.grad.clone()
        before, already = plain.detach().clone(), ours.detach().clone()
        for opt in optimizers:
            opt.step()
        update = plain.detach() - before
        squares = 0.95 * squares + 0.05 * (update**2).mean(dim=1)
        assert torch.allclose(ours.detach() - already, 0.2 * update / squares.sqrt()[:, None], rtol=1e-3, atol=1e-5)
    assert squares.std() > 0.1 * squares.mean()  # else nothing is divided
    assert torch.allclose(optimizers[1].state[ours]['row_squares'][:, 0], squares, rtol=1e-4)


def test_each_head_is_a_matrix_of_its_own():
    model = GPT(GPTConfig(**TINY, n_kv_head=2, mlp='swiglu'))
    stacks = configure_optimizers(model, 'muon', 1e-3, 0.1, (0.9, 0.95))[1].stacks
    assert (torch.Size((128, 64)), (16,) * 8) in stacks and (torch.Size((512, 64)), (256, 256)) in stacks


def trained(optimizer, skips=(), steps=4):
    """A tiny GPT after some steps on random tokens; skips: steps whose gradient is not finite. Returns (model, optimizers)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    optimizers = configure_optimizers(model, optimizer, 1e-2, 0.1, (0.9, 0.95))
    tokens = torch.randint(0, 257, (steps, 2, 9))
    for i in range(steps):
        model(tokens[i, :, :-1], tokens[i, :, 1:])[1].backward()
        if i in (skips or ()):
            for p in model.parameters():
                p.grad[0] = float('nan')
        step(optimizers, None if skips is None else torch.tensor(i in skips))
    return model, optimizers


def state(model, optimizers):
    return [x for p in model.parameters() for opt in optimizers if p in opt.state
            for x in (p.detach(), *opt.state[p].values())]


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_skipped_step_changes_nothing_and_the_device_decides(optimizer):
    before, after = (state(*trained(optimizer, skips=(1, 3), steps=steps)) for steps in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    decided = state(*trained(optimizer))
    plain = state(*trained(optimizer, skips=None))
    assert max((a - b).abs().max() for a, b in zip(decided, plain)) < 1e-5


def test_a_spike_is_one_beside_the_last_hundred_good_steps():
    rule, norms = SkipRule(5.0, 'cpu', {}), torch.linspace(0.9, 1.1, 100).double()
    loss = torch.tensor(1.0).double()
    assert not any(rule(loss, norm) for norm in [torch.tensor(50.0).double(), *norms[1:]])  # too few to judge by
    assert not rule(loss, norms[0])  # which pushes the 50 out
    mean, deviation = norms.mean(), norms.std()
    resumed = SkipRule(5.0, 'cpu', rule.state_dict())
    for judge in rule, resumed:
        assert judge(loss, mean + 5.1 * deviation) and judge(loss, torch.tensor(float('inf'))) and judge(loss / 0, mean)
        assert not judge(loss, mean + 4.9 * deviation)
    assert rule.state_dict() == resumed.state_dict() and len(rule.state_dict()['norms']) == 100
    assert not SkipRule(0.0, 'cpu', rule.state_dict())(loss, 100 * mean)


def test_the_settings_of_adamw_reach_it():
    optimizer, = configure_optimizers(GPT(GPTConfig(**TINY)), 'adamw', 1e-3, 0.1, (0.8, 0.9), eps=1e-6)
    assert all(group['eps'] == 1e-6 and group['betas'] == (0.8, 0.9) for group in optimizer.param_groups)


@pytest.mark.parametrize('loss, norm, spike', [(2.0, 1.0, False), (9.0, 1.0, True), (2.0, 9.0, True),
                                              (float('nan'), 1.0, True)])
def test_a_spike_of_the_loss_alone_is_one_too(loss, norm, spike):
    past = [2.0 + 0.01 * (i % 5) for i in range(100)]
    rule = SkipRule(6.0, 'cpu', {'losses': past, 'norms': [x - 1 for x in past]})
    assert bool(rule(torch.tensor(loss), torch.tensor(norm))) == spike


def test_the_momentum_of_muon_rises_with_the_step():
    adamw, muon = configure_optimizers(GPT(GPTConfig(**TINY)), 'muon', 1e-3, 0.1, (0.9, 0.95))
    for number, momentum in (0, 0.85), (150, 0.9), (300, 0.95), (9000, 0.95):
        schedule([adamw, muon], 0.01 * number, number)
        assert muon.param_groups[0]['momentum'] == pytest.approx(momentum)
        assert all(group['lr'] == 0.01 * number for opt in (adamw, muon) for group in opt.param_groups)
