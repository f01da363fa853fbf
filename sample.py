"""
Text from a trained GPT.

From your own checkpoint:   python sample.py --out_dir=out
From GPT-2's weights:       python sample.py --init_from=gpt2-xl --start='What is the answer to life?'
From a file's text:         python sample.py --start=FILE:prompt.txt
For each line of a file:    python sample.py --prompts=lines.txt --num_samples=1 --json
As long as you type:        python sample.py --interactive
"""

import codecs
import signal
import sys
from json import dumps

import torch

from common.checkpoint import load_model
from configurator import UserError, configure
from data.tokenizer import get_tokenizer
from common.device import autocast, pick_device, pick_dtype
from common.generate import cast_linears, check_sampling, stream

# -----------------------------------------------------------------------------
out_dir = 'out'  # where ckpt.pt is
init_from = 'resume'  # from out_dir, or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder, a .pt file
start = ''  # the text to continue, or FILE:prompt.txt; nothing: a new document
prompts = ''  # a file with a text to continue in each line, instead of start
interactive = False  # read texts to continue from the keyboard: Ctrl-C stops a sample, Ctrl-D ends
num_samples = 5  # of each text; one of each when interactive
batch_size = 16  # samples written together
max_new_tokens = 500  # in each sample
stop = False  # end a sample where the model ends its document
temperature = 0.8  # 1.0 as the model learned it, less is more careful, 0 takes the likeliest token
top_k = 200  # only the so many likeliest tokens; 0 is off
top_p = 1.0  # only the likeliest tokens that together reach this probability; 1.0 is off
min_p = 0.0  # only tokens at least so many times as likely as the likeliest; 0.0 is off
repetition_penalty = 1.0  # above 1.0 makes tokens that were there before less likely
seed = 1337  # of a text's first sample, the next has one more; what is written beside it changes at most rounding
json = False  # a line of JSON for each sample
device = 'auto'  # cuda, else mps, else cpu; or cuda:1 …
dtype = 'auto'  # bfloat16 where the hardware has it, else float16 on GPUs, else float32
config = configure(globals())
# -----------------------------------------------------------------------------


def read(path):
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the prompt {path}: {error}')


def text_of(ids):
    """The text of ids; a character whose last bytes are still missing is left out."""
    return codecs.getincrementaldecoder('utf-8')('replace').decode(tokenizer.decode_bytes(ids))


def watch(ids):
    """Print the ids as they come, each character when it is whole."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for i in ids:
        print(decoder.decode(tokenizer.decode_bytes([i])), end='', flush=True)
        yield i


def continuations(texts, seeds):
    """Yield, step by step, the list of the ids that follow each of the texts, until every one has ended."""
    rows = [tokenizer.encode(text).tolist() or [tokenizer.eot] for text in texts]
    T = max(map(len, rows))
    idx = torch.tensor([[tokenizer.eot] * (T - len(row)) + row for row in rows], device=device)  # (B, T)
    ended = [False] * len(rows)
    for new in stream(model, idx, max_new_tokens, **options, lengths=torch.tensor([*map(len, rows)]), seeds=seeds):
        new = new[:, 0].tolist()
        ended = [end or stop and i == tokenizer.eot for end, i in zip(ended, new)]
        if all(ended):
            return
        yield new


def write(jobs):
    """Print a sample for each (text, seed) of jobs, written together."""
    texts, seeds = zip(*jobs)
    steps = continuations(texts, seeds)
    watched = len(jobs) == 1 and sys.stdout.isatty() and not json
    if watched:
        print(texts[0], end='', flush=True)
        steps = ([i] for i in watch(i for i, in steps))
    added = []
    try:
        for new in steps:
            added.append(new)
    except KeyboardInterrupt:
        if not interactive:
            raise
    for row, (text, seed) in enumerate(jobs):
        ids = [new[row] for new in added]
        if stop and tokenizer.eot in ids:
            ids = ids[:ids.index(tokenizer.eot)]
        if json:
            print(dumps({'prompt': text, 'seed': seed, 'text': text_of(ids), 'tokens': ids}), flush=True)
        else:
            print('' if watched else text + text_of(ids), '---------------', sep='\n', flush=True)


def typed():
    """Yield what the user types, line by line, until Ctrl-D."""
    try:
        import readline  # gives input() its history and editing; Windows has none
    except ImportError:
        pass
    while True:
        try:
            yield input('> ')
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
try:
    check_sampling(**options)
except ValueError as error:
    raise UserError(error) from None
if min(num_samples, max_new_tokens, batch_size) < 1:
    raise UserError('num_samples, max_new_tokens and batch_size must be at least 1')
if (start != '') + (prompts != '') + interactive > 1:
    raise UserError('start, prompts and interactive each say what to continue: give only one of them')
if prompts:
    texts = read(prompts).removesuffix('\n').split('\n')
    if texts == ['']:
        raise UserError(f'{prompts} holds no prompt')
else:
    texts = [read(start[5:]) if start.startswith('FILE:') else start]

device = pick_device(device)
dtype = pick_dtype(dtype, device)
model, tokenizer_name = load_model(init_from, out_dir, device)
tokenizer = get_tokenizer(tokenizer_name)
cast_linears(dtype, model)

sys.stdout.reconfigure(errors='replace')  # for terminals that do not have every character
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other commands do when `| head` has seen enough
try:
    with autocast(dtype, device):
        if interactive:
            for n, text in enumerate(typed()):
                write([(text, seed + n)])
        else:
            jobs = [(text, seed + n) for text in texts for n in range(num_samples)]
            for i in range(0, len(jobs), batch_size):
                write(jobs[i:i + batch_size])
except KeyboardInterrupt:
    print()
    sys.exit(130)
