"""What is trained for: the mean over scored tokens, a teacher's distribution, masked tokens."""

import json
import math
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import checkpoint, distributed, objectives, page
from conftest import TINY, losses, read_log, run_ranks
from data.dataset import Split
from data.errors import UserError
from data.loader import Loader
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from processes import on_processes
from test_distributed import run_here

SIZES = dict(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16)

SETTINGS = dict(objective='next_token', teacher='', teacher_weight=0.5, teacher_temperature=2.0, block_size=32)


def tiny(dataset, out_dir, *args):
    return 'train.py', *TINY, f'--dataset={dataset}', f'--out_dir={out_dir}', *args


def uneven_batches():
    """Four micro-batches, x, y: (2, 16) each, of 32, 1, 0 and 20 scored tokens."""
    torch.manual_seed(1)
    x, y = torch.randint(0, 50, (2, 4, 2, 16))
    for batch, scored in zip(y, (32, 1, 0, 20)):
        batch.view(-1)[scored:] = -1
    return x, y


def step_gradient(rank, processes):
    """(loss, gradient norm, a gradient) of one step, each of the processes with its part of the micro-batches."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(**SIZES))
    train_model = distributed.wrap(model, 'cpu')
    batches = list(zip(*(z[rank::processes] for z in uneven_batches())))
    weights, total = objectives.token_weights([y for _, y in batches], 'cpu'), 0
    for i, (x, y) in enumerate(batches):
        distributed.sync_gradients(train_model, i == len(batches) - 1)
        loss = objectives.weighted(train_model(x, y, return_logits=False)[1], weights[i]) / len(batches)
        loss.backward()
        total += loss.item()
    return distributed.sum_over_ranks(total / processes, device='cpu').item(), model.transformer.h[0].mlp.c_fc.weight.grad.tolist()


def step_gradient_of_this_process():
    return step_gradient(distributed.rank, 2)


@pytest.mark.parametrize('processes', [1, 2])
def test_a_step_is_the_mean_over_its_scored_tokens(processes):
    torch.manual_seed(2)
    model, (x, y) = GPT(GPTConfig(**SIZES)), uneven_batches()
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    logits = model.head(model.hidden(x))[y != -1]  # (53, V)
    by_hand = -logits.log_softmax(-1).gather(1, y[y != -1][:, None]).sum() / 53
    by_hand.backward()
    for loss, grad in [step_gradient(0, 1)] if processes == 1 else on_processes(2, step_gradient_of_this_process):
        assert loss == pytest.approx(by_hand.item(), rel=1e-6)
        torch.testing.assert_close(torch.tensor(grad), model.transformer.h[0].mlp.c_fc.weight.grad)


def test_equal_counts_change_no_bit_and_no_counts_are_no_number():
    full, empty = torch.zeros(3, 2, 16, dtype=torch.int64), torch.full((3, 2, 16), -1)
    assert objectives.token_weights(full, 'cpu').tolist() == [1.0] * 3
    loss = objectives.weighted(torch.tensor(float('nan')), objectives.token_weights(empty, 'cpu')[0])
    assert loss.isnan()  # which skips the step


def test_a_run_is_the_same_however_its_tokens_are_divided(dataset, tmp_path, monkeypatch):
    """Two rows of three have no targets: with two rows in a micro-batch some have none at all."""
    monkeypatch.setattr(Loader, 'next_batch', Loader.next_batch)  # undone after the runs in this process
    uneven = tmp_path / 'uneven.py'
    uneven.write_text('''
from data.errors import UserError
from data.loader import Loader as _Loader
def _next_batch(self, _next=_Loader.next_batch):
    x, y = _next(self)
    y[x.sum(1) % 3 > 0] = -1
    return x, y
_Loader.next_batch = _next_batch
''')
    for name, batch_size, processes in ('one', 16, 0), ('eight', 2, 0), ('two', 2, 2):
        args = tiny(dataset, tmp_path / name, uneven, f'--batch_size={batch_size}', '--max_iters=5', '--eval_tokens=1024')
        run_ranks(*args, processes=processes) if processes else run_here(*args)
    one, eight, two = (losses(tmp_path / name) for name in ('one', 'eight', 'two'))
    assert len(one) == 5
    assert list(eight.values()) == pytest.approx(list(one.values()), abs=2e-5)
    assert list(two.values()) == pytest.approx(list(one.values()), abs=2e-5)


def test_kl_is_pytorchs_over_the_scored_tokens():
    torch.manual_seed(3)
    logits, target, y = torch.randn(2, 5, 50, requires_grad=True), torch.randn(2, 5, 50), torch.randint(-1, 1, (2, 5))
    assert 0 < (y == -1).sum() < 10
    for temperature in 1.0, 3.0:
        ours = objectives.kl_divergence(logits, target, y, temperature)
        theirs = temperature**2 * F.kl_div((logits[y != -1] / temperature).log_softmax(-1),
                                           (target[y != -1] / temperature).softmax(-1), reduction='batchmean')
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)):
            torch.testing.assert_close(mine, other)
    assert objectives.kl_divergence(target, target, y).item() == pytest.approx(0, abs=1e-6)


def write_teacher(path, tokenizer='bytes', **changes):
    torch.manual_seed(4)
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=32) | changes))
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.3)  # sure of itself, unlike the model at the start
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': tokenizer}, path)
    return model


def test_a_model_learns_its_teachers_distribution(dataset, tmp_path, traced):
    """With weight 1 the text does not matter: the loss is the divergence, and falls. One process stopped and resumed
    ends where one that ran through does, and two processes compute the same."""
    teacher = write_teacher(tmp_path / 'teacher.pt')
    settings = [f'--teacher={tmp_path}/teacher.pt', '--teacher_weight=1.0', '--teacher_temperature=2.0',
                '--learning_rate=1e-2', '--dropout=0.1', '--keep_checkpoints=2', '--n_layer=1']
    run_here(*tiny(dataset, tmp_path / 'one', *settings))
    one = losses(tmp_path / 'one')
    assert one[20] < 0.9 * one[1]
    (tmp_path / 'cut').mkdir()
    shutil.copy(tmp_path / 'one' / 'ckpt_000010.pt', tmp_path / 'cut' / 'ckpt.pt')
    run_here(*tiny(dataset, tmp_path / 'cut', *settings, '--init_from=resume'))
    assert losses(tmp_path / 'cut') == {step: one[step] for step in range(11, 21)}
    run_here(*tiny(dataset, tmp_path / 'dry', *settings, '--dropout=0.0', '--max_iters=3'))
    run_ranks(*tiny(dataset, tmp_path / 'two', *settings, '--dropout=0.0', '--max_iters=3', traced, '--compile=True'), processes=2)
    dry, two = losses(tmp_path / 'dry'), losses(tmp_path / 'two')
    assert list(two.values()) == pytest.approx(list(dry.values()), abs=1e-4)
    student, _ = checkpoint.pretrained(str(tmp_path / 'one' / 'ckpt.pt'))
    x = torch.randint(0, 256, (4, 32))
    untrained = GPT(student.config)
    distances = [objectives.kl_divergence(model(x, x)[0], teacher(x, x)[0], x).item() for model in (student, untrained)]
    assert distances[0] < 0.9 * distances[1]


def test_a_teacher_compiles(tmp_path, traced):
    write_teacher(tmp_path / 'teacher.pt')
    torch.manual_seed(5)
    model, x = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=16)), torch.randint(0, 256, (2, 32))
    args = SETTINGS | {'teacher': f'{tmp_path}/teacher.pt'}, model.config, 'bytes', 'cpu'
    eager = objectives.Objective(*args)(model, x, x)
    compiled = objectives.Objective(*args, compiled=True)(distributed.wrap(model, 'cpu', compiled=True), x, x)
    torch.testing.assert_close(compiled, eager)
    compiled.backward()


@pytest.mark.parametrize('tokenizer, changes, line', [
    ('gpt2', {}, 'reads gpt2 tokens, 257 of them, and the model bytes tokens'),
    ('bytes', {'vocab_size': 300}, '300 of them'),
    ('bytes', {'block_size': 16}, '--block_size=16'), ('bytes', {'causal': False}, 'fills masks, unlike the model')])
def test_a_teacher_of_other_tokens_or_a_shorter_context_is_named(tmp_path, tokenizer, changes, line):
    write_teacher(tmp_path / 'teacher.pt', tokenizer, **changes)
    with pytest.raises(UserError, match=line):
        objectives.Objective(SETTINGS | {'teacher': f'{tmp_path}/teacher.pt'}, GPTConfig(32, 257), 'bytes', 'cpu')


def test_masks_have_berts_proportions():
    x = torch.randint(0, 257, (200, 1000), generator=torch.Generator().manual_seed(1))
    y = torch.where(torch.arange(200)[:, None] < 100, x, -1)  # half of the rows are padding
    read, targets = objectives.mask_tokens(x, y, 257, torch.Generator().manual_seed(2))
    assert (targets[100:] == -1).all() and torch.equal(read[100:], x[100:])
    read, targets, x = read[:100], targets[:100], x[:100]
    chosen = targets != -1
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.003)
    assert torch.equal(targets[chosen], x[chosen]) and torch.equal(read[~chosen], x[~chosen])
    masked, kept = (read[chosen] == 257).float().mean().item(), (read == x)[chosen].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.01) and kept == pytest.approx(0.1 + 0.1 / 257, abs=0.01)
    others = read[chosen & (read != 257) & (read != x)]
    assert others.min() == 0 and others.max() == 256 and others.bincount().max() < 4 * len(others) / 257
    assert not torch.equal(objectives.mask_tokens(x, x, 257)[0], objectives.mask_tokens(x, x, 257)[0])


def test_a_masked_model_attends_both_ways_and_a_causal_one_does_not():
    torch.manual_seed(6)
    model, x = GPT(GPTConfig(**SIZES, causal=False)), torch.randint(0, 50, (1, 16))
    other = torch.cat((x[:, :-1], (x[:, -1:] + 1) % 50), dim=1)
    assert not torch.allclose(model.hidden(x)[0, 0], model.hidden(other)[0, 0])
    q, k, v = model.transformer.h[0].attn.c_attn(model.transformer.ln_f(x[..., None] * torch.ones(16))).view(
        1, 16, 6, 8).transpose(1, 2).split(2, dim=1)
    by_hand = (q @ k.mT / 8**0.5).softmax(-1) @ v
    attention = model.transformer.h[0].attn
    ours = attention(model.transformer.ln_f(x[..., None] * torch.ones(16)))
    torch.testing.assert_close(ours, attention.c_proj(by_hand.transpose(1, 2).reshape(1, 16, 16)))
    with pytest.raises(ValueError, match='generates no text'):
        model.generate(x, 1)
    model.config.causal = True
    assert torch.equal(model.hidden(x)[0, 0], model.hidden(other)[0, 0])


def test_a_masked_model_is_trained_resumed_scored_and_fills(dataset, tmp_path, capsys):
    settings = ['--objective=mlm', '--learning_rate=1e-2', '--dropout=0.1', '--keep_checkpoints=2', '--max_iters=40',
                '--eval_interval=20']
    run_here(*tiny(dataset, tmp_path / 'one', *settings))
    one, log = losses(tmp_path / 'one'), read_log(tmp_path / 'one')
    assert abs(one[1] - 5.55) < 0.2 and one[40] < 4.5  # ln 257
    (tmp_path / 'cut').mkdir()
    shutil.copy(tmp_path / 'one' / 'ckpt_000020.pt', tmp_path / 'cut' / 'ckpt.pt')
    run_here(*tiny(dataset, tmp_path / 'cut', *settings, '--init_from=resume'))
    assert losses(tmp_path / 'cut') == {step: one[step] for step in range(21, 41)}
    assert read_log(tmp_path / 'cut')[-1] == log[-1]  # the masks of an evaluation are the same each time

    model, _ = checkpoint.load_model('resume', str(tmp_path / 'one'), 'cpu')
    capsys.readouterr()
    run_here('sample.py', f'--out_dir={tmp_path}/one', '--start=impo[MASK]t o[MASK]', '--json', '--device=cpu', '--dtype=float32')
    answer = json.loads(capsys.readouterr().out)
    ids = [*b'impo', 257, *b't o', 257]
    by_hand = model(torch.tensor([ids]), torch.tensor([ids]) * 0)[0][0].softmax(-1)  # (T, V)
    for place, candidates in zip((4, 8), answer['candidates']):
        p, top = by_hand[place].topk(5)
        assert [token for token, _ in candidates] == [bytes([i]).decode() if i < 128 else '' for i in top.tolist()]
        assert [q for _, q in candidates] == pytest.approx(p.tolist(), rel=1e-4)
    best = by_hand.argmax(-1)
    assert answer['text'] == f'impo{chr(best[4])}t o{chr(best[8])}'

    run_here('evaluate.py', f'--out_dir={tmp_path}/one', f'--dataset={dataset}', '--max_tokens=40', '--device=cpu',
             '--dtype=float32')
    found = dict(re.findall(r'^([\w-]+) +([\d.]+)$', capsys.readouterr().out, re.MULTILINE))
    tokens, total, right = torch.from_numpy(Split(str(dataset), 'val').read(np.array([0]), 40)[0].astype('int64')), 0.0, 0
    for begin, end in (0, 32), (32, 40):
        for place in range(end - begin):
            block = tokens[None, begin:end].clone()
            block[0, place] = 257
            logits = model(block, block)[0][0, place]
            total -= logits.log_softmax(-1)[tokens[begin + place]].item()
            right += logits.argmax().item() == tokens[begin + place].item()
    assert float(found['pseudo-perplexity']) == pytest.approx(math.exp(total / 40), rel=1e-3)
    assert float(found['accuracy']) == pytest.approx(right / 40, abs=1e-4)
    with pytest.raises(UserError, match='causal=False'):
        model.save_pretrained(tmp_path / 'folder', 'bytes')
    with pytest.raises(UserError, match='causal=False'):
        page.write(tmp_path / 'page.html', model, get_tokenizer('bytes'))


@pytest.mark.parametrize('settings, line', [
    (['--objective=mlm', '--sample_interval=5'], 'continues no text'), (['--objective=bert'], 'next_token, mlm'),
    (['--objective=mlm', '--n_layer=1', '--init_from=BASE'], 'predicts the next token')])
def test_masks_that_fit_nothing_are_refused(dataset, tmp_path, settings, line):
    write_teacher(tmp_path / 'base.pt')
    settings = [setting.replace('BASE', str(tmp_path / 'base.pt')) for setting in settings]
    with pytest.raises(UserError, match=line):
        run_here(*tiny(dataset, tmp_path / 'out', *settings))
    with pytest.raises(UserError, match='no id for a mask'):
        objectives.Objective(SETTINGS | {'objective': 'mlm'}, GPTConfig(32, 256, causal=False), 'mine', 'cpu')


def test_two_processes_train_a_masked_model_compiled(dataset, tmp_path, traced):
    run_ranks(*tiny(dataset, tmp_path, traced, '--objective=mlm', '--max_iters=12', '--n_layer=1', '--compile=True',
                    '--learning_rate=1e-2'), processes=2)
    assert len(losses(tmp_path)) == 12 and losses(tmp_path)[12] < losses(tmp_path)[1] - 0.2
