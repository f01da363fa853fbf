"""
How many of a chat model's answers about the held-out part of the standard library are exactly right, by the kind of question.

    python data/stdlib_chat/prepare.py
    python tests/bench_stdlib_chat.py --init_from=out-stdlib-chat/ckpt.pt
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import configure

import torch

from common.checkpoint import load_model
from common.generate import stream
from data.chatml import encode
from data.tokenizer import get_tokenizer

init_from = 'out-stdlib-chat/ckpt.pt'  # a .pt file
questions = str(ROOT / 'data' / 'stdlib_chat' / 'val.jsonl')
show = 3  # print this many questions of each kind
device = 'cpu'
configure(globals())

model, spec = load_model(init_from, '', device)
tokenizer, found = get_tokenizer(spec), {}
for line in open(questions):
    row = json.loads(line)
    found.setdefault(row['kind'], []).append(row['messages'])
for kind, conversations in sorted(found.items()):
    right = 0
    for first in range(0, len(conversations), 32):
        asked = conversations[first:first + 32]
        rows = [encode(messages[:-1], tokenizer, answer=True)[0].tolist() for messages in asked]
        T = max(map(len, rows))
        idx = torch.tensor([[tokenizer.eot] * (T - len(row)) + row for row in rows], device=device)  # (B, T)
        answers, lengths = [[] for _ in rows], torch.tensor([*map(len, rows)])
        for new in stream(model, idx, model.config.block_size - min(map(len, rows)), temperature=0, lengths=lengths):
            answers = [ids + i for ids, i in zip(answers, new.tolist())]
            if all(tokenizer.im_end in ids for ids in answers):
                break
        for n, (messages, ids) in enumerate(zip(asked, answers)):
            text = tokenizer.decode(ids[:(ids + [tokenizer.im_end]).index(tokenizer.im_end)]).strip()
            right += text == messages[-1]['content'].strip()
            if first + n < show:
                print(f'  {messages[0]["content"]}\n    {text!r}, and right is {messages[-1]["content"]!r}')
    print(f'{kind}: {right} of {len(conversations)} exact, {right / len(conversations):.1%}')
