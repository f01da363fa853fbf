"""
Settings from files and from the command line. They are plain lowercase globals at the top of a script:

    # training
    batch_size = 12   # sequences in a micro-batch
    compile = 'auto'  # True, False, or 'auto': where a compiler works
    config = configure(globals())  # {'batch_size': 12, 'compile': 'auto'}

    $ python train.py config/gpt2.py --batch_size=32 --compile=False

Files and settings apply in order, the last wins. A file is Python that assigns settings; it sees those made so
far, and may import, define functions, and keep helpers of its own in names that begin with an underscore.

Importing this installs the hook that prints a UserError, Ctrl-C or a missing package as one line: commands import it
first.
"""
import ast
import difflib
import math
import os.path
import re
import runpy
import shutil
import sys
import textwrap
import tokenize
import traceback

from data.errors import UserError

BOOLS = {'True': True, 'true': True, '1': True, 'False': False, 'false': False, '0': False}
TYPES = {bool: 'True or False', int: 'an int', float: 'a float', str: 'a string'}

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
SCALING = 'rope_factor rope_original_context rope_low_freq_factor rope_high_freq_factor rope_attention_factor'
# Settings of train.py and dpo.py, when a run does not use them, and why
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
    ('wandb_run_name', lambda c: not uses_wandb(c) and given['wandb_run_name'][0] == '-',  # each config file has one
     'wandb_log is False'),
)
PATHS = ('out_dir', 'init_from', 'teacher', 'dataset', 'hellaswag_data', 'data', 'out', 'prompts', 'folder', 'input',
         'data_files', 'pairs', 'val_pairs', 'html', 'fit')

given = {}  # {setting: the argument or FILE:LINE that set it}, in the order of the last time that each was set

def configure(script, base='', positional=None):
    """Override the settings among `script`, a script's globals(), by sys.argv[1:]; returns {name: value}.

    base: a script beside this one whose settings are accepted and returned too (plan.py takes train.py's).
    positional: a list that collects the arguments that are not --name=value, for a script that
        takes other things than settings files (plot.py: folders).

    A setting is a bool, int, float or str and keeps its default's type, but an int will do for a float, and
    True or False for the string 'auto'. Raises UsageError for an unknown setting, a wrong type or a broken file, and
    UserError for a value outside its range.
    """
    own = {k: script[k] for k, _ in assignments(script['__file__']) if is_setting(k, script.get(k))}
    if {'-h', '--help'} & set(sys.argv[1:]):
        sys.exit(print_help(script, own, base, '[FILE.py ...]' if positional is None else 'ARGUMENT ...'))
    defaults = (settings_of(os.path.join(os.path.dirname(script['__file__']), base)) if base else {}) | own
    config = override(defaults, sys.argv[1:], positional)
    script.update({name: config[name] for name in own})
    return config

def override(defaults, arguments, positional=None):
    """{name: value}: the defaults, with files and --name=value applied in order; see configure()."""
    config = dict(defaults)
    given.clear()
    for arg in arguments:
        key, equals, text = arg.removeprefix('--').partition('=')
        if arg.startswith('--'):
            config[key] = checked(arg, key, parse(text, defaults.get(key)) if equals else True, defaults)
            note_given({key: arg})
        elif positional is not None:
            positional.append(arg)
        elif arg.endswith('.py'):
            settings, lines = run_file(arg, config, defaults)
            note_given({k: f'{arg}:{lines.get(k, 1)}' for k in settings if k in lines or settings[k] != config[k]})
            config.update(settings)
        else:
            raise UsageError(f'{arg}: expected a settings file (FILE.py) or --key=value; --help lists the settings')
    config |= {key: os.path.expanduser(config[key]) for key in PATHS if key in config}
    check_ranges(config, defaults)
    return config

def note_given(places):
    for key, place in places.items():
        given.pop(key, None)  # the last one given comes last
        given[key] = place

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

def uses_wandb(config):
    return config['wandb_log'] or 'wandb' in config['log_to']

def unused(config):
    """Lines on the settings that were given and have no effect. config: train.py's or dpo.py's, and 'processes'."""
    for names, without, reason in UNUSED:
        names = [name for name in names.split() if name in given]
        if names and without(config):
            yield f'not used: {", ".join(names)} ({reason.format(**config)})'
    if config.get('decay_lr', True) and config['warmup_iters'] > config['max_iters']:
        yield f'warmup_iters={config["warmup_iters"]} is longer than the run (max_iters={config["max_iters"]}), ' \
              'which ends before the learning rate is at its peak'

def settings_of(file):
    """{name: value} of the settings that a script assigns, as literals, before it calls configure()."""
    values = {}
    for name, node in assignments(file):
        if isinstance(node.value, ast.Call):
            break
        values[name] = ast.literal_eval(node.value)
    return {name: value for name, value in values.items() if is_setting(name, value)}

def is_setting(name, value):
    return name.islower() and name[0] != '_' and type(value) in TYPES

def assignments(file):
    """[(name, node)] of what a Python file assigns outside its functions and classes, in order."""
    with tokenize.open(file) as f:
        found, nodes = [], ast.parse(f.read()).body
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            found += [(name.id, node) for name in ast.walk(node)
                      if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):  # into an if, a for, a with
            nodes[:0] = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found

def parse(text, default):
    """The value that `text` spells for a setting with this default, or `text` itself where it spells none."""
    if type(default) is bool or default == 'auto':
        return BOOLS.get(text, text)
    try:
        return type(default)(text)
    except (TypeError, ValueError):
        return text

def checked(where, key, value, defaults):
    """`value`, if `key` is known and the type right; `where` begins the message otherwise."""
    if key not in defaults:
        near = ' or '.join(difflib.get_close_matches(key.lower(), defaults))
        raise UsageError(f'{where}: unknown setting {key}; '
                         + (f'did you mean {near}?' if near else '--help lists them all'))
    kind = type(defaults[key])
    if type(value) is int and kind is float and abs(value) < 2**1023:
        return float(value)
    if type(value) is not kind and not (type(value) is bool and defaults[key] == 'auto'):
        example = f': {where}={defaults[key]!r}' * (where == f'--{key}')  # without a value it is True
        raise UsageError(f'{where}: {key} takes {TYPES[kind]} (its default is {defaults[key]!r}){example}')
    return value

def run_file(file, config, defaults):
    """The settings that the Python file `file` makes of `config`, {name: value}, and where, {name: line}."""
    if not os.path.isfile(file):
        raise UsageError(f'{file}: no such file')
    try:
        result = runpy.run_path(file, init_globals=config)
        lines = {name: node.lineno for name, node in assignments(file)}
    except Exception as error:  # whatever the user's code raises; a SyntaxError has no frame in the file
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = [getattr(error, 'lineno', 1), *frames][-1]
        raise UsageError(f'{file}:{line}: {type(error).__name__}: {getattr(error, "msg", error)}') from None
    return {k: checked(f'{file}:{lines.get(k, 1)}', k, value, defaults) for k, value in result.items()
            if k in defaults or k in lines and (is_setting(k, value) or k.lower() in defaults)}, lines

class UsageError(UserError):
    """The command line, or a settings file, is not valid."""
    status = 2

def excepthook(kind, error, trace):
    """sys.excepthook: one line for a mistake of the user's, a traceback for one of ours; of many processes that fail
    together, or because one did, only the first prints."""
    distributed = sys.modules.get('common.distributed')  # only a script that can run on many processes has imported it
    if not distributed or distributed.is_first_failure():
        if isinstance(error, UserError):
            print(' '.join(str(error).split()), file=sys.stderr)  # it may quote an exception of several lines
        elif kind is ModuleNotFoundError and (package := error.name.split('.')[0]) in required_packages():
            print(f'{package} is not installed in this Python ({sys.executable}): activate your virtual environment, '
                  'or pip install -r requirements.txt', file=sys.stderr)
        elif kind is BrokenPipeError and not (distributed and distributed.world_size > 1):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # `| head` has read enough
        elif kind is KeyboardInterrupt:
            print(error if error.args else 'interrupted', file=sys.stderr)
        elif line := distributed and distributed.describe(error):
            print(line, file=sys.stderr)
        else:
            if distributed and distributed.world_size > 1:
                print(f'on rank {distributed.rank}:', file=sys.stderr)
            sys.__excepthook__(kind, error, trace)
    raise SystemExit(130 if kind is KeyboardInterrupt else getattr(error, 'status', 1))

def required_packages():
    with open(os.path.join(os.path.dirname(__file__), 'requirements.txt')) as f:
        return {match[0] for line in f if (match := re.match(r'\w+', line))}

sys.excepthook = excepthook

def print_help(script, defaults, base, operands):
    """Print the script's docstring, then each setting under the comment lines that stand right above it."""
    with tokenize.open(script['__file__']) as f:
        comments = {t.start: t.string for t in tokenize.generate_tokens(f.readline) if t.type == tokenize.COMMENT}
    print((script['__doc__'] or '').strip())
    print(f'\nusage: python {sys.argv[0]} {operands} [--setting=value ...]')
    if base:
        print(f'with the settings of {base} (`python {base} --help`), and')
    nodes = dict(reversed(assignments(script['__file__'])))  # a script may assign a setting again, further down
    indent = max((len(f'  --{name}={value!r}  ') for name, value in defaults.items()), default=0)
    width = max(shutil.get_terminal_size().columns, indent + 30)
    for name, value in defaults.items():
        first, last, above = nodes[name].lineno, nodes[name].end_lineno, []
        while (first - len(above) - 1, 0) in comments:
            above.append(comments[first - len(above) - 1, 0].strip('#- '))
        if above:
            print('', *filter(None, reversed(above)), sep='\n')
        beside = ' '.join(text.lstrip('# ') for (line, _), text in comments.items() if first <= line <= last)
        setting = f'  --{name}={value!r}'.ljust(indent)
        print(textwrap.fill(setting + beside, width, subsequent_indent=' ' * indent))
