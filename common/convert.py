"""
Weights to and from Hugging Face: folders and hub models in, folders that transformers opens out, tokenizer and all.

Only names and shapes are translated here, from one dictionary of tensors to another; model.py uses it. There are
three families. In transformers they are

    gpt2    GPT2LMHeadModel   learned positions, LayerNorm, GELU
    llama   LlamaForCausalLM  RoPE, RMSNorm, SwiGLU, grouped heads
    qwen3   Qwen3ForCausalLM  the same with normalised queries and keys, without biases
"""

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.errors import UserError
from data.tokenizer import TOKENIZERS, get_tokenizer, tokenizer_files

# what GPTConfig has where transformers has the family
FAMILIES = {
    'gpt2': dict(position='learned', norm='layernorm', mlp='gelu', qk_norm=False, softcap=0.0, n_kv_head=0),
    'llama': dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=False, softcap=0.0),
    'qwen3': dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, softcap=0.0, bias=False),
}
CLASSES = dict(gpt2='GPT2LMHeadModel', llama='LlamaForCausalLM', qwen3='Qwen3ForCausalLM')

# settings of transformers' that change what is computed, with the only value that a GPT here can have
ONLY = {
    'gpt2': dict(activation_function=('gelu_new', 'gelu_pytorch_tanh'), scale_attn_weights=(True,),
                 scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)),
    'llama': dict(hidden_act=('silu',), rope_scaling=(None,), pretraining_tp=(1,)),
    'qwen3': dict(hidden_act=('silu',), rope_scaling=(None,), use_sliding_window=(False,)),
}

# GPT-2's have our names, but are kept transposed, as in the Conv1D layers of OpenAI's TensorFlow code
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')

# ours: theirs; where they have several matrices we have one, with the rows of all
LLAMA_NAMES = {'transformer.wte': ['model.embed_tokens'], 'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head']}
LLAMA_BLOCK = {'ln_1': ['input_layernorm'], 'ln_2': ['post_attention_layernorm'],
               'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
               'attn.c_proj': ['self_attn.o_proj'], 'attn.q_norm': ['self_attn.q_norm'],
               'attn.k_norm': ['self_attn.k_norm'], 'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'],
               'mlp.c_proj': ['mlp.down_proj']}


def llama_names(n_layer):
    blocks = {f'transformer.h.{i}.{ours}': [f'model.layers.{i}.{name}' for name in theirs]
              for i in range(n_layer) for ours, theirs in LLAMA_BLOCK.items()}
    return {f'{ours}.{kind}': [f'{name}.{kind}' for name in theirs]
            for ours, theirs in (LLAMA_NAMES | blocks).items() for kind in ('weight', 'bias')}

# -----------------------------------------------------------------------------
# in

def find(name, file, optional=False):
    """The path of one file of a local folder or of a model on the hub, downloaded if need be."""
    if os.path.isdir(name):
        if os.path.isfile(os.path.join(name, file)):
            return os.path.join(name, file)
        if optional:
            return None
        raise UserError(f'{name} holds no {file}: a folder written by save_pretrained does')
    try:
        return hf_hub_download(name, file)
    except HFValidationError:
        raise UserError(f'there is no folder {name}, and it is no name of a model on the Hugging Face hub')
    except LocalEntryNotFoundError:
        raise UserError(f'{name}: {file} is not in the local cache, and the Hugging Face hub cannot be reached')
    except EntryNotFoundError:
        if optional:
            return None
        raise UserError(f'{name} on the Hugging Face hub holds no {file}') from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f'{name}: could not download {file} from the Hugging Face hub: {str(error).splitlines()[0]}')


def load(name):
    """GPTConfig fields and our state dict (float32, vocabulary not padded) of a folder or a hub model."""
    with open(find(name, 'config.json')) as f:
        try:
            hf = json.load(f)
        except ValueError as error:
            raise UserError(f'{f.name} is no JSON: {error}')
    family = hf.get('model_type')
    if family not in FAMILIES:
        raise UserError(f'{name}: model_type={family!r} cannot be read, only {", ".join(FAMILIES)}')
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}  # the newer and the older way to write it
    hf['rope_scaling'] = None if rope.get('rope_type', rope.get('type', 'default')) == 'default' else rope
    for field, known in ONLY[family].items():
        if hf.get(field, known[0]) not in known:
            raise UserError(f'{name}: {field}={hf[field]!r} has no counterpart in GPTConfig, only {known[0]!r}')
    files = [find(name, 'model.safetensors', optional=True)]
    if not files[0]:  # larger models come in parts
        with open(find(name, 'model.safetensors.index.json')) as f:
            files = [find(name, file) for file in sorted(set(json.load(f)['weight_map'].values()))]
    try:
        theirs = {key: w.float() for file in files for key, w in load_file(file).items()}
        fields, weights = from_gpt2(hf, theirs) if family == 'gpt2' else from_llama(name, hf, theirs, rope)
    except (SafetensorError, KeyError) as error:
        raise UserError(f'{name}: the weights are damaged or incomplete: {error}')
    if len(weights['transformer.wte.weight']) != fields['vocab_size']:
        raise UserError(f'{name}: vocab_size={fields["vocab_size"]}, but its weights have '
                        f'{len(weights["transformer.wte.weight"])} rows')
    return fields | FAMILIES[family] | dict(bias=fields['bias']), weights


def from_gpt2(hf, theirs):
    fields = dict(block_size=hf['n_positions'], vocab_size=hf['vocab_size'], n_layer=hf['n_layer'],
                  n_head=hf['n_head'], n_embd=hf['n_embd'], n_mlp=hf.get('n_inner') or 0, bias=True,
                  norm_eps=hf.get('layer_norm_epsilon', 1e-5), tie_embeddings=hf.get('tie_word_embeddings', True))
    weights = {}
    for key, w in theirs.items():
        key = key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}'  # the hub's has no prefix
        if not key.endswith(('.attn.bias', '.attn.masked_bias')):  # the causal mask, which some files carry
            weights[key] = w.t().contiguous() if key.endswith(TRANSPOSED) else w
    if fields['tie_embeddings']:
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    return fields, weights


def from_llama(name, hf, theirs, rope):
    fields = dict(block_size=hf['max_position_embeddings'], vocab_size=hf['vocab_size'],
                  n_layer=hf['num_hidden_layers'], n_head=hf['num_attention_heads'], n_embd=hf['hidden_size'],
                  n_kv_head=hf.get('num_key_value_heads') or 0, n_mlp=hf['intermediate_size'],
                  norm_eps=hf.get('rms_norm_eps', 1e-6), rope_theta=rope.get('rope_theta') or hf.get('rope_theta') or 1e4,
                  bias=hf.get('attention_bias', False) or hf.get('mlp_bias', False),
                  tie_embeddings=hf.get('tie_word_embeddings', False))
    head_size = hf.get('head_dim') or fields['n_embd'] // fields['n_head']
    if head_size * fields['n_head'] != fields['n_embd']:
        raise UserError(f'{name}: head_dim={head_size} has no counterpart in GPTConfig, only '
                        f'hidden_size / num_attention_heads = {fields["n_embd"] / fields["n_head"]:g}')
    if fields['tie_embeddings']:
        theirs['lm_head.weight'] = theirs['model.embed_tokens.weight']
    weights = {ours: torch.cat([theirs[key] for key in keys]) for ours, keys in llama_names(fields['n_layer']).items()
               if all(key in theirs for key in keys)}
    if fields['bias']:  # theirs may have biases in the attention or in the MLP alone
        for key in [key for key in weights if '.c_' in key and key.endswith('.weight')]:
            weights.setdefault(key.replace('weight', 'bias'), torch.zeros(len(weights[key])))
    return fields, weights

# -----------------------------------------------------------------------------
# out

def save(folder, fields, state_dict, tokenizer):
    """Write config.json, model.safetensors and the tokenizer's files, for GPTConfig fields and our state dict
    (vocabulary not padded). Exits with one line that names the field that transformers has no class for."""
    family = 'gpt2' if fields['position'] == 'learned' else 'qwen3' if fields['qk_norm'] else 'llama'
    for field, value in FAMILIES[family].items():
        value = fields['n_head'] if field == 'n_kv_head' else value
        if fields[field] != value:
            raise UserError(f'transformers has no class for {field}={fields[field]!r}: with position={fields["position"]!r} '
                            f'its {CLASSES[family]} comes nearest, and that has {field}={value!r}')
    tokenizer = get_tokenizer(tokenizer)
    if tokenizer.vocab_size != fields['vocab_size']:
        raise UserError(f'the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {fields["vocab_size"]}')
    config = dict(model_type=family, architectures=[CLASSES[family]], vocab_size=fields['vocab_size'],
                  bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot,
                  tie_word_embeddings=fields['tie_embeddings'], dtype='float32')
    state_dict = {key: w.float() for key, w in state_dict.items()}
    more, weights = (to_gpt2 if family == 'gpt2' else to_llama)(fields, state_dict)
    if fields['tie_embeddings']:
        del weights['lm_head.weight']
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / 'model.safetensors.tmp', metadata={'format': 'pt'})
    os.replace(folder / 'model.safetensors.tmp', folder / 'model.safetensors')
    for file, content in (tokenizer_files(tokenizer, fields['block_size']) | {'config.json': config | more}).items():
        (folder / f'{file}.tmp').write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        os.replace(folder / f'{file}.tmp', folder / file)


def to_gpt2(fields, state_dict):
    config = dict(n_positions=fields['block_size'], n_embd=fields['n_embd'], n_layer=fields['n_layer'],
                  n_head=fields['n_head'], n_inner=fields['n_mlp'], layer_norm_epsilon=fields['norm_eps'],
                  activation_function='gelu_new')
    weights = {key: w.t().contiguous() if key.endswith(TRANSPOSED) else w for key, w in state_dict.items()}
    for key in state_dict:  # transformers' GPT-2 always has biases: zeros are none
        if '.ln_' in key or key.endswith(TRANSPOSED):
            weights.setdefault(key.replace('weight', 'bias'), torch.zeros(len(state_dict[key])))
    return config, weights


def to_llama(fields, state_dict):
    config = dict(max_position_embeddings=fields['block_size'], hidden_size=fields['n_embd'],
                  num_hidden_layers=fields['n_layer'], num_attention_heads=fields['n_head'],
                  num_key_value_heads=fields['n_kv_head'], head_dim=fields['n_embd'] // fields['n_head'],
                  intermediate_size=fields['n_mlp'], rms_norm_eps=fields['norm_eps'], hidden_act='silu',
                  rope_theta=fields['rope_theta'], attention_bias=fields['bias'], mlp_bias=fields['bias'])
    weights = {}
    for ours, theirs in llama_names(fields['n_layer']).items():
        if ours in state_dict:
            kv_size = fields['n_kv_head'] * config['head_dim']
            rows = {1: [-1], 2: [fields['n_mlp']] * 2, 3: [fields['n_embd'], kv_size, kv_size]}[len(theirs)]
            parts = state_dict[ours].split(rows) if len(theirs) > 1 else [state_dict[ours]]
            weights.update({key: w.contiguous() for key, w in zip(theirs, parts)})
    return config, weights

# -----------------------------------------------------------------------------
# peers' checkpoints

class PeerConfig:
    """build-nanogpt pickles its GPTConfig: this takes its place, and its fields."""


def from_peer(checkpoint, path):
    """nanoGPT's or build-nanogpt's checkpoint as one of ours: model, model_args and tokenizer, of which only their
    vocabulary's size tells. (nanoGPT's GELU is the exact one: the approximation here differs by at most 0.0005.)"""
    from model import GPTConfig
    try:
        fields = dict(checkpoint['model_args'] if 'model_args' in checkpoint else vars(checkpoint['config']))
        weights = {k.removeprefix('_orig_mod.'): w for k, w in checkpoint['model'].items()  # compiled models' prefix
                   if not k.endswith('.attn.bias')}  # the causal mask
        tokenizer = 'gpt2' if fields['vocab_size'] == 50304 else tokenizer_of(fields['vocab_size'], path)  # padded
        fields['vocab_size'] = TOKENIZERS[tokenizer].vocab_size
        rows = GPTConfig(**fields).padded_vocab_size
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{path} holds no GPT')
    return {'model': pad_vocab(weights, rows), 'model_args': fields, 'tokenizer': tokenizer}


def tokenizer_of(vocab_size, where):
    """The name of the tokenizer with so many ids, for weights that do not say."""
    for name, tokenizer in TOKENIZERS.items():
        if tokenizer.vocab_size == vocab_size:
            return name
    raise UserError(f'{where} has a vocabulary of {vocab_size} ids, and no tokenizer here has as many')


def pad_vocab(state_dict, rows):
    """state_dict with its two (V, C) matrices padded with zeros, or cut, to that many rows."""
    vocab = ('transformer.wte.weight', 'lm_head.weight')
    return {k: F.pad(w, (0, 0, 0, rows - len(w))) if k in vocab else w for k, w in state_dict.items()}
