"""Weights to and from transformers: the same logits both ways, and a tokenizer with the same ids."""
import json
import os
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED, needs_gpt2, run
from data.errors import UserError
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')

TINY = dict(block_size=32, vocab_size=257, n_layer=2, n_head=4, n_embd=32)
LLAMA = dict(position='rope', norm='rmsnorm', mlp='swiglu', n_mlp=88)
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
}
IDS = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))


def scramble(model):
    """Weights, biases and gains that are all different, so that nothing can be mixed up unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


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
    assert asdict(back.config) == asdict(ours.config) | dict(dropout=0.1) | (
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
    (dict(position='rope'), "norm='layernorm'"),
    (LLAMA | dict(softcap=15.0, bias=False), 'softcap=15.0'),
    (LLAMA | dict(qk_norm=True, bias=True), 'bias=True'),
    (dict(qk_norm=True), 'qk_norm=True'),
])
def test_ours_without_a_counterpart_name_the_field(settings, words, tmp_path):
    with pytest.raises(UserError, match=f'transformers has no class for {words}: '):
        GPT(GPTConfig(**TINY | settings)).save_pretrained(tmp_path / 'new', 'bytes')
    assert not (tmp_path / 'new').exists()


@needs_gpt2
def test_the_wrong_tokenizer(tmp_path):
    with pytest.raises(UserError, match='the tokenizer gpt2 has 50257 ids, the model 257'):
        GPT(GPTConfig(**TINY)).save_pretrained(tmp_path)


@pytest.mark.parametrize('family, change, words', [
    ('gpt2', dict(activation_function='relu'), "activation_function='relu' has no counterpart"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True has no counterpart'),
    ('gpt2', dict(model_type='opt'), "model_type='opt' cannot be read, only gpt2, llama, qwen3"),
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu' has no counterpart"),
    ('llama', dict(head_dim=16), 'head_dim=16 has no counterpart'),
    ('llama', dict(rope_parameters=dict(rope_type='llama3', factor=8.0)), 'rope_scaling=.*llama3.* has no counterpart'),
    ('llama', dict(rope_scaling=dict(type='linear', factor=2.0), rope_parameters=None), 'rope_scaling=.*linear'),
    ('qwen3', dict(use_sliding_window=True), 'use_sliding_window=True has no counterpart'),
    ('llama', dict(num_hidden_layers=3), 'Missing key'),
    ('llama', dict(vocab_size=1000), 'vocab_size=1000, but its weights have 257 rows'),
    ('llama', dict(intermediate_size=64), 'size mismatch'),
])
def test_theirs_without_a_counterpart_name_the_field(family, change, words, tmp_path):
    transformers.AutoModelForCausalLM.from_config(THEIRS[family]()).save_pretrained(tmp_path)
    file = tmp_path / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=words) as exit:
        GPT.from_pretrained(str(tmp_path))
    assert '\n' not in str(exit.value)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match='holds no config.json'):
        GPT.from_pretrained(str(tmp_path))
    GPT(GPTConfig(**TINY)).save_pretrained(tmp_path, 'bytes')
    (tmp_path / 'model.safetensors').write_bytes(b'damaged')
    with pytest.raises(UserError, match='damaged'):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match='config.json is no JSON'):
        GPT.from_pretrained(str(tmp_path))


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


# the command ---------------------------------------------------------------------------------------------------------

def test_export(tmp_path):
    model = scramble(GPT(GPTConfig(**TINY)))
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'bytes'}, tmp_path / 'ckpt.pt')
    run('export.py', f'--out_dir={tmp_path}', f'--folder={tmp_path}/gpt')
    assert_same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'gpt'))
    out = run('sample.py', f'--init_from={tmp_path}/gpt', '--num_samples=1', '--max_new_tokens=9', '--dtype=float32').out
    assert out == run('sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=9', '--dtype=float32').out
    assert '--folder=FOLDER' in run('export.py', f'--out_dir={tmp_path}', expect=1).err
