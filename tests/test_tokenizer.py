"""The tokenizers: exact there and back, documents joined as they are one by one, and never a special token by chance."""
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment, needs_gpt2

from data.errors import UserError
from data.tokenizer import END_OF_TEXT, get_tokenizer

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
    process = python('from data.tokenizer import get_tokenizer; get_tokenizer("gpt2")', **nowhere)
    assert process.returncode == 1 and process.stderr.count('\n') == 1
    assert 'GPT-2 vocabulary' in process.stderr and 'TIKTOKEN_CACHE_DIR' in process.stderr
