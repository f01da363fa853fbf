"""Questions about the standard library: true, held out by file, and the same each time."""

import ast
import importlib
import inspect
import json

import numpy as np
import pytest
from conftest import run

from data.dataset import Split
from data.stdlib.prepare import held_out
from data.tokenizer import get_tokenizer


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'stdlib_chat'
    run('data/stdlib_chat/prepare.py', f'--out_dir={folder}')
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(rows):
    """The modules, as files, that these conversations are about."""
    names = [row['messages'][-1]['content'] if row['kind'] == 'which' else
             row['messages'][0]['content'].removesuffix(' do?').removesuffix('?').split()[-1] for row in rows]
    return {name.replace('.', '/') for name in names}


def test_answers_are_what_python_says(folder):
    """Of modules that have their functions from their own file, not from C."""
    checked = 0
    for row in rows(folder / 'val.jsonl'):
        question, answer = (message['content'] for message in row['messages'])
        name = answer if row['kind'] == 'which' else question.removesuffix('?').removesuffix(' do').split()[-1]
        module = next((m for m in ('urllib.parse', 'bdb', 'sched', 'xml.sax.saxutils') if name.startswith(f'{m}.')), None)
        if not module:
            continue
        thing = importlib.import_module(module)
        for part in name.removeprefix(f'{module}.').split('.'):
            thing = inspect.getattr_static(thing, part)
        thing = inspect.unwrap(getattr(thing, '__func__', thing))
        documentation = ' '.join((inspect.cleandoc(thing.__doc__ or '')).split('\n\n')[0].split())
        if row['kind'] == 'signature':
            assert answer.startswith(thing.__name__ + '(') and list(inspect.signature(thing).parameters) == arguments(answer)
        else:
            assert documentation == (answer if row['kind'] == 'what' else question.partition(': ')[2])
        checked += 1
    assert checked > 100


def arguments(signature):
    """The names of the arguments in 'f(a, *, b=1)'."""
    args = ast.parse(f'def {signature}: pass').body[0].args
    return [a.arg for a in (*args.posonlyargs, *args.args, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg]))]


def test_whole_files_are_held_out(folder):
    val = {file.removesuffix('.py').removesuffix('/__init__') for file in held_out}
    train, test = (files_of(rows(folder / f'{split}.jsonl')) for split in ('train', 'val'))

    def owner(name):  # whether a held-out module has it
        return any(name.startswith(f'{module}/') for module in val - {'xml', 'idlelib/__main__'})
    assert all(map(owner, test)) and not any(map(owner, train)) and len(train) > 5000 and len(test) > 200


def test_shards_hold_the_conversations_and_pairs_their_answers(folder):
    tokenizer, split = get_tokenizer('bytes+chatml'), Split(str(folder), 'val')
    assert split.tokenizer == tokenizer.name
    found = rows(folder / 'val.jsonl')
    conversations = {row['messages'][0]['content']: row['messages'][1]['content'] for row in found}
    text = tokenizer.decode(np.load(folder / 'val_000000.npy'))
    for question, answer in conversations.items():
        assert f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>' in text
    pairs = rows(folder / 'pairs_val.jsonl')
    assert len(pairs) > 0.95 * sum(row['kind'] != 'signature' for row in found)
    for pair in pairs:
        assert pair['chosen'] == conversations[pair['prompt']] != pair['rejected'] in conversations.values()


def test_the_same_again(tmp_path):
    few = tmp_path / 'few.py'  # a tenth of the files
    few.write_text('from __main__ import files as _files\n_files[:] = _files[::10]\n')
    for name in 'one', 'two':
        run('data/stdlib_chat/prepare.py', few, f'--out_dir={tmp_path}/{name}')
    assert len(list((tmp_path / 'one').iterdir())) >= 8
    for path in sorted((tmp_path / 'one').iterdir()):
        assert path.read_bytes() == (tmp_path / 'two' / path.name).read_bytes(), path.name
