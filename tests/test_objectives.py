"""The loss of a step: the mean over its scored tokens, wherever they are."""

import pytest
import torch

from common import distributed, objectives
from conftest import TINY, losses, run
from data.loader import Loader
from model import GPT, GPTConfig
from processes import on_processes
from test_distributed import run_here

SIZES = dict(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16)


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
    return distributed.all_sum(total / processes, device='cpu')[0], model.transformer.h[0].mlp.c_fc.weight.grad.tolist()


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
from data.loader import Loader as _Loader
def _next_batch(self, _next=_Loader.next_batch):
    x, y = _next(self)
    y[x.sum(1) % 3 > 0] = -1
    return x, y
_Loader.next_batch = _next_batch
''')
    for name, batch_size, processes in ('one', 16, 0), ('eight', 2, 0), ('two', 2, 2):
        args = tiny(dataset, tmp_path / name, uneven, f'--batch_size={batch_size}', '--max_iters=5', '--eval_tokens=1024')
        run(*args, processes=processes) if processes else run_here(*args)
    one, eight, two = (losses(tmp_path / name) for name in ('one', 'eight', 'two'))
    assert len(one) == 5
    assert list(eight.values()) == pytest.approx(list(one.values()), abs=2e-5)
    assert list(two.values()) == pytest.approx(list(one.values()), abs=2e-5)
