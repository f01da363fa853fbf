"""
Preferences: two answers to a prompt, the better one first. They are read from jsonl files, in any of these forms:

    {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
    {"prompt": [message, …], "chosen": [message, …], "rejected": [message, …]}    messages as in data/conversation.py
    {"chosen": [message, …], "rejected": [message, …]}                            two whole conversations
"""
import numpy as np
import torch

from data.chatml import encode
from data.conversation import json_files, to_messages
from data.errors import UserError
from data.files import Bad, read
from data.loader import permute, stream_keys


def read_pairs(paths, tokenizer, block_size, setting='pairs'):
    """
    (pairs, the number of those left out) of jsonl files (glob patterns with commas between). A pair is two
    conversations, the better one first, each (ids, scored) as of conversation.encode. One with more than block_size + 1
    ids, or with two equal answers, is left out. setting: what an error calls paths.

    Raises UserError with file and line for a line that holds no pair, and if there is none.
    """
    pairs, left_out = [], 0
    for path in json_files(paths, setting):
        for line, pair in read(path, to_pair, ''):
            if isinstance(pair, Bad):
                raise UserError(f'{path}:{line}: {pair}')
            pair = [encode(messages, tokenizer) for messages in pair]
            fits = max(len(ids) for ids, _ in pair) <= block_size + 1 and not np.array_equal(pair[0][0], pair[1][0])
            pairs += [pair] * fits
            left_out += not fits
    if not pairs:
        why = f' of at most {block_size} tokens: {left_out} are left out' if left_out else ''
        raise UserError(f'{paths} holds no pair{why}')
    return pairs, left_out


def to_pair(row):
    """[messages, messages], the better ones first, of a line's object, or Bad."""
    row = row if isinstance(row, dict) else {}
    prompt, pair = row.get('prompt', []), []
    if isinstance(prompt, str):
        prompt = [{'role': 'user', 'content': prompt}]
    for name in 'chosen', 'rejected':
        answer = row.get(name)
        if isinstance(answer, str):
            answer = [{'role': 'assistant', 'content': answer}]
        if not isinstance(prompt, list) or not isinstance(answer, list) or not answer:
            return Bad('no pair: prompt, chosen and rejected, each a text or a list of messages')
        messages = to_messages({'messages': answer})
        if not isinstance(messages, Bad) and messages[0]['role'] == 'assistant':  # else it is the whole conversation
            messages = to_messages({'messages': prompt + answer})
        if isinstance(messages, Bad):
            return Bad(f'{name}: {messages}')
        if messages[-1]['role'] != 'assistant' or len(messages) < 2:
            return Bad(f'{name}: not a prompt and an answer of the assistant')
        pair.append(messages)
    return pair


def collate(pairs, block_size, device):
    """x, y: (2B, T) int64 each on the device, of B pairs: the chosen conversations, then the rejected ones. y is what
    follows each token of x where the assistant wrote it, else -1. T is a multiple of 64 or block_size."""
    rows = [conversation for part in zip(*pairs) for conversation in part]
    T = min(block_size, -(-max(len(ids) - 1 for ids, _ in rows) // 64) * 64)
    x, y = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), -1)
    for i, (ids, scored) in enumerate(rows):
        ids = torch.from_numpy(ids.astype(np.int64))
        x[i, :len(ids) - 1] = ids[:-1]
        y[i, :len(ids) - 1] = torch.where(torch.from_numpy(scored[1:]), ids[1:], -1)
    return x.to(device), y.to(device)


def shuffled(places, n, seed):
    """(m,) int64: the indices of n things at these places, (m,) int64, of an endless order: each epoch is a permutation
    that follows from the seed."""
    epochs, index = np.divmod(places, n)
    for epoch in set(epochs.tolist()):
        index[epochs == epoch] = permute(index[epochs == epoch], n, stream_keys(seed, epoch))
    return index
