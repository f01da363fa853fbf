"""
What a run of train.py will need, worked out before it is paid for.

    python plan.py config/gpt2_xl.py --gpus=8
    python plan.py --budget=1e19                # the model and the tokens that make the most of that compute

It takes train.py's settings and its own. Nothing is trained and nothing allocated: the model is built on PyTorch's meta
device, where tensors have shapes and no memory.
"""

import math
from dataclasses import fields

from configurator import UserError, configure, given

import torch

from common import distributed, laws
from common.device import GPUS
from common.optimizers import configure_optimizers, muon_memory
from common.settings import divide_step
from data.dataset import Split
from data.loader import parse_mixture
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
gpus = 8  # GPUs that the run will have
mfu = 0.4  # the fraction of their peak FLOP/s that it will reach
gpu_hour_price = 2.0  # of one GPU, in any currency
budget = 0.0  # FLOPs, such as 1e19: print the compute-optimal parameters and tokens instead of a run's plan
fit = ''  # with budget: by a law of your own too, the scaling.json that scaling.py wrote
# -----------------------------------------------------------------------------

USABLE = 0.9  # usable fraction of a GPU's memory; the rest: CUDA's context, buffers, fragmentation


def empty_model(config):
    """The GPT of train.py's settings, without memory. Raises ValueError if they make no model."""
    try:
        vocab_size = Split(next(iter(parse_mixture(config['dataset']))), 'val').vocab_size
    except UserError:  # not prepared yet
        vocab_size = 50257
    with torch.device('meta'):
        return GPT(GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig) if f.name in config},
                             vocab_size=vocab_size))


def predicted_loss(n, n_non_embedding, tokens):
    """(Chinchilla's, Kaplan's) nats per token after training n parameters on `tokens` tokens, each for its own text
    and tokens of about four characters. Kaplan et al. 2020, arXiv:2001.08361, equation 1.5."""
    kaplan = ((6.4e13 / n_non_embedding)**(0.076 / 0.103) + 1.8e13 / tokens)**0.103
    return laws.EQUATION_10.loss(n, tokens), kaplan


def memory(model, config, gpus):
    """{part: bytes} on the fullest device; float32 weights, gradients and optimizer, whatever the dtype."""
    c, layout = model.config, config['parallel']
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    hidden = [tuple(p.shape) for name, p in model.named_parameters()
              if config['optimizer'] == 'muon' and '.h.' in name and p.dim() == 2 and p.requires_grad]
    n, n_hidden = sum(sizes.values()), sum(math.prod(shape) for shape in hidden)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)  # with lora_rank, the adapters
    shards = {'ddp': 1, 'zero1': gpus, 'fsdp': gpus // config['replicas']}[layout]
    parts = {'weights': 4 * n / shards, 'gradients': 4 * trained / shards,
             'optimizer': (8 * trained - 4 * n_hidden) / shards}
    b = 4 if config['dtype'] == 'float32' else 2  # bytes of what matrix products take and give
    residual = 4 if config['dtype'] in ('float32', 'float16') else 2  # bytes of the residual stream
    if layout == 'zero1':
        parts['gathered'] = 4 * (n + trained)  # weights and gradients are whole from the first micro-batch to the last
    if layout == 'fsdp':
        if config['cpu_offload']:
            parts = dict.fromkeys(parts, 0)
        block = sum(size for name, size in sizes.items() if '.h.0.' in name)
        outside = n - block * c.n_layer
        # two blocks, since the next is fetched while one computes; the embeddings and their gradient in float32
        parts['gathered'] = 2 * b * block + 8 * outside

    # bytes a token that a compiled backward pass needs of each layer: the residual stream before both normalisations,
    # their outputs, q, k, v, attention's output, and the MLP before and after its activation (after Korthikanti et al.
    # 2022, arXiv:2205.05198, section 4.1)
    q, kv = c.n_head * c.head_size, c.n_kv_head * c.head_size
    mlp = (3 if c.mlp == 'swiglu' else 2) * c.n_mlp
    layer = 2 * residual * c.n_embd + b * (2 * c.n_embd + 2 * q + 2 * kv + mlp) + (2 * c.n_embd if c.dropout else 0)
    layers = residual * c.n_embd * c.n_layer + layer if config['activation_checkpointing'] else layer * c.n_layer
    head = (b if config['compile'] else b + 8) * c.padded_vocab_size  # the logits; eager, also twice in float32
    activations = config['batch_size'] * c.block_size * (layers + head)
    if (muon := muon_memory(hidden, gpus) - activations) > 0:  # while it updates, when the activations are gone
        parts['muon'] = muon
    return parts | {'activations': activations}


def remedies(model, config, gpus):
    """[(settings, '' for none, bytes on the fullest device)], each of less memory, and of more cost, than the one
    before."""
    changes, found = {}, []

    def add(**more):
        changes.update(more)
        found.append((' '.join(f'--{k}={v}' for k, v in changes.items()),
                      sum(memory(model, config | changes, gpus).values())))

    add()
    while (size := (config | changes)['batch_size']) % 2 == 0:  # each step then has twice as many micro-batches
        steps = (config | changes)['gradient_accumulation_steps']
        add(batch_size=size // 2, **({'gradient_accumulation_steps': 2 * steps} if steps else {}))
    add(activation_checkpointing=True)
    if gpus > 1 and config['parallel'] != 'fsdp':
        add(parallel='zero1')
        add(parallel='fsdp')
    if gpus > 1 or config['parallel'] == 'fsdp':
        add(cpu_offload=True)
    return found


def remedy(options, available):
    """The settings of the first of the remedies that fits into `available` bytes; None if none does."""
    return next((settings for settings, size in options if size <= available), None)


def report(config):
    """The plan as text, for train.py's settings. Raises ValueError, with one line, if they make no run."""
    if config['init_from'] not in ('scratch', 'auto', 'resume'):
        raise ValueError(f'init_from={config["init_from"]} has sizes of its own, which the plan does not know: give '
                         '--init_from=scratch, and them as n_layer, n_head and n_embd')
    gpus = config['gpus']
    distributed.check_layout(config['parallel'], config['replicas'], config['cpu_offload'],
                             config['sharded_checkpoints'], planned=gpus)
    model = empty_model(config)
    configure_optimizers(model, config['optimizer'], 0.0, 0.0, (0.9, 0.95))  # raises if they do not fit together
    n = model.get_num_params(non_embedding=False)
    non_embedding = sum(p.numel() for p in model.transformer.h.parameters())
    steps, config['batch_size'], note = divide_step(config, given, gpus)
    step = steps * config['batch_size'] * config['block_size'] * gpus
    tokens = step * config['max_iters']
    flops = model.flops_per_token() * tokens
    chinchilla, kaplan = predicted_loss(n, non_embedding, tokens)
    expected = (f"{chinchilla:.2f} by Chinchilla's fit, {kaplan:.2f} by Kaplan's law, in nats per token\n"
                f'{"":22}(each for the text and the tokenizer of its paper)')
    if max(chinchilla, kaplan) > math.log(model.config.vocab_size):  # what a guess costs
        expected = 'unknown: the published laws are of larger models and longer tokens'
    parts = memory(model, config, gpus)
    layout = config['parallel'] + (f', {config["replicas"]} replicas' if config['replicas'] > 1 else '')
    lines = [
        f'parameters            {n:,}, {non_embedding:,} of them in the blocks',
        f'tokens                {tokens:,} = {config["max_iters"]:,} steps of {step:,}',
        *[f'                      ({note})'] * bool(note),
        f'tokens per parameter  {tokens / n:.1f}, where Chinchilla\'s optimum for its compute is about 20',
        f'compute               {flops:.3g} FLOPs, {model.flops_per_token():.3g} a token (6 a weight, and attention)',
        f'loss to expect        {expected}', '',
        f'memory of each of {gpus} GPUs ({layout}), in GB',
        *(f'  {part:<20}{size / 1e9:11.3g}' + '  (about)' * (part == 'activations') for part, size in parts.items()),
        f'  {"together":<20}{sum(parts.values()) / 1e9:11.3g}',
        *['  (without the teacher: its weights, and both models\' logits)'] * bool(config['teacher']), '',
        f'on {gpus} GPUs at {config["mfu"]:.0%} of their peak, {config["gpu_hour_price"]:.2f} a GPU-hour',
        f'  {"":<12}{"GB":>5}{"hours":>13}{"GPU-hours":>15}{"cost":>15}  does it fit?']
    options = remedies(model, config, gpus)
    for gpu, (peak, size) in GPUS.items():
        hours = flops / (peak * config['mfu']) / 3600
        change = remedy(options, USABLE * size * 1e9)
        fit = ('no: more GPUs with --parallel=fsdp, or a smaller model' if change is None
               else f'with {change}' if change else 'yes')
        lines.append(f'  {gpu:<12}{size:>5}{hours / gpus:>13,.1f}{hours:>15,.1f}'
                     f'{hours * config["gpu_hour_price"]:>15,.0f}  {fit}')
    return '\n'.join(lines)


def optima(budget, fit):
    """The compute-optimal parameters and tokens for `budget` FLOPs, as text, by the published fits and your own."""
    rows, notes = dict(laws.OPTIMA), []
    if fit:
        law, (low, high) = laws.read(fit)
        rows['your own: ' + fit] = law.optimum
        if not low <= budget <= high:
            notes = ['', f'{fit} is of runs of {low:.1e} to {high:.1e} FLOPs: outside of them it extrapolates']
    lines = [f'compute-optimal for {budget:.3g} FLOPs (C = 6ND; each fit is of its own text, tokenizer and models)', '',
             f'{"parameters":>12}{"tokens":>12}{"tokens each":>13}']
    for name, optimum in rows.items():
        n, d = optimum(budget)
        lines.append(f'{n:>12.3g}{d:>12.3g}{d / n:>13.1f}   {name}')
    return '\n'.join(lines + notes)


if __name__ == '__main__':
    config = configure(globals(), base='train.py')
    if budget or fit:
        if not 0 < budget < math.inf:
            raise UserError(f'fit={fit} needs a budget: --budget=1e19' if not budget else
                            f'budget={budget} must be a number of FLOPs above 0')
        if ignored := [name for name in given if name not in ('budget', 'fit')]:
            raise UserError(f'with budget no run is planned: {", ".join(ignored)} would be ignored')
        print(optima(budget, fit))
    else:
        try:
            print(report(config))
        except ValueError as error:
            raise UserError(error) from None
