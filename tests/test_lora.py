"""Adapters: they alone are trained, and merged they are the weights that any other tool reads."""

import copy
import shutil
from dataclasses import asdict

import pytest
import torch

from common import checkpoint, lora
from conftest import TINY, losses, run_ranks
from data.errors import UserError
from model import GPT, GPTConfig
from plan import memory
from test_distributed import run_here


def tiny(dataset, out_dir, *args):
    return 'train.py', *TINY, f'--dataset={dataset}', f'--out_dir={out_dir}', *args


def write_base(path, **changes):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32) | changes))
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'bytes'}, path)
    return model


@pytest.mark.parametrize('changes', [{}, dict(bias=False, mlp='swiglu', position='rope', n_kv_head=1)], ids=['gpt2', 'llama'])
def test_adapters_start_as_nothing_and_merge_into_the_weights(changes):
    torch.manual_seed(2)
    base = GPT(GPTConfig(**dict(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32) | changes))
    x, model = torch.randint(0, 257, (2, 32)), lora.add(copy.deepcopy(base), rank=4, alpha=12.0)
    assert torch.equal(model(x, x)[0], base(x, x)[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f'transformer.h.{i}.{name}.lora_{ab}' for i in (0, 1) for ab in 'ab'
                       for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    for name, p in model.named_parameters():
        if name.endswith('lora_b'):
            torch.nn.init.normal_(p, std=0.1)
    a, b = model.transformer.h[1].attn.c_proj.lora_a, model.transformer.h[1].attn.c_proj.lora_b
    by_hand = base.transformer.h[1].attn.c_proj.weight + 12 / 4 * b @ a  # section 4.1 of the paper
    logits, merged = model(x, x)[0], lora.merge(copy.deepcopy(model))
    assert (logits - base(x, x)[0]).abs().max() > 0.1
    torch.testing.assert_close(merged(x, x)[0], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.transformer.h[1].attn.c_proj.weight, by_hand)
    assert merged.config == base.config and merged.state_dict().keys() == base.state_dict().keys()


def test_a_finetuning_run_changes_the_adapters_alone(dataset, tmp_path):
    """On a shorter context. Stopped and resumed it ends bit for bit where one that ran through does; two processes
    compute the same; its text and its folder have the adapters merged."""
    base = write_base(tmp_path / 'base.pt', block_size=48)
    settings = [f'--init_from={tmp_path}/base.pt', '--lora_rank=4', '--learning_rate=3e-2', '--dropout=0.1',
                '--keep_checkpoints=2', '--activation_checkpointing']
    run_here(*tiny(dataset, tmp_path / 'one', *settings))
    saved, one = checkpoint.load(tmp_path / 'one' / 'ckpt.pt', resume=True), losses(tmp_path / 'one')
    assert one[20] < one[1] - 0.05
    before = base.state_dict() | {'transformer.wpe.weight': base.transformer.wpe.weight[:32]}
    assert all(torch.equal(saved['model'][name], w) for name, w in before.items())
    adapters = {name for name in saved['model'] if 'lora' in name}
    assert all(saved['model'][name].any() for name in adapters) and saved['optimizer']['state'].keys() == adapters

    (tmp_path / 'cut').mkdir()
    shutil.copy(tmp_path / 'one' / 'ckpt_000010.pt', tmp_path / 'cut' / 'ckpt.pt')
    run_here(*tiny(dataset, tmp_path / 'cut', *settings[2:], '--init_from=resume'))  # its rank is the checkpoint's
    assert losses(tmp_path / 'cut') == {step: one[step] for step in range(11, 21)}
    again = checkpoint.load(tmp_path / 'cut' / 'ckpt.pt')['model']
    assert all(torch.equal(again[name], w) for name, w in saved['model'].items())

    model, tokenizer = checkpoint.load_model('resume', str(tmp_path / 'one'), 'cpu')
    x, trained = torch.randint(0, 257, (2, 32)), checkpoint.model_from(saved).eval()
    assert trained.config.lora_rank == 4 and not model.config.lora_rank
    torch.testing.assert_close(model(x, x)[0], trained(x, x)[0], atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / 'folder', tokenizer)
    torch.testing.assert_close(GPT.from_pretrained(str(tmp_path / 'folder'))(x, x)[0], model(x, x)[0])


def test_a_longer_context_is_frozen_too(dataset, tmp_path):
    write_base(tmp_path / 'base.pt', block_size=24)  # learned positions, interpolated
    settings = ['--lora_rank=4', '--learning_rate=3e-2', '--max_iters=4', '--eval_interval=2', '--keep_checkpoints=2']
    run_here(*tiny(dataset, tmp_path / 'one', *settings, f'--init_from={tmp_path}/base.pt'))
    run_here(*tiny(dataset, tmp_path / 'cut', *settings, f'--init_from=resume:{tmp_path}/one/ckpt_000002.pt'))
    one, half, cut = (checkpoint.load(tmp_path / name)['model'] for name in ('one/ckpt.pt', 'one/ckpt_000002.pt', 'cut/ckpt.pt'))
    assert all(torch.equal(one[name], w) for name, w in cut.items())
    assert torch.equal(one['transformer.wpe.weight'], half['transformer.wpe.weight'])


@pytest.mark.parametrize('layout', ['ddp', 'fsdp'])
def test_adapters_train_on_two_processes_compiled(dataset, tmp_path, traced, layout):
    write_base(tmp_path / 'base.pt', n_layer=1)
    settings = [f'--init_from={tmp_path}/base.pt', '--lora_rank=4', '--learning_rate=3e-2', '--max_iters=4', '--n_layer=1']
    run_here(*tiny(dataset, tmp_path / 'one', *settings))
    run_ranks(*tiny(dataset, tmp_path / 'two', *settings, traced, f'--parallel={layout}', '--compile=True'), processes=2)
    one, two = losses(tmp_path / 'one'), losses(tmp_path / 'two')
    assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-3)


@pytest.mark.parametrize('settings, line', [
    (['--lora_rank=4'], 'lora_rank=4 adapts trained weights: name them with --init_from'),
    (['--lora_rank=4', '--optimizer=muon', '--init_from=BASE'], 'lora_rank needs --optimizer=adamw'),
    (['--lora_rank=-1'], 'lora_rank')])
def test_adapters_of_nothing_are_refused(dataset, tmp_path, settings, line):
    write_base(tmp_path / 'base.pt')
    settings = [setting.replace('BASE', str(tmp_path / 'base.pt')) for setting in settings]
    with pytest.raises(UserError, match=line):
        run_here(*tiny(dataset, tmp_path / 'out', *settings))


def test_the_plan_counts_the_adapters_gradients_and_moments_alone():
    config = dict(parallel='ddp', optimizer='adamw', replicas=1, dtype='float32', compile=False, batch_size=1,
                  activation_checkpointing=False)
    with torch.device('meta'):
        model = GPT(GPTConfig(64, 257, n_layer=2, n_head=2, n_embd=32, lora_rank=4))
    n = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))  # rank * (columns + rows) of each matrix
    parts = memory(model, config, gpus=1)
    assert (parts['gradients'], parts['optimizer']) == (4 * n, 8 * n)
    assert parts['weights'] == 4 * sum(p.numel() for p in model.parameters()) > 10 * parts['gradients'] / 4
