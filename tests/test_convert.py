"""Weights to and from transformers: the same logits both ways, and a tokenizer with the same ids."""
import copy
import json
import os
import random
import resource
import runpy
import subprocess
import sys
from dataclasses import asdict, dataclass, fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint, convert
from common.extend import extend_context
from conftest import ROOT, SHARED, TINY as TINY_RUN, environment, needs_gpt2, run
from data.errors import UserError
from data.tokenizer import get_tokenizer, tokenizer_files
from model import GPT, GPTConfig, rope_frequencies

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')

TINY = dict(block_size=32, vocab_size=257, n_layer=2, n_head=4, n_embd=32)
LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', n_mlp=88)
NANOCHAT = dict(position='rope', norm='rmsnorm', norm_gain=False, qk_norm=True, mlp='relu2', embedding_norm=True,
                bias=False)
FAST = {name: value for name, value in runpy.run_path(str(ROOT / 'config' / 'gpt2_fast.py')).items()
        if name in {field.name for field in fields(GPTConfig)}}
OURS = {  # settings, and the class that they become
    'gpt2': (dict(norm_eps=1e-3), 'GPT2LMHeadModel'),
    'gpt2 bias=False': (dict(bias=False), 'GPT2LMHeadModel'),
    'gpt2 untied': (dict(tie_embeddings=False), 'GPT2LMHeadModel'),
    'gpt2 n_mlp': (dict(n_mlp=48), 'GPT2LMHeadModel'),
    'llama': (dict(bias=False, tie_embeddings=False, rope_theta=1e5) | LLAMA, 'LlamaForCausalLM'),
    'llama tied': (dict(bias=False, norm_eps=1e-3) | LLAMA, 'LlamaForCausalLM'),
    'llama grouped heads': (dict(bias=False, n_kv_head=2) | LLAMA, 'LlamaForCausalLM'),
    'llama biases': (dict(bias=True, n_kv_head=1) | LLAMA, 'LlamaForCausalLM'),
    'qwen3': (dict(bias=False, qk_norm=True, tie_embeddings=False, rope_theta=1e6) | LLAMA, 'Qwen3ForCausalLM'),
    'qwen3 grouped heads': (dict(bias=False, qk_norm=True, n_kv_head=2) | LLAMA, 'Qwen3ForCausalLM'),
    'llama head_size': (dict(bias=False, head_size=12) | LLAMA, 'LlamaForCausalLM'),
    'llama llama3': (dict(bias=False, rope_type='llama3', rope_factor=8.0, rope_original_context=24,
                          rope_low_freq_factor=0.5, rope_high_freq_factor=2.0) | LLAMA, 'LlamaForCausalLM'),
    'qwen3 yarn': (dict(bias=False, qk_norm=True, head_size=16, rope_type='yarn', rope_factor=4.0,
                        rope_original_context=16) | LLAMA, 'Qwen3ForCausalLM'),
    'qwen3 linear': (dict(bias=False, qk_norm=True, rope_type='linear', rope_factor=2.5) | LLAMA, 'Qwen3ForCausalLM'),
    'the fast recipe': (FAST, 'ApertusForCausalLM'),
    'apertus yarn': (FAST | dict(n_kv_head=2, head_size=12, n_mlp=80, tie_embeddings=False, rope_type='yarn', rope_factor=4.0,
                                 rope_original_context=16), 'ApertusForCausalLM'),
    'nanochat': (dict(softcap=15.0, tie_embeddings=False, norm_eps=1e-6) | NANOCHAT, 'NanoChatForCausalLM'),
    'nanochat, as unlike it as can be': (dict(n_kv_head=2, head_size=12, n_mlp=80, rope_theta=1e5) | NANOCHAT,
                                         'NanoChatForCausalLM'),
}
SMALL = dict(vocab_size=257, bos_token_id=256, eos_token_id=256)
SMALL_LLAMA = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=88,
                   max_position_embeddings=32, initializer_range=0.3) | SMALL
THEIRS = {
    'gpt2': lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3, **SMALL),
    'gpt2 n_inner': lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, n_inner=40,
                                                    tie_word_embeddings=False, initializer_range=0.3, **SMALL),
    'llama': lambda: transformers.LlamaConfig(**SMALL_LLAMA),
    'llama grouped': lambda: transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-3,
                                                      rope_parameters=dict(rope_type='default', rope_theta=2e5),
                                                      **SMALL_LLAMA),
    'llama attention_bias': lambda: transformers.LlamaConfig(attention_bias=True, **SMALL_LLAMA),
    'qwen3': lambda: transformers.Qwen3Config(num_key_value_heads=2, head_dim=8, **SMALL_LLAMA),
    'qwen3 attention_bias': lambda: transformers.Qwen3Config(
        attention_bias=True, num_key_value_heads=4, head_dim=16, **SMALL_LLAMA),
    'llama linear': lambda: transformers.LlamaConfig(rope_parameters=dict(rope_type='linear', factor=3.0), **SMALL_LLAMA),
    'llama yarn': lambda: transformers.LlamaConfig(rope_parameters=dict(
        rope_type='yarn', factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5,
        mscale=1.5, mscale_all_dim=0.7, rope_theta=1e3), **SMALL_LLAMA),
    'llama yarn attention_factor': lambda: transformers.LlamaConfig(rope_parameters=dict(
        rope_type='yarn', factor=4.0, attention_factor=1.7), **SMALL_LLAMA),
    'apertus': lambda: transformers.ApertusConfig(hidden_act='relu2', num_key_value_heads=2, attention_bias=True,
                                                  **SMALL_LLAMA),
    'nanochat': lambda: transformers.NanoChatConfig(**SMALL_LLAMA),
    'nanochat grouped': lambda: transformers.NanoChatConfig(num_key_value_heads=1, final_logit_softcapping=None,
                                                            attention_bias=True, tie_word_embeddings=True, **SMALL_LLAMA),
}
IDS = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))


def scramble(model):
    """Weights, biases and gains that are all different, so that nothing can be mixed up unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def theirs(name, folder):
    """A model of transformers' with random weights, which it has written into the folder."""
    model = scramble(transformers.AutoModelForCausalLM.from_config(THEIRS[name]()))
    model.save_pretrained(folder)
    return model


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def assert_same_logits(ours, theirs, **how):
    expected = theirs(IDS).logits
    logits, _ = ours(IDS, IDS)
    assert expected.std() > 0.5  # the comparison means something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('name', OURS)
def test_ours_in_transformers_and_back(name, tmp_path):
    settings, kind = OURS[name]
    ours = scramble(GPT(GPTConfig(**TINY | settings)))
    ours.save_pretrained(tmp_path, 'bytes')
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == kind and not any(info[k] for k in ('missing_keys', 'unexpected_keys'))
    assert_same_logits(ours, theirs)
    back = GPT.from_pretrained(str(tmp_path), dropout=0.1).eval()
    assert_same_logits(back, theirs)
    assert asdict(back.config) == asdict(ours.config) | dict(dropout=0.1, zero_init=False) | (
        dict(bias=True) if kind == 'GPT2LMHeadModel' else {})  # whose biases are then zeros


@pytest.mark.parametrize('name', THEIRS)
def test_theirs_in_ours(name, tmp_path):
    theirs = scramble(transformers.AutoModelForCausalLM.from_config(THEIRS[name]()))
    theirs.save_pretrained(tmp_path, max_shard_size='20KB' if name == 'llama' else '1GB')  # in parts, as large ones
    assert (name == 'llama') == (tmp_path / 'model.safetensors.index.json').exists()
    assert_same_logits(GPT.from_pretrained(str(tmp_path)).eval(), theirs)


def test_the_hubs_gpt2_has_no_prefix_and_carries_masks(tmp_path):
    theirs = scramble(transformers.AutoModelForCausalLM.from_config(THEIRS['gpt2']()))
    theirs.save_pretrained(tmp_path)
    weights = {k.removeprefix('transformer.'): w for k, w in load_file(tmp_path / 'model.safetensors').items()}
    save_file(weights | {'h.0.attn.bias': torch.ones(1, 1, 32, 32).tril()}, tmp_path / 'model.safetensors')
    assert_same_logits(GPT.from_pretrained(str(tmp_path)).eval(), theirs)


# what has no counterpart ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, words', [
    (dict(n_kv_head=2), "n_kv_head=2"),
    (dict(norm='rmsnorm'), "norm='rmsnorm'"),
    (dict(mlp='relu2'), "mlp='relu2'"),
    (dict(softcap=15.0), 'softcap=15.0'),
    (dict(head_size=12), 'head_size=12'),
    (dict(embedding_norm=True), 'embedding_norm=True'),
    (LLAMA | dict(norm_gain=False), 'norm_gain=False'),
    (NANOCHAT | dict(norm_gain=True), 'norm_gain=True'),
    (FAST | dict(softcap=15.0), 'softcap=15.0'),
    (FAST | dict(norm='layernorm'), "norm='layernorm'"),
    (NANOCHAT | dict(rope_type='yarn'), "rope_type='yarn'"),
    (NANOCHAT | dict(bias=True), 'bias=True'),
    (dict(position='rope'), "norm='layernorm'"),
    (LLAMA | dict(softcap=15.0, bias=False), 'softcap=15.0'),
    (LLAMA | dict(qk_norm=True, bias=True), 'bias=True'),
    (dict(qk_norm=True), 'qk_norm=True'),
])
def test_ours_without_a_counterpart_name_the_field(settings, words, tmp_path):
    with pytest.raises(UserError, match=f'transformers has no class for {words}: '):
        GPT(GPTConfig(**TINY | settings)).save_pretrained(tmp_path / 'new', 'bytes')
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('settings', [{}, LLAMA, LLAMA | dict(qk_norm=True), FAST, NANOCHAT])
def test_a_field_that_no_family_lists_is_refused(settings, tmp_path):
    @dataclass
    class NewConfig(GPTConfig):
        window: int = 0
    settings = TINY | dict(bias=False) | settings
    model = GPT(NewConfig(**settings, window=16))
    with pytest.raises(UserError, match='transformers has no class for window=16: '):
        model.save_pretrained(tmp_path / 'new', 'bytes')
    GPT(NewConfig(**settings)).save_pretrained(tmp_path / 'old', 'bytes')


def test_every_field_is_in_a_family_or_changes_nothing():
    known = {field for family in convert.FAMILIES.values() for field in {**family.fields, **family.fixed}}
    known |= {'lora_rank', 'lora_alpha', 'causal'}  # adapters are merged before, and a model that is not causal is refused
    assert known | {*convert.TRAINING, 'bias'} == {field.name for field in fields(GPTConfig)}


@needs_gpt2
def test_the_wrong_tokenizer(tmp_path):
    with pytest.raises(UserError, match='the tokenizer gpt2 has 50257 ids, the model 257'):
        GPT(GPTConfig(**TINY)).save_pretrained(tmp_path)


@pytest.mark.parametrize('family, change, words', [
    ('gpt2', dict(activation_function='relu'), "activation_function='relu' has no counterpart"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True has no counterpart'),
    ('gpt2', dict(model_type='opt'), "model_type='opt' cannot be read, only gpt2, llama, qwen3"),
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu' has no counterpart"),
    ('llama', dict(head_dim=16), r'q_proj.weight has the shape \(32, 32\), and config.json asks for \(64, 32\)'),
    ('llama', dict(rope_parameters=dict(rope_type='llama3', factor=8.0)), 'rope_parameters=.*llama3.* has no low_freq_factor'),
    ('llama', dict(rope_scaling=dict(type='dynamic', factor=2.0), rope_parameters=None), "rope_scaling of the type 'dynamic'"),
    ('llama', dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), 'rope_parameters=.*full_attention.* has no'),
    ('llama', dict(rope_scaling=dict(type='yarn', factor=2.0, truncate=False)), 'truncate=False has no counterpart'),
    ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5 has no counterpart'),
    ('nanochat', dict(rope_scaling=dict(type='linear', factor=2.0)), "rope_type='linear' has no counterpart in NanoChat"),
    ('qwen3', dict(layer_types=['full_attention', 'sliding_attention']), "layer_types=.*sliding_attention.* has no counterpart"),
    ('llama', dict(quantization_config=dict(quant_method='fp8')), 'config.json: quantization_config: quantised weights'),
    ('llama', dict(attention_bias=True), r'q_proj.bias.* and 5 more are missing'),
    ('llama', dict(num_hidden_layers=1), r'no place for: model.layers.1.* left over'),
    ('llama', dict(num_hidden_layers=10**9), '1000000000 layers, and there are only'),
    ('llama', dict(hidden_size=10**30), 'hidden_size=10{30} is not an int of 32 bits'),
    ('llama', dict(hidden_size=None), 'hidden_size=None is not an int'),
    ('llama', dict(hidden_size='32'), "hidden_size='32' is not an int"),
    ('llama', dict(hidden_size=True), 'hidden_size=True is not an int'),
    ('llama', dict(rms_norm_eps=float('nan')), 'rms_norm_eps=nan is not a finite float'),
    ('llama', dict(num_attention_heads=-4), 'n_head=-4 must be at least 1'),
    ('llama', dict(max_position_embeddings=2**30), 'a context of 1073741824 tokens'),
    ('llama', dict(model_type=['llama']), r"model_type=\['llama'\] cannot be read"),
    ('gpt2', dict(n_head=3), 'n_embd=32 must be a multiple of n_head=3'),
    ('qwen3', dict(use_sliding_window=True), 'use_sliding_window=True has no counterpart'),
    ('llama', dict(num_hidden_layers=3), 'model.layers.2.* and 6 more are missing'),
    ('llama', dict(vocab_size=1000), r'embed_tokens.weight has the shape \(257, 32\), and config.json asks for \(1000, 32\)'),
    ('llama', dict(intermediate_size=64), r'gate_proj.weight has the shape \(88, 32\), and config.json asks for \(64, 32\)'),
])
def test_theirs_without_a_counterpart_name_the_field(family, change, words, tmp_path):
    theirs(family, tmp_path)
    edit(tmp_path / 'config.json', **change)
    with pytest.raises(UserError, match=words) as exit:
        GPT.from_pretrained(str(tmp_path))
    assert '\n' not in str(exit.value)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match='holds no config.json'):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match='test_convert.py is a file: give a .pt file, a folder, or a name'):
        GPT.from_pretrained(__file__)
    GPT(GPTConfig(**TINY)).save_pretrained(tmp_path, 'bytes')
    (tmp_path / 'model.safetensors').write_bytes(b'damaged')
    with pytest.raises(UserError, match='damaged'):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match='config.json is no JSON'):
        GPT.from_pretrained(str(tmp_path))


def test_rope_scaling_goes_before_rope_parameters(tmp_path):
    """A model card tells people to add it, and transformers takes it; its theta then is the one beside it, or 10,000."""
    theirs('llama grouped', tmp_path)  # its rope_parameters have a theta of 200,000
    edit(tmp_path / 'config.json', rope_scaling=dict(type='yarn', factor=4.0, original_max_position_embeddings=8))
    assert_same_logits(GPT.from_pretrained(str(tmp_path)).eval(),
                       transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize('family, change, words', [
    ('llama', lambda w: w.pop('model.layers.0.mlp.up_proj.weight'), 'model.layers.0.mlp.up_proj.weight is missing'),
    ('llama attention_bias', lambda w: w.pop('model.layers.1.self_attn.k_proj.bias'), 'self_attn.k_proj.bias is missing'),
    ('qwen3', lambda w: w.pop('model.layers.1.self_attn.q_norm.weight'), 'self_attn.q_norm.weight is missing'),
    ('gpt2', lambda w: w.pop('transformer.h.1.ln_2.bias'), 'transformer.h.1.ln_2.bias is missing'),
    ('llama', lambda w: w.update({'model.extra.weight': torch.ones(3)}), 'no place for: model.extra.weight is left over'),
    ('llama', lambda w: w.update({'model.norm.weight': torch.ones(32, dtype=torch.int8)}), 'model.norm.weight is torch.int8'),
    ('llama', lambda w: w.update({'model.norm.weight': torch.ones(32).to(torch.float8_e4m3fn)}), 'is torch.float8_e4m3fn'),
    ('llama', lambda w: w['model.norm.weight'].fill_(float('nan')), 'model.norm.weight has values that are not finite'),
    ('gpt2', lambda w: w.update({'lm_head.weight': torch.ones(257, 32)}), 'tie_word_embeddings is true, but lm_head.weight'),
])
def test_weights_that_do_not_fit_are_named(family, change, words, tmp_path):
    theirs(family, tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    change(weights)
    save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=words) as error:
        GPT.from_pretrained(str(tmp_path))
    assert '\n' not in str(error.value)


def test_files_that_are_damaged_or_foreign(tmp_path):
    def expect(words):
        with pytest.raises(UserError, match=words) as error:
            GPT.from_pretrained(str(tmp_path))
        assert '\n' not in str(error.value)

    model = scramble(GPT(GPTConfig(**TINY)))
    model.save_pretrained(tmp_path, 'bytes')
    config, file = tmp_path / 'config.json', tmp_path / 'model.safetensors'
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    expect('model.safetensors is damaged or incomplete')
    file.rename(tmp_path / 'pytorch_model.bin')
    expect('holds no model.safetensors, only pytorch_model.bin: .*save_pretrained')
    outside = tmp_path.parent / f'{tmp_path.name}.safetensors'
    outside.write_bytes(whole)
    for names in (f'../{outside.name}', str(outside), '.', '', 7, None, ['model.safetensors']):
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': names}}))
        expect('weight_map must name .safetensors files beside it')
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map"')
    expect('index.json is no JSON')
    for content, words in (('[' * 100_000, 'is no JSON'), ('[]', 'holds no JSON object'), ('9' * 5000, 'is no JSON'),
                           ('\xff', 'is no JSON'), (json.dumps({'model_type': 'gpt2'}), 'config.json has no n_positions')):
        config.write_bytes(content.encode('latin-1'))
        expect(words)


# a thousand accidents ------------------------------------------------------------------------------------------------

DEEP = json.loads('[' * 900 + ']' * 900)
ODD = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.0, -1.5, 1e300, float('nan'), float('inf'), '', 'x', '../x',
       [], [1], {}, {'a': 1}, 'gpt2', 'default', 'yarn', 'llama3', 'linear', DEEP, ['full_attention'], {'rope_type': 'yarn'}]


def mutated(value, chance):
    """A copy of a JSON object in which one entry, anywhere, is gone or something else."""
    value = copy.copy(value)
    key = chance.choice(list(value))
    if isinstance(value[key], dict) and value[key] and chance.random() < 0.7:
        value[key] = mutated(value[key], chance)
    elif chance.random() < 0.2:
        del value[key]
    else:
        value[key] = chance.choice(ODD)
    return value


@pytest.mark.parametrize('family', ['gpt2', 'llama yarn', 'qwen3', 'nanochat'])
def test_a_config_with_any_entry_changed_loads_or_is_one_line(family, tmp_path):
    theirs(family, tmp_path)
    config, chance = json.loads((tmp_path / 'config.json').read_text()), random.Random(0)
    config |= dict(rope_scaling=None, rope_theta=1e4, quantization_config=None, partial_rotary_factor=1.0)
    for _ in range(int(os.environ.get('FUZZ', 40))):
        changed = mutated(config, chance)
        (tmp_path / 'config.json').write_text(json.dumps(changed))
        try:
            GPT.from_pretrained(str(tmp_path))
        except UserError as error:
            assert len(str(error)) < 1000
        except Exception as error:
            raise AssertionError(f'{changed}') from error


def test_a_peers_checkpoint_with_any_entry_changed_loads_or_is_one_line(tmp_path):
    fields = dict(block_size=32, n_layer=2, n_head=4, n_embd=32, bias=True, dropout=0.0, vocab_size=257)
    weights = {k: w[:257] if k in convert.VOCABULARY else w for k, w in GPT(GPTConfig(**TINY)).state_dict().items()}
    whole, chance = {'model': weights, 'model_args': fields, 'iter_num': 3}, random.Random(0)
    odd = [value for value in ODD if value is not DEEP] + [torch.ones(3), torch.ones(32, 32), torch.ones(())]
    for _ in range(int(os.environ.get('FUZZ', 40))):
        changed = copy.copy(whole)
        where = chance.choice([changed, 'model', 'model_args', 'model_args'])
        if isinstance(where, str):
            changed[where] = where = dict(changed[where])
        key = chance.choice(list(where))
        where[key] = chance.choice(odd)
        if chance.random() < 0.2:
            del where[key]
        try:
            checkpoint.model_from(convert.from_peer(changed, 'ckpt.pt'))
        except UserError as error:
            assert 'ckpt.pt' in str(error)


# published models, at a toy's width ----------------------------------------------------------------------------------

PUBLISHED = {  # their config.json with the widths, layers and vocabulary of a toy; ratios of heads as they are
    'SmolLM2-135M': lambda: transformers.LlamaConfig(
        hidden_size=36, intermediate_size=96, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=100000, tie_word_embeddings=True, vocab_size=257,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3),
    'Qwen3-0.6B': lambda: transformers.Qwen3Config(
        hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1000000, tie_word_embeddings=True, vocab_size=257,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3),
    'Llama-3.2-1B': lambda: transformers.LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True, vocab_size=257,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=32,
                          rope_type='llama3'), bos_token_id=0, eos_token_id=0, initializer_range=0.3),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_model_is_loaded_trained_and_saved(name, tmp_path):
    model = scramble(transformers.AutoModelForCausalLM.from_config(PUBLISHED[name]()))
    model.to(torch.bfloat16).save_pretrained(tmp_path / 'in')  # as they are published
    ours = GPT.from_pretrained(str(tmp_path / 'in')).eval()
    assert_same_logits(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'in', dtype=torch.float32))
    x, y = IDS[:, :-1], IDS[:, 1:]
    before = ours(x, y)[1]
    before.backward()
    torch.optim.SGD(ours.parameters(), 0.01).step()
    assert ours(x, y)[1] < before
    ours.save_pretrained(tmp_path / 'out', 'bytes')
    assert_same_logits(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out'))


@pytest.mark.parametrize('ours, scaling', [
    (dict(rope_type='linear', rope_factor=4.0), dict(rope_type='linear', factor=4.0)),
    (dict(rope_type='llama3', rope_factor=32.0, rope_original_context=8192),
     dict(rope_type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)),
    (dict(rope_type='yarn', rope_factor=4.0, rope_original_context=32768),
     dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=32768)),
    (dict(rope_type='yarn', rope_factor=16.0, rope_original_context=512, rope_high_freq_factor=16.0,
          rope_low_freq_factor=2.0, rope_attention_factor=1.1),
     dict(rope_type='yarn', factor=16.0, original_max_position_embeddings=512, beta_fast=16, beta_slow=2, attention_factor=1.1)),
])
@pytest.mark.parametrize('D', [64, 128])
def test_rope_frequencies_are_those_of_transformers(ours, scaling, D):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = transformers.LlamaConfig(hidden_size=4 * D, num_attention_heads=4, max_position_embeddings=2**17,
                                      rope_parameters=scaling | dict(rope_theta=5e5))
    expected, factor = ROPE_INIT_FUNCTIONS[scaling['rope_type']](config)
    frequencies, ours_factor = rope_frequencies(GPTConfig(position='rope', n_embd=4 * D, n_head=4, rope_theta=5e5, **ours))
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert ours_factor == pytest.approx(factor, abs=1e-9)


# a longer context ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, extension', [
    (dict(), dict()),
    (dict(position='rope'), dict(rope_theta=80000.0)),
    (dict(position='rope'), dict(rope_type='yarn')),
    (dict(position='rope'), dict(rope_type='llama3')),
    (dict(position='rope'), dict(rope_type='linear')),
])
def test_a_longer_context(settings, extension):
    """Sequences repeat three tokens: what comes beyond the old context is predicted after a few steps in the new one."""
    def batch(T, seed):
        ids = torch.randint(16, (16, 3), generator=torch.Generator().manual_seed(seed)).repeat(1, T)[:, :T + 1]
        return ids[:, :-1], ids[:, 1:]

    def train(T, steps):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for seed in range(steps):
            model(*batch(T, seed))[1].backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=16, n_layer=1, n_head=2, n_embd=32, **settings))
    train(12, 80)
    extend_context(model, 24, **extension)
    assert model.config.block_size == 24 and all(block.attn.config is model.config for block in model.transformer.h)
    train(24, 60)
    x, y = batch(24, -1)
    with torch.no_grad():
        assert model(x, y.where(torch.arange(24) >= 12, -1))[1].item() < 1.4  # a guess is 2.77
    assert model.generate(x[:, :9], 30).shape == (16, 39)


def test_extending_the_context_names_what_it_needs():
    rope, learned = (GPT(GPTConfig(**TINY, position=position)) for position in ('rope', 'learned'))
    with pytest.raises(ValueError, match='block_size=64 is longer than the weights. 32: .* rope_theta, or rope_type=yarn'):
        extend_context(rope, 64)
    with pytest.raises(ValueError, match='rope_theta and rope_type are for position=rope'):
        extend_context(learned, 64, rope_theta=1e5)
    with pytest.raises(ValueError, match="rope_type='ntk' is not one of"):
        extend_context(rope, 64, rope_type='ntk')
    assert rope.config.block_size == 32  # as it was
    extend_context(rope, 64, rope_type='yarn')
    assert (rope.config.rope_factor, rope.config.rope_original_context) == (2, 32)
    extend_context(rope, 128, rope_type='yarn')
    assert (rope.config.rope_factor, rope.config.rope_original_context) == (4, 32)
    assert rope.config.rope_attention_factor == pytest.approx(1.13863, abs=1e-5)


# config/ -------------------------------------------------------------------------------------------------------------

def test_llamas_of_config_have_their_parameters():
    names = {field.name for field in fields(GPTConfig)}
    for name, vocab_size, parameters in (('llama_7b', 32000, 6_738_415_616), ('llama_124m', 50257, 123_551_232)):
        settings = runpy.run_path(ROOT / 'config' / f'{name}.py')
        with torch.device('meta'):
            model = GPT(GPTConfig(vocab_size=vocab_size, **{k: v for k, v in settings.items() if k in names}))
        assert model.get_num_params(non_embedding=False) == parameters
        convert.check_exportable(model.config, 'llama')


def test_llama_trains(dataset, tmp_path):
    run('train.py', 'config/llama_124m.py', *TINY_RUN, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--max_iters=2',
        '--n_mlp=80', '--hellaswag_interval=0', '--sample_interval=0')
    model, tokenizer = checkpoint.load_model('resume', str(tmp_path), 'cpu')
    assert model.config.norm_eps == 1e-6
    scramble(model).save_pretrained(tmp_path / 'llama', tokenizer)
    assert_same_logits(model, transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'llama'))


# what is imported ----------------------------------------------------------------------------------------------------

def test_nothing_is_imported_before_it_is_used():
    script = ("import sys, model; assert not {'safetensors', 'huggingface_hub', 'datasets'} & sys.modules.keys(); "
              "import common.checkpoint; assert not {'safetensors', 'huggingface_hub'} & sys.modules.keys()")
    subprocess.run([sys.executable, '-c', script], cwd=ROOT, env=environment(), check=True)


# tokenizers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['bytes', pytest.param('gpt2', marks=needs_gpt2)])
def test_the_tokenizer_goes_along(name, tmp_path):
    tokenizer = get_tokenizer(name)
    GPT(GPTConfig(**TINY | dict(vocab_size=tokenizer.vocab_size, n_embd=4, n_layer=1))).save_pretrained(tmp_path, name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ['', ' ', 'Hello world', "it's  12345,\n\n\tdon't  ", 'Übermut 9 € ☃ 😀 中文', '\x00\x7f\xad\u00a0\u2028', 'a' * 99]
    texts.append((SHARED / 'data/tinyshakespeare.txt').read_text()[:200_000] if SHARED.is_dir() else __doc__)
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)['input_ids'] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot and len(theirs) == tokenizer.vocab_size
    assert theirs('<|endoftext|>')['input_ids'] == [tokenizer.eot]


def test_the_folders_tokenizer_decides(tmp_path):
    model = GPT(GPTConfig(**TINY))
    model.save_pretrained(tmp_path / 'a', 'bytes')
    assert checkpoint.pretrained(str(tmp_path / 'a'))[1] == 'bytes'
    file = tmp_path / 'a' / 'tokenizer.json'
    other = json.loads(file.read_text())
    vocab = other['model']['vocab']
    vocab['a'], vocab['b'] = vocab['b'], vocab['a']
    file.write_text(json.dumps(other))
    assert checkpoint.pretrained(str(tmp_path / 'a'))[1] == str(file)  # not bytes, although it has as many ids
    file.unlink()
    assert checkpoint.pretrained(str(tmp_path / 'a'))[1] == 'bytes'  # only the number of ids tells
    (tmp_path / 'a' / 'tokenizer.model').write_bytes(b'sentencepiece')
    with pytest.raises(UserError, match=r'its tokenizer \(tokenizer.model\) cannot be read'):
        checkpoint.pretrained(str(tmp_path / 'a'))


@needs_gpt2
def test_gpt2s_tokenizer_in_its_older_files(tmp_path):
    vocabulary = tokenizer_files(get_tokenizer('gpt2'), 32)['tokenizer.json']['model']['vocab']
    (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary))
    assert convert.tokenizer_of(50257, str(tmp_path)) == 'gpt2'
    vocabulary['a'], vocabulary['b'] = vocabulary['b'], vocabulary['a']
    (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match=r'its tokenizer \(vocab.json\) cannot be read'):
        convert.tokenizer_of(50257, str(tmp_path))


# writing -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_dtype(dtype, tmp_path):
    ours = scramble(GPT(GPTConfig(**TINY | LLAMA, bias=False)))
    ours.save_pretrained(tmp_path, 'bytes', dtype)
    assert {w.dtype for w in load_file(tmp_path / 'model.safetensors').values()} == {getattr(torch, dtype)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == getattr(torch, dtype)  # what config.json says
    assert_same_logits(GPT.from_pretrained(str(tmp_path)).eval(), theirs.float())


def test_weights_too_large_for_float16_are_named(tmp_path):
    model = GPT(GPTConfig(**TINY))
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 1e5
    with pytest.raises(UserError, match='transformer.ln_f.weight has values that are not finite in float16'):
        model.save_pretrained(tmp_path / 'new', 'bytes', 'float16')
    with pytest.raises(UserError, match='dtype=int8 is not one of float32, bfloat16, float16'):
        model.save_pretrained(tmp_path / 'new', 'bytes', 'int8')
    assert not (tmp_path / 'new').exists()


def test_nothing_in_the_folder_is_replaced(tmp_path):
    model = GPT(GPTConfig(**TINY))
    for file in ('model.safetensors', 'config.json', 'tokenizer.json', 'model.safetensors.index.json'):
        (tmp_path / file).write_text('mine')
        with pytest.raises(UserError, match=f'holds {file} already: give another folder'):
            model.save_pretrained(str(tmp_path), 'bytes')
        assert [path.name for path in tmp_path.iterdir()] == [file] and (tmp_path / file).read_text() == 'mine'
        (tmp_path / file).unlink()
    (tmp_path / 'notes.txt').write_text('mine')
    (tmp_path / 'model.safetensors.tmp').write_text('mine')
    model.save_pretrained(str(tmp_path), 'bytes')
    assert (tmp_path / 'notes.txt').read_text() == (tmp_path / 'model.safetensors.tmp').read_text() == 'mine'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model.safetensors', 'model.safetensors.tmp',
                                                                'notes.txt', 'tokenizer.json', 'tokenizer_config.json']


@pytest.mark.parametrize('limit', [1000, 3000])  # while the weights are written; while the tokenizer is
def test_a_full_disk_is_one_line_and_leaves_nothing(limit, tmp_path):
    model, before = GPT(GPTConfig(**TINY | dict(n_embd=1, n_head=1, n_layer=1))), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # no file may grow beyond it
    try:
        with pytest.raises(UserError, match='new cannot be written: ') as error:
            model.save_pretrained(tmp_path / 'new', 'bytes', 'float16')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert '\n' not in str(error.value) and not list((tmp_path / 'new').iterdir())
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(UserError, match='file/new cannot be written: Not a directory'):
        model.save_pretrained(tmp_path / 'file' / 'new', 'bytes')


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    model = GPT(GPTConfig(**TINY))
    model.save_pretrained('~/gpt', 'bytes')
    assert (tmp_path / 'gpt' / 'config.json').exists()
    assert GPT.from_pretrained('~/gpt').config == model.config


# the command ---------------------------------------------------------------------------------------------------------

def test_export(tmp_path):
    model = scramble(GPT(GPTConfig(**TINY)))
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'bytes'}, tmp_path / 'ckpt.pt')
    run('export.py', f'--out_dir={tmp_path}', f'--folder={tmp_path}/gpt')
    assert_same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'gpt'))
    out = run('sample.py', f'--init_from={tmp_path}/gpt', '--num_samples=1', '--max_new_tokens=9', '--dtype=float32').out
    assert out == run('sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=9', '--dtype=float32').out
    assert '--folder=FOLDER' in run('export.py', f'--out_dir={tmp_path}', expect=1).err
    err = run('export.py', f'--out_dir={tmp_path}', f'--html={tmp_path}/a.html', '--dtype=float16', expect=1).err
    assert err == 'dtype is for --folder alone\n'
    assert {path.stat().st_mode for path in (tmp_path / 'gpt').iterdir()} == {(tmp_path / 'ckpt.pt').stat().st_mode}
