"""
Conversations: read from files, and written as token ids, of which a model learns the answers alone.

A conversation is a list of messages {'role': 'system', 'user' or 'assistant', 'content': text}. As ids it is ChatML, which
many models use: <|im_start|> and <|im_end|> are one id each, white space around a content is dropped, and the end-of-text id
comes first, as before any document.

    <|endoftext|><|im_start|>user
    What is 1 + 1?<|im_end|>
    <|im_start|>assistant
    2<|im_end|>

The tokenizer is one with these two tokens: 'gpt2+chatml', or any other one's name and +chatml. Its first ids are those of
gpt2, so that GPT-2's weights fit. tokenizer.chat_template in an exported folder is the same in transformers.
"""
import itertools
import os

import numpy as np

from data.errors import UserError
from data.files import READERS, Bad, find_files, read, read_json
from data.tokenizer import CHATML, get_tokenizer

ROLES = {'system': 'system', 'user': 'user', 'assistant': 'assistant', 'human': 'user', 'gpt': 'assistant'}  # sharegpt's

# -----------------------------------------------------------------------------
# from files

def conversations(paths):
    """
    Yield the messages of each line of jsonl files (glob patterns with commas between, or a list; also .gz and .zst):

        {"messages": [{"role": "user", "content": "Hi"}, …]}
        {"conversations": …}    the same; MiniMind's, or sharegpt's with from and value, human and gpt
        {"prompt": "Hi", "completion": "Hello"}

    Raises UserError with file and line for anything else.
    """
    for path in find_files(paths, 'input') if isinstance(paths, str) else paths:
        for line, messages in read_conversations(str(path)):
            if isinstance(messages, Bad):
                raise UserError(f'{path}:{line}: {messages}')
            yield messages


def read_conversations(path):
    """(line, messages or Bad) for each line of a json or jsonl file."""
    end = os.path.splitext(path.lower().removesuffix('.gz').removesuffix('.zst'))[1]
    if READERS.get(end) is not read_json:
        return iter([(1, Bad('conversations are read from json and jsonl'))])
    return read(path, to_messages, '')


def to_messages(row):
    """The messages of a line's object, or Bad."""
    row = row if isinstance(row, dict) else {}
    found = row.get('messages', row.get('conversations'))
    if found is None and 'prompt' in row and 'completion' in row:
        found = [{'role': 'user', 'content': row['prompt']}, {'role': 'assistant', 'content': row['completion']}]
    if not isinstance(found, list) or not found:
        return Bad('no conversation: messages or conversations, a list, or prompt and completion')
    messages = []
    for message in found:
        message = message if isinstance(message, dict) else {}
        role, content = message.get('role', message.get('from')), message.get('content', message.get('value'))
        if not isinstance(role, str) or role not in ROLES:
            return Bad(f'the role {role!r:.40} is not one of {", ".join(ROLES)}')
        if not isinstance(content, str):
            return Bad(f'the content of the role {role} is of type {type(content).__name__}, not a string')
        messages.append({'role': ROLES[role], 'content': content})
    return messages

# -----------------------------------------------------------------------------
# as token ids

def chat_tokenizer(spec):
    """The Tokenizer for conversations: that of get_tokenizer(spec), with ChatML's tokens if it lacks them. Raises UserError
    for a tokenizer.json with another chat template."""
    tokenizer = get_tokenizer(spec)
    return tokenizer if tokenizer.im_start is not None else get_tokenizer(spec + CHATML)


def encode(messages, tokenizer, answer=False):
    """
    (ids, scored) of a conversation: (n,) of tokenizer.dtype and (n,) bool, True for what the assistant writes, the im_end
    of its messages included. answer: end with the beginning of the assistant's next message, for the model to write.

    tokenizer: from chat_tokenizer. Raises UserError for one without ChatML's tokens.
    """
    if tokenizer.im_start is None:
        raise UserError(f'the tokenizer {tokenizer.name} has no chat template: data/chat/prepare.py prepares '
                        'conversations, and training on them teaches one')
    start, end, newline = [tokenizer.im_start], [tokenizer.im_end], tokenizer.encode('\n')
    pieces = [([tokenizer.eot], False)]
    for message in messages:
        answers = message['role'] == 'assistant'
        pieces += [(start, False), (tokenizer.encode(message['role'] + '\n'), False),
                   (tokenizer.encode(message['content'].strip()), answers), (end, answers), (newline, False)]
    if answer:
        pieces += [(start, False), (tokenizer.encode('assistant\n'), False)]
    ids = np.fromiter(itertools.chain(*(piece for piece, _ in pieces)), tokenizer.dtype)
    return ids, np.repeat([scored for _, scored in pieces], [len(piece) for piece, _ in pieces])
