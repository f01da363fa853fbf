"""Preferences: read from files, and learned by dpo.py."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from common import checkpoint, distributed, objectives
from conftest import TINY, at_step, read_log, run_ranks
from data.chatml import encode
from data.errors import UserError
from data.pairs import collate, read_pairs, shuffled
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from plot import curves

CHAT = get_tokenizer('bytes+chatml')
ROWS = [{'prompt': f'{a}?', 'chosen': f'yes {a}', 'rejected': f'no {a}'} for a in 'abcdefghijklmnopqrstuvwxyz'[:20]]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.fixture
def dpo(inside, tmp_path):
    """dpo(out_dir, *args, processes=0): run dpo.py, tiny, from one model of bytes+chatml."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=CHAT.vocab_size, n_layer=1, n_head=2, n_embd=32))
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.1)
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': CHAT.name}, tmp_path / 'base.pt')
    train, val = write(tmp_path / 'train.jsonl', ROWS[:16]), write(tmp_path / 'val.jsonl', ROWS[16:])

    def dpo(out_dir, *args, processes=0):
        args = ['dpo.py', f'--out_dir={tmp_path / out_dir}', f'--init_from={tmp_path}/base.pt', f'--pairs={train}',
                f'--val_pairs={val}', '--batch_size=4', '--gradient_accumulation_steps=2', '--learning_rate=1e-3',
                '--warmup_iters=2', '--max_iters=20', '--eval_interval=10', '--device=cpu', '--dtype=float32',
                '--compile=False', *args]
        return run_ranks(*args, processes=processes) if processes else inside(*args)
    return dpo


@torch.no_grad()
def log_prob(model, messages):
    """The sum over what the assistant wrote, token by token, in float64."""
    ids, scored = encode(messages, CHAT)
    logits = model(torch.from_numpy(ids[None].astype(np.int64)), torch.zeros(1, len(ids), dtype=torch.int64))[0][0].double()
    p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)  # (T, V)
    return sum(math.log(p[i - 1, ids[i]]) for i in range(1, len(ids)) if scored[i])


def margins(policy, reference, rows):
    """log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected) of each row."""
    def ratio(row, answer):
        messages = [{'role': 'user', 'content': row['prompt']}, {'role': 'assistant', 'content': row[answer]}]
        return log_prob(policy, messages) - log_prob(reference, messages)
    return [ratio(row, 'chosen') - ratio(row, 'rejected') for row in rows]


@pytest.mark.parametrize('kind', ['dpo', 'ipo'])
def test_a_preference_is_learned_by_the_formula(dpo, tmp_path, kind):
    dpo('out', f'--loss={kind}', '--beta=0.2')
    first, *_, last = [entry for entry in read_log(tmp_path / 'out') if 'val_loss' in entry]
    assert first == {'step': 0, 'val_loss': pytest.approx(math.log(2) if kind == 'dpo' else 2.5**2), 'val_margin': 0,
                     'val_accuracy': 0.5}
    policy, _ = checkpoint.load_model('resume', str(tmp_path / 'out'), 'cpu')
    reference, _ = checkpoint.pretrained(str(tmp_path / 'base.pt'))
    h = margins(policy, reference.eval(), ROWS[16:])
    by_hand = [math.log(1 + math.exp(-0.2 * x)) if kind == 'dpo' else (x - 1 / (2 * 0.2))**2 for x in h]
    assert last['val_loss'] == pytest.approx(sum(by_hand) / 4, rel=1e-4)
    assert last['val_margin'] == pytest.approx(0.2 * sum(h) / 4, rel=1e-4)
    curves([str(tmp_path / 'out')], tmp_path / 'curves.png')  # plot.py reads the log
    assert last['val_accuracy'] == 1 and last['val_loss'] < 0.6 * first['val_loss']


def test_the_gradient_is_the_formulas():
    """Equation 7's, by hand: -beta * sigmoid(-beta * h) for the chosen answers, its opposite for the rejected ones."""
    policy, reference = torch.tensor([[-5.0, -3.0], [-4.0, -6.0]], requires_grad=True), torch.tensor([[-6.0, -3.5], [-4.0, -5.5]])
    losses, rewards = objectives.preference_loss(policy, reference, 0.5)
    losses.sum().backward()
    h = torch.tensor([1.0, 1.0])
    slope = 0.5 / (1 + (0.5 * h).exp())
    torch.testing.assert_close(policy.grad, torch.stack((-slope, slope)))
    torch.testing.assert_close(rewards, 0.5 * h)
    losses, _ = objectives.preference_loss(policy, reference, 0.5, 'ipo')
    torch.testing.assert_close(losses, torch.tensor([0.0, 0.0]))  # 1 / (2 beta) is 1


def test_a_run_that_is_stopped_continues_as_if_it_was_not(dpo, tmp_path):
    dpo('one', '--keep_checkpoints=2', '--optimizer=muon')
    stop = at_step(tmp_path, 7, 'signal.raise_signal(signal.SIGTERM)')
    clip = torch.nn.utils.clip_grad_norm_
    try:
        assert 'ckpt.pt at step 7; --init_from=resume' in dpo('cut', stop, '--optimizer=muon')
    finally:
        torch.nn.utils.clip_grad_norm_, distributed.stop_signal = clip, 0
    dpo('cut', '--init_from=resume', '--optimizer=muon')
    assert read_log(tmp_path / 'cut') == read_log(tmp_path / 'one')
    dpo('one', f'--init_from=resume:{tmp_path}/one/ckpt_000010.pt', '--optimizer=muon')
    whole, cut, again = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('one', 'cut', 'one'))
    assert whole['iter_num'] == cut['iter_num'] == 20 and whole['data'] == cut['data'] and whole['best_val_loss'] == cut['best_val_loss']
    for name, w in whole['model'].items():
        assert torch.equal(w, cut['model'][name]) and torch.equal(w, again['model'][name])
    assert (tmp_path / 'one' / 'ckpt_best.pt').exists() and (tmp_path / 'one' / '1.ckpt.pt').exists()


def test_two_processes_are_one_up_to_rounding_compiled_or_not(dpo, tmp_path, traced):
    dpo('one', '--max_iters=6')
    dpo('two', '--max_iters=6', traced, '--compile=True', processes=2)
    dpo('fsdp', '--max_iters=6', '--parallel=fsdp', '--activation_checkpointing', processes=2)
    for name in 'two', 'fsdp':
        one, other = read_log(tmp_path / 'one'), read_log(tmp_path / name)
        assert len(one) == len(other) == 8
        for a, b in zip(one, other):
            assert a == {key: pytest.approx(value, abs=1e-4) for key, value in b.items()}


def test_adapters_alone_are_trained_and_merged(dpo, tmp_path):
    dpo('out', '--lora_rank=2', '--max_iters=3', '--loss=ipo')
    saved, base = (torch.load(path, weights_only=True)['model'] for path in (tmp_path / 'out' / 'ckpt.pt', tmp_path / 'base.pt'))
    assert all(torch.equal(w, saved[name]) for name, w in base.items()) and len(saved) > len(base)
    model, tokenizer = checkpoint.load_model('resume', str(tmp_path / 'out'), 'cpu')
    assert model.config.lora_rank == 0 and tokenizer == CHAT.name


def test_pairs_are_read_in_each_form(tmp_path):
    user, yes, no = ({'role': role, 'content': text} for role, text in (('user', 'Hi'), ('assistant', 'yes'), ('assistant', 'no')))
    rows = [{'prompt': 'Hi', 'chosen': 'yes', 'rejected': 'no'}, {'prompt': [user], 'chosen': [yes], 'rejected': [no]},
            {'chosen': [user, yes], 'rejected': [user, no]}, {'prompt': 'Hi', 'chosen': [user, yes], 'rejected': [user, no]},
            {'prompt': 'Hi', 'chosen': 'no', 'rejected': 'no'}, {'prompt': 'Hi' * 99, 'chosen': 'yes', 'rejected': 'no'}]
    pairs, left_out = read_pairs(str(write(tmp_path / 'a.jsonl', rows)), CHAT, 64)
    assert len(pairs) == 4 and left_out == 2
    for pair in pairs:
        for (ids, scored), answer in zip(pair, (yes, no)):
            assert ids.tolist() == encode([user, answer], CHAT)[0].tolist()
            assert CHAT.decode(ids[scored]) == f'{answer["content"]}<|im_end|>'
    x, y = collate(pairs[:2], 64, 'cpu')
    assert x.shape == y.shape == (4, 64)
    for row, (ids, scored) in enumerate([pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]]):
        assert x[row, :len(ids) - 1].tolist() == ids[:-1].tolist()
        assert y[row][y[row] != -1].tolist() == ids[scored].tolist()
    assert collate(pairs, 40, 'cpu')[0].shape == (8, 40)


def test_an_epoch_has_each_pair_once_in_another_order():
    first, second = shuffled(np.arange(60), 60, 1), shuffled(np.arange(60, 120), 60, 1)
    assert sorted(first) == sorted(second) == list(range(60)) and list(first) != list(second) and list(first) != sorted(first)
    assert list(shuffled(np.arange(120), 60, 1)) == [*first, *second] and list(shuffled(np.arange(60), 60, 2)) != list(first)


@pytest.mark.parametrize('row, line', [
    ({'prompt': 'Hi', 'chosen': 'yes'}, 'no pair: prompt, chosen and rejected'), ([], 'no pair'),
    ({'chosen': 'yes', 'rejected': 'no'}, 'chosen: not a prompt and an answer'),
    ({'prompt': 3, 'chosen': 'yes', 'rejected': 'no'}, 'no pair'),
    ({'prompt': 'Hi', 'chosen': [{'role': 'tool', 'content': 'x'}], 'rejected': 'no'}, "chosen: the role 'tool'"),
    ({'prompt': [{'role': 'user'}], 'chosen': 'yes', 'rejected': 'no'}, 'chosen: the content of the role user'),
    ({'prompt': 'Hi', 'chosen': [{'role': 'user', 'content': 'x'}], 'rejected': 'no'}, 'chosen: not a prompt')])
def test_a_line_that_holds_no_pair_is_named(tmp_path, row, line):
    path = write(tmp_path / 'a.jsonl', [ROWS[0], row])
    with pytest.raises(UserError, match=f'a.jsonl:2: {line}'):
        read_pairs(str(path), CHAT, 64)
    with pytest.raises(UserError, match='no pair of at most 8 tokens: 1 are left out'):
        read_pairs(str(write(path, ROWS[:1])), CHAT, 8)


def test_what_makes_no_run_is_refused_and_leaves_nothing(dpo, tmp_path, monkeypatch):
    base = torch.load(tmp_path / 'base.pt', weights_only=True)
    torch.save(base | {'tokenizer': 'bytes', 'model_args': base['model_args'] | {'vocab_size': 257}}, tmp_path / 'text.pt')
    torch.save(base | {'model_args': base['model_args'] | {'causal': False}}, tmp_path / 'masks.pt')
    for args, line in ((['--pairs='], 'pairs is empty: it names'), (['--beta=0.0'], 'beta=0.0'), (['--loss=kto'], 'dpo, ipo'),
                       ([f'--init_from={tmp_path}/text.pt'], 'bytes has no chat template'), (['--init_from=resume'], 'no checkpoint'),
                       ([f'--init_from={tmp_path}/masks.pt'], 'masked language model'), (['--optimizer=muon', '--lora_rank=2'], 'muon'),
                       ([f'--pairs={tmp_path}/none.jsonl'], '^pairs: no file .*none.jsonl'),
                       ([f'--val_pairs={tmp_path}/none.jsonl'], '^val_pairs: no file .*none.jsonl'),
                       (['--gradient_accumulation_steps=0'], 'gradient_accumulation_steps=0'), (['--parallel=zero1'], 'torchrun')):
        with pytest.raises(UserError, match=line):
            dpo('out', *args)
    monkeypatch.setattr(distributed, 'world_size', 3)
    with pytest.raises(UserError, match='not a multiple of the 3 processes'):
        dpo('out')
    assert not (tmp_path / 'out').exists()


def test_a_resume_with_other_pairs_is_refused(dpo, inside, tmp_path, dataset):
    dpo('out', '--max_iters=1')
    write(tmp_path / 'train.jsonl', ROWS[1:16])
    with pytest.raises(UserError, match='the pairs changed since .*: --init_from=.*ckpt.pt starts'):
        dpo('out', '--init_from=resume')
    inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/text', '--max_iters=1')
    with pytest.raises(UserError, match='is of a run of train.py'):
        dpo('text', '--init_from=resume', '--optimizer=adamw')
    with pytest.raises(UserError, match='is of a run of dpo.py'):
        inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--init_from=resume')
