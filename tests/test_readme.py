"""The README's commands name scripts, settings and files that exist; what needs neither a GPU, the internet nor a
training runs."""

import ast
import contextlib
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import compare
import configurator
from configurator import UserError, override
from conftest import ROOT
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from test_dataset import write_dataset

README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```$', README, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r'^```\w+\n.*?^```$', '', README, flags=re.DOTALL | re.MULTILINE)
SPANS = [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', PROSE)]
YOURS = 'config/a.py', 'config/b.py', 'config/scaled.py'  # which the reader writes
ANY = '--help', '--flag', '--name', '--setting'


def commands_in(text):
    """The commands of a shell script, as lists of words."""
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index('&&') if '&&' in words else len(words)
            yield words[:end]
            words = words[end + 1:]


def scripts():
    return [path for path in [*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py')] if call_of_configure(path)]


@functools.cache
def call_of_configure(path):
    """(line, {keyword: its value, or True}) of a script's configure(globals(), ...); None: it has no settings."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'configure':
            return node.lineno, {keyword.arg: getattr(keyword.value, 'value', True) for keyword in node.keywords}


@functools.cache
def defaults_of(path):
    """{name: value} of the settings that a script takes."""
    line, keywords = call_of_configure(path)
    values = defaults_of(ROOT / keywords['base']) if 'base' in keywords else {}
    for name, node in configurator.assignments(path):
        with contextlib.suppress(ValueError):  # not a literal
            if node.lineno < line and configurator.is_setting(name, value := ast.literal_eval(node.value)):
                values = values | {name: value}
    return values


def check_script(name, arguments):
    """Raise unless `name` is a script that takes these arguments."""
    path = ROOT / name
    assert path.is_file(), f'there is no {name}'
    if not call_of_configure(path):  # it runs another one
        assert not arguments
        return
    operands = [] if 'positional' in call_of_configure(path)[1] else None
    files = [argument for argument in arguments if argument in YOURS]
    override(defaults_of(path), [argument for argument in arguments if argument not in files], operands)
    for operand in operands or []:
        if shlex.split(operand)[0].endswith('.py'):
            compare.side(operand, [])


def check(words):
    """Raise unless a command would start: what it names exists, what it is given is valid."""
    if re.match(r'[a-z]+=', words[0]) or words[0] in ('.', 'export'):
        return
    if words[0] == 'srun':
        words = words[1:]
    if words[0] == 'torchrun':
        with contextlib.suppress(SystemExit):
            arguments = get_args_parser().parse_args(words[1:])
            return check_script(arguments.training_script, arguments.training_script_args)
        raise AssertionError(f'torchrun does not take {words[1:]}')
    if words[:2] == ['pip', 'install']:
        assert all((ROOT / file).is_file() for option, file in zip(words, words[1:]) if option == '-r')
    elif words[:2] == ['python', '-m']:
        assert words[2] == 'pytest' and (ROOT / words[3]).is_dir() or (ROOT / f'{words[2].replace(".", "/")}.py').is_file()
    elif words[:3] != ['python3', '-m', 'venv']:
        assert words[0] == 'python', f'what is {words[0]}?'
        check_script(words[1], words[2:])


COMMANDS = [words for kind, text in BLOCKS if kind == 'sh' for words in commands_in(text)]
COMMANDS += [shlex.split(span) for span in SPANS if span.startswith(('python ', 'torchrun '))
             and '…' not in span and 'FOLDER' not in span.split()[1:2]]


@pytest.mark.parametrize('words', COMMANDS, ids=' '.join)
def test_a_command_names_what_exists(words):
    check(words)


def test_the_readme_has_the_commands():
    named = {Path(word).name for words in COMMANDS for word in words if word.endswith('.py')}
    assert len(COMMANDS) > 30 and named >= {path.name for path in scripts()}


@pytest.mark.parametrize('command', [
    'python trian.py', 'python train.py config/gpt3.py', 'python train.py --batchsize=3', 'python train.py --batch_size=x',
    'python sample.py --stride=3', 'torchrun --gpus=8 train.py', 'torchrun --nproc_per_node=8 train.py --parallel=tensor',
    'python compare.py config/gpt2.py config/nowhere.py', 'python compare.py "config/gpt2.py --n_heads=3" config/b.py',
    'python -m data.datasets FOLDER', 'pip install -r missing.txt', 'pyhton train.py', 'python plan.py --gpu=8'])
def test_a_wrong_command_is_found(command):
    with pytest.raises((UserError, AssertionError)):
        check(shlex.split(command))


def test_every_option_in_the_prose_exists():
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    for span in SPANS:
        for option, value in re.findall(r'(--[\w-]+)(?:=([^\s`]*))?', span):
            takers = [path for path in scripts() if option[2:] in defaults_of(path)]
            assert takers or option in known or option in ANY, f'{option}, in `{span}`, is no setting'
            if takers and value and not re.search('[A-Z|]', value):
                accepted = []
                for path in takers:
                    with contextlib.suppress(UserError):
                        accepted.append(override(defaults_of(path), [f'{option}={value}']))
                assert accepted, f'{option}={value} is valid nowhere'


def test_every_file_in_the_prose_exists():
    for span in SPANS:
        if re.fullmatch(r'[\w/*]+\.py', span) and span not in YOURS:
            assert any([*ROOT.glob(span), *ROOT.glob(f'config/{span}'), *ROOT.glob(f'tests/{span}')]), span
        if re.fullmatch(r'[a-z]+/', span):
            assert (ROOT / span).is_dir(), span
    for link in re.findall(r'\]\(([^)#]+)\)', README):
        assert '://' in link or (ROOT / link).exists(), link

# -----------------------------------------------------------------------------
# run, in a folder that holds what the commands need

EXTRA = {'sample.py': ['--max_new_tokens=3', '--num_samples=1', '--device=cpu', '--dtype=float32', '--compile=False'],
         'hellaswag.py': ['--data=items.jsonl', '--device=cpu', '--dtype=float32'],
         'evaluate.py': ['--dataset=lines', '--device=cpu', '--dtype=float32'], 'export.py': [], 'plan.py': []}
RUN = [words for words in COMMANDS if words[:1] == ['python'] and words[1] in EXTRA
       and ('--out_dir=out-quickstart' in words or words[1] == 'plan.py')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with an out-quickstart, a dataset and items of HellaSwag."""
    folder = tmp_path_factory.mktemp('readme')
    tokenizer = get_tokenizer('bytes')
    ids = tokenizer.encode_documents(['class A: pass\n' * 20] * 20)
    write_dataset(folder / 'lines', 10_000, 257, tokenizer='bytes', train=ids, val=ids)
    (folder / 'config').symlink_to(ROOT / 'config')
    (folder / 'items.jsonl').write_text('{"ctx": "A man", "label": 1, "endings": ["up.", "down.", "in.", "out."]}\n')
    config = GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=16)
    (folder / 'out-quickstart').mkdir()
    torch.save({'model': GPT(config).state_dict(), 'model_args': vars(config), 'tokenizer': 'bytes'},
               folder / 'out-quickstart' / 'ckpt.pt')
    return folder


@pytest.mark.parametrize('words', RUN, ids=' '.join)
def test_a_command_runs(words, folder, monkeypatch, capsys):
    name, arguments = words[1], [word for word in words[2:] if word.split('=')[0] not in
                                 {extra.split('=')[0] for extra in EXTRA[words[1]]}]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', [name, *arguments, *EXTRA[name]])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / name), run_name='__main__')
    assert capsys.readouterr().out
    for word in words:
        if word.startswith(('--folder=', '--html=')):
            assert (folder / word.split('=')[1]).exists()


def test_the_commands_that_run_are_there():
    assert {words[1] for words in RUN} == EXTRA.keys() and any('--html=gpt.html' in words for words in RUN)


def test_an_idea_in_three_lines():
    """The README's change of the architecture, made to a copy of model.py."""
    lines = dict(line.split('  # ')[::-1] for line in next(text for kind, text in BLOCKS if kind == 'python').splitlines())
    field, parameter, use = (next(code for where, code in lines.items() if part in where)
                             for part in ('model.py, GPTConfig', 'GPT.__init__', 'GPT.hidden'))
    source = (ROOT / 'model.py').read_text(encoding='utf-8')

    def insert(after, code, condition):
        nonlocal source
        match = re.search(after, source, re.MULTILINE)
        assert match, f'model.py has no {after}'
        code = [f'        if {condition}:', f'    {code}'] if condition else [code]
        source = '\n'.join([source[:match.end()], *code]) + source[match.end():]

    insert(r'^    softcap: float = .*$', field, '')
    insert(r'(?s)^class GPT\(.*?^        self\.config = config$', parameter, 'config.embedding_scale')
    insert(r'^        x\b.*transformer\.wte.*$', use, 'self.config.embedding_scale')
    module = {'__name__': 'idea'}
    sys.modules['idea'] = type(sys)('idea')  # where dataclass looks for the types of fields
    try:
        exec(compile(source, 'idea.py', 'exec'), module)
        model = module['GPT'](module['GPTConfig'](16, 50, 1, 2, 8, embedding_scale=True))
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
        assert model.embedding_scale.grad is not None
    finally:
        del sys.modules['idea']
