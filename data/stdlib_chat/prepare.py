"""
Questions about Python's standard library, answered by its own documentation: a chat dataset on every machine, without
a download.

    python data/stdlib_chat/prepare.py

What a function does, which one does that, and its signature: parsed from the source, and nothing of it is run. The
files that data/stdlib holds out are held out here, so that a model of that dataset has not read them.

    train.jsonl, val.jsonl              the conversations, which become the dataset's shards
    pairs_train.jsonl, pairs_val.jsonl  for dpo.py: the true answer, and another function's
"""
import ast
import json
import platform
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from configurator import configure
from data.atomic import write
from data.chatml import chat_tokenizer, encode
from data.conversation import prepare_conversations
from data.prepare import corpus_of
from data.stdlib.prepare import files, held_out, read, root

tokenizer = 'bytes'  # or 'gpt2'
out_dir = ''  # the dataset's folder; empty: the one of this script
block_size = 128  # tokens in a block, as in config/quickstart.py; longer conversations are left out
seed = 1337  # of the order, and of the pairs

PROPERTY = {'property', 'cached_property', 'abstractproperty', 'setter', 'deleter'}  # decorators: no signature


def definitions(body, parent):
    """(qualified name, node) of the public functions and classes in a list of statements, and in those classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not node.name.startswith('_') or node.name.endswith('__'):
                yield f'{parent}.{node.name}', node
                if isinstance(node, ast.ClassDef):
                    yield from definitions(node.body, f'{parent}.{node.name}')


def conversations(file):
    """(kind, question, answer) for each public function and class of a file of the library."""
    try:
        tree = ast.parse(read(root / file) or '')
    except SyntaxError:  # on purpose
        return
    module = file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
    if '._' in f'.{module}':
        return
    for name, node in dict(definitions(tree.body, module)).items():
        decorators = {ast.unparse(decorator).split('.')[-1] for decorator in node.decorator_list}
        if not isinstance(node, ast.ClassDef) and not decorators & PROPERTY:
            yield 'signature', f'What is the signature of {name}?', f'{node.name}({ast.unparse(node.args)})'
        if does := ' '.join((ast.get_docstring(node) or '').split('\n\n')[0].split()):
            yield 'what', f'What does {name} do?', does
            yield 'which', f'Which {"class" if isinstance(node, ast.ClassDef) else "function"} does this: {does}', name


def answered(question, answer):
    return [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]


def chosen(files):
    """The (kind, question, answer) of these files that fit into a block and have one answer, shuffled."""
    found, answers = [], {}
    for kind, question, answer in (c for file in files for c in conversations(file)):
        answers.setdefault(question, set()).add(answer)
        found.append((kind, question, answer))
    found = [c for c in found if len(answers[c[1]]) == 1 and len(encode(answered(*c[1:]), chat)[0]) <= block_size]
    random.Random(seed).shuffle(found)
    return found


def jsonl(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def pairs(found):
    """Questions with their answer and, as the rejected one, the next answer of the kind. Not for signatures, where the
    one that has the name is easily told."""
    for kind in 'what', 'which':
        asked = [(question, answer) for k, question, answer in found if k == kind]
        for (question, answer), (_, other) in zip(asked, asked[1:] + asked[:1]):
            if other != answer:
                yield {'prompt': question, 'chosen': answer, 'rejected': other}


if __name__ == '__main__':
    configure(globals())
    chat, out_dir = chat_tokenizer(tokenizer), Path(out_dir or Path(__file__).parent)
    parts = {'train': chosen([file for file in files if file not in held_out]), 'val': chosen(held_out)}
    train, val = (corpus_of([json.dumps(answered(*c[1:])) for c in found]) for found in parts.values())
    prepare_conversations(out_dir, train, val, tokenizer, block_size, num_proc=1, settings={'seed': seed},
                          source={'dataset': "questions about Python's standard library",
                                  'version': platform.python_version()})
    for split, found in parts.items():
        write(out_dir / f'{split}.jsonl', jsonl({'kind': kind, 'messages': answered(*c)} for kind, *c in found))
        write(out_dir / f'pairs_{split}.jsonl', jsonl(pairs(found)))
