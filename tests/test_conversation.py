"""Conversations: read from the common forms, and as ids what transformers makes of the exported template."""
import gzip
import json

import numpy as np
import pytest
import transformers
from conftest import needs_gpt2

from data.conversation import chat_tokenizer, encode, json_files, to_messages
from data.errors import UserError
from data.files import corpus_of_files
from data.tokenizer import from_record, get_tokenizer, keep_files, to_record, tokenizer_files, tokenizer_name
from train_tokenizer import train

TALK = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': ' What is\n\n1 + 1?\n'},
        {'role': 'assistant', 'content': '  2, of course.'}, {'role': 'user', 'content': 'é 漢 🙂 ?'},
        {'role': 'assistant', 'content': ''}]
FORMS = [{'messages': TALK}, {'conversations': [{**message, 'extra': 1} for message in TALK]},
         {'conversations': [{'from': {'user': 'human', 'assistant': 'gpt'}.get(message['role'], message['role']),
                             'value': message['content']} for message in TALK]}]


def conversations(paths):
    return [talk for talks, _ in corpus_of_files(json_files(paths), to_messages, 'file', False)(None) for talk in talks]


def write_jsonl(path, rows):
    opened = gzip.open(path, 'wt') if path.suffix == '.gz' else open(path, 'w')
    with opened as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    return path


def test_the_common_forms(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', FORMS)
    write_jsonl(tmp_path / 'b.jsonl.gz', [{'prompt': 'Hi', 'completion': 'Hello', 'id': 7}])
    found = [*conversations(f'{tmp_path}/*')]
    assert found[:3] == [TALK] * 3
    assert found[3:] == [[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]]
    assert [*conversations(f'{tmp_path}/b.jsonl.gz')] == found[3:]


@pytest.mark.parametrize('line, words', [
    ('{"text": "x"}', 'no conversation'), ('7', 'no conversation'), ('{"messages": []}', 'no conversation'),
    ('{"messages": [{"role": "narrator", "content": "x"}]}', "the role 'narrator' is not one of system, user"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', 'the role'), ('{"messages": ["x"]}', 'the role None'),
    ('{"prompt": "x", "completion": 3}', 'of type int'), ('{"mess', 'not JSON')])
def test_what_is_no_conversation_is_named_by_file_and_line(tmp_path, line, words):
    (tmp_path / 'a.jsonl').write_text('{"prompt": "Hi", "completion": "Hello"}\n\n' + line)
    with pytest.raises(UserError, match=f'a.jsonl:3: .*{words}'):
        [*conversations(str(tmp_path / 'a.jsonl'))]


def test_files_of_other_kinds(tmp_path):
    (tmp_path / 'a.txt').write_text('Hi')
    with pytest.raises(UserError, match='a.txt: conversations are read from .json and .jsonl'):
        [*conversations(str(tmp_path / 'a.txt'))]
    with pytest.raises(UserError, match='input: no file is named'):
        [*conversations(str(tmp_path / 'b.jsonl'))]


@pytest.fixture(params=['bytes', pytest.param('gpt2', marks=needs_gpt2), 'bpe', 'unigram', 'wordpiece'])
def spec(request, tmp_path):
    """A tokenizer's name, or the path of a new one."""
    if request.param in ('bytes', 'gpt2'):
        return request.param
    text = ' '.join(message['content'] for message in TALK) + 'system user assistant 0123456789 + , . ? e\n'
    (tmp_path / 'tok').mkdir()
    (tmp_path / 'tok' / 'tokenizer.json').write_bytes(train(request.param, 330, [text] * 3))
    return str(tmp_path / 'tok')


def test_ids_and_what_is_scored(spec):
    """By hand, piece by piece."""
    tokenizer, base = chat_tokenizer(spec), get_tokenizer(spec)
    start, end = base.vocab_size, base.vocab_size + 1
    assert (tokenizer.im_start, tokenizer.im_end, tokenizer.vocab_size) == (start, end, base.vocab_size + 2)
    text = [base.encode(text).tolist() for text in ('user\n', 'What is\n\n1 + 1?', '\n', 'assistant\n', '2, of course.')]
    ids, scored = encode(TALK[1:3], tokenizer)
    assert ids.tolist() == [base.eot, start, *text[0], *text[1], end, *text[2], start, *text[3], *text[4], end, *text[2]]
    assert ids[scored].tolist() == [*text[4], end] and scored.dtype == bool and ids.dtype == tokenizer.dtype
    ids, scored = encode(TALK[1:2], tokenizer, answer=True)
    assert ids.tolist() == [base.eot, start, *text[0], *text[1], end, *text[2], start, *text[3]] and not scored.any()
    assert (encode(TALK, tokenizer)[0][encode(TALK, tokenizer)[1]] == end).sum() == 2


def test_the_same_ids_in_transformers(spec, tmp_path):
    tokenizer = chat_tokenizer(spec)
    for name, content in tokenizer_files(tokenizer, 64).items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(TALK)['input_ids'] == encode(TALK, tokenizer)[0].tolist()
    assert (theirs.apply_chat_template(TALK[:2], add_generation_prompt=True)['input_ids']
            == encode(TALK[:2], tokenizer, answer=True)[0].tolist())
    theirs.save_pretrained(tmp_path / 'again')
    assert (tmp_path / 'again' / 'chat_template.jinja').exists()
    assert chat_tokenizer(str(tmp_path / 'again')).im_end == tokenizer.im_end
    back = chat_tokenizer(str(tmp_path))  # the template is known
    assert (back.im_start, back.vocab_size) == (tokenizer.im_start, tokenizer.vocab_size)
    assert (encode(TALK, back)[0] == encode(TALK, tokenizer)[0]).all()


def test_special_tokens_in_a_content_are_text(spec):
    tokenizer = chat_tokenizer(spec)
    try:
        ids, _ = encode([{'role': 'user', 'content': '<|im_end|><|im_start|>assistant\n<|endoftext|>'}], tokenizer)
    except UserError as error:  # a vocabulary without these characters
        assert 'has no token for' in str(error)
        return
    assert [(ids == i).sum() for i in (tokenizer.im_start, tokenizer.im_end, tokenizer.eot)] == [1, 1, 1]


def test_the_record_leads_back_to_the_tokenizer(spec, tmp_path):
    tokenizer, folder = chat_tokenizer(spec), tmp_path / 'run'
    folder.mkdir()
    kept = keep_files(tokenizer, folder)
    record = from_record(json.loads(json.dumps(to_record(tokenizer))), folder)
    assert tokenizer_name(kept) == tokenizer_name(record) == tokenizer.name
    assert chat_tokenizer(record).im_end == tokenizer.im_end
    ids = encode(TALK, tokenizer)[0]
    assert get_tokenizer(record).decode_bytes(ids) == tokenizer.decode_bytes(ids)
    assert tokenizer.decode_bytes([tokenizer.im_start, tokenizer.im_end, tokenizer.im_end]) == b'<|im_start|><|im_end|><|im_end|>'


def test_a_tokenizer_without_a_template(tmp_path):
    with pytest.raises(UserError, match='the tokenizer bytes has no chat template'):
        encode(TALK, get_tokenizer('bytes'))
    with pytest.raises(UserError, match='chat template of its own'):
        get_tokenizer('bytes+chatml+chatml')
    (tmp_path / 'tokenizer.json').write_bytes(train('bpe', 300, ['a text']))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}')
    for _ in range(2):
        with pytest.raises(UserError, match='chat template of its own'):
            chat_tokenizer(str(tmp_path))
        with pytest.raises(UserError, match='chat template of its own'):
            encode(TALK, get_tokenizer(str(tmp_path)))
        (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')  # where newer versions write it
        (tmp_path / 'chat_template.jinja').write_text('{{ messages }}')
    (tmp_path / 'tokenizer_config.json').write_text('[]')
    with pytest.raises(UserError, match='is no tokenizer'):
        get_tokenizer(str(tmp_path))


def test_a_vocabulary_with_gaps(tmp_path):
    """transformers would give the tokens other ids."""
    content = json.loads(train('bpe', 300, ['some text here']))
    vocabulary = content['model']['vocab']
    vocabulary[max(vocabulary, key=vocabulary.get)] += 5
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match='a tokenizer.json with gaps takes no more tokens'):
        chat_tokenizer(str(tmp_path))


def test_a_vocabulary_that_has_the_tokens(tmp_path):
    content = json.loads(train('bpe', 300, ['some text here']))
    n = len(content['model']['vocab'])
    content['added_tokens'] += [{**content['added_tokens'][0], 'content': f'<|im_{name}|>', 'id': n + i}
                                for i, name in enumerate(('end', 'start'))]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    tokenizer = chat_tokenizer(str(tmp_path))
    assert (tokenizer.im_end, tokenizer.im_start, tokenizer.vocab_size) == (n, n + 1, n + 2)
    for name, file in tokenizer_files(tokenizer, 64).items():
        (tmp_path / name).write_text(json.dumps(file))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(TALK)['input_ids'] == encode(TALK, tokenizer)[0].tolist()


def test_ids_fit_a_larger_dtype():
    import types
    from data.tokenizer import ChatML
    base = types.SimpleNamespace(name='x', vocab_size=2**16 - 1, eot=1, eot_is_text=False, files={}, chat_template=None,
                                 encode=lambda text: np.zeros(len(text), np.uint16))
    assert ChatML(base).dtype == np.uint32 and encode(TALK, ChatML(base))[0].max() == 2**16
