"""
Conversations of your own, to finetune a GPT on: its answers are scored, everything else is only read.

    python data/chat/prepare.py --input='talks/*.jsonl'
    python train.py config/finetune_chat.py
    python sample.py --out_dir=out-chat --chat

Each line of the files is one: {"messages": [{"role": "user", "content": "Hi"}, …]}, the same as "conversations"
(MiniMind's, sharegpt's), or {"prompt": "Hi", "completion": "Hello"}; data/chatml.py says how they become tokens. Whole
conversations are packed into blocks, and one that is longer than a block loses its end. Those held out for validation
are chosen by their questions: the same question is never on both sides.
"""
import json
import os
import sys
import zlib
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from configurator import UserError, configure
from data.conversation import json_files, prepare_conversations, to_messages
from data.files import Bad, corpus_of_files

input = ''  # patterns as 'a/*.jsonl.gz,b/**/*.json'; json or jsonl, also as .gz or .zst
held_out = 20  # one question in N is for validation
skip_bad = False  # skip lines that are no conversations and count them, rather than stop and name the first
tokenizer = 'gpt2'  # of the weights to finetune, or 'bytes', a folder with a tokenizer.json …; gets ChatML's two tokens
block_size = 1024  # tokens in a block: what train.py is given as --block_size
out_dir = ''  # the dataset's folder; empty: the one of this script
shard_size = 100_000_000  # tokens
num_proc = 0  # workers; 0: one per core
configure(globals())
if not input:
    raise UserError("--input='talks/*.jsonl' names the conversations")
if held_out < 2:
    raise UserError(f'held_out={held_out} must be at least 2')


def to_text(row):
    """The messages of a line as JSON, or Bad."""
    messages = to_messages(row)
    return messages if isinstance(messages, Bad) else json.dumps(messages)


def is_val(text):
    """Whether a conversation is for validation, by a hash of what precedes its first answer."""
    return zlib.crc32(text.partition('{"role": "assistant"')[0].encode()) % held_out == 0


def corpus(state, val):
    """The corpus (see data/prepare.py) of one side; a line that cannot be read (None) counts as training."""
    for texts, state in corpus_of_files(files, to_text, 'file', skip_bad)(state):
        yield [text for text in texts if bool(text and is_val(text)) == val], state


files = json_files(input)
prepare_conversations(out_dir or Path(__file__).parent, partial(corpus, val=False), partial(corpus, val=True),
                      tokenizer, block_size, shard_size=shard_size, num_proc=num_proc,
                      settings={'held_out': held_out, 'skip_bad': skip_bad},
                      source={'input': input, 'files': {file: os.path.getsize(file) for file in files}})
