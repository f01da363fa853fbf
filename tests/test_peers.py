"""Checkpoints of nanoGPT and of build-nanogpt: read for sampling and training, and nothing in them is run."""
import subprocess
import sys

import pytest
import torch

from common import checkpoint
from conftest import TINY, environment, run
from data.errors import UserError
from model import GPT, GPTConfig
from test_model import nanogpt

FIELDS = dict(block_size=32, n_layer=2, n_head=4, n_embd=32)

# build-nanogpt's train_gpt2.py is its own __main__, and pickles the class that is defined there
BUILD_NANOGPT = '''
import sys, torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int = 32
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32

weights = torch.load(sys.argv[1])
torch.save({'model': weights, 'config': GPTConfig(block_size=16), 'step': 5, 'val_loss': 3.2}, sys.argv[2])
'''


def weights(vocab_size, block_size=32):
    torch.manual_seed(0)
    return GPT(GPTConfig(**FIELDS | dict(vocab_size=vocab_size, block_size=block_size)))


def nanogpt_checkpoint(model, path, rows, **model_args):
    """What nanoGPT's train.py saves of a compiled model; its embedding has as many rows as its vocab_size."""
    state = {'_orig_mod.' + k: w[:rows] if 'wte' in k or 'lm_head' in k else w for k, w in model.state_dict().items()}
    state['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32).tril()
    torch.save({'model': state, 'optimizer': {}, 'model_args': FIELDS | dict(bias=True, dropout=0.0, vocab_size=rows)
                | model_args, 'iter_num': 7, 'best_val_loss': torch.tensor(1.5), 'config': dict(dataset='openwebtext')}, path)
    return str(path)


@pytest.mark.parametrize('rows', [50257, 50304])
def test_nanogpt(rows, tmp_path):
    ours = weights(50257).eval()
    model, tokenizer = checkpoint.load_model(nanogpt_checkpoint(ours, tmp_path / 'ckpt.pt', rows), '', 'cpu')
    assert tokenizer == 'gpt2' and model.config.vocab_size == 50257  # nobody scores or samples the 47 others
    idx = torch.arange(20)[None]
    assert torch.equal(model(idx)[0], ours(idx)[0]) and model(idx)[0].shape == (1, 1, 50257)
    assert checkpoint.pretrained(str(tmp_path / 'ckpt.pt'), dropout=0.1)[0].config.dropout == 0.1


def test_nanogpt_itself(tmp_path):
    """Its own model, with large weights, for its GELU is not quite ours."""
    peer = nanogpt()
    torch.manual_seed(0)
    theirs = peer.GPT(peer.GPTConfig(**FIELDS, vocab_size=50304, dropout=0.0, bias=False)).eval()
    torch.save({'model': theirs.state_dict(), 'model_args': dict(FIELDS, vocab_size=50304, dropout=0.0, bias=False)},
               tmp_path / 'ckpt.pt')
    model, _ = checkpoint.load_model(str(tmp_path / 'ckpt.pt'), '', 'cpu')
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(model(idx)[0], theirs(idx)[0][..., :50257], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('name', ['__main__', 'train_gpt2'])
def test_build_nanogpt(name, tmp_path):
    ours = weights(50304, block_size=16).eval()
    torch.save(ours.state_dict(), tmp_path / 'weights.pt')
    script = BUILD_NANOGPT.replace('weights =', f'GPTConfig.__module__ = {name!r}\nsys.modules[{name!r}] = '
                                   f'sys.modules["__main__"]\nweights =')
    path = tmp_path / 'model_00005.pt'
    subprocess.run([sys.executable, '-c', script, tmp_path / 'weights.pt', path], env=environment(), check=True)
    model, tokenizer = checkpoint.load_model(str(path), '', 'cpu')
    assert tokenizer == 'gpt2' and model.config.block_size == 16
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx)[0], ours(idx)[0][..., :50257])


def test_nothing_is_run(tmp_path):
    class Config:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')
    torch.save({'model': {}, 'config': Config()}, tmp_path / 'bad.pt')
    with pytest.raises(UserError, match='bad.pt is not a readable checkpoint') as exit:
        checkpoint.load_model(str(tmp_path / 'bad.pt'), '', 'cpu')
    assert '\n' not in str(exit.value) and not (tmp_path / 'ran').exists()


def test_other_files(tmp_path):
    torch.save({'weights': torch.ones(3)}, tmp_path / 'other.pt')
    with pytest.raises(UserError, match='other.pt holds no GPT'):
        checkpoint.load_model(str(tmp_path / 'other.pt'), '', 'cpu')
    torch.save([1, 2], tmp_path / 'list.pt')
    with pytest.raises(UserError, match='list.pt holds no GPT'):
        checkpoint.load_model(str(tmp_path / 'list.pt'), '', 'cpu')
    characters = nanogpt_checkpoint(weights(65), tmp_path / 'characters.pt', 65)
    with pytest.raises(UserError, match='a vocabulary of 65 ids, and no tokenizer here has as many'):
        checkpoint.load_model(characters, '', 'cpu')


def test_sampling_and_training_from_them(tmp_path, dataset):
    path = nanogpt_checkpoint(weights(257), tmp_path / 'ckpt.pt', 257)  # as many ids as the tokenizer of bytes
    sample = ['--num_samples=1', '--max_new_tokens=5']
    assert run('sample.py', f'--init_from={path}', *sample).out == run('sample.py', f'--out_dir={tmp_path}', *sample).out
    train = [*TINY, '--n_head=4', f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--max_iters=2']
    assert 'step 2/2' in run('train.py', *train, f'--init_from={path}').out
    resume = run('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--init_from=resume', expect=1)
    assert resume.err.strip().endswith(f'--init_from={path} starts from them') and 'Traceback' not in resume.err
