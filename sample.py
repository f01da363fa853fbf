"""
Text from a trained GPT.

From your own checkpoint:   python sample.py --out_dir=out
From GPT-2's weights:       python sample.py --init_from=gpt2-xl --start='What is the answer to life?'
From a file's text:         python sample.py --start=FILE:prompt.txt
From each line of a file:   python sample.py --prompts=lines.txt --num_samples=1 --json
From what you type:         python sample.py --interactive
In a conversation:          python sample.py --out_dir=out-chat --chat
A masked language model:    python sample.py --start='import [MASK]s'

A [MASK] is one token: with GPT-2's vocabulary most words begin with their space: 'The capital of France is[MASK].'
"""

import codecs
import os.path
import sys
from contextlib import closing
from itertools import islice
from json import dumps

from configurator import UserError, configure, given

import torch

from common.checkpoint import load_model
from common.device import autocast, pick_device, pick_dtype
from common.generate import Conversation, cast_linears, stream
from data.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder, a .pt file
start = ''  # the prompt, or FILE:prompt.txt; empty: a new document
prompts = ''  # a file with a prompt on each line, instead of start
interactive = False  # read prompts from the keyboard: Ctrl-C stops a sample, Ctrl-D ends
chat = False  # talk with a model of conversations (data/chat/prepare.py): Ctrl-C stops an answer, Ctrl-D ends
num_samples = 5  # of each prompt; one of each when interactive
batch_size = 16  # samples generated together
max_new_tokens = 500  # in each sample
stop = False  # end a sample where the model ends its document
temperature = 0.8  # 1.0 samples from the model's distribution, less is more careful, 0 takes the most likely token
top_k = 200  # sample from the k most likely tokens; 0 disables
top_p = 1.0  # sample from the most likely tokens that together reach this probability; 1.0 disables
min_p = 0.0  # sample from tokens at least this many times as likely as the most likely one; 0.0 disables
repetition_penalty = 1.0  # above 1.0 makes tokens that were there before less likely
seed = 1337  # of a prompt's first sample, the next has one more; other samples of the batch change at most rounding
json = False  # a line of JSON for each sample
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32
compile = 'auto'  # on a GPU, replay the step of one token as a CUDA graph; False launches its kernels one at a time
configure(globals())
# -----------------------------------------------------------------------------


def read(path):
    try:
        with open(path := os.path.expanduser(path), encoding='utf-8') as f:
            return f.read()
    except OSError as error:
        raise UserError(f'cannot read the prompt {path}: {error.strerror}')
    except UnicodeDecodeError:
        raise UserError(f'cannot read the prompt {path}: it is not UTF-8 text')


def text_of(ids):
    """The text of ids, without a last character that is incomplete."""
    return codecs.getincrementaldecoder('utf-8')('replace').decode(tokenizer.decode_bytes(ids))


def show(ids):
    """Print the ids as they come, each character once it is complete."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for i in ids:
        print(decoder.decode(tokenizer.decode_bytes([i])), end='', flush=True)
        yield i


def continuations(texts, seeds):
    """Yield, step by step, the list of the next id of each text, until all have ended."""
    rows = [tokenizer.encode(text).tolist() or [tokenizer.eot] for text in texts]
    if (T := max(map(len, rows))) > model.config.block_size:
        print(f'a prompt has {T:,} tokens: the model sees the last {model.config.block_size:,}', file=sys.stderr)
    idx = torch.tensor([[tokenizer.eot] * (T - len(row)) + row for row in rows], device=device)  # (B, T)
    ended = [False] * len(rows)
    for new in stream(model, idx, max_new_tokens, **options, lengths=torch.tensor([*map(len, rows)]), seeds=seeds):
        new = new[:, 0].tolist()
        ended = [end or stop and i == tokenizer.eot for end, i in zip(ended, new)]
        if all(ended):
            return
        yield new


def write(jobs):
    """Print a sample for each (text, seed) of jobs, generated together."""
    texts, seeds = zip(*jobs)
    steps = continuations(texts, seeds)
    streamed = len(jobs) == 1 and sys.stdout.isatty() and not json
    if streamed:
        print(texts[0], end='', flush=True)
        steps = ([i] for i in show(i for i, in steps))
    added = []
    try:
        for new in steps:
            added.append(new)
    except KeyboardInterrupt:
        if not interactive:
            print()
            raise
    for row, (text, seed) in enumerate(jobs):
        ids = [new[row] for new in added]
        if stop and tokenizer.eot in ids:
            ids = ids[:ids.index(tokenizer.eot)]
        if json:
            print(dumps({'prompt': text, 'seed': seed, 'text': text_of(ids), 'tokens': ids}), flush=True)
        else:
            print('' if streamed else text + text_of(ids), '---------------', sep='\n', flush=True)


def talk():
    """Answer what the user types, as one conversation."""
    conversation = Conversation(model, tokenizer)
    for n, text in enumerate(typed()):
        try:
            with closing(conversation.ask(text, max_new_tokens, seeds=[seed + n], **options)) as answer:
                for _ in show(answer):
                    pass
            print(conversation.note)
        except KeyboardInterrupt:
            print('…')
        except UserError as error:  # a question that is too long
            print(error)


def fill(text):
    """Print the text with each [MASK] filled by its most likely token, and the five most likely ones of each."""
    mask, (first, *others) = model.config.vocab_size, [tokenizer.encode(part).tolist() for part in text.split('[MASK]')]
    ids = sum(([mask] + part for part in others), first)
    if not others or len(ids) > model.config.block_size:
        raise UserError('this model fills masks: give it a text with [MASK], of at most '
                        f'{model.config.block_size} tokens')
    with torch.inference_mode():
        idx = torch.tensor([ids], device=device)  # (1, T)
        p, top = model.head(model.hidden(idx)[idx == mask]).float().softmax(dim=-1).topk(5)  # (masks, 5) each
    best = iter(top[:, 0].tolist())
    filled = text_of([next(best) if i == mask else i for i in ids])
    candidates = [[(text_of([i]), q) for i, q in zip(*row)] for row in zip(top.tolist(), p.tolist())]
    if json:
        print(dumps({'prompt': text, 'text': filled, 'candidates': candidates}), flush=True)
    else:
        print(filled, *('  '.join(f'{token!r} {q:.1%}' for token, q in row) for row in candidates), '---------------',
              sep='\n', flush=True)


def typed():
    """Yield what the user types, line by line, until Ctrl-D. With json, prompts go to stderr, not among the lines."""
    try:
        import readline  # gives input() its history and editing; Windows has none
    except ImportError:
        pass
    terminal = sys.stderr if json else sys.stdout
    while True:
        try:
            if json:
                print('> ', end='', file=terminal, flush=True)
            yield input('' if json else '> ')
        except KeyboardInterrupt:
            print(file=terminal)
        except EOFError:
            print(file=terminal)
            return


if compile not in ('auto', True, False):
    raise UserError(f'compile={compile} is not one of auto, True, False')
if (start != '') + (prompts != '') + interactive + chat > 1:
    raise UserError('start, prompts, interactive and chat each name the prompt: give only one of them')
if chat and (unused := [name for name in ('num_samples', 'batch_size', 'stop', 'json') if name in given]):
    raise UserError(f'{", ".join(unused)}: a conversation has one answer at a time, which ends where the model ends it')
if interactive and ('batch_size' in given or 'num_samples' in given and num_samples > 1):
    raise UserError('num_samples, batch_size: interactive draws one sample a prompt')
if not temperature and (unused := [name for name in ('top_k', 'top_p', 'min_p') if name in given]):
    print(f'not used: {", ".join(unused)} (temperature is 0)', file=sys.stderr)
if prompts:
    texts = read(prompts).removesuffix('\n').split('\n')
    if texts == ['']:
        raise UserError(f'{prompts} holds no prompt')
else:
    texts = [read(start[5:]) if start.startswith('FILE:') else start]

device = pick_device(device)
dtype = pick_dtype(dtype, device)
model, tokenizer_name = load_model(init_from, out_dir, device, given)
tokenizer = get_tokenizer(tokenizer_name)
if not model.config.causal and (unused := [name for name in given if name not in (
        'out_dir', 'init_from', 'start', 'prompts', 'interactive', 'json', 'device', 'dtype')]):
    raise UserError(f'{", ".join(unused)}: this is a masked language model, which generates no text')
cast_linears(dtype, model)
if compile is True and 'cuda' not in device:
    print(f'compile=True does nothing on {device}: CUDA graphs need a GPU', file=sys.stderr)
options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
               cuda_graph='cuda' in device and compile is not False)

sys.stdout.reconfigure(errors='replace')  # for terminals that lack a character
with autocast(dtype, device), torch.inference_mode():
    if not model.config.causal:
        for text in typed() if interactive else texts:
            fill(text)
    elif chat:
        talk()
    elif interactive:
        for n, text in enumerate(typed()):
            write([(text, seed + n)])
    else:
        jobs = ((text, seed + n) for text in texts for n in range(num_samples))
        while batch := list(islice(jobs, batch_size)):
            write(batch)
