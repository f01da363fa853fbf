"""
Conversations: read from files, and packed into the blocks of a dataset.

A conversation is a list of messages {'role': 'system', 'user' or 'assistant', 'content': text}; data/chatml.py writes
it as token ids.
"""
import bisect
import collections
import functools
import json

import numpy as np

from data.chatml import chat_tokenizer, encode
from data.errors import UserError
from data.files import Bad, find_files, read_json, reader_of
from data.prepare import prepare
from data.tokenizer import CHATML, get_tokenizer

ROLES = {'system': 'system', 'user': 'user', 'assistant': 'assistant',
         'human': 'user', 'gpt': 'assistant'}  # sharegpt's

# -----------------------------------------------------------------------------
# from files

def json_files(paths, setting='input'):
    """The json and jsonl files that comma-separated glob patterns name. Raises UserError for others."""
    files = find_files(paths, setting)
    for path in files:
        if reader_of(path) is not read_json:
            raise UserError(f'{path}: conversations are read from .json and .jsonl, also as .gz or .zst')
    return files


def to_messages(row):
    """
    The messages of a line's object, Bad if it is none of these:

        {"messages": [{"role": "user", "content": "Hi"}, …]}
        {"conversations": …}    the same; MiniMind's, or sharegpt's with from and value, human and gpt
        {"prompt": "Hi", "completion": "Hello"}
    """
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
            return Bad(f'the content of the role {role} is of type {type(content).__name__}, not a string: '
                       'only text is read')
        messages.append({'role': ROLES[role], 'content': content})
    return messages

# -----------------------------------------------------------------------------
# as a dataset

def prepare_conversations(out_dir, train, val, tokenizer, block_size, **options):
    """
    Make the dataset folder `out_dir` from two corpora (see data/prepare.py) of conversations, each a JSON text of its
    messages, packed into blocks of block_size tokens. tokenizer: as in chat_tokenizer; options: those of prepare.
    """
    if block_size < 2:
        raise UserError(f'block_size={block_size} must be at least 2')
    spec = tokenizer + CHATML * (chat_tokenizer(tokenizer).name != get_tokenizer(tokenizer).name)
    settings = {'block_size': block_size, **options.pop('settings', {})}
    work = functools.partial(pack, block_size=block_size)
    meta = prepare(out_dir, train, val, spec, settings=settings, encode=work, **options)
    counts, total = meta['documents'], sum(meta['tokens'].values())
    print(f'{counts["in"]:,} conversations in blocks of {block_size} tokens: {counts["scored"] / total:.1%} of the '
          f'tokens are scored, {counts["padding"] / total:.1%} are padding; {counts["cut"]:,} conversations longer '
          f'than a block are cut, {counts["no_answer"]:,} without an answer are dropped')
    return meta


def pack(texts, tokenizer, block_size):
    """
    What a worker makes of conversations, JSON texts of their messages (None: unreadable): (tokens, None, counts), where
    tokens are whole blocks, (n * block_size,) of fields id and scored. No conversation lies in two blocks, and the rest
    of a block is end-of-text ids. A conversation that is longer than a block loses its end.
    """
    tokenizer, found = get_tokenizer(tokenizer), []
    counts = collections.Counter({'in': len(texts), 'unreadable': texts.count(None), 'no_answer': 0, 'cut': 0})
    for text in filter(None, texts):
        ids, scored = encode(json.loads(text), tokenizer)
        if scored[:block_size].any():
            found.append((ids[:block_size], scored[:block_size]))
            counts['cut'] += bool(scored[block_size:].any())
        else:
            counts['no_answer'] += 1
    blocks = best_fit([len(ids) for ids, _ in found], block_size)
    tokens = np.zeros((len(blocks), block_size), [('id', tokenizer.dtype), ('scored', np.uint8)])
    tokens['id'] = tokenizer.eot
    for row, block in zip(tokens, blocks):
        ids, scored = (np.concatenate(column) for column in zip(*(found[i] for i in block)))
        row['id'][:len(ids)], row['scored'][:len(ids)] = ids, scored
    counts['scored'], counts['padding'] = int(tokens['scored'].sum()), tokens.size - sum(len(ids) for ids, _ in found)
    return tokens.ravel(), None, counts


def best_fit(lengths, size):
    """Lists of indices of lengths that sum to at most `size`, by best-fit decreasing."""
    groups, bins = [], []  # bins: (free, group), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(bins, (lengths[i],))
        if at == len(bins):
            bins.append((size, len(groups)))
            groups.append([])
        free, group = bins.pop(at)
        groups[group].append(i)
        bisect.insort(bins, (free - lengths[i], group))
    return sorted(sorted(group) for group in groups)  # in the order of the conversations, whatever their lengths
