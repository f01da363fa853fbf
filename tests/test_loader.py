"""The order of training: each block once an epoch, the same for any number of processes, exact after a resume."""
import collections
import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Loader, permute, permute_by_sorting, stream_keys
from test_dataset import bin_header, complaint, write_dataset

ROOT = Path(__file__).resolve().parents[1]
T, N = 8, 101       # block size; blocks of the dataset `counting`


@pytest.fixture(scope='module')
def counting(tmp_path_factory):
    """A dataset whose every id is its own position, so that a block tells where it comes from."""
    ids = np.arange(N * T + 1 + 5)      # the last 5 don't fill a block
    folder = tmp_path_factory.mktemp('data') / 'counting'
    return write_dataset(folder, vocab_size=2**20, dtype='uint32', train=ids, val=ids)


@pytest.fixture(scope='module')
def mixture(tmp_path_factory):
    """Three datasets: one has ids from 0, one from 10,000, one from 20,000."""
    folder = tmp_path_factory.mktemp('data')
    for k, (name, blocks) in enumerate({'a': 1000, 'b': 100, 'c': 15}.items()):
        ids = 10_000 * k + np.arange(blocks * T + 1)
        write_dataset(folder / name, shard_size=3000, vocab_size=2**20, dtype='uint32', train=ids, val=ids)
    return f'{folder}/a:0.7,{folder}/b:0.2,{folder}/c:0.1'


def draw(loader, n_batches):
    """The blocks of the next n_batches, by the number of their first token; x and y are checked on the way."""
    blocks = []
    for _ in range(n_batches):
        x, y = loader.next_batch()
        assert x.shape == y.shape == (loader.batch_size, T) and x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        next_ids = y == x + 1
        if loader.orders[0]['move_blocks']:
            next_ids |= y % 10_000 == 0     # past the end follows the beginning
        assert next_ids.all() and (x[:, 1:] == y[:, :-1]).all()
        blocks += x[:, 0].tolist()
    return blocks


def draw_job(loaders, n_batches):
    """What the processes of a job draw together, in the job's order."""
    return [block for _ in range(n_batches) for loader in loaders for block in draw(loader, 1)]


def job(dataset, world_size, batch_size, state=None, **kwargs):
    loaders = [Loader(dataset, 'train', batch_size, T, rank, world_size, **kwargs) for rank in range(world_size)]
    for loader in loaders:
        if state:
            loader.load_state_dict(state)
    return loaders


def saved(loader):
    """The loader's state after a checkpoint's way to the disk and back."""
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_an_epoch_is_every_block_once(counting):
    order = draw(Loader(counting, 'train', 1, T, move_blocks=False), 3 * N)
    epochs = [order[e * N:(e + 1) * N] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [T * block for block in range(N)]
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_later_epochs_cut_the_text_elsewhere(counting):
    """Each epoch has every token once, but for the few that don't fill a block, and these change."""
    loader, n_tokens = Loader(counting, 'train', 1, T), N * T + 1 + 5
    order = draw(loader, 6 * N)
    epochs = [order[e * N:(e + 1) * N] for e in range(6)]
    assert sorted(epochs[0]) == [T * block for block in range(N)]
    offsets = [{start % T for start in epoch if start >= T} for epoch in epochs[1:]]
    assert len({frozenset(each) for each in offsets}) > 1
    for epoch in epochs:
        tokens = {(start + i) % n_tokens for start in epoch for i in range(T)}
        assert len(tokens) == N * T
    whole = Loader(counting, 'train', 1, T, move_blocks=False)
    assert draw(whole, N) == epochs[0]


@pytest.mark.parametrize('blocks', [20, N])
def test_an_older_checkpoint_continues_in_its_order(tmp_path, blocks):
    dataset = write_dataset(tmp_path, vocab_size=2**20, dtype='uint32', train=np.arange(blocks * T + 1))
    loader = Loader(dataset, 'train', 1, T)
    loader.load_state_dict({tmp_path.name: {'drawn': 5, 'n_blocks': blocks, 'seed': 1337, 'shuffle': True,
                                            'block_size': T}})
    expected = [T * block for epoch in range(3)
                for block in permute(np.arange(blocks), blocks, stream_keys(1337, epoch))]
    assert draw(loader, 2 * blocks) == expected[5:][:2 * blocks]
    again = Loader(dataset, 'train', 1, T)
    again.load_state_dict(saved(loader))
    assert draw(again, 5) == expected[5 + 2 * blocks:][:5]


def test_datasets_of_one_size_have_their_own_permutations(tmp_path):
    for k, name in enumerate('ab'):
        write_dataset(tmp_path / name, vocab_size=2**20, dtype='uint32', train=10_000 * k + np.arange(N * T + 1))
    drawn = draw(Loader(f'{tmp_path}/a:0.5,{tmp_path}/b:0.5', 'train', 10, T), 30)
    a, b = ([block % 10_000 for block in drawn if block // 10_000 == k][:N] for k in range(2))
    assert sorted(a) == sorted(b) == [T * block for block in range(N)]
    assert sum(x == y for x, y in zip(a, b)) < 10


def test_shards_that_changed_since_the_checkpoint_are_named(tmp_path, capsys):
    def write(seed):
        ids = np.random.default_rng(seed).integers(257, size=2000)
        write_dataset(tmp_path / 'ours', vocab_size=257, tokenizer='bytes', train=ids)
        (tmp_path / 'theirs').mkdir(exist_ok=True)
        np.save(tmp_path / 'theirs/a_train_000001.npy', ids.astype(np.uint16))
        os.utime(tmp_path / 'theirs/a_train_000001.npy', (seed, seed))
    shards = {'ours': 'train_000000.npy, train_000001.npy, train_000002.npy', 'theirs': 'a_train_000001.npy'}
    for name, shard in shards.items():
        write(1)
        loader = Loader(str(tmp_path / name), 'train', 4, T)
        draw_unchecked = [loader.next_batch() for _ in range(3)]
        state = saved(loader)
        write(1)
        Loader(str(tmp_path / name), 'train', 4, T).load_state_dict(state)
        assert capsys.readouterr().out == ''
        write(2)
        again = Loader(str(tmp_path / name), 'train', 4, T)
        again.load_state_dict(state)
        assert capsys.readouterr().out.startswith(f'{tmp_path / name}: {shard} changed since the checkpoint')
        assert saved(again)[name]['drawn'] == 4 * len(draw_unchecked)
        Loader(str(tmp_path / name), 'train', 4, T, rank=1, world_size=2).load_state_dict(state)
        assert capsys.readouterr().out == ''


def test_a_damaged_position_is_one_line(counting):
    loader = Loader(counting, 'train', 4, T)
    state = loader.state_dict()
    for changes in {'drawn': -1}, {'drawn': '7'}, {'drawn': 1.0}, {'stream': -1}, {'seed': None}, {'shards': [1]}:
        assert 'is damaged' in complaint(loader.load_state_dict, {'counting': state['counting'] | changes})
    for other in [], 7, {}, 'text':
        assert 'is damaged' in complaint(loader.load_state_dict, {'counting': other})


def test_the_seed_makes_the_order(counting):
    order = draw(Loader(counting, 'train', 4, T, seed=1), 30)
    assert order == draw(Loader(counting, 'train', 4, T, seed=1), 30)
    assert order != draw(Loader(counting, 'train', 4, T, seed=2), 30)


def test_without_shuffle_it_reads_in_sequence(counting):
    order = draw(Loader(counting, 'train', 1, T, shuffle=False), 2 * N)
    assert order == 2 * [T * block for block in range(N)]


@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('world_size, batch_size', [(2, 12), (3, 8), (24, 1)])
def test_any_number_of_processes_reads_the_same(counting, mixture, world_size, batch_size, shuffle):
    for dataset in counting, mixture:
        alone = draw_job(job(dataset, 1, 24, shuffle=shuffle), 12)
        assert draw_job(job(dataset, world_size, batch_size, shuffle=shuffle), 12) == alone


@pytest.mark.parametrize('world_size, batch_size', [(1, 12), (2, 6), (3, 1), (5, 3)])
@pytest.mark.parametrize('drawn', [0, 1, 7, 30])
def test_after_a_resume_comes_what_would_have_come(counting, mixture, drawn, world_size, batch_size):
    for dataset in counting, mixture:
        first = job(dataset, 2, 6)
        draw_job(first, drawn)
        states = [saved(loader) for loader in first]
        assert states[0] == states[1]       # whichever process writes the checkpoint
        then = draw_job(first, 20)
        second = draw_job(job(dataset, world_size, batch_size, states[0]), 240 // (world_size * batch_size))
        assert second == then[:len(second)]


def test_a_state_may_be_loaded_at_any_time(counting):
    loader = Loader(counting, 'train', 4, T)
    draw(loader, 3)
    state = saved(loader)
    then = draw(loader, 10)
    loader.load_state_dict(state)       # while batches behind it are ready
    assert saved(loader) == state
    assert draw(loader, 10) == then


def test_another_order_starts_from_the_beginning_and_says_so(counting, capsys):
    loader = Loader(counting, 'train', 4, T)
    draw(loader, 3)
    other = Loader(counting, 'train', 4, T, seed=7)
    other.load_state_dict(saved(loader))
    assert 'seed was 1337, is 7' in capsys.readouterr().out
    other.load_state_dict({'another': saved(loader).popitem()[1]})
    assert 'is new in this run' in capsys.readouterr().out
    assert draw(other, 3) == draw(Loader(counting, 'train', 4, T, seed=7), 3)


def test_a_dataset_may_join_a_mixture(mixture):
    a, b, c = mixture.split(',')
    loader = Loader(f'{a},{b}', 'train', 10, T)
    drawn = draw(loader, 50)
    more = Loader(mixture, 'train', 10, T)
    more.load_state_dict(saved(loader))
    assert more.stats()['c']['epochs'] == 0
    new = [block for block in draw(more, 30) if block < 10_000]     # a continues with blocks that it hasn't drawn
    assert not set(new) & set(drawn)


def test_this_order_never_changes(mixture):
    """Positions in checkpoints mean something only as long as this order stays."""
    assert Loader(mixture, 'train', 4, T).choose(100, 12).tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 2, 2, 2, 0]
    assert permute(np.arange(12), 12, stream_keys(1337, 0)).tolist() == [7, 9, 6, 10, 8, 11, 4, 1, 5, 3, 2, 0]


def test_every_order_is_as_likely():
    """Of 3 blocks there are 6 orders: in 3,000 epochs each comes about 500 times (a deviation is 20)."""
    orders = collections.Counter(tuple(permute(np.arange(3), 3, stream_keys(5, epoch))) for epoch in range(3000))
    assert len(orders) == 6 and all(400 < count < 600 for count in orders.values())


@pytest.mark.parametrize('n, draws', [(2, 500), (3, 1000), (4, 2000)])
def test_every_order_of_few_blocks_is_as_likely(n, draws):
    """Pearson's chi-square over the n! orders: mean n! - 1, deviation sqrt(2 (n! - 1))."""
    orders = collections.Counter(tuple(permute_by_sorting(np.arange(n), n, stream_keys(5, epoch))) for epoch in range(draws))
    freedom = math.factorial(n) - 1
    expected = draws / (freedom + 1)
    chi_square = sum((orders[order] - expected) ** 2 / expected for order in itertools.permutations(range(n)))
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize('n', [9, 25, 49])
def test_few_blocks_have_odd_orders_too(n, tmp_path):
    """On a square grid, shifts of an odd length reach the even permutations alone."""
    loader = Loader(write_dataset(tmp_path, train=np.zeros(n * T + 1)), 'train', 1, T, move_blocks=False)
    odd = sum(parity((loader.starts(0, epoch, np.arange(n)) // T).tolist()) for epoch in range(400))
    assert 140 < odd < 260      # a deviation is 10


def parity(order):
    return sum(a > b for i, a in enumerate(order) for b in order[i + 1:]) % 2


@pytest.mark.parametrize('n', [1, 2, 3, 17, 10_000])
def test_permutations_of_any_size(n):
    for epoch in range(3):
        assert sorted(permute_by_sorting(np.arange(n), n, stream_keys(0, epoch))) == list(range(n))
        assert sorted(permute(np.arange(n), n, stream_keys(0, epoch))) == list(range(n))


def test_neighbours_are_far_apart():
    order = permute(np.arange(100_000), 100_000, stream_keys(0, 0))
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, permute(np.arange(100_000), 100_000, stream_keys(0, 1)))[0, 1]) < 0.02


def test_a_mixture_has_its_shares(mixture):
    loader = Loader(mixture, 'train', 20, T, move_blocks=False)
    drawn = draw(loader, 150)       # 3,000 blocks
    by_dataset = [[block % 10_000 for block in drawn if block // 10_000 == k] for k in range(3)]
    for name, blocks, share, n in zip('abc', by_dataset, (0.7, 0.2, 0.1), (1000, 100, 15)):
        assert len(blocks) / 3000 == pytest.approx(share, abs=0.03)
        assert loader.stats()[name] == {'share': len(blocks) / 3000, 'epochs': len(blocks) / n}
        for epoch in range(len(blocks) // n):       # each dataset has its own epochs
            assert sorted(blocks[epoch * n:(epoch + 1) * n]) == [T * block for block in range(n)]
    assert [block // 10_000 for block in drawn] != sorted(block // 10_000 for block in drawn)


def test_the_seed_makes_the_mixture(mixture):
    sources = [[block // 10_000 for block in draw(Loader(mixture, 'train', 20, T, seed=seed), 5)]
               for seed in (1, 1, 2)]
    assert sources[0] == sources[1] != sources[2]


def test_weights_are_proportions(mixture):
    times_ten = mixture.replace(':0.7', ':7').replace(':0.2', ':2.0').replace(':0.1', ':1')
    assert draw(Loader(times_ten, 'train', 20, T), 10) == draw(Loader(mixture, 'train', 20, T), 10)


def test_the_parts_of_a_mixture(mixture):
    loader = Loader(mixture, 'val', 4, T)
    parts = zip(loader.names, loader.weights)
    assert [(name, round(weight, 6)) for name, weight in parts] == [('a', 0.7), ('b', 0.2), ('c', 0.1)]
    assert [next(loader.eval_batches(1, k))[0][0, 0] for k in range(3)] == [0, 10_000, 20_000]


def test_folders_of_one_name(tmp_path):
    for parent in 'xy':
        write_dataset(tmp_path / parent / 'text', train=np.arange(1000))
    loader = Loader(f'{tmp_path}/x/text:1,{tmp_path}/y/text:1', 'train', 2, T)
    assert list(loader.stats()) == [f'{tmp_path}/x/text', f'{tmp_path}/y/text']


@pytest.mark.parametrize('dataset, words', [
    ('{a}:0.5,{b}:0', "b:0' should be a dataset and a positive weight"),
    ('{a}:0.5,{b}:-1', 'positive weight'),
    ('{a}:0.5,{b}:nan', 'positive weight'),
    ('{a}:0.5,{b}:inf', 'positive weight'),
    ('{a}:0.5,{b}:half', 'positive weight'),
    ('{a}:-1', 'positive weight'),
    ('{a},{b}', 'positive weight'),
    ('{a}:0.5,', 'positive weight'),
    ('{a}:0.5,:0.5', 'positive weight'),
    ('{a}:0.5,{a}:0.5', 'twice'),
    ('{a}:0.5,{a}/../a:0.5', 'same folder'),
    ('{a}:0.5,{other}:0.5', 'a mixture needs one tokenizer'),
    ('{a}:0.5,{a}/nothing:0.5', 'no dataset in'),
])
def test_wrong_mixtures(mixture, tmp_path, dataset, words):
    a, b, _ = (item.rpartition(':')[0] for item in mixture.split(','))
    other = write_dataset(tmp_path / 'other', vocab_size=257, tokenizer='bytes', train=np.zeros(1000))
    assert words in complaint(Loader, dataset.format(a=a, b=b, other=other), 'train', 4, T)


def test_less_than_a_block(tmp_path):
    dataset = write_dataset(tmp_path, train=np.zeros(64))
    assert 'too few for one block of block_size=64' in complaint(Loader, dataset, 'train', 4, 64)
    Loader(dataset, 'train', 4, 63).next_batch()


@pytest.mark.parametrize('world_size, batch_size', [(1, 6), (2, 3), (4, 6)])
@pytest.mark.parametrize('blocks', [6, 30, N, N + 50])
def test_evaluation_scores_the_first_blocks_once_each(counting, blocks, world_size, batch_size):
    loaders = [Loader(counting, 'val', batch_size, T, rank, world_size) for rank in range(world_size)]
    batches = [list(loader.eval_batches(blocks)) for loader in loaders]
    assert len({len(each) for each in batches}) == 1      # every process takes part in every forward pass
    scored = []
    for x, y in (pair for each in batches for pair in each):
        assert x.shape == y.shape == (batch_size, T) and (x >= 0).all()
        real = y[:, 0] >= 0
        assert (y[real] == x[real] + 1).all() and (y[~real] == -1).all()
        scored += x[real, 0].tolist()
    assert sorted(scored) == [T * block for block in range(min(blocks, N))]


def test_evaluation_is_the_same_each_time_and_leaves_training_alone(counting):
    loader = Loader(counting, 'train', 4, T)
    order = draw(Loader(counting, 'train', 4, T), 10)
    first = [x.tolist() for x, _ in loader.eval_batches(5)]
    drawn = draw(loader, 5)
    assert [x.tolist() for x, _ in loader.eval_batches(5)] == first
    assert drawn + draw(loader, 5) == order


def test_a_bad_id_ends_the_training_with_the_file_named(tmp_path):
    ids = np.zeros(50_000, np.uint16)
    ids[7_000] = 60_000
    (tmp_path / 'fineweb_train_000001.bin').write_bytes(bin_header(len(ids)) + ids.tobytes())
    loader = Loader(str(tmp_path), 'train', 4, 64)

    def epoch():
        for _ in range(50_000 // 256):
            loader.next_batch()
    assert 'fineweb_train_000001.bin holds the id 60000' in complaint(epoch)


MEASURE = '''
import resource, sys
from data.loader import Loader
def megabytes():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 1e6
loader = Loader(sys.argv[1], 'train', 64, 64)
for _ in range(20):
    loader.next_batch()
before = megabytes()
for _ in range(1000):
    loader.next_batch()
print(megabytes() - before)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """Of 2 GB (a file of holes, which takes no room) 64,000 blocks are read; a map would keep 250 MB of them."""
    with open(tmp_path / 'fineweb_train_000001.bin', 'wb') as file:
        file.write(bin_header(10**9))
        file.truncate(1024 + 2 * 10**9)
    run = subprocess.run([sys.executable, '-c', MEASURE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert float(run.stdout) < 30, run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_batches_arrive_on_the_gpu(counting):
    loader = Loader(counting, 'train', 4, T, device='cuda')
    expected = Loader(counting, 'train', 4, T)
    for _ in range(20):
        (x, y), (x_cpu, y_cpu) = loader.next_batch(), expected.next_batch()
        assert x.is_cuda and (x.cpu() == x_cpu).all() and (y.cpu() == y_cpu).all()
