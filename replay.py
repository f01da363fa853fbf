"""
What a training step read, from the run's log and its dataset alone, whatever the number of processes.

    python replay.py --out_dir=out --step=1234              # the documents of that step
    python replay.py --out_dir=out --find='some text'       # where a text stands, and the steps that read it

Each start of a run logs its settings and its position in the data, from which data/loader.py's order follows. Steps
count from 1, as train.py prints them. A document is printed as SHARD:POSITION, in tokens, and its text; an ellipsis
stands where a block begins or ends inside it.
"""
from pathlib import Path

from configurator import UserError, configure

import numpy as np

from common import log
from data.loader import Loader
from data.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run's
step = 0  # print what this step read
find = ''  # or: look for this text in the training data
characters = 200  # printed of each document; 0: all
# -----------------------------------------------------------------------------

CHUNK = 2**20  # blocks, or tokens, at a time


def starts(out_dir):
    """Yield (Loader at its position, first step, last step, blocks in a step) for each start of a run.

    Raises UserError if the log is missing or doesn't have what it takes, or the dataset is another one now.
    """
    path = Path(out_dir, 'log.jsonl')
    entries = log.read(path)
    found = [entry for entry in entries if 'data' in entry]
    if not found:
        raise UserError(f"{path} doesn't say where the run was in its data: an older train.py wrote it")
    ends = [entry['step'] for entry in found[1:]] + [max(entry['step'] for entry in entries)]
    for entry, end in zip(found, ends):
        config, position = entry['config'], entry['data']
        loader = Loader(config['dataset'], 'train', 1, config['block_size'], seed=config['seed'],
                        shuffle=config['shuffle'])
        now = loader.state_dict()
        if position.keys() != now.keys() or any(position[name].get(key) != now[name][key] for name in now
                                                for key in ('n_blocks', 'block_size', 'seed', 'shuffle')):
            raise UserError(f'{config["dataset"]} is not the dataset that {out_dir} read: it has '
                            f'{loader.n_blocks} blocks, and had {[state["n_blocks"] for state in position.values()]}')
        loader.load_state_dict(position)
        yield loader, entry['step'] + 1, end, entry['tokens_per_step'] // config['block_size']


def draw(loader, count):
    """The next `count` blocks of a Loader's order, and its position moves past them: (dataset, start), (count,)
    int64 each, where `start` is the block's first token in the dataset's stream."""
    dataset, start = loader.choose(sum(loader.drawn), count), np.empty(count, np.int64)
    for k, drawn in enumerate(loader.drawn):
        mine = np.flatnonzero(dataset == k)
        start[mine] = loader.block_starts(k, drawn + np.arange(len(mine)))
        loader.drawn[k] += len(mine)
    return dataset, start


def steps_read(out_dir):
    """Yield (Loader, step, dataset, start) for the steps of a run, CHUNK blocks at a time: `step`, `dataset` and
    `start` are (n,) int64, for each block the step that read it, which of the Loader's datasets, its first token."""
    for loader, first, last, blocks in starts(out_dir):
        for step in range(first, last + 1, max(1, CHUNK // blocks)):
            steps = np.arange(step, min(step + max(1, CHUNK // blocks), last + 1)).repeat(blocks)
            yield loader, steps, *draw(loader, len(steps))


def place(split, position):
    """SHARD:POSITION of a position in a split's stream of tokens."""
    k = np.searchsorted(split.starts, position, side='right') - 1
    return f'{split.shards[k].path}:{position - split.starts[k]}'


def quote(text):
    return repr(text if not characters or len(text) <= characters else text[:characters] + '…')


def show(loader, datasets, starts):
    """Print the documents in the blocks that start there in a Loader's datasets."""
    T, decode = loader.block_size, get_tokenizer(loader.tokenizer).decode
    for k, start in zip(datasets, starts):
        split = loader.splits[k]
        ids = split.read(start[None], T + 1)[0]
        cuts = sorted({0, *np.flatnonzero(ids[:T] == loader.eot).tolist()})  # a document begins with this id
        for begin, end in zip(cuts, [*cuts[1:], T]):
            text = decode(ids[begin:end][ids[begin:end] != loader.eot])
            before, after = '' if ids[begin] == loader.eot else '…', '' if ids[end] == loader.eot else '…'
            print(place(split, (start + begin) % split.n_tokens), quote(before + text + after))


def occurrences(split, text):
    """Yield (first, last): the tokens in a split's stream that hold the text, even where it was tokenized otherwise."""
    tokenizer, pattern = get_tokenizer(split.tokenizer), text.encode()
    size = np.array([len(tokenizer.decode_bytes([i])) for i in range(split.vocab_size)])  # bytes in a token
    for begin in range(0, split.n_tokens, CHUNK):
        ids = split.read(np.array([begin]), min(CHUNK + len(pattern), split.n_tokens - begin))[0]
        raw, ends = tokenizer.decode_bytes(ids), np.cumsum(size[ids])
        at = raw.find(pattern)
        while at >= 0:
            first, last = np.searchsorted(ends, [at, at + len(pattern) - 1], side='right')
            if first < CHUNK:
                yield begin + first, begin + last
            at = raw.find(pattern, at + 1)


def search(out_dir, text):
    """Yield (Split, position in its stream, the steps that read the text there or a part of it), of each occurrence."""
    found = {}  # {folder: (Split, {(first, last): steps})}
    for loader, step, dataset, start in steps_read(out_dir):
        for k, split in enumerate(loader.splits):
            if split.folder not in found:
                found[split.folder] = split, {span: [] for span in occurrences(split, text)}
            begin, by = start[dataset == k], step[dataset == k]
            beyond = begin + loader.block_size > split.n_tokens  # a block that continues with the first tokens
            begin, by = np.append(begin, begin[beyond] - split.n_tokens), np.append(by, by[beyond])
            order = np.argsort(begin)
            begin, by = begin[order], by[order]
            for (first, last), steps in found[split.folder][1].items():
                a, b = np.searchsorted(begin, [first - loader.block_size + 1, last + 1])
                steps += by[a:b].tolist()
    for split, spans in found.values():
        for (first, _), steps in spans.items():
            yield split, first, sorted(set(steps))


if __name__ == '__main__':
    configure(globals())
    if (step > 0) == (find != ''):
        raise UserError("replay.py needs a step or a text to find: --step=1234 or --find='some text'")
    if step:
        last = 0
        for loader, steps, dataset, start in steps_read(out_dir):
            last, mine = steps[-1], steps == step
            if mine.any():
                print(f'step {step} read {mine.sum()} blocks of {loader.block_size} tokens')
                show(loader, dataset[mine], start[mine])
        if step > last:
            raise UserError(f'--step={step}: the run in {out_dir} has made {last} steps')
    else:
        n = 0
        for n, (split, position, steps) in enumerate(search(out_dir, find), 1):
            ids = split.read(np.array([position]), min(64, split.n_tokens - position))[0]
            when = f'read in step {", ".join(map(str, steps))}' if steps else 'not read'
            print(place(split, position), f'({when})', quote(get_tokenizer(split.tokenizer).decode(ids)), flush=True)
        if not n:
            raise UserError(f'--find: the training data of {out_dir} has no {find!r}')
