"""replay.py finds what was planted: the blocks that training really read, step by step, and the steps of a text."""

import ast
import json
import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import replay
from conftest import ROOT, TINY, needs_gpt2, run, run_ranks
from data.errors import UserError
from data.loader import Loader
from data.tokenizer import get_tokenizer
from test_dataset import write_dataset

T = 32


def documents(folder, name, count, tokenizer='bytes', shard_size=1000):
    """A dataset of short documents; each names itself."""
    rng, tokenizer = np.random.default_rng(count), get_tokenizer(tokenizer)
    texts = [f'<{name} {i}> ' + 'lorem ipsum dolor sit amet '[:rng.integers(1, 27)] * 2 for i in range(count)]
    ids = tokenizer.encode_documents(texts)
    write_dataset(folder / name, shard_size, tokenizer.vocab_size, tokenizer=tokenizer.name, train=ids, val=ids)
    return str(folder / name)


def logged(out_dir, *runs):
    """The log of a run whose starts had these (Loader's arguments, steps, batches in a step); returns {step: rows of
    ids, (B, T)}, as the Loader gave them."""
    read, entries, step, state = {}, [], 0, {}
    for settings, steps, batches in runs:
        loader = Loader(split='train', batch_size=4, **settings)
        loader.load_state_dict(state)
        config = {'block_size': settings['block_size'], 'shuffle': True, 'seed': 1337} | settings
        entries.append({'step': step, 'config': config, 'data': loader.state_dict(),
                        'tokens_per_step': batches * 4 * settings['block_size']})
        for step in range(step + 1, step + steps + 1):
            read[step] = [row for _ in range(batches) for row in loader.next_batch()[0].tolist()]
            entries.append({'step': step, 'loss': 1.0})
        state = loader.state_dict()
    out_dir.mkdir(exist_ok=True)
    (out_dir / 'log.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return read


def replayed(out_dir):
    """{step: rows of ids}, as replay.py says."""
    read = defaultdict(list)
    for loader, steps, datasets, starts in replay.steps_read(out_dir):
        for step, k, start in zip(steps.tolist(), datasets, starts):
            read[step].append(loader.splits[k].read(start[None], loader.block_size)[0].tolist())
    return read


def call(monkeypatch, capsys, *args):
    """What replay.py prints, run in this process."""
    monkeypatch.setattr(sys, 'argv', ['replay.py', *map(str, args)])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    runpy.run_path(str(ROOT / 'replay.py'), run_name='__main__')
    return capsys.readouterr().out


@pytest.mark.parametrize('chunk', [7, 2**20])
@pytest.mark.parametrize('shuffle', [True, False])
def test_every_step_of_every_epoch(tmp_path, monkeypatch, shuffle, chunk):
    """Of one dataset and of a mixture, after a resume with other batches, another order and another mixture."""
    monkeypatch.setattr(replay, 'CHUNK', chunk)
    a, b = documents(tmp_path, 'a', 40), documents(tmp_path, 'b', 15)
    order = dict(block_size=T, shuffle=shuffle)
    read = logged(tmp_path / 'out', (dict(dataset=a, **order), 30, 2), (dict(dataset=a, **order), 5, 3),
                  (dict(dataset=f'{a}:0.7,{b}:0.3', **order), 40, 2), (dict(dataset=a, seed=1, **order), 3, 1),
                  (dict(dataset=f'{b}:1,{a}:1', block_size=16, shuffle=shuffle), 9, 2))
    assert Loader(a, 'train', 1, T).n_blocks[0] * 3 < 8 * 30  # several epochs
    assert replayed(tmp_path / 'out') == read


@needs_gpt2
def test_a_text_is_found_however_it_was_tokenized(tmp_path):
    """In the middle of a token, over a token's, a block's and a shard's end, and nowhere."""
    folder = documents(tmp_path, 'a', 300, 'gpt2', shard_size=501)
    read = logged(tmp_path / 'out', (dict(dataset=folder, block_size=T, move_blocks=False), 30, 2))
    decode = get_tokenizer('gpt2').decode
    ids = np.concatenate([np.load(path) for path in sorted(Path(folder).glob('train_*.npy'))])
    for text in '<a 17>', ' 290', 'orem ipsum d', decode(ids[499:504]), decode(ids[5 * T - 2:5 * T + 2]):
        found = list(replay.search(tmp_path / 'out', text))
        assert len(found) == decode(ids).count(text) > 0
        for split, first, steps in found:
            around = decode(ids[max(0, first - 1):first + 20])
            assert text in around
            last = next(n for n in range(first, first + 30) if text in decode(ids[first:n + 1]))
            blocks = {tuple(ids[n * T:(n + 1) * T]) for n in range(first // T, last // T + 1)}
            assert steps == sorted(step for step, rows in read.items() if blocks & set(map(tuple, rows)))
    assert list(replay.search(tmp_path / 'out', 'nowhere to be found')) == []


def test_what_training_really_read(tmp_path, monkeypatch, capsys):
    """Two processes, then one after a resume, on a mixture; train.py tells what it reads."""
    mixture = f'{documents(tmp_path, "a", 60)}:0.6,{documents(tmp_path, "b", 20)}:0.4'
    out_dir, tell = tmp_path / 'out', tmp_path / 'tell.py'
    tell.write_text(f"""
import json, os
from data.loader import Loader
_next = Loader.next_batch
def _next_batch(self):
    x, y = _next(self)
    with open({str(tmp_path / 'read')!r} + os.environ.get('RANK', '0'), 'a') as f:
        f.write(json.dumps(x.tolist()) + chr(10))
    return x, y
Loader.next_batch = _next_batch
""")
    args = [*TINY, '--n_layer=1', f'--dataset={mixture}', f'--out_dir={out_dir}', '--eval_interval=3', '--seed=7', tell]
    run_ranks('train.py', *args, '--total_batch_size=512', '--max_iters=3', processes=2)
    read = [[json.loads(line) for line in (tmp_path / f'read{rank}').read_text().splitlines()] for rank in (0, 1)]
    rows = [row for one, two in zip(*read) for row in one + two]  # (rank 0's, rank 1's) micro-batch by micro-batch
    (tmp_path / 'read0').unlink()
    run('train.py', *args, '--total_batch_size=512', '--max_iters=6', '--init_from=resume')
    rows += [row for line in (tmp_path / 'read0').read_text().splitlines() for row in json.loads(line)]
    truth = {step: rows[16 * (step - 1):16 * step] for step in range(1, 7)}
    assert replayed(out_dir) == truth
    decode = get_tokenizer('bytes').decode
    for step in 2, 5:
        out = call(monkeypatch, capsys, f'--out_dir={out_dir}', f'--step={step}', '--characters=0')
        texts = [ast.literal_eval(line.partition(' ')[2]) for line in out.splitlines()[1:]]
        read = ''.join(map(decode, truth[step])).replace('<|endoftext|>', '')
        assert ''.join(text.strip('…') for text in texts) == read
    marker = re.search(r'<[ab] \d+>', ''.join(map(decode, truth[4])))[0]
    out = call(monkeypatch, capsys, f'--out_dir={out_dir}', f'--find={marker}')
    (shard, position, steps, text), = re.findall(r"^(.*):(\d+) \(read in step ([\d, ]+)\) '(.*)'$", out, re.MULTILINE)
    assert text.startswith(marker) and '4' in steps.split(', ')
    shards = [path for path in sorted(Path(shard).parent.glob('train_*.npy')) if str(path) >= shard]
    ids = np.concatenate([np.load(path) for path in shards])
    assert decode(ids[int(position):]).startswith(marker)


@pytest.mark.parametrize('args, accident, words', [
    ('', '', 'a step or a text'), ('--step=3 --find=lorem', '', 'a step or a text'),
    ('--step=4', '', 'has made 3 steps'), ('--step=-1', '', 'step=-1'), ('--find=nowhere', '', "has no 'nowhere'"),
    ('--out_dir=/no --step=1', '', 'no such log'),
    ('--step=1', 'changed', 'is not the dataset'), ('--step=1', 'gone', 'no dataset in'), ('--step=1', 'old', 'older')])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, args, accident, words):
    logged(tmp_path / 'out', (dict(dataset=documents(tmp_path, 'a', 40), block_size=T), 3, 2))
    if accident == 'changed':
        documents(tmp_path, 'a', 41)
    elif accident == 'gone':
        (tmp_path / 'a').rename(tmp_path / 'b')
    elif accident == 'old':
        (tmp_path / 'out' / 'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match=words) as error:
        call(monkeypatch, capsys, f'--out_dir={tmp_path}/out', *args.split())
    assert '\n' not in str(error.value)


def test_a_text_is_found_where_later_epochs_cut_it(tmp_path):
    """Each epoch reads each text once, in one step or in two that share it, wherever its blocks start."""
    folder = documents(tmp_path, 'a', 40)
    n = Loader(folder, 'train', 1, T).n_blocks[0]
    logged(tmp_path / 'out', (dict(dataset=folder, block_size=T), n, 1))     # four epochs
    for i in 5, 20, 30:
        (_, _, steps), = replay.search(tmp_path / 'out', f'<a {i}>')
        for epoch in range(4):
            assert 1 <= len({step for step in steps if epoch * n < step * 4 <= (epoch + 1) * n + 3}) <= 3
