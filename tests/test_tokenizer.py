"""The tokenizers: exact there and back, documents joined as they are one by one, and never a special token by chance."""
import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT, TINY, environment, needs_gpt2, run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data.tokenizer
from common import checkpoint
from common.log import archive_previous_run
from data.dataset import Split
from data.errors import UserError
from data.prepare import corpus_of, prepare
from data.tokenizer import END_OF_TEXT, from_record, get_tokenizer, keep_files, to_record, tokenizer_name

TEXTS = ['Hello world', '', ' ', '\n\n', 'é 漢字 🙂 e\u0301', 'ends in space ', ' begins\n', '0123456789' * 9, '\x00\x7f\ufeff',
         f'a {END_OF_TEXT} b', '<|endof', 'text|>', 'lone \ud83d surrogate']


def python(code, **env):
    return subprocess.run([sys.executable, '-c', code], env=environment(**env), cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(params=['bytes', pytest.param('gpt2', marks=needs_gpt2)])
def tokenizer(request):
    return get_tokenizer(request.param)


def test_there_and_back(tokenizer):
    for text in TEXTS[:-1]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and ids.ndim == 1
        assert tokenizer.decode(ids) == text and tokenizer.decode(ids.tolist()) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(tokenizer.encode(TEXTS[-1])) == 'lone \ufffd surrogate'


def test_text_is_never_a_special_token(tokenizer):
    for text in TEXTS:
        assert tokenizer.eot not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.eot]) == END_OF_TEXT
    assert tokenizer.eot == tokenizer.vocab_size - 1


def test_documents_together_are_documents_one_by_one(tokenizer):
    def one_by_one(texts):
        return [i for text in texts for i in (tokenizer.eot, *tokenizer.encode(text).tolist())]

    assert tokenizer.encode_documents([]).tolist() == []
    shuffle = random.Random(1)
    for _ in range(200):
        texts = shuffle.choices(TEXTS, k=shuffle.randrange(1, 9))
        assert tokenizer.encode_documents(texts).tolist() == one_by_one(texts)


@needs_gpt2
def test_gpt2_is_tiktokens():
    import tiktoken
    text = '\n'.join(TEXTS[:-1])
    assert get_tokenizer('gpt2').encode(text).tolist() == tiktoken.get_encoding('gpt2').encode_ordinary(text)


def test_bytes_are_bytes():
    tokenizer = get_tokenizer('bytes')
    assert tokenizer.encode('hé').tolist() == list('hé'.encode())
    assert tokenizer.decode([104, 0xc3]) == 'h\ufffd' and (tokenizer.vocab_size, tokenizer.eot) == (257, 256)


def test_unknown_name():
    with pytest.raises(UserError, match="no tokenizer is called 'gpt3': there are gpt2 and bytes"):
        get_tokenizer('gpt3')


def test_no_vocabulary_and_no_network(tmp_path):
    nowhere = {'TIKTOKEN_CACHE_DIR': str(tmp_path), 'HTTPS_PROXY': 'http://127.0.0.1:9', 'NO_PROXY': ''}
    process = python('import sys; from configurator import excepthook; sys.excepthook = excepthook; '
                     'from data.tokenizer import get_tokenizer; get_tokenizer("gpt2")', **nowhere)
    assert process.returncode == 1 and process.stderr.count('\n') == 1
    assert 'GPT-2 vocabulary' in process.stderr and 'TIKTOKEN_CACHE_DIR' in process.stderr


# -----------------------------------------------------------------------------
# tokenizers from files

@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """{kind: folder}: a tokenizer.json of each kind, made with the library itself."""
    def bpe(prefix):
        new = Tokenizer(models.BPE(byte_fallback=prefix, unk_token='<unk>' if prefix else None))
        special = ['<unk>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))] if prefix else [END_OF_TEXT]
        if prefix:  # as Llama 2's
            new.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
            new.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                             decoders.Strip(' ', 1, 0)])
        else:
            new.pre_tokenizer, new.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = [] if prefix else pre_tokenizers.ByteLevel.alphabet()
        return new, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)

    def wordpiece():
        new = Tokenizer(models.WordPiece(unk_token='[UNK]'))
        new.pre_tokenizer, new.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        return new, trainers.WordPieceTrainer(vocab_size=300, special_tokens=['[UNK]', '[SEP]'])

    def unigram():
        new = Tokenizer(models.Unigram())
        new.pre_tokenizer, new.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        return new, trainers.UnigramTrainer(vocab_size=200, special_tokens=['<unk>', '</s>'], unk_token='<unk>')

    made = {}
    for kind, (new, trainer) in dict(bpe=bpe(False), llama=bpe(True), wordpiece=wordpiece(), unigram=unigram()).items():
        trainer.show_progress = False
        new.train_from_iterator([SOME] * 5, trainer)
        made[kind] = tmp_path_factory.mktemp('tokenizers') / kind
        made[kind].mkdir()
        content = json.loads(new.to_str())
        if kind == 'llama':  # bytes are in its vocabulary, not special tokens
            content['added_tokens'] = content['added_tokens'][:2]
        (made[kind] / 'tokenizer.json').write_text(json.dumps(content))
    return made


KINDS = ['bpe', 'llama', 'wordpiece', 'unigram']
SOME = (ROOT / 'data/prepare.py').read_text()
WORDS = 'return the tokens , and files'  # what every kind has, and WordPiece joins again


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_encodes_as_the_library_does(kind, files):
    tokenizer = get_tokenizer(str(files[kind]))
    theirs = Tokenizer.from_file(str(files[kind] / 'tokenizer.json'))
    assert tokenizer.vocab_size == theirs.get_vocab_size() and tokenizer.dtype == np.uint16
    texts = [SOME[i:i + 500].strip() for i in range(0, 5000, 500)]
    for text in texts:
        assert tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
        if kind != 'wordpiece':
            known = text if kind == 'bpe' else theirs.decode(theirs.encode(text).ids)
            assert tokenizer.decode(tokenizer.encode(known)) == known
    assert tokenizer.encode_documents(texts).tolist() == [
        i for text in texts for i in (tokenizer.eot, *tokenizer.encode(text).tolist())]
    assert tokenizer.encode_documents([]).tolist() == [] and tokenizer.encode('').tolist() == []


@pytest.mark.parametrize('kind', ['bpe', 'llama'])
def test_bytes_there_and_back(kind, files):
    tokenizer = get_tokenizer(str(files[kind]))
    for text in TEXTS[:-1]:
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids).decode().removeprefix(' ' if kind == 'llama' and text else '') == text
    assert tokenizer.decode(tokenizer.encode(TEXTS[-1])) == 'lone \ufffd surrogate'


@pytest.mark.parametrize('kind', KINDS)
def test_ids_one_by_one_are_the_text(kind, files):
    """As sample.py prints them; a text's beginning may have a space more."""
    tokenizer = get_tokenizer(str(files[kind]))
    ids = tokenizer.encode(WORDS).tolist()
    assert b''.join(tokenizer.decode_bytes([i]) for i in ids) == tokenizer.decode_bytes(ids)
    assert tokenizer.decode_bytes(ids).decode().strip() == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == (WORDS.replace(' ,', ',') if kind == 'wordpiece' else WORDS)
    assert tokenizer.decode_bytes([tokenizer.eot, 60_000, *ids[:1]]).startswith(tokenizer.end.encode())


@pytest.mark.parametrize('kind', KINDS)
def test_an_end_in_a_text_is_only_text(kind, files):
    tokenizer = get_tokenizer(str(files[kind]))
    for text in ['a ' + tokenizer.end + ' b', tokenizer.end * 2]:
        ids = tokenizer.encode(text)
        assert len(ids) and tokenizer.eot not in ids
        if kind != 'wordpiece':
            assert tokenizer.decode(ids) == text


def test_the_end_of_text(files, tmp_path):
    assert [get_tokenizer(str(files[kind])).end for kind in KINDS] == [END_OF_TEXT, '</s>', '[SEP]', '</s>']
    shutil.copytree(files['bpe'], tmp_path / 'a')
    before = get_tokenizer(str(tmp_path / 'a'))
    for eos in ['re', {'content': 're', 'special': True}]:
        (tmp_path / 'a' / 'tokenizer_config.json').write_text(json.dumps({'eos_token': eos}))
        tokenizer = get_tokenizer(str(tmp_path / 'a' / 'tokenizer.json'))
        assert tokenizer.end == 're' and tokenizer.name != before.name and tokenizer.sha256 == before.sha256
    (tmp_path / 'a' / 'tokenizer_config.json').unlink()
    content = json.loads((tmp_path / 'a' / 'tokenizer.json').read_text())
    content['added_tokens'][0]['content'] = '<stop>'
    content['model']['vocab'] = {'<stop>' if token == END_OF_TEXT else token: i for token, i in content['model']['vocab'].items()}
    (tmp_path / 'a' / 'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match='has no end-of-text token: .* its special tokens are <stop>'):
        get_tokenizer(str(tmp_path / 'a'))


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match='no tokenizer is called .*none.json'):
        get_tokenizer(str(tmp_path / 'none.json'))
    with pytest.raises(UserError, match='holds no tokenizer.json'):
        get_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match='there is no file nobody/nothing, and no tokenizer.json of that name'):
        get_tokenizer('nobody/nothing')
    for content in [b'', b'{', b'\xff', b'{}', b'[' * 10**5, b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
                    b'{"model": {"type": "WordLevel", "vocab": {"</s>": 4000000000}, "unk_token": "a"}}']:
        (tmp_path / 'tokenizer.json').write_bytes(content)
        with pytest.raises(UserError, match='tokenizer.json is no tokenizer: ') as error:
            get_tokenizer(str(tmp_path))
        assert '\n' not in str(error.value)


def test_a_model_on_the_hub(files, tmp_path):
    """From the cache of huggingface_hub, as after a download."""
    snapshot = tmp_path / 'hub/models--some--model/snapshots' / ('a' * 40)
    shutil.copytree(files['bpe'], snapshot)
    (snapshot / 'tokenizer_config.json').write_text('{"eos_token": "re"}')
    (tmp_path / 'hub/models--some--model/refs').mkdir()
    (tmp_path / 'hub/models--some--model/refs/main').write_text('a' * 40)
    process = python("from data.tokenizer import get_tokenizer; print(get_tokenizer('some/model').end)",
                     HF_HUB_CACHE=str(tmp_path / 'hub'))
    assert process.stdout == 're\n', process.stderr


@pytest.fixture
def encoding(monkeypatch):
    """An encoding of tiktoken's with a vocabulary beyond uint16, most of whose ids stand for nothing."""
    import tiktoken.registry
    tiktoken.list_encoding_names()
    ranks = {bytes([i]): i for i in range(256)} | {b'he': 256, b'hello': 257}
    special = {END_OF_TEXT: 70_000, '<|fim|>': 70_001}
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, 'wide', lambda: dict(
        name='wide', pat_str=r'\w+|\W', mergeable_ranks=ranks, special_tokens=special))
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    yield get_tokenizer('wide')
    data.tokenizer.named.cache_clear()


def test_an_encoding_of_tiktoken(encoding):
    assert (encoding.name, encoding.vocab_size, encoding.eot, encoding.dtype) == ('wide', 70_002, 70_000, np.uint32)
    assert encoding.encode('hello he').tolist() == [257, 32, 256]
    texts = ['hello <|fim|>', '', 'he']
    assert encoding.encode_documents(texts).tolist() == [
        i for text in texts for i in (70_000, *encoding.encode(text).tolist())]
    assert not {70_000, 70_001} & {*encoding.encode(f'{END_OF_TEXT}<|fim|>').tolist()}
    for text in TEXTS[:-1]:
        assert encoding.decode(encoding.encode(text)) == text
    assert encoding.decode([257, 300, 70_000]) == 'hello<|endoftext|>' and encoding.decode_bytes([300]) == b''


def test_wide_ids_in_a_dataset(encoding, tmp_path):
    prepare(tmp_path, corpus_of(['hello he'] * 40), tokenizer='wide', num_proc=1)
    split = Split(str(tmp_path), 'train')
    assert (split.dtype, split.tokenizer) == (np.uint32, 'wide')
    assert encoding.decode(split.read(np.array([0]), 4)[0]) == '<|endoftext|>hello he'


# -----------------------------------------------------------------------------
# nanoGPT's characters

def meta_pkl(text):
    chars = sorted(set(text))
    return pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}})


def test_characters(tmp_path):
    text = 'First Citizen:\nBefore we proceed … é🙂\n'
    (tmp_path / 'meta.pkl').write_bytes(meta_pkl(text))
    chars = sorted(set(text))
    np.array([chars.index(char) for char in text * 9], np.uint16).tofile(tmp_path / 'train.bin')
    split = Split(str(tmp_path), 'train')
    tokenizer = get_tokenizer(split.tokenizer)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [chars.index(char) for char in text] and split.vocab_size == len(chars)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode([tokenizer.eot]) == '\n'
    with pytest.raises(UserError, match=r"has no token for the character 'x'"):
        tokenizer.encode('Citizenxx')
    kept = keep_files(tokenizer, tmp_path)
    assert kept.endswith('tokenizer.json') and tokenizer_name(kept) == tokenizer.name
    assert get_tokenizer(kept).encode(text).tolist() == ids.tolist() and get_tokenizer(kept).decode(ids) == text


class Evil:
    def __reduce__(self):
        return Path.touch, (Path('evil'),)


@pytest.mark.parametrize('content, why', [
    (pickle.dumps({'itos': Evil()}), 'could run code'), (pickle.dumps({'itos': Evil()}, 0), 'could run code'),
    (pickle.dumps(OrderedDict(itos={0: 'a'})), 'could run code'), (b'\x80\x04r\xff\xff\xff\xff.', 'damaged'), (b'', 'damaged'),
    (b'(' * 10, 'damaged'), (pickle.dumps([]), "no 'itos'"), (pickle.dumps({'itos': {1: 'a'}}), "no 'itos'"),
    (pickle.dumps({'itos': {0: 'ab'}}), "no 'itos'"), (meta_pkl('abc')[:-9], 'damaged'),
    (pickle.dumps({'itos': {0: '\ud83d'}}), 'no tokenizer')])
def test_a_pickle_makes_plain_values_alone(content, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('meta.pkl').write_bytes(content)
    with pytest.raises(UserError, match=f'meta.pkl is no tokenizer: .*{why}' if why != 'no tokenizer' else why):
        get_tokenizer('meta.pkl')
    assert not Path('evil').exists()


# -----------------------------------------------------------------------------
# a dataset, a run, an export

def test_a_dataset_keeps_its_tokenizer(files, tmp_path):
    shutil.copytree(files['bpe'], tmp_path / 'tok')
    prepare(tmp_path / 'data', corpus_of([SOME] * 3), tokenizer=str(tmp_path / 'tok'), num_proc=1)
    content = (tmp_path / 'tok/tokenizer.json').read_bytes()
    shutil.rmtree(tmp_path / 'tok')
    meta = json.loads((tmp_path / 'data/meta.json').read_text())
    assert (meta['tokenizer'], meta['tokenizer_sha256']) == ('tokenizer.json', hashlib.sha256(content).hexdigest())
    assert (tmp_path / 'data/tokenizer.json').read_bytes() == content
    split = Split(str(tmp_path / 'data'), 'train')
    tokenizer = get_tokenizer(split.tokenizer)
    assert (tokenizer.eot, tokenizer.vocab_size) == (split.eot, split.vocab_size)
    ids = np.concatenate([Split(str(tmp_path / 'data'), name).read(np.array([0]), n)[0]
                          for name, n in [('val', meta['tokens']['val']), ('train', meta['tokens']['train'])]])
    assert tokenizer.decode(ids) == (END_OF_TEXT + SOME) * 3
    prepare(tmp_path / 'data', corpus_of([SOME] * 3), tokenizer=str(tmp_path / 'data'), num_proc=1)  # the same one
    with pytest.raises(UserError, match='was started with tokenizer=tokenizer.json .*, not tokenizer.json'):
        prepare(tmp_path / 'data', corpus_of([SOME] * 3), tokenizer=str(files['unigram']), num_proc=1)
    shutil.copy(files['unigram'] / 'tokenizer.json', tmp_path / 'data')
    with pytest.raises(UserError, match='tokenizer.json is another tokenizer: its sha256 is not'):
        Split(str(tmp_path / 'data'), 'train')
    (tmp_path / 'data/tokenizer.json').unlink()
    with pytest.raises(UserError, match='tokenizer.json is missing: copy it'):
        Split(str(tmp_path / 'data'), 'train')


def test_nothing_is_written_over(files, tmp_path):
    shutil.copytree(files['unigram'], tmp_path / 'data')
    with pytest.raises(UserError, match='is another tokenizer than tokenizer.json'):
        prepare(tmp_path / 'data', corpus_of([SOME]), tokenizer=str(files['bpe']), num_proc=1)
    assert get_tokenizer(str(tmp_path / 'data')).name == get_tokenizer(str(files['unigram'])).name


@pytest.mark.parametrize('kind', ['unigram', 'characters'])
def test_train_sample_evaluate_export(kind, files, tmp_path):
    """A run keeps what decodes its samples, when the dataset is gone; another tokenizer is refused."""
    data = tmp_path / 'data'
    if kind == 'characters':
        data.mkdir()
        (data / 'meta.pkl').write_bytes(meta_pkl(SOME))
        for name in 'train', 'val':
            get_tokenizer(str(data)).encode(SOME).tofile(data / f'{name}.bin')
    else:
        prepare(data, corpus_of([SOME] * 2), tokenizer=str(files[kind]), num_proc=1)
    name, out = tokenizer_name(Split(str(data), 'train').tokenizer), tmp_path / 'out'
    settings = [*TINY, '--max_iters=2', '--sample_interval=2', f'--out_dir={out}']
    run('train.py', *settings, f'--dataset={data}')
    assert tokenizer_name(str(out)) == name
    assert 'bits per byte' in run('evaluate.py', f'--out_dir={out}', f'--dataset={data}').out
    shutil.rmtree(data)  # out_dir has what is needed
    sampled = run('sample.py', f'--out_dir={out}', '--start=the', '--num_samples=1', '--max_new_tokens=20', '--json')
    line = json.loads(sampled.out)
    assert line['text'] == get_tokenizer(str(out)).decode_bytes(line['tokens']).decode(errors='ignore')
    if kind == 'characters':
        return
    prepare(tmp_path / 'other', corpus_of([SOME] * 2), tokenizer=str(files['bpe']), num_proc=1)
    process = run('train.py', *settings, f'--dataset={tmp_path / "other"}', '--init_from=resume', expect=1)
    assert 'is tokenized with tokenizer.json' in process.err and 'but the weights were trained on' in process.err
    run('export.py', f'--out_dir={out}', f'--folder={tmp_path / "gpt"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'gpt')
    assert theirs(WORDS, add_special_tokens=False)['input_ids'] == get_tokenizer(str(out)).encode(WORDS).tolist()
    assert theirs.eos_token_id == get_tokenizer(str(out)).eot
    assert tokenizer_name(checkpoint.pretrained(str(tmp_path / 'gpt'))[1]) == name
    shutil.copy(files['bpe'] / 'tokenizer.json', out)
    with pytest.raises(UserError, match='is another tokenizer'):
        checkpoint.load(out / 'ckpt.pt')


def test_an_earlier_runs_tokenizer_stays_with_its_checkpoint(files, tmp_path, capsys):
    checkpoint.keep_tokenizer(get_tokenizer(str(files['bpe'])), tmp_path)
    (tmp_path / 'ckpt.pt').write_bytes(b'a')
    archive_previous_run(tmp_path)
    checkpoint.keep_tokenizer(get_tokenizer(str(files['unigram'])), tmp_path)
    for kind, found in [('bpe', '1.tokenizer.json'), ('unigram', 'tokenizer.json')]:
        tokenizer = get_tokenizer(str(files[kind]))
        assert from_record(to_record(tokenizer), tmp_path) == str(tmp_path / found)
        assert tokenizer_name(str(tmp_path / found)) == tokenizer.name
