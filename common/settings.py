"""What the settings of a run may be, which of them it does not use, and what those of a step come to."""

import math
import sys

from data.errors import UserError

# -----------------------------------------------------------------------------
# what is allowed

# The values that a setting may have, by its name, in every script: (lowest, highest, names), both included. A setting's
# default is always allowed, since a 0 often stands for something else.
TINY, HUGE = 5e-324, sys.float_info.max  # the bounds of an open interval: above 0, below infinity
RANGES = (
    (1, 2**31 - 1, 'batch_size block_size max_iters eval_interval eval_iters log_interval max_bad_steps replicas '
                   'n_layer n_head n_embd num_samples max_new_tokens stride gpus keep_last vocab_size jobs'),
    (0, 2**31 - 1, 'warmup_iters lr_decay_iters gradient_accumulation_steps keep_checkpoints hellaswag_interval '
                   'hellaswag_limit sample_interval n_kv_head n_mlp head_size num_proc limit batch_tokens top_k '
                   'step characters processes lora_rank'),
    (1, 2**62, 'total_batch_size eval_tokens shard_size'),
    (0, 2**62, 'max_tokens'),
    (0, 2**63 - 1, 'seed'),
    (0, HUGE, 'learning_rate min_lr weight_decay grad_clip skip_spikes softcap gpu_hour_price temperature '
              'lora_alpha'),
    (TINY, HUGE, 'beta rope_theta norm_eps adam_eps repetition_penalty dist_timeout teacher_temperature'),
    (0, 1 - 2**-53, 'dropout beta1 beta2'),
    (TINY, 1, 'wsd_decay mfu top_p'),
    (0, 1, 'min_p teacher_weight'),
)
CHOICES = {'lr_schedule': ('cosine', 'linear', 'wsd'), 'parallel': ('ddp', 'zero1', 'fsdp'),
           'optimizer': ('adamw', 'muon'), 'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
           'objective': ('next_token', 'mlm'), 'loss': ('dpo', 'ipo'),
           'kind': ('bpe', 'wordpiece', 'unigram')}


def check_ranges(config, defaults):
    """Raise UserError for the first value that is outside RANGES or CHOICES, or contradicts another."""
    ranges = {name: (low, high) for low, high, names in RANGES for name in names.split()}
    for name, value in config.items():
        low, high = ranges.get(name, (-math.inf, math.inf))
        if value != defaults[name] and type(value) in (int, float) and not low <= value <= high:
            bounds = ['above 0' if low == TINY else f'at least {low}'] * (low > -math.inf)
            bounds += ['finite' if high == HUGE else 'below 1' if high == 1 - 2**-53 else f'at most {high}']
            default = f', or {defaults[name]}, its default' * (not low <= defaults[name] <= high)
            raise UserError(f'{name}={value} must be {" and ".join(bounds)}{default}')
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f'{name}={value} is not one of {", ".join(CHOICES[name])}')
    if config.get('objective') == 'mlm' and (config['hellaswag_interval'] or config['sample_interval']):
        raise UserError('objective=mlm continues no text: --hellaswag_interval=0 --sample_interval=0')
    if config.get('decay_lr') and config['min_lr'] > config['learning_rate']:
        raise UserError(f'min_lr={config["min_lr"]} must be at most learning_rate={config["learning_rate"]}')


# -----------------------------------------------------------------------------
# what is not used

# Settings of train.py and dpo.py, when a run does not use them, and why
SCALING = 'rope_factor rope_original_context rope_low_freq_factor rope_high_freq_factor rope_attention_factor'
UNUSED = (
    ('warmup_iters lr_decay_iters min_lr lr_schedule wsd_decay', lambda c: not c.get('decay_lr', True),
     'decay_lr is False'),
    ('wsd_decay', lambda c: c['decay_lr'] and c['lr_schedule'] != 'wsd', 'lr_schedule is {lr_schedule}'),
    ('teacher_weight teacher_temperature', lambda c: not c['teacher'], 'there is no teacher'),
    ('lora_alpha', lambda c: not c['lora_rank'], 'lora_rank is 0'),
    (f'rope_theta {SCALING}', lambda c: c['init_from'] == 'scratch' and c['position'] != 'rope',
     'position is {position}'),
    (SCALING, lambda c: c['init_from'] == 'scratch' and c['position'] == 'rope' and c['rope_type'] == 'default',
     'rope_type is default'),
    ('zero_init', lambda c: not c['init_from'].startswith(('scratch', 'auto', 'resume')),
     'the weights come from {init_from}'),
    ('keep_checkpoints always_save_checkpoint', lambda c: c.get('eval_only'), 'eval_only is True'),
    ('backend dist_timeout', lambda c: c['processes'] == 1, 'there is one process'),
    ('hellaswag_limit hellaswag_data', lambda c: not c['hellaswag_interval'], 'hellaswag_interval is 0'),
    ('wandb_project', lambda c: not uses_wandb(c), 'wandb_log is False'),
    ('wandb_run_name', lambda c: not uses_wandb(c) and c['given']['wandb_run_name'][0] == '-',  # each config file has one
     'wandb_log is False'),
)


def uses_wandb(config):
    return config['wandb_log'] or 'wandb' in config['log_to']


def unused(config, given, processes):
    """Lines on the settings that were given and have no effect. config: train.py's or dpo.py's; given: {name: where}."""
    config = config | {'given': given, 'processes': processes}
    for names, without, reason in UNUSED:
        names = [name for name in names.split() if name in given]
        if names and without(config):
            yield f'not used: {", ".join(names)} ({reason.format(**config)})'
    if config.get('decay_lr', True) and config['warmup_iters'] > config['max_iters']:
        yield f'warmup_iters={config["warmup_iters"]} is longer than the run (max_iters={config["max_iters"]}), ' \
              'which ends before the learning rate is at its peak'


# -----------------------------------------------------------------------------
# how large an evaluation and a step are

def deciding(config, given, batches, tokens):
    """(which of two settings of one size decides, a line for the user or ''): the one that was given last. The one in
    batches may be 0: then the one in tokens."""
    if not config[batches]:
        return tokens, ''
    order = [name for name in given if name in (batches, tokens)]
    note = '{1}={3} replaces {0}={2}, given before it'.format(*order, *map(config.get, order)) if order[1:] else ''
    return tokens if order[-1:] == [tokens] else batches, note


def eval_size(config, given):
    """(tokens in an evaluation, a line for the user or ''), of eval_tokens or eval_iters."""
    name, note = deciding(config, given, 'eval_iters', 'eval_tokens')
    batch = config['batch_size'] * config['block_size'] if name == 'eval_iters' else 1  # tokens
    return config[name] * batch, note


def divide_step(config, given, processes):
    """(micro-batches that each process runs in a step, sequences in each, a line for the user or '').

    config: settings with total_batch_size (tokens in a step), gradient_accumulation_steps (micro-batches in a step over
    all processes; 0: total_batch_size decides), batch_size and block_size. given: those that the user set, in the order
    of setting; the later of the two wins. Raises UserError if they can't be divided by the number of processes.
    """
    batch_size, block_size = config['batch_size'], config['block_size']
    total, steps = config['total_batch_size'], config['gradient_accumulation_steps']
    name, note = deciding(config, given, 'gradient_accumulation_steps', 'total_batch_size')
    if name == 'gradient_accumulation_steps':
        if steps % processes:
            raise UserError(f'gradient_accumulation_steps={steps} is not a multiple of the {processes} processes: use '
                            f'{-(-steps // processes) * processes}, or total_batch_size')
        return steps // processes, batch_size, note
    micro_batch = batch_size * block_size * processes  # tokens, over all processes
    if total % micro_batch == 0:
        return total // micro_batch, batch_size, note
    if total < micro_batch and total % (block_size * processes) == 0:
        batch_size = total // (block_size * processes)
        return 1, batch_size, f'batch_size={batch_size}: {processes} processes divide a step of {total:,} tokens'
    if 'total_batch_size' not in given:  # a default gives way to what was set
        steps = max(1, round(total / micro_batch))
        return steps, batch_size, (f'total_batch_size={steps * micro_batch} instead of {total}, which is not a '
                                   f'multiple of batch_size * block_size * processes = {micro_batch}')
    below = total // micro_batch * micro_batch
    near = f'are {below} or {below + micro_batch}' if below else f'is {micro_batch}'
    raise UserError(f'total_batch_size={total} is not a multiple of batch_size * block_size * processes = '
                    f'{batch_size} * {block_size} * {processes} = {micro_batch}: the nearest {near}')
