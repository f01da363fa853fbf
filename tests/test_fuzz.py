"""
Whatever is in a file: reading it works, or raises one UserError.

    python tests/test_fuzz.py --cases=10000     # by hand, of each kind; --seed=N for other ones

A kind of file is a row of CASES: make(folder) writes a good one and returns its path; read(path) uses the file at that
path, however it was mutated. To add one, append a row. The mutator edits bytes, and in JSON also values.
"""
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import prepare as engine
from data.chatml import chat_tokenizer, encode
from data.conversation import prepare_conversations, to_messages
from data.dataset import Split, verify
from data.errors import UserError
from data.files import corpus_of_files
from data.loader import Loader
from data.pairs import read_pairs
from data.tokenizer import get_tokenizer
from train_tokenizer import train

TEXTS = [f'Document {i}: né 漢 🙂\n' * 3 for i in range(8)]
ROWS = ''.join(json.dumps({'text': text}) + '\n' for text in TEXTS)
VALUES = [None, True, False, 0, 1, -1, 2**70, 0.5, float('nan'), 1e400, '', 'x', '../../x', '/etc/passwd', '~', 'a\nb',
          '\0', [], {}, [[]], [None], {'a': {}}, 'uint32', 'train_000000.npy', 7, 'val']


def mutated(content, chance):
    """Bytes of a file with one to three changes."""
    for _ in range(chance.randint(1, 3)):
        how = chance.choice([mutated_json] * 4 + [flip, cut, repeat, insert, digits])
        content = how(content, chance)
    return content


def mutated_json(content, chance):
    """One value of the JSON object, or of one of its lines, is dropped, renamed, nested too deep or another."""
    lines = content.split(b'\n') if content.count(b'\n') and not content.startswith(b'{\n') else [content]
    k = chance.randrange(len(lines))
    try:
        root = tree = json.loads(lines[k])
        while True:
            key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
            if not (isinstance(tree[key], (dict, list)) and tree[key] and chance.random() < 0.8):
                break
            tree = tree[key]
        value = chance.choice([*VALUES, 'deep', tree[key]])
        if isinstance(tree, dict) and chance.random() < 0.2:
            del tree[key]
            key = chance.choice([key, 'file', '', 'text'])
        tree[key] = value
        lines[k] = json.dumps(root).encode()
        if value == 'deep':
            lines[k] = lines[k].replace(b'"deep"', b'[' * 20_000, 1)
    except (ValueError, TypeError, LookupError, RecursionError):  # no JSON, or nothing in it
        return flip(content, chance)
    return b'\n'.join(lines)


def flip(content, chance):
    content = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        if content:
            at = int(len(content) * chance.random() ** 3)
            content[at] = chance.choice([0, 10, 34, 44, 91, 123, 255, chance.randrange(256)])
    return bytes(content)


def cut(content, chance):
    return content[:chance.randrange(len(content) + 1)]


def repeat(content, chance):
    a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:b] + content[a:b] * chance.choice([1, 50]) + content[b:]


def insert(content, chance):
    at = chance.randrange(len(content) + 1)
    new = chance.choice([b'\xff' * 5, b'\0' * 8, b'\xef\xbb\xbf', b'[' * 5000, b'"', b'\r', b'-'])
    return content[:at] + new + content[at:]


def digits(content, chance):
    """A number of the text is another one."""
    places = [i for i, byte in enumerate(content[:4096]) if 48 <= byte <= 57]
    if not places:
        return content
    at = chance.choice(places)
    return content[:at] + chance.choice([b'0', b'-1', b'9' * 30, b'4294967296', b'1e5', b'']) + content[at + 1:]


# -----------------------------------------------------------------------------
# what data/ reads

def make_dataset(folder, name):
    engine.prepare(folder, engine.corpus_of(TEXTS), tokenizer='bytes', num_proc=1, shard_size=200)
    return folder / name


def read_dataset(path):
    """As training, verification and another preparation do."""
    def train():
        Split(str(path.parent), 'train').read(np.array([0]), 10)
    uses = [train, lambda: verify(str(path.parent)),
            lambda: engine.prepare(path.parent, engine.corpus_of(TEXTS), tokenizer='bytes', num_proc=1, shard_size=200)]
    in_turn(uses)


def in_turn(uses):
    """Each of these, whether or not the one before raised a UserError."""
    errors = []
    for use in uses:
        try:
            use()
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def make_chat(folder, name):
    rows = [json.dumps([{'role': 'user', 'content': text[:9]}, {'role': 'assistant', 'content': text}]) for text in TEXTS]
    prepare_conversations(folder, engine.corpus_of(rows), engine.corpus_of(rows[:2]), 'bytes', 50, num_proc=1, shard_size=200)
    return folder / name


def read_chat(path):
    def train():
        x, y = Loader(str(path.parent), 'train', 2, 50).next_batch()
        assert x.shape == y.shape == (2, 50)
    in_turn([train, lambda: verify(str(path.parent))])


def read_conversations(path):
    for messages in (talk for talks, _ in corpus_of_files([str(path)], to_messages, 'file', False)(None) for talk in talks):
        ids, scored = encode(messages, chat_tokenizer('bytes'))
        assert len(ids) == len(scored) and ids.max() < 259


def make_progress(folder):
    """Half of a preparation."""
    def texts():
        yield from TEXTS[:6] * 20_000
        raise OSError('lost')
    with contextlib.suppress(UserError):
        engine.prepare(folder, engine.corpus_of(texts), tokenizer='bytes', num_proc=1, shard_size=1_500_000)
    return folder / 'progress.json'


def read_progress(path):
    def resume():
        engine.prepare(path.parent, engine.corpus_of(TEXTS), tokenizer='bytes', num_proc=1, shard_size=1_500_000)
    in_turn([resume, lambda: Split(str(path.parent), 'train'), lambda: engine.earlier_source(path.parent)])


def make_bin(folder):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 3000
    path = folder / 'fineweb_train_000001.bin'
    path.write_bytes(header.tobytes() + np.arange(3000, dtype=np.uint16).tobytes())
    return path


def make_npy(folder):
    np.save(folder / 'a_train_000001.npy', np.arange(3000, dtype=np.uint16))
    return folder / 'a_train_000001.npy'


def read_foreign(path):
    in_turn([lambda: Split(str(path.parent), 'train').read(np.array([5]), 100), lambda: verify(str(path.parent))])


def make_file(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name
    return make


def read_texts(path):
    """Both ways: skipping what cannot be read must not end, either."""
    def read(skip_bad):
        for texts, _ in corpus_of_files([str(path)], 'text', 'blank', skip_bad)(None):
            assert all(text is None or type(text) is str for text in texts)
    read(True)
    read(False)


def read_preferences(path):
    pairs, _ = read_pairs(str(path), get_tokenizer('bytes+chatml'), 512)
    assert all(len(ids) == len(scored) <= 513 and scored.any() for pair in pairs for ids, scored in pair)


def parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({'text': TEXTS}), file)
    return file.getvalue()


def read_items(path):
    from hellaswag import load_items
    assert all(len(item['endings']) == 4 for item in load_items(str(path)))


def make_tokenizer(kind):
    def make(folder):
        content = train(kind, 330, TEXTS)
        (folder / 'tokenizer.json').write_bytes(json.dumps(json.loads(content)).encode())
        return folder / 'tokenizer.json'
    return make


def read_tokenizer(path):
    tokenizer = get_tokenizer(str(path))
    ids = tokenizer.encode_documents([TEXTS[0], '', 'a'])
    assert ids.dtype == tokenizer.dtype and (not len(ids) or ids.max() < tokenizer.vocab_size)
    assert type(tokenizer.decode(ids)) is str and type(tokenizer.decode_bytes(ids)) is bytes


CHARACTERS = ''.join(sorted(set(''.join(TEXTS)) | {'a'}))
META = pickle.dumps({'vocab_size': len(CHARACTERS), 'itos': dict(enumerate(CHARACTERS)),
                     'stoi': {char: i for i, char in enumerate(CHARACTERS)}})
CSV = ('id,text\n' + ''.join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))).encode()
PAIRS = ''.join(json.dumps({'prompt': text, 'chosen': [{'role': 'assistant', 'content': 'a'}], 'rejected': 'b'}) + '\n'
                for text in TEXTS)
TALKS = ''.join(json.dumps(row) + '\n' for text in TEXTS for row in (
    {'prompt': text, 'completion': text}, {'conversations': [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': 'a'}]},
    {'messages': [{'role': 'system', 'content': 'a'}, {'role': 'user', 'content': text}]}))
ITEMS = ''.join(json.dumps({'ctx': 'A man', 'label': i % 4, 'endings': list('abcd')}) + '\n' for i in range(5))

SETTINGS = {
    'train.py': {'init_from': 'scratch', 'dataset': 'DATA', 'document_mask': True, 'eval_only': True, 'n_layer': 1, 'n_head': 2,
        'n_embd': 16, 'block_size': 16, 'batch_size': 2, 'total_batch_size': 64, 'eval_tokens': 64, 'eval_iters': 1,
        'max_iters': 9, 'gradient_accumulation_steps': 0, 'warmup_iters': 1, 'lr_decay_iters': 9,
        'learning_rate': 0.001, 'min_lr': 0.0, 'lr_schedule': 'wsd', 'wsd_decay': 0.5, 'position': 'rope',
        'rope_theta': 10000.0, 'rope_type': 'yarn', 'rope_factor': 2.0, 'norm': 'rmsnorm', 'norm_eps': 1e-05,
        'mlp': 'swiglu', 'n_mlp': 32, 'n_kv_head': 1, 'head_size': 8, 'softcap': 15.0, 'dropout': 0.1,
        'optimizer': 'muon', 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'adam_eps': 1e-08, 'grad_clip': 1.0,
        'skip_spikes': 6.0, 'max_bad_steps': 5, 'parallel': 'ddp', 'replicas': 1, 'dist_timeout': 9, 'device': 'cpu',
        'dtype': 'float32', 'compile': False, 'seed': 1, 'hellaswag_interval': 0, 'hellaswag_limit': 1,
        'hellaswag_data': '', 'sample_interval': 2, 'log_to': ''},
    'plan.py': {'gpus': 8, 'mfu': 0.4, 'gpu_hour_price': 2.0, 'budget': 0.0, 'fit': '', 'dataset': 'DATA',
        'parallel': 'fsdp', 'replicas': 2, 'n_layer': 12, 'batch_size': 8, 'max_iters': 100, 'init_from': 'scratch'},
    'sample.py': {'out_dir': 'DATA', 'init_from': 'resume', 'start': 'a', 'prompts': '', 'chat': False, 'num_samples': 1,
        'batch_size': 2, 'max_new_tokens': 5, 'temperature': 0.8, 'top_k': 5, 'top_p': 0.9, 'min_p': 0.1,
        'repetition_penalty': 1.1, 'seed': 1, 'device': 'cpu', 'dtype': 'float32', 'compile': False},
    'evaluate.py': {'out_dir': 'DATA', 'init_from': 'resume', 'dataset': 'DATA', 'split': 'val', 'max_tokens': 9,
        'block_size': 8, 'stride': 4, 'batch_size': 2, 'device': 'cpu', 'dtype': 'float32'},
    'hellaswag.py': {'out_dir': 'DATA', 'init_from': 'resume', 'data': 'DATA', 'limit': 1, 'batch_tokens': 9,
        'device': 'cpu', 'dtype': 'float32', 'out': ''},
    'dpo.py': {'out_dir': 'DATA', 'init_from': 'resume', 'pairs': '', 'val_pairs': '', 'loss': 'ipo', 'beta': 0.1,
        'eval_interval': 9, 'log_interval': 1, 'batch_size': 2, 'gradient_accumulation_steps': 2, 'optimizer': 'adamw',
        'learning_rate': 0.001, 'warmup_iters': 1, 'max_iters': 9, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95,
        'grad_clip': 1.0, 'lora_rank': 0, 'parallel': 'ddp', 'device': 'cpu', 'dtype': 'float32', 'compile': False, 'seed': 1},
    'export.py': {'out_dir': 'DATA', 'init_from': 'resume', 'folder': '', 'dtype': 'float32', 'html': '',
        'html_dtype': 'int8'}
}


def make_settings(folder):
    """A line for each script, and a dataset."""
    make_dataset(folder / 'data', 'meta.json')
    (folder / 'settings.jsonl').write_text('\n'.join(json.dumps({'script': k} | v) for k, v in SETTINGS.items()))
    return folder / 'settings.jsonl'


class Enough(Exception):
    """The settings were accepted, and a model would be loaded, or put on its device."""


def read_settings(path):
    """Run each script whose line was mutated, up to its model; no setting may write anything."""
    from common import checkpoint, distributed

    def enough(*args, **kwargs):
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(checkpoint, 'load_model', enough)
        patch.setattr(checkpoint, 'pretrained', enough)
        patch.setattr(distributed, 'wrap', enough)
        for line in path.read_bytes().split(b'\n'):
            try:
                settings = json.loads(line)
                script = settings.pop('script')
            except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
                continue  # the mutation was not of a setting
            if type(script) is str and script in SETTINGS and settings != SETTINGS[script]:
                args = [f'--{k}={path.parent / "data" if v == "DATA" else v}' for k, v in settings.items()]
                patch.setattr(sys, 'argv', [script, *args])
                with contextlib.suppress(Enough, SystemExit):
                    runpy.run_path(str(ROOT / script), run_name='__main__')


CASES = [  # (name, make, read)
    ('settings', make_settings, read_settings),
    ('meta.json', lambda folder: make_dataset(folder, 'meta.json'), read_dataset),
    ('shard', lambda folder: make_dataset(folder, 'train_000001.npy'), read_dataset),
    ('progress.json', make_progress, read_progress),
    ('mask', lambda folder: make_chat(folder, 'train_000001.mask.npy'), read_chat),
    ('meta.json of conversations', lambda folder: make_chat(folder, 'meta.json'), read_chat),
    ('conversations', make_file('a.jsonl', TALKS.encode()), read_conversations),
    ('npy', make_npy, read_foreign),
    ('bin', make_bin, read_foreign),
    ('jsonl', make_file('a.jsonl', ROWS.encode()), read_texts),
    ('json', make_file('a.json', json.dumps([{'text': text} for text in TEXTS]).encode()), read_texts),
    ('jsonl.gz', make_file('a.jsonl.gz', gzip.compress(ROWS.encode())), read_texts),
    ('csv', make_file('a.csv', CSV), read_texts),
    ('parquet', make_file('a.parquet', parquet()), read_texts),
    ('txt', make_file('a.txt', '\n\n'.join(TEXTS).encode()), read_texts),
    ('pairs', make_file('pairs.jsonl', PAIRS.encode()), read_preferences),
    ('hellaswag', make_file('items.jsonl', ITEMS.encode()), read_items),
    *((f'{kind} tokenizer.json', make_tokenizer(kind), read_tokenizer) for kind in ('bpe', 'wordpiece', 'unigram')),
    ('meta.pkl', make_file('meta.pkl', META), read_tokenizer),
]


def fuzz(make, read, cases, seed):
    """Read `cases` mutations of a file; an error that is not a UserError is raised, with its case in a note."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        good = Path(folder, 'good')
        good.mkdir()
        name = make(good).name
        outside = sorted(os.listdir(folder))
        for case in range(cases):
            bad = Path(folder, 'bad')
            shutil.copytree(good, bad)
            content = mutated((bad / name).read_bytes(), random.Random(f'{seed} {case}'))
            (bad / name).write_bytes(content)
            try:
                read(bad / name)
            except UserError as error:
                assert str(error).strip(), f'case {case} of seed {seed} has no message'
            except Exception as error:
                what = f'{type(error).__name__}: {error}\n{content[:500]}'
                raise AssertionError(f'case {case} of seed {seed}: {what}') from error
            shutil.rmtree(bad)
            assert sorted(os.listdir(folder)) == outside, f'case {case} of seed {seed} wrote outside of its folder'


@pytest.mark.parametrize('name, make, read', CASES, ids=[case[0] for case in CASES])
def test_each_mutation_is_read_or_refused_in_a_line(name, make, read, monkeypatch):
    monkeypatch.setattr(os, 'fsync', lambda file: None)
    fuzz(make, read, 85, seed=0)


cases = 10_000  # mutations of each file
seed = 1
only = ''  # the names of some files, as meta.json,csv; empty: all

if __name__ == '__main__':
    from configurator import configure
    configure(globals())
    os.fsync = lambda file: None
    for name, make, read in CASES:
        if not only or name in only.split(','):
            fuzz(make, read, cases, seed)
            print(f'{name}: {cases:,} cases', flush=True)
