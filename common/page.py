"""
A GPT as one HTML file: weights, tokenizer and the JavaScript that runs them (page.html), for any browser, offline.

The JavaScript computes in float32 what model.py does, with the weights that `stored` gives: matrices as int8 with a
scale for each row, or as float16; vectors in float32.
"""

import base64
import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from data import atomic
from data.errors import UserError
from data.tokenizer import byte_pairs

# the GPTConfig fields that page.html computes with, and the values of those that are strings
FIELDS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'head_size', 'n_embd', 'n_mlp', 'mlp', 'norm',
          'norm_eps', 'qk_norm', 'position', 'embedding_norm', 'tie_embeddings', 'softcap')
# those that it can ignore: they change training only, or the tensors and RoPE's frequencies that it is given
GIVEN = ('dropout', 'zero_init', 'bias', 'norm_gain', 'rope_theta', 'rope_type', 'rope_factor', 'rope_original_context',
         'rope_low_freq_factor', 'rope_high_freq_factor', 'rope_attention_factor')
VALUES = dict(position=('learned', 'rope'), norm=('layernorm', 'rmsnorm'), mlp=('gelu', 'relu2', 'swiglu'))

# {tokenizer: the pattern that splits a text, as tiktoken has it}; White_Space because JavaScript's \s is another set of
# characters
SPLITS = {'bytes': None,
          'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+"
                  r'|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+'}


def write(path, model, tokenizer, dtype='int8'):
    """Write the page of a GPT and its tokenizer (an object of data.tokenizer's) to path; returns its size in bytes.

    dtype: how matrices are stored, 'int8' or 'float16'. Raises UserError for a GPTConfig field, a tokenizer or a dtype
    that the page can't have, or a path that can't be written.
    """
    from model import rope_frequencies
    config = model.config
    check(config)
    vocabulary = tables(tokenizer)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f'the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {config.vocab_size}')
    arrays = sorted(stored(model, dtype).items(), key=lambda item: -item[1].itemsize)  # aligned without padding
    frequencies, factor = rope_frequencies(config)
    header = {'config': {name: getattr(config, name) for name in FIELDS},
              'rope': {'frequencies': frequencies.tolist(), 'factor': factor},
              'tensors': [(name, str(array.dtype), array.shape) for name, array in arrays], 'tokenizer': vocabulary,
              'parameters': f'{model.get_num_params() / 1e6:.2f}M'}
    weights = base64.b64encode(b''.join(array.tobytes() for _, array in arrays)).decode()
    content = template().replace('WEIGHTS', weights, 1)
    content = content.replace('HEADER', json.dumps(header).replace('<', r'\u003c'), 1).encode()  # it comes first
    try:
        atomic.write(path, content)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from None
    return len(content)


def template():
    """page.html: the words HEADER and WEIGHTS stand where a model goes."""
    return Path(__file__).with_suffix('.html').read_text(encoding='utf-8')


def check(config):
    """Raise UserError, naming the field, if config asks for what page.html doesn't compute."""
    for field in fields(config):
        value = getattr(config, field.name)
        known = VALUES.get(field.name, [value if field.name in FIELDS + GIVEN else field.default])
        if value not in known:
            raise UserError(f'the page cannot compute {field.name}={value!r}, only {" or ".join(map(str, known))}')


def stored(model, dtype):
    """{name: array} of a GPT's weights as the page stores them: vectors in float32; matrices (rows, columns) in
    float16, or in int8 beside `name.scale`, float32 (rows,). The vocabulary's padding is left out, and a tied head."""
    if dtype not in ('int8', 'float16'):
        raise UserError(f'the page stores weights as int8 or float16, not as {dtype}')
    arrays = {}
    for name, p in model.named_parameters():  # tied weights once
        w = p.detach().float().cpu()
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            w = w[:model.config.vocab_size]
        if w.dim() < 2:
            arrays[name] = w.numpy()
        elif dtype == 'float16':
            arrays[name] = w.clamp(-65504, 65504).numpy().astype('float16')
        else:
            scale = w.abs().amax(dim=1).clamp(min=1e-12) / 127
            arrays[f'{name}.scale'] = scale.numpy()
            arrays[name] = (w / scale[:, None]).round().numpy().astype('int8')
    return arrays


def tables(tokenizer):
    """What page.html's Tokenizer takes: the 256 single bytes in the order of their ids, pairs of ids that make each
    later token (uint32), the pattern that splits a text (None: it is one piece), and the end-of-text id.
    A byte-level tokenizer of another kind needs a line here."""
    if tokenizer.name not in SPLITS:
        raise UserError(f'the page has no tokenizer {tokenizer.name}, only {" and ".join(SPLITS)}')
    ranks, merges = byte_pairs(tokenizer)
    single = sorted((token for token in ranks if len(token) == 1), key=ranks.get)
    pairs = np.array([[ranks[part] for part in pair] for pair in merges], np.uint32)
    return {'name': tokenizer.name, 'bytes': base64.b64encode(b''.join(single)).decode(),
            'merges': base64.b64encode(pairs.tobytes()).decode(), 'split': SPLITS[tokenizer.name], 'eot': tokenizer.eot}
