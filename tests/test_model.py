"""The model: GPT-2 to the last parameter, beside two other implementations of it, and every variant of it."""
import ast
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from common.extend import extend_context
from common.optimizers import configure_optimizers

TINY = dict(block_size=32, vocab_size=128, n_layer=2, n_head=4, n_embd=32)  # 128: no padding, as the peers have none
VARIANTS = {
    'gpt2': {},
    'no bias': dict(bias=False),
    'grouped heads': dict(n_kv_head=2),
    'rope': dict(position='rope', rope_theta=1e5),
    'rope linear': dict(position='rope', rope_type='linear', rope_factor=4.0),
    'rope llama3': dict(position='rope', rope_type='llama3', rope_factor=8.0, rope_original_context=16,
                        rope_low_freq_factor=0.5, rope_high_freq_factor=2.0),
    'rope yarn': dict(position='rope', rope_type='yarn', rope_factor=4.0, rope_attention_factor=1.2),
    'head_size': dict(head_size=12, n_kv_head=2),
    'no gains': dict(norm='rmsnorm', norm_gain=False, qk_norm=True),
    'embedding_norm': dict(embedding_norm=True),
    'rmsnorm': dict(norm='rmsnorm', norm_eps=1e-6),
    'qk_norm': dict(qk_norm=True),
    'relu2': dict(mlp='relu2'),
    'swiglu': dict(mlp='swiglu', n_mlp=96),
    'untied': dict(tie_embeddings=False),
    'zero_init': dict(zero_init=True, tie_embeddings=False),
    'softcap': dict(softcap=15.0),
    'dropout': dict(dropout=0.1),
    'all at once': dict(bias=False, n_kv_head=1, position='rope', norm='rmsnorm', qk_norm=True, mlp='swiglu',
                        n_mlp=48, tie_embeddings=False, zero_init=True, softcap=30.0),
}


def tiny(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**TINY | settings))


def batch(vocab_size=128, B=3, T=32):
    """Random tokens and their successors, (B, T) each."""
    ids = torch.randint(vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def train(model, x, y, steps, loss_of=lambda model, x, y: model(x, y)[1], optimizers=None):
    """The loss before each of `steps` steps."""
    optimizers = optimizers or configure_optimizers(model, 'adamw', 1e-2, 0.1, (0.9, 0.95))
    losses = []
    for _ in range(steps):
        loss = loss_of(model, x, y)
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


# GPT-2 ---------------------------------------------------------------------------------------------------------------

def test_gpt2_has_its_parameters_under_their_names():
    transformers = pytest.importorskip('transformers')
    with torch.device('meta'):  # shapes alone
        ours, theirs = GPT(GPTConfig()), transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert ours.get_num_params(non_embedding=False) == 124_439_808
    assert ours.get_num_params() == 124_439_808 - 1024 * 768
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    assert ours.lm_head.weight.shape == (50304, 768)


def test_padding_is_not_counted_when_untied():
    assert (tiny(vocab_size=100, tie_embeddings=False).get_num_params()
            == tiny(vocab_size=100).get_num_params() + 100 * TINY['n_embd'])


def test_initialisation():
    model = tiny(n_embd=256, n_layer=8)
    x, y = batch()
    assert model(x, y)[1].item() == pytest.approx(math.log(128), abs=0.2)
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std['transformer.wte.weight'] == pytest.approx(0.02, rel=0.02)
    assert std['transformer.wpe.weight'] == pytest.approx(0.01, rel=0.02)
    assert std['transformer.h.3.mlp.c_fc.weight'] == pytest.approx(0.02, rel=0.02)
    assert std['transformer.h.3.mlp.c_proj.weight'] == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.02)
    assert std['transformer.h.3.attn.c_proj.weight'] == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.02)
    assert std['transformer.ln_f.weight'] == std['transformer.h.3.mlp.c_fc.bias'] == 0
    zero = tiny(zero_init=True, tie_embeddings=False)
    assert zero(x, y)[1].item() == pytest.approx(math.log(128), abs=1e-5)  # an untied head at zero


# beside other implementations ----------------------------------------------------------------------------------------

def nanogpt():
    """nanoGPT's model.py as a module, from its checkout in the environment variable NANOGPT."""
    file = Path(os.environ.get('NANOGPT', ''), 'model.py')
    if not file.is_file() or 'NANOGPT' not in os.environ:
        pytest.skip('compares with nanoGPT: NANOGPT=FOLDER names a checkout of it')
    spec = importlib.util.spec_from_file_location('nanogpt_model', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def twin(name, bias=True):
    """A model of the peer with our weights, ours, and how the peer computes its loss."""
    ours = tiny(bias=bias)
    with torch.no_grad():  # biases and gains leave their zeros and ones, or a mistake in them would not show
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    if name == 'nanoGPT':
        peer = nanogpt()
        theirs = peer.GPT(peer.GPTConfig(**TINY, dropout=0.0, bias=bias))
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs, lambda model, x, y: model(x, y.contiguous())[1]
    transformers = pytest.importorskip('transformers')
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    theirs.load_state_dict({k: w.t() if 'c_' in k and w.dim() == 2 else w for k, w in ours.state_dict().items()})
    return ours, theirs, lambda model, x, y: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


@pytest.mark.parametrize('name, bias', [('transformers', True), ('nanoGPT', True), ('nanoGPT', False)])
def test_the_loss_and_three_steps_of_adamw_are_the_peers(name, bias):
    ours, theirs, their_loss = twin(name, bias)
    x, y = batch()
    if name == 'nanoGPT':
        their_optimizer = theirs.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    else:
        decay = [p for p in theirs.parameters() if p.dim() >= 2]
        rest = [p for p in theirs.parameters() if p.dim() < 2]
        their_optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0)],
                                            1e-2, (0.9, 0.95))
    losses = train(ours, x, y, 4)  # before the first step, and after each of three
    assert losses == pytest.approx(train(theirs, x, y, 4, their_loss, [their_optimizer]), abs=1e-4)
    assert losses[3] < losses[0] - 0.3


# the forward pass ----------------------------------------------------------------------------------------------------

def test_overfits_one_batch():
    x, y = batch()
    assert train(tiny(), x, y, 60)[-1] < 0.1


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_learns_and_writes(variant):
    model = tiny(**VARIANTS[variant])
    x, y = batch()
    losses = train(model, x, y, 20)
    assert losses[0] == pytest.approx(math.log(128), abs=0.3) and losses[-1] < 0.75 * losses[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    ids = model.eval().generate(x[:, :5], 40)  # past the end of the context
    assert ids.shape == (3, 45) and (ids[:, :5] == x[:, :5]).all()


def test_every_field_has_a_variant():
    tested = {field for settings in VARIANTS.values() for field in settings} | set(TINY)
    tested |= {'causal', 'lora_rank', 'lora_alpha'}  # in test_objectives.py and test_lora.py
    assert tested == {field.name for field in fields(GPTConfig)}


@pytest.mark.parametrize('variant', VARIANTS)
def test_no_token_sees_a_later_one(variant):
    model = tiny(**VARIANTS[variant] | dict(zero_init=False)).eval()
    x, y = batch()
    changed = x.clone()
    changed[:, 20] = (x[:, 20] + 1) % 128
    before, after = model(x, y)[0], model(changed, y)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_padding_is_never_scored_or_sampled():
    model = tiny(vocab_size=70)  # the weights have 128 rows
    with torch.no_grad():
        model.transformer.wte.weight[70:] = 100 * model.transformer.wte.weight[69]  # it would win if it could
    x, y = batch(vocab_size=70)
    logits, loss = model(x, y)
    assert logits.shape == (3, 32, 70) and model(x)[0].shape == (3, 1, 70)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), y.flatten()).item(), abs=1e-5)
    for temperature in (0, 1, 100):
        assert model.generate(x, 20, temperature=temperature).max() < 70


@pytest.mark.parametrize('softcap', [0.0, 15.0])
def test_the_padding_changes_neither_loss_nor_gradient(softcap):
    """Beside logits cut off at the vocabulary's end."""
    x, y = batch(vocab_size=70)
    y = y.where(y > 10, -1)
    gradients, losses = [], []
    for cut in (True, False):
        model = tiny(vocab_size=70, softcap=softcap)  # the weights have 128 rows
        logits, loss = model(x, y)
        if cut:
            loss = F.cross_entropy(model.head(model.hidden(x)).flatten(0, 1), y.flatten(), ignore_index=-1)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_rope_tables_stay_float32_on_every_device():
    expected = tiny(position='rope').rope_cos
    assert expected.shape == (32, 4) and expected.dtype == torch.float32
    assert torch.equal(tiny(position='rope').bfloat16().rope_cos, expected)
    with torch.device('meta'):
        model = GPT(GPTConfig(**TINY, position='rope'))
    assert model.rope_cos.device.type == 'meta'
    assert torch.equal(model.to_empty(device='cpu').rope_cos, expected)
    assert not [name for name in model.state_dict() if 'rope' in name]
    positions = torch.arange(32)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(expected, positions.cos())
    model.crop_block_size(16)
    assert torch.equal(model.rope_cos, expected[:16])
    extend_context(model, 64, rope_theta=1e6)
    assert model.rope_cos.shape == (64, 4) and not torch.equal(model.rope_cos[:16], expected[:16])


def test_model_py_works_alone(tmp_path):
    """Copied out of the repository, with no other package than torch."""
    shutil.copy(Path(GPT.__init__.__code__.co_filename), tmp_path)
    code = ('import sys, torch; torch_alone = set(sys.modules); from model import GPT, GPTConfig\n'
            'print({name.split(".")[0] for name in set(sys.modules) - torch_alone} - sys.stdlib_module_names)\n'
            'x = torch.zeros(1, 8, dtype=int); GPT(GPTConfig(8, 65, 1, 1, 8))(x, x)[1].backward()')
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) <= {'model', 'torch'}


def test_targets_of_minus_one_are_not_scored():
    model, (x, y) = tiny(), batch()
    some = y.where(torch.rand(y.shape, generator=torch.Generator().manual_seed(2)) < 0.5, -1)
    every = model.token_losses(x, y)  # (B, T)
    assert every.mean().item() == pytest.approx(model(x, y)[1].item(), abs=1e-5)
    each = model.token_losses(x, some)
    assert (each[some == -1] == 0).all()
    torch.testing.assert_close(each[some != -1], every[some != -1])
    assert model(x, some)[1].item() == pytest.approx(every[some != -1].mean().item(), abs=1e-5)
    assert model(x, some, return_logits=False)[0] is None


@pytest.mark.parametrize('variant', ['gpt2', 'rope'])
def test_positions_and_mask_pack_two_texts_in_a_row(variant):
    model = tiny(**VARIANTS[variant]).eval()
    x, y = batch(B=1)
    positions = torch.arange(32) % 16  # two texts of 16
    text = torch.arange(32) // 16
    mask = (text[:, None] == text) & torch.ones(32, 32, dtype=torch.bool).tril()
    packed = model(x, y, positions=positions, mask=mask)[0]
    torch.testing.assert_close(packed, torch.cat([model(x[:, i:i + 16], y[:, i:i + 16])[0] for i in (0, 16)], dim=1))
    rows = model(x.repeat(2, 1), y.repeat(2, 1), positions=positions.repeat(2, 1), mask=mask)[0]  # (B, T) positions
    torch.testing.assert_close(rows[[1]], packed)


def test_activation_checkpointing_changes_no_gradient():
    x, y = batch()
    gradients = []
    for recompute in (False, True):
        model = tiny()
        model.activation_checkpointing = recompute
        model(x, y)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('variant', ['gpt2', 'all at once'])
def test_a_bfloat16_residual_stream(variant):
    """Inside bfloat16's autocast alone, and nearly the same loss."""
    model, (x, y), types = tiny(**VARIANTS[variant] | dict(zero_init=False)), batch(), []
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: types.append(args[0].dtype))
    losses = [model(x, y)[1].item()]
    for dtype in torch.float16, torch.bfloat16:
        with torch.autocast('cpu', dtype):
            losses.append(model(x, y)[1].item())
    assert types == [torch.float32, torch.float32, torch.bfloat16]  # float16 would overflow
    assert losses == pytest.approx([losses[0]] * 3, abs=0.01)
    with torch.autocast('cpu', torch.bfloat16):
        torch.compile(model, backend='aot_eager', fullgraph=True)(x, y)[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_crop_block_size():
    model, (x, y) = tiny(), batch(T=16)
    before = model(x, y)[1].item()
    model.crop_block_size(16)
    assert model.config.block_size == 16 and model.transformer.wpe.weight.shape == (16, 32)
    assert model(x, y)[1].item() == before
    with pytest.raises(ValueError, match='block_size=32 is longer'):
        model.crop_block_size(32)
    with pytest.raises(ValueError, match='17 tokens do not fit into block_size=16'):
        model(batch(T=17)[0])


def test_another_length_compiles_whole():
    """As dpo.py's pairs have it: the second length is traced as a symbol."""
    model = tiny(n_layer=1)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for T in 8, 12, 16, 1:
        x, y = batch(T=T)
        torch.testing.assert_close(compiled(x, y)[1], model(x, y)[1])


@pytest.mark.parametrize('settings, words', [
    (dict(n_head=5), 'n_embd=32 must be a multiple of n_head=5'),
    (dict(n_kv_head=3), 'n_head=4 must be a multiple of n_kv_head=3'),
    (dict(position='alibi'), "position='alibi' is not one of learned, rope"),
    (dict(norm='batchnorm'), "norm='batchnorm' is not one of"),
    (dict(mlp='relu'), "mlp='relu' is not one of"),
    (dict(position='rope', n_embd=36, n_head=4), 'even head size'),
    (dict(n_layer=0), 'n_layer=0 must be at least 1'),
    (dict(vocab_size=-3), 'vocab_size=-3 must be at least 1'),
    (dict(dropout=1.0), 'dropout=1.0'),
])
def test_impossible_configurations_name_the_field(settings, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**TINY | settings)
