"""
Weights to and from Hugging Face, nanoGPT and build-nanogpt, and the tokenizer that they were trained with.

A folder of transformers' holds config.json, model.safetensors and a tokenizer. FAMILIES, below, says which of its
architectures a GPT can be, and how:

    gpt2      GPT2LMHeadModel      learned positions, LayerNorm, GELU
    llama     LlamaForCausalLM     RoPE, RMSNorm, SwiGLU, grouped heads
    qwen3     Qwen3ForCausalLM     the same with normalised queries and keys, without biases
    apertus   ApertusForCausalLM   RoPE, RMSNorm, normalised queries and keys, ReLU²: config/gpt2_fast.py's
    nanochat  NanoChatForCausalLM  the same without gains, and with a norm after the embedding

Only names, shapes and settings are translated, and whatever cannot be is refused by name. A new field of GPTConfig
is exported once a family lists it.
"""

import json
import math
import os
import re
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.device import DTYPES
from common.files import reason
from data.atomic import atomic_write
from data.errors import UserError, some
from data.tokenizer import CHATML, TOKENIZERS, get_tokenizer, printable, tokenizer_files

# -----------------------------------------------------------------------------
# the families

class Family(NamedTuple):
    kind: str  # transformers' class
    fixed: dict  # GPTConfig fields whose values this family implies
    fields: dict  # those that vary: (name in config.json, value where it is missing; ... where it must be there)
    settings: dict  # what else changes the computation: the values that compute what GPT does; the first is written
    biases: dict  # {part of a block: the setting that gives its Linears biases}; empty where they always have some
    names: dict  # {our module: theirs}; where they have several matrices we have one, with the rows of all


LINEAR = dict(rope_factor=('factor', ...))
SCALED = LINEAR | dict(rope_original_context=('original_max_position_embeddings', 0))
ROPE_TYPES = {  # what config.json's rope_scaling holds for each rope_type; as Family.fields
    'default': {},
    'linear': LINEAR,
    'llama3': SCALED | dict(rope_low_freq_factor=('low_freq_factor', ...),
                            rope_high_freq_factor=('high_freq_factor', ...)),
    'yarn': SCALED | dict(rope_low_freq_factor=('beta_slow', 1.0), rope_high_freq_factor=('beta_fast', 32.0),
                          rope_attention_factor=('attention_factor', 0.0))}
ROPE = dict.fromkeys(('rope_theta', 'rope_type', *ROPE_TYPES['yarn']))  # read_rope and write_rope translate them
LLAMA_FIELDS = dict(block_size=('max_position_embeddings', ...), vocab_size=('vocab_size', ...),
                    n_layer=('num_hidden_layers', ...), n_head=('num_attention_heads', ...),
                    n_embd=('hidden_size', ...), n_kv_head=('num_key_value_heads', 0), head_size=('head_dim', 0),
                    n_mlp=('intermediate_size', ...), norm_eps=('rms_norm_eps', 1e-6),
                    tie_embeddings=('tie_word_embeddings', False))
LLAMA_NAMES = {
    'transformer.wte': ['model.embed_tokens'], 'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head'],
    'transformer.h.*.ln_1': ['model.layers.*.input_layernorm'],
    'transformer.h.*.attn.c_attn': [f'model.layers.*.self_attn.{x}_proj' for x in 'qkv'],
    'transformer.h.*.attn.q_norm': ['model.layers.*.self_attn.q_norm'],
    'transformer.h.*.attn.k_norm': ['model.layers.*.self_attn.k_norm'],
    'transformer.h.*.attn.c_proj': ['model.layers.*.self_attn.o_proj'],
    'transformer.h.*.ln_2': ['model.layers.*.post_attention_layernorm'],
    'transformer.h.*.mlp.c_fc': ['model.layers.*.mlp.gate_proj', 'model.layers.*.mlp.up_proj'],
    'transformer.h.*.mlp.c_proj': ['model.layers.*.mlp.down_proj']}

FAMILIES = {
    'gpt2': Family(
        'GPT2LMHeadModel', fixed={},
        fields=dict(block_size=('n_positions', ...), vocab_size=('vocab_size', ...), n_layer=('n_layer', ...),
                    n_head=('n_head', ...), n_embd=('n_embd', ...), n_mlp=('n_inner', 0),
                    norm_eps=('layer_norm_epsilon', 1e-5), tie_embeddings=('tie_word_embeddings', True)),
        settings=dict(activation_function=('gelu_new', 'gelu_pytorch_tanh'), scale_attn_weights=(True,),
                      scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)),
        biases={}, names={}),
    'llama': Family(
        'LlamaForCausalLM', fixed=dict(position='rope', norm='rmsnorm', mlp='swiglu'), fields=LLAMA_FIELDS | ROPE,
        settings=dict(hidden_act=('silu',), pretraining_tp=(1,)),
        biases=dict(attn='attention_bias', mlp='mlp_bias'), names=LLAMA_NAMES),
    'qwen3': Family(
        'Qwen3ForCausalLM', fixed=dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True),
        fields=LLAMA_FIELDS | ROPE | dict(head_size=('head_dim', 128)),
        settings=dict(hidden_act=('silu',), use_sliding_window=(False,)),
        biases=dict(attn='attention_bias'), names=LLAMA_NAMES),
    'apertus': Family(
        'ApertusForCausalLM', fixed=dict(position='rope', norm='rmsnorm', qk_norm=True, mlp='relu2'),
        fields=LLAMA_FIELDS | ROPE | dict(norm_eps=('rms_norm_eps', 1e-5)),
        settings=dict(hidden_act=('relu2',)),
        biases=dict(attn='attention_bias'), names=LLAMA_NAMES | {
            'transformer.h.*.ln_1': ['model.layers.*.attention_layernorm'],
            'transformer.h.*.ln_2': ['model.layers.*.feedforward_layernorm'],
            'transformer.h.*.mlp.c_fc': ['model.layers.*.mlp.up_proj']}),
    'nanochat': Family(
        'NanoChatForCausalLM', fixed=dict(position='rope', norm='rmsnorm', norm_gain=False, qk_norm=True, mlp='relu2',
                                          embedding_norm=True),
        fields=LLAMA_FIELDS | dict(rope_theta=None, softcap=('final_logit_softcapping', 15.0)),
        settings=dict(hidden_act=('relu2',)),
        biases=dict(attn='attention_bias'),
        names=LLAMA_NAMES | {'transformer.h.*.mlp.c_fc': ['model.layers.*.mlp.fc1'],
                             'transformer.h.*.mlp.c_proj': ['model.layers.*.mlp.fc2']}),
}
TRAINING = ('dropout', 'zero_init')  # GPTConfig fields that change training alone
NULL_IS_ZERO = ('n_kv_head', 'head_size', 'n_mlp', 'softcap')  # null in config.json, 0 in GPTConfig


def family_of(config):
    """The name of the family nearest to a GPTConfig."""
    if config.position == 'learned':
        return 'gpt2'
    if config.mlp == 'relu2':
        return 'apertus' if config.norm_gain and not config.embedding_norm else 'nanochat'
    return 'qwen3' if config.qk_norm else 'llama'


def layout(family, config):
    """{our tensor: (its shape, [their tensor, …])}, the vocabulary not padded; tied weights once."""
    from model import GPT
    try:
        with torch.device('meta'):
            shapes = {name: list(w.shape) for name, w in GPT(config).state_dict().items()}
    except (RuntimeError, TypeError) as error:  # sizes beyond what a tensor can have
        raise UserError(f'no GPT has these sizes: {str(error).splitlines()[0]}') from None
    if config.tie_embeddings:
        del shapes['lm_head.weight']
    tensors = {}
    for ours, shape in shapes.items():
        if ours in VOCABULARY:
            shape[0] = config.vocab_size
        module, kind = ours.rsplit('.', 1)
        layer = re.search(r'\.h\.(\d+)\.', module)
        theirs = family.names.get(re.sub(r'\.h\.\d+\.', '.h.*.', module), [module])
        tensors[ours] = tuple(shape), [f'{name}.{kind}'.replace('*', layer[1] if layer else '') for name in theirs]
    return tensors


def rows(theirs, shape, config):
    """How many rows of our tensor each of theirs has."""
    if len(theirs) == 3:  # queries, keys, values
        return [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    return [shape[0] // len(theirs)] * len(theirs)


def turn(family, name, w, config):
    """One of their tensors in our layout, or one of ours in theirs: each of these changes is its own inverse."""
    if family.kind == 'GPT2LMHeadModel' and '.c_' in name and w.dim() == 2:
        return w.t()  # as in the Conv1D layers of OpenAI's TensorFlow code
    if family.kind == 'NanoChatForCausalLM' and ('q_proj' in name or 'k_proj' in name):  # RoPE turns the other way
        return w.unflatten(0, (-1, 2, config.head_size // 2)).flip(1).flatten(0, 2)
    return w

# -----------------------------------------------------------------------------
# files of a folder or of the hub

def find(name, file, optional=False):
    """The path of one file of a local folder or of a model on the hub, downloaded if need be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    folder = os.path.expanduser(name)
    if os.path.isfile(folder):
        raise UserError(f'{name} is a file: give a .pt file, a folder, or a name on the Hugging Face hub')
    if os.path.isdir(folder):
        if os.path.isfile(os.path.join(folder, file)):
            return os.path.join(folder, file)
        if optional:
            return None
        raise UserError(f'{name} holds no {file}: a folder written by save_pretrained does')
    try:
        return hf_hub_download(name, file)
    except HFValidationError:
        raise UserError(f'there is no folder {name}, and it is no name of a model on the Hugging Face hub') from None
    except EntryNotFoundError as error:
        if optional:
            return None
        if isinstance(error, LocalEntryNotFoundError):
            raise UserError(f'{name}: {file} is not in the local cache, and the Hugging Face hub cannot be '
                            'reached: copy the folder of a machine that has it, and give its path') from None
        raise UserError(f'{name} on the Hugging Face hub holds no {file}') from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f'{name}: could not download {file} from the Hugging Face hub: '
                        f'{str(error).splitlines()[0]}') from None


def read_json(path):
    """The JSON object in a file."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is no JSON: {error}') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    if not isinstance(content, dict):
        raise UserError(f'{path} holds no JSON object')
    return content


def read_tensors(name):
    """{their name: tensor} of all the safetensors of a folder or a hub model, in its own dtypes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    files = [find(name, 'model.safetensors', optional=True)]
    if not files[0]:  # larger models come in parts
        index = find(name, 'model.safetensors.index.json', optional=True)
        if not index:
            if any(find(name, f'pytorch_model.bin{end}', optional=True) for end in ('', '.index.json')):
                raise UserError(f'{name} holds no model.safetensors, only pytorch_model.bin: AutoModelForCausalLM'
                                '.from_pretrained(…).save_pretrained(…) of transformers writes one')
            find(name, 'model.safetensors')  # raises, with the reason
        parts = read_json(index).get('weight_map')
        parts = list(parts.values()) if isinstance(parts, dict) else [None]
        if not all(isinstance(part, str) and re.fullmatch(r'[\w-][\w.-]*\.safetensors', part) for part in parts):
            raise UserError(f'{index}: weight_map must name .safetensors files beside it')
        files = [find(name, part) for part in sorted(set(parts))]
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except OSError as error:
            raise UserError(f'{file} cannot be read: {error.strerror or error}') from None
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f'{file} is damaged or incomplete: {str(error).splitlines()[0][:200]}') from None
    for key, w in tensors.items():
        if w.dtype not in (*DTYPES.values(), torch.float64):
            raise UserError(f'{name}: {key} is {w.dtype}: quantised weights cannot be read')
    return tensors

# -----------------------------------------------------------------------------
# in

def load(name):
    """GPTConfig fields and our state dict (float32, vocabulary not padded) of a folder or a hub model. Raises
    UserError, which names what has no counterpart here, is missing, left over or damaged."""
    from model import GPTConfig
    path = find(name, 'config.json')
    hf = read_json(path)
    if hf.get('quantization_config'):
        raise UserError(f'{path}: quantization_config: quantised weights cannot be read')
    if hf.get('model_type') not in [*FAMILIES]:  # a list, since the value may have no hash
        raise UserError(f'{name}: model_type={short(hf.get("model_type"))} cannot be read, only {", ".join(FAMILIES)}')
    family = FAMILIES[hf['model_type']]
    fields, biases = read_fields(family, hf, path)
    try:
        config = GPTConfig(**fields)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None
    theirs = read_tensors(name)
    if not family.names:  # OpenAI's files have no prefix, and some hold the causal mask
        theirs = {key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}': w
                  for key, w in theirs.items() if not key.endswith(('.attn.bias', '.attn.masked_bias'))}
    theirs = {key: w for key, w in theirs.items() if not key.endswith('rotary_emb.inv_freq')}  # computed here
    weights = translate(name, family, config, theirs, biases)
    if config.tie_embeddings:
        head = theirs.get('lm_head.weight')
        if head is not None and not torch.equal(head.float(), weights['transformer.wte.weight']):
            raise UserError(f'{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding')
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    return fields, weights


def translate(name, family, config, theirs, biases):
    """Our state dict of their tensors. biases: {part of a block: whether it has them}; they are zeros elsewhere."""
    if config.n_layer > len(theirs):
        raise UserError(f'{name}: config.json has {config.n_layer} layers, and there are only {len(theirs)} weights')
    tensors = layout(family, config)
    expected = {ours: tensor for ours, tensor in tensors.items()
                if not ours.endswith('.bias') or biases.get(ours.split('.')[-3], True)}
    keys = [key for _, keys in expected.values() for key in keys]
    if missing := [key for key in keys if key not in theirs]:
        raise UserError(f'{name}: of the weights that config.json asks for, {listed(missing)} missing')
    if unknown := theirs.keys() - {*keys, 'lm_head.weight'}:
        raise UserError(f'{name}: the weights hold what config.json has no place for: '
                        f'{listed(sorted(unknown))} left over')
    weights = {}
    for ours, (shape, keys) in expected.items():
        parts = []
        for key, n in zip(keys, rows(keys, shape, config)):
            w, wanted = theirs[key], turn(family, key, torch.empty(n, *shape[1:], device='meta'), config).shape
            if w.shape != wanted:
                raise UserError(f'{name}: {key} has the shape {tuple(w.shape)}, and config.json asks for '
                                f'{tuple(wanted)}')
            if not w.isfinite().all():
                raise UserError(f'{name}: {key} has values that are not finite')
            parts.append(turn(family, key, w, config).float())
        weights[ours] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return weights | {ours: torch.zeros(shape) for ours, (shape, _) in tensors.items() if ours not in expected}


def listed(names):
    """'a, b, c and 2 more are'"""
    return f'{some(names)} {"is" if len(names) == 1 else "are"}'


def read_fields(family, hf, path):
    """(GPTConfig fields, {part of a block: does it have biases?}) of config.json's content."""
    from model import GPTConfig
    for setting, known in family.settings.items():
        if hf.get(setting, known[0]) not in known:
            raise UserError(f'{path}: {setting}={short(hf[setting])} has no counterpart in GPTConfig, '
                            f'only {known[0]!r}')
    kinds = hf.get('layer_types') or []
    if not isinstance(kinds, list) or any(kind != 'full_attention' for kind in kinds):
        raise UserError(f"{path}: layer_types={short(kinds)} has no counterpart in GPTConfig, only 'full_attention'")
    fields = dict(family.fixed)
    for ours, where in family.fields.items():
        if where:
            theirs, default = where
            value = hf.get(theirs, default)
            if value is ...:
                raise UserError(f'{path} has no {theirs}')
            if value is None and ours in NULL_IS_ZERO:
                value = 0
            fields[ours] = typed(value, type(getattr(GPTConfig, ours)), f'{path}: {theirs}')
    if fields['block_size'] > 2**24:
        raise UserError(f'{path}: a context of {fields["block_size"]} tokens is more than {2**24}')
    if 'rope_theta' in family.fields:
        rope = read_rope(hf, path)
        if family.kind == 'ApertusForCausalLM' and not (hf.get('rope_scaling') or hf.get('rope_parameters')):
            raise UserError(f'{path} has no rope_parameters')  # its defaults are not those that read_rope takes
        for ours, value in rope.items():
            if ours not in family.fields and value != getattr(GPTConfig, ours):
                raise UserError(f'{path}: {ours}={value!r} has no counterpart in {family.kind}')
        fields |= {ours: value for ours, value in rope.items() if ours in family.fields}
    biases = {part: typed(hf.get(setting, False), bool, f'{path}: {setting}')
              for part, setting in family.biases.items()}
    if family.biases:
        biases.setdefault('mlp', False)
    return fields | {'bias': not biases or any(biases.values())}, biases


def short(value):
    """`value` as a message shows it."""
    try:
        return f'{value!r:.80}'
    except RecursionError:
        return 'what is nested too deep'


NOUNS = {int: 'an int of 32 bits', float: 'a finite float', bool: 'true or false', str: 'a string'}


def typed(value, kind, where):
    """`value`, if it is of that type; an int will do for a float."""
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)) or (kind is int and abs(value) >= 2**31):
        raise UserError(f'{where}={short(value)} is not {NOUNS[kind]}')
    return value


def read_rope(hf, path):
    """GPTConfig's rope_* fields of config.json's content, read as transformers does: rope_scaling, the older way to
    write them, goes before rope_parameters."""
    from model import GPTConfig
    rope = hf.get('rope_scaling') or hf.get('rope_parameters') or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f'{path}: rope_parameters={short(rope)} has no counterpart in GPTConfig')
    context = hf.get('original_max_position_embeddings')  # goes before the one inside
    values = rope | ({'original_max_position_embeddings': context} if context else {})

    def get(name, default, kind=float):
        value = values.get(name)
        value = default if value is None else value
        if value is ...:
            raise UserError(f'{path}: rope_parameters={short(rope)} has no {name}')
        return typed(value, kind, f'{path}: {name}')

    kind = get('rope_type', get('type', 'default', str), str)
    if kind not in ROPE_TYPES:
        raise UserError(f'{path}: rope_scaling of the type {kind!r} has no counterpart in GPTConfig')
    for name, neutral in (('partial_rotary_factor', 1.0), ('truncate', True)):
        value = rope.get(name, hf.get(name))
        if value is not None and value != neutral:
            raise UserError(f'{path}: {name}={short(value)} has no counterpart in GPTConfig, only {neutral!r}')
    theta = hf.get('rope_theta')
    fields = dict(rope_type=kind, rope_theta=get('rope_theta', 10000.0 if theta is None else theta))
    fields |= {ours: get(*where, type(getattr(GPTConfig, ours))) for ours, where in ROPE_TYPES[kind].items()}
    if kind == 'yarn' and rope.get('attention_factor') is None:
        scales = [get(name, 0.0) for name in ('mscale', 'mscale_all_dim')]
        if all(scales):
            scale, all_dim = (0.1 * x * math.log(max(1, fields['rope_factor'])) + 1 for x in scales)
            fields['rope_attention_factor'] = scale / all_dim
    return fields


def write_rope(config, family):
    """config.json's rope_theta and rope_scaling, which old and new versions of transformers read. Old ones refuse a
    rope_scaling that scales nothing; Apertus, which they don't have, scales unless there is one."""
    if config.rope_type == 'default' and family.kind != 'ApertusForCausalLM':
        return dict(rope_theta=config.rope_theta)
    scaling = {theirs: getattr(config, ours) for ours, (theirs, _) in ROPE_TYPES[config.rope_type].items()}
    return dict(rope_theta=config.rope_theta, rope_scaling=dict(rope_type=config.rope_type) | scaling)

# -----------------------------------------------------------------------------
# out

FILES = ('model.safetensors', 'model.safetensors.index.json', 'config.json', 'tokenizer.json', 'tokenizer_config.json')


def check_folder(folder):
    """Raise UserError if writing a model into that folder would replace a file."""
    for file in FILES:
        if os.path.lexists(os.path.join(os.path.expanduser(folder), file)):
            raise UserError(f'{folder} holds {file} already: give another folder')


def save(folder, config, state_dict, tokenizer, dtype='float32'):
    """Write config.json, model.safetensors and the tokenizer's files of a GPTConfig and our state dict (vocabulary not
    padded). tokenizer: for get_tokenizer. Raises UserError if a file is there already, or naming the GPTConfig field
    that transformers has no class for."""
    if dtype not in DTYPES:
        raise UserError(f'dtype={dtype} is not one of {", ".join(DTYPES)}')
    check_folder(folder)
    name = family_of(config)
    family = FAMILIES[name]
    check_exportable(config, name)
    tokenizer = get_tokenizer(tokenizer)
    if tokenizer.vocab_size > config.vocab_size:  # some models have more ids than their tokenizers
        raise UserError(f'the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {config.vocab_size}')
    end = tokenizer.eot if tokenizer.im_end is None else tokenizer.im_end  # where transformers' generate() stops
    hf = dict(model_type=name, architectures=[family.kind], bos_token_id=tokenizer.eot, eos_token_id=end,
              pad_token_id=None, dtype=dtype, torch_dtype=dtype)
    hf |= {setting: known[0] for setting, known in family.settings.items()}
    hf |= {where[0]: getattr(config, ours) for ours, where in family.fields.items() if where}
    hf |= {setting: config.bias for setting in family.biases.values()}
    if 'rope_theta' in family.fields:
        hf |= write_rope(config, family)
    if hf.get('final_logit_softcapping') == 0:
        hf['final_logit_softcapping'] = None
    weights = {}
    for ours, (shape, keys) in layout(family, replace(config, bias=config.bias or not family.biases)).items():
        w = state_dict[ours] if ours in state_dict else torch.zeros(shape)  # transformers' GPT-2 always has biases
        for key, part in zip(keys, w.split(rows(keys, shape, config))):
            weights[key] = turn(family, key, part, config).to(DTYPES[dtype]).contiguous()
            if not weights[key].isfinite().all():
                raise UserError(f'{key} has values that are not finite' + f' in {dtype}' * bool(part.isfinite().all()))
    files = {'config.json': hf} | tokenizer_files(tokenizer, config.block_size)  # config.json makes the folder a model
    write_folder(Path(folder).expanduser(), weights, files)


def check_exportable(config, name):
    """Raise UserError if a GPTConfig has a field that its family does not list, and not the family's value of it."""
    family, fields = FAMILIES[name], asdict(config)
    try:
        plain = asdict(type(config)(**family.fixed | {ours: fields[ours] for ours in family.fields}))
    except ValueError as error:
        raise UserError(f'transformers has no class for this model: in {family.kind}, {error}') from None
    plain['bias'] = fields['bias'] and (not family.biases or 'mlp' in family.biases)
    if name == 'llama' and config.n_embd % config.n_head:
        raise UserError(f'transformers has no class for n_embd={config.n_embd}: in {family.kind} it is a multiple of '
                        f'n_head={config.n_head}')
    for field, value in plain.items():
        if fields[field] != value and field not in (*family.fields, *TRAINING):
            raise UserError(f'transformers has no class for {field}={fields[field]!r}: with position='
                            f'{config.position!r} its {family.kind} comes nearest, and that has {field}={value!r}')


def write_folder(folder, weights, files):
    """Write model.safetensors and files {name: JSON object or bytes}, which get their places once all are complete, in
    reverse: the first of the files is the last."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for file, content in files.items():
                if isinstance(content, dict):
                    content = (json.dumps(content, indent=1, ensure_ascii=False) + '\n').encode()
                f = stack.enter_context(atomic_write(folder / file))
                f.write(content)
                f.flush()  # a full disk is known before any file gets its place
            f = stack.enter_context(atomic_write(folder / 'model.safetensors'))
            mode = os.fstat(f.fileno()).st_mode
            save_file(weights, f.name, {'format': 'pt'})
            with open(f.name, 'rb+') as written:  # in place of f: save_file may have replaced it, for its owner alone
                os.chmod(f.name, mode)
                os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder} cannot be written: {reason(error)}') from None

# -----------------------------------------------------------------------------
# peers' checkpoints

VOCABULARY = ('transformer.wte.weight', 'lm_head.weight')  # (V, C)


class PeerConfig:
    """build-nanogpt pickles its GPTConfig: this takes its place, and its fields."""


def from_peer(checkpoint, path):
    """nanoGPT's or build-nanogpt's checkpoint as one of ours: model, model_args and tokenizer, which only the size of
    its vocabulary tells. (nanoGPT's GELU is the exact one: the approximation here differs by at most 0.0005.)"""
    from model import GPTConfig
    content = checkpoint if isinstance(checkpoint, dict) else {}
    fields, weights = content.get('model_args') or content.get('config'), content.get('model')
    fields = vars(fields) if isinstance(fields, PeerConfig) else fields
    if not (isinstance(fields, dict) and isinstance(weights, dict) and 'vocab_size' in fields
            and all(isinstance(w, torch.Tensor) for w in weights.values())):
        raise UserError(f'{path} holds no GPT')
    known = {field: value for field, value in asdict(GPTConfig()).items() if field != 'head_size'}
    for field, value in fields.items():
        if field not in known:
            raise UserError(f'{path}: its model has {field!r}, which has no counterpart in GPTConfig')
        fields = fields | {field: typed(value, type(known[field]), f'{path}: {field}')}
    weights = {str(k).removeprefix('_orig_mod.'): w for k, w in weights.items()  # compiled models' prefix
               if not str(k).endswith('.attn.bias')}  # the causal mask
    tokenizer = 'gpt2' if fields['vocab_size'] == 50304 else tokenizer_with(fields['vocab_size'], path)  # padded
    fields['vocab_size'] = TOKENIZERS[tokenizer].vocab_size
    try:
        config = GPTConfig(**fields)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None
    if config.n_layer > len(weights):
        raise UserError(f'{path} has {config.n_layer} layers, and only {len(weights)} weights')
    expected = layout(FAMILIES['gpt2'], replace(config, tie_embeddings=False))
    for key in expected.keys() | weights.keys():
        if key not in weights or key not in expected:
            raise UserError(f'{path}: the weights {"lack" if key in expected else "hold, and the model lacks,"} {key}')
        shape = tuple(weights[key].shape)
        n, *rest = expected[key][0]
        if list(shape[1:]) != rest or not shape or (shape[0] < n if key in VOCABULARY else shape[0] != n):
            raise UserError(f'{path}: {key} has the shape {shape}, which is not that of its model')
    return {'model': pad_vocab(weights, config.padded_vocab_size), 'model_args': fields, 'tokenizer': tokenizer}


def pad_vocab(state_dict, rows):
    """state_dict with its two (V, C) matrices padded with zeros, or cut, to that many rows."""
    return {k: F.pad(w, (0, 0, 0, rows - len(w))) if k in VOCABULARY else w for k, w in state_dict.items()}

# -----------------------------------------------------------------------------
# tokenizers

def tokenizer_of(vocab_size, where):
    """The tokenizer of a folder or hub model with that many ids: a name in TOKENIZERS, or the path of its
    tokenizer.json. Where it has no tokenizer, the one with as many ids."""
    path = find(where, 'tokenizer.json', optional=True)
    if path or (older := find(where, 'vocab.json', optional=True)):
        vocabulary = vocabulary_of(path or older)
        for name in (*TOKENIZERS, *(name + CHATML for name in TOKENIZERS)):
            size = TOKENIZERS[name.removesuffix(CHATML)].vocab_size + 2 * name.endswith(CHATML)
            if len(vocabulary) == size == vocab_size:
                decode = get_tokenizer(name).decode_bytes
                if vocabulary == {printable(decode([i])): i for i in range(vocab_size)}:
                    return name
    if path:
        return path
    for file in ('vocab.json', 'tokenizer.model', 'spiece.model'):
        if find(where, file, optional=True):
            raise UserError(f'{where}: its tokenizer ({file}) cannot be read: AutoTokenizer.from_pretrained(…)'
                            '.save_pretrained(…) of transformers writes a tokenizer.json')
    return tokenizer_with(vocab_size, where)


def vocabulary_of(path):
    """{token: id} of a tokenizer.json, or of GPT-2's older vocab.json."""
    content = read_json(path)
    if os.path.basename(path) == 'vocab.json':
        return content
    model, added = content.get('model'), content.get('added_tokens') or []
    try:
        return dict(model['vocab']) | {token['content']: token['id'] for token in added}
    except (TypeError, KeyError, ValueError):  # another kind of model, whose vocabulary is a list
        return {}


def tokenizer_with(vocab_size, where):
    """The name of the tokenizer with that many ids, for weights that come without one."""
    for name, tokenizer in TOKENIZERS.items():
        if tokenizer.vocab_size == vocab_size:
            return name
    raise UserError(f'{where} has a vocabulary of {vocab_size} ids, and no tokenizer here has as many')
