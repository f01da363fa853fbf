"""
Weights to and from Hugging Face: folders and hub models in, folders that transformers opens out.

Only names and shapes are translated here, from one dictionary of tensors to another; model.py uses it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

# Hugging Face's GPT-2 keeps these transposed, as the Conv1D layers of OpenAI's TensorFlow code had them
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


def find(name, file):
    """The path of one file of a local folder or of a model on the hub, downloaded if need be."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, file)):
            sys.exit(f'{name} holds no {file}: a folder written by save_pretrained does')
        return os.path.join(name, file)
    try:
        return hf_hub_download(name, file)
    except HFValidationError:
        sys.exit(f'there is no folder {name}, and it is no name of a model on the Hugging Face hub')
    except LocalEntryNotFoundError:
        sys.exit(f'{name}: {file} is not in the local cache, and the Hugging Face hub cannot be reached')
    except (HfHubHTTPError, OSError) as error:
        sys.exit(f'{name}: could not download {file} from the Hugging Face hub: {str(error).splitlines()[0]}')


def load(name):
    """GPTConfig fields and our state dict (float32, vocabulary not padded) of a folder or a hub model."""
    with open(find(name, 'config.json')) as f:
        hf = json.load(f)
    if hf.get('model_type') != 'gpt2':
        sys.exit(f'{name} holds a {hf.get("model_type")} model; only gpt2 can be read')
    weights = load_file(find(name, 'model.safetensors'))
    fields = dict(block_size=hf['n_positions'], vocab_size=hf['vocab_size'], n_layer=hf['n_layer'],
                  n_head=hf['n_head'], n_embd=hf['n_embd'], n_mlp=hf.get('n_inner') or 0,
                  norm_eps=hf['layer_norm_epsilon'])
    state_dict = {}
    for key, w in weights.items():
        key = key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}'  # the hub's has no prefix
        if not key.endswith(('.attn.bias', '.attn.masked_bias')):  # the causal mask, which some files carry
            state_dict[key] = (w.t() if key.endswith(TRANSPOSED) else w).float().contiguous()
    state_dict.setdefault('lm_head.weight', state_dict['transformer.wte.weight'])
    return fields, state_dict


def save(folder, fields, state_dict, tokenizer):
    """Write config.json and model.safetensors for GPTConfig fields and our state dict (vocabulary not padded)."""
    needed = dict(position='learned', norm='layernorm', mlp='gelu', qk_norm=False, softcap=0.0,
                  n_kv_head=fields['n_head'])
    for field, value in needed.items():
        if fields[field] != value:
            sys.exit(f'transformers has no class for {field}={fields[field]!r}: its GPT-2 has {value!r}')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    eot = fields['vocab_size'] - 1
    hf = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=fields['vocab_size'],
              n_positions=fields['block_size'], n_embd=fields['n_embd'], n_layer=fields['n_layer'],
              n_head=fields['n_head'], n_inner=fields['n_mlp'], layer_norm_epsilon=fields['norm_eps'],
              activation_function='gelu_new', tie_word_embeddings=fields['tie_embeddings'],
              bos_token_id=eot, eos_token_id=eot, dtype='float32')
    weights = {}
    for key, w in state_dict.items():
        w = w.float()
        weights[key] = (w.t() if key.endswith(TRANSPOSED) else w).contiguous()
        if key.endswith('weight') and 'wte' not in key and 'wpe' not in key and key != 'lm_head.weight':
            weights.setdefault(key.replace('weight', 'bias'), torch.zeros(weights[key].size(-1)))  # bias=False
    weights.update({k: w.float() for k, w in state_dict.items() if k.endswith('bias')})
    if fields['tie_embeddings']:
        del weights['lm_head.weight']
    (folder / 'config.json').write_text(json.dumps(hf, indent=2) + '\n')
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
