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
import os.path
import re
import runpy
import shutil
import sys
import textwrap
import tokenize
import traceback

from common.settings import check_ranges
from data.errors import UserError

BOOLS = {'True': True, 'true': True, '1': True, 'False': False, 'false': False, '0': False}
TYPES = {bool: 'True or False', int: 'an int', float: 'a float', str: 'a string'}
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
