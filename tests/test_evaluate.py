"""The loss of a dataset: every token once, in windows that give it context."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, finish, needs_gpt2, run, start

from data.tokenizer import get_tokenizer
from evaluate import total_loss, windows
from model import GPT, GPTConfig


@pytest.mark.parametrize('n, block_size, stride', [(100, 16, 16), (100, 16, 5), (17, 16, 16), (18, 16, 16), (10, 16, 4),
                                                   (2, 16, 1), (33, 16, 1)])
def test_every_token_but_the_first_is_scored_once(n, block_size, stride):
    scored = []
    for begin, end, first in windows(n, block_size, stride):
        assert end - begin - 1 <= block_size
        assert first == 1 or first - begin >= min(first, block_size - stride + 1)  # so much context, at least
        scored += range(first, end)
    assert scored == list(range(1, n))


@pytest.mark.parametrize('stride', [16, 5])
def test_the_loss_is_that_of_one_token_at_a_time(stride):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32)).eval()
    tokens = torch.randint(0, 257, (60,))
    expected = 0.0
    for begin, end, first in windows(60, 16, stride):
        for t in range(first, end):
            logits, _ = model(tokens[None, begin:t])
            expected += F.cross_entropy(logits[:, -1], tokens[t:t + 1]).item()
    assert math.isclose(total_loss(model, tokens.numpy(), 16, stride, batch_size=3), expected, rel_tol=1e-5)


@needs_gpt2
def test_bits_per_byte_are_of_the_bytes_of_the_text(tmp_path):
    """Two documents of GPT-2's tokens: many have several bytes, ends of texts none."""
    texts = ['Übermut tut selten gut, 世界. ' * 9, 'An ordinary sentence of ordinary words. ' * 9]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    run('prepare_fineweb.py', f'--data_files={tmp_path}/a.jsonl', f'--out_dir={tmp_path}/data')
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8))
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'gpt2'}, tmp_path / 'ckpt.pt')
    text = get_tokenizer('gpt2').decode_bytes(np.load(tmp_path / 'data/train_000000.npy')[1:])
    out = run('evaluate.py', f'--out_dir={tmp_path}', f'--dataset={tmp_path}/data', '--split=train').out
    assert f'{len(text.replace(b"<|endoftext|>", b"")):,} bytes' in out
    assert 'has no test split' in run('evaluate.py', f'--out_dir={tmp_path}', f'--dataset={tmp_path}/data', '--split=test',
                                      expect=1).err


INTERRUPT = """
import os, signal, time
import model as _model
def _interrupt(*args):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1000)
_model.GPT.token_losses = _interrupt
"""


def test_ctrl_c_is_one_line(dataset, tmp_path):
    """In evaluate.py and hellaswag.py, while the model computes. (A settings file is Python.)"""
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'bytes'}, tmp_path / 'ckpt.pt')
    (tmp_path / 'interrupt.py').write_text(INTERRUPT)
    (tmp_path / 'items.jsonl').write_text('{"ctx": "a", "label": 0, "endings": ["b", "c", "d", "e"]}\n')
    for process in [start(script, tmp_path / 'interrupt.py', f'--out_dir={tmp_path}', '--device=cpu', option)
                    for script, option in (('evaluate.py', f'--dataset={dataset}'),
                                           ('hellaswag.py', f'--data={tmp_path}/items.jsonl'))]:  # side by side
        finish(process)
        assert (process.returncode, process.out, process.err) == (130, '', 'interrupted\n')


def test_as_a_command(dataset, tmp_path):
    run('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--max_iters=2')
    options = (f'--out_dir={tmp_path}', f'--dataset={dataset}', '--max_tokens=1000', '--device=cpu')
    out = run('evaluate.py', *options, '--stride=8').out
    assert '999 tokens' in out and 'every 8' in out
    numbers = {line.split('  ')[0]: float(line.split()[3 if line.startswith('bits') else 1])
               for line in out.splitlines()[1:]}
    assert math.isclose(numbers['perplexity'], math.exp(numbers['loss']), rel_tol=1e-3)
    assert 5 < numbers['loss'] < 6 and 7 < numbers['bits per byte'] < 9  # hardly trained: about ln 257 = 5.55
    assert 'at most block_size' in run('evaluate.py', *options, '--stride=33', expect=1).err
    assert 'is a mixture' in run('evaluate.py', f'--out_dir={tmp_path}', '--dataset=a:0.5,b:0.5', expect=1).err
    assert 'no dataset' in run('evaluate.py', f'--out_dir={tmp_path}', '--dataset=nowhere', expect=1).err
