"""HellaSwag: the same losses as the simple way, one item and one ending at a time, and what a user sees."""

import hashlib
import http.server
import json
import threading
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import hellaswag
from conftest import SHARED, needs_gpt2, run
from data.errors import UserError
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from processes import on_processes

ITEM = {'ind': 7, 'ctx': 'A man sits on a roof. he', 'label': 3,
        'endings': ['is using wrap.', 'is ripping level tiles off.', 'holds a cube.', 'pulls up roofing on the roof.']}


@pytest.fixture(scope='module')
def items():
    """The first 1,000 items of the validation set."""
    path = SHARED / 'data' / 'hellaswag_val_1000.jsonl'
    path = path if path.exists() else hellaswag.FILE
    if not path.exists():
        pytest.skip('no HellaSwag items here: python hellaswag.py fetches them')
    return hellaswag.load_items(path, limit=1000)


def small_gpt(**fields):
    """A random GPT that is large enough to have opinions."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{'block_size': 512, 'vocab_size': 257, 'n_layer': 2, 'n_head': 2, 'n_embd': 32} | fields))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model.eval()


@torch.no_grad()
def simple_way(model, tokenizer, item):
    """Each ending's summed loss, and its tokens: one forward pass an ending, all of it through the head."""
    losses, lengths = [], []
    context = tokenizer.encode(item['ctx']).tolist() or [tokenizer.eot]
    endings = [tokenizer.encode(' ' + ending).tolist()[:model.config.block_size] for ending in item['endings']]
    room = model.config.block_size - max(len(ending) for ending in endings)  # the last token is only a target
    context = context[-(room + 1):]
    for ending in endings:
        row = torch.tensor([context + ending])
        logits, _ = model(row[:, :-1], row[:, 1:])
        loss = F.cross_entropy(logits[0], row[0, 1:], reduction='none')
        losses.append(loss[-len(ending):].sum().item())
        lengths.append(len(ending))
    return losses, lengths


def evaluate(model, tokenizer, items, **how):
    return hellaswag.evaluate(model, hellaswag.prepare(items, tokenizer, model.config.block_size), **how)


def assert_same(result, simple):
    losses, lengths = (torch.tensor(x) for x in zip(*simple))
    assert torch.equal(result['lengths'], lengths)
    torch.testing.assert_close(result['losses'].float(), losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(result['losses'].argmin(1), losses.argmin(1))
    assert torch.equal((result['losses'] / result['lengths']).argmin(1), (losses / lengths).argmin(1))


@pytest.mark.parametrize('fields', [
    {}, {'position': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'n_kv_head': 1, 'qk_norm': True},
    {'block_size': 64}, {'block_size': 64, 'position': 'rope'}], ids=['gpt2', 'modern', 'short', 'short rope'])
def test_same_as_the_simple_way(items, fields):
    """Learned and rotary positions; and contexts that must be cut, endings too, where 64 bytes are too few."""
    model, tokenizer = small_gpt(**fields), get_tokenizer('bytes')
    some = items[::20] + [{**ITEM, 'ctx': ''}, {**ITEM, 'endings': ['', 'a', 'b', 'cd']}]
    assert_same(evaluate(model, tokenizer, some), [simple_way(model, tokenizer, item) for item in some])


@needs_gpt2
def test_same_as_the_simple_way_with_gpt2s_tokens(items):
    model, tokenizer = small_gpt(vocab_size=50257, n_embd=16), get_tokenizer('gpt2')
    some = items[::50]
    assert_same(evaluate(model, tokenizer, some), [simple_way(model, tokenizer, item) for item in some])


def test_same_accuracy_as_the_simple_way(items):
    items, model, tokenizer = items[::5], small_gpt(n_layer=1), get_tokenizer('bytes')
    result = evaluate(model, tokenizer, items)
    simple = [simple_way(model, tokenizer, item) for item in items]
    assert_same(result, simple)
    summed = [losses for losses, _ in simple]
    a_token = [[loss / n for loss, n in zip(losses, lengths)] for losses, lengths in simple]
    for name, scores in ('acc', summed), ('acc_norm', a_token):
        p = sum(row.index(min(row)) == item['label'] for row, item in zip(scores, items)) / len(items)
        assert result[name] == p and result[f'{name}_stderr'] == pytest.approx((p * (1 - p) / len(items)) ** 0.5)
    assert result['acc'] != result['acc_norm']


def test_the_score_is_of_the_ending_not_of_its_length():
    """A model that finds every byte equally likely takes the shortest ending for acc; for acc_norm all are alike."""
    model = small_gpt()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, get_tokenizer('bytes'), [ITEM, {**ITEM, 'label': 2}])
    ln_V = torch.log(torch.tensor(257.0)).item()
    assert result['lengths'].tolist() == [[len(' ' + ending) for ending in ITEM['endings']]] * 2
    torch.testing.assert_close(result['losses'] / result['lengths'], torch.full((2, 4), ln_V, dtype=torch.float64))
    assert result['acc'] == 0.5 and result['acc_stderr'] == pytest.approx(0.125 ** 0.5)


def test_batches_change_nothing(items):
    """Sizes of batches, from one row to all of them; rows stay under the budget; the items' order is kept."""
    model, tokenizer = small_gpt(), get_tokenizer('bytes')
    sizes = []
    model.transformer.wte.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    one = evaluate(model, tokenizer, items[:40], batch_tokens=1)
    assert len(sizes) == 40
    sizes.clear()
    several = evaluate(model, tokenizer, items[:40], batch_tokens=5000)
    assert 2 < len(sizes) < 20 and max(sizes) <= 5000
    torch.testing.assert_close(one['losses'], several['losses'], rtol=1e-5, atol=1e-4)
    backwards = evaluate(model, tokenizer, items[:40][::-1], batch_tokens=5000)
    torch.testing.assert_close(backwards['losses'].flip(0), several['losses'], rtol=1e-5, atol=1e-4)


def test_compiled_and_in_bfloat16(items):
    model, tokenizer = small_gpt(), get_tokenizer('bytes')
    expected = evaluate(model, tokenizer, items[:20])
    low = evaluate(model, tokenizer, items[:20], dtype='bfloat16')
    torch.testing.assert_close(low['losses'], expected['losses'], rtol=0.05, atol=0.5)
    compiled = evaluate(torch.compile(model, backend='aot_eager'), tokenizer, items[:20])
    torch.testing.assert_close(compiled['losses'], expected['losses'], rtol=1e-4, atol=1e-4)


def share(url, file, sha256):
    """What a rank finds for the items that it fetches, and how many forward passes it takes."""
    model, passes = small_gpt(), []
    model.transformer.wte.register_forward_pre_hook(lambda module, args: passes.append(1))
    hellaswag.URL, hellaswag.FILE, hellaswag.SHA256 = url, file, sha256
    result = evaluate(model, get_tokenizer('bytes'), hellaswag.load_items(), batch_tokens=1000)
    return result | {'passes': len(passes)}


def test_processes_share_the_items(items, server):
    """Two processes, an odd number of items: one downloads them, the same forward passes on both, and one process's
    losses on both."""
    content = ''.join(json.dumps(item) + '\n' for item in items[:21]).encode()
    (server / 'items.jsonl').write_bytes(content)
    first, second = on_processes(2, share, hellaswag.URL, hellaswag.FILE, hashlib.sha256(content).hexdigest())
    assert requests == ['/items.jsonl']
    assert first['passes'] == second['passes']
    alone = evaluate(small_gpt(), get_tokenizer('bytes'), items[:21])
    for result in first, second:
        torch.testing.assert_close(result['losses'], alone['losses'], rtol=1e-5, atol=1e-4)
        assert result['acc'] == alone['acc'] and result['acc_norm'] == alone['acc_norm']


def test_command(tmp_path):
    """Of a checkpoint and a file: the two accuracies, and each item's losses in a file."""
    model = small_gpt()
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': 'bytes'},
               tmp_path / 'ckpt.pt')
    (tmp_path / 'items.jsonl').write_text((json.dumps(ITEM) + '\n') * 3)
    done = run('hellaswag.py', f'--out_dir={tmp_path}', f'--data={tmp_path}/items.jsonl', '--limit=2',
               '--device=cpu', '--dtype=float32', f'--out={tmp_path}/results.jsonl')
    losses, lengths = simple_way(model, get_tokenizer('bytes'), ITEM)
    results = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert len(results) == 2
    assert results[1]['losses'] == pytest.approx(losses, rel=1e-4)
    assert (results[1]['ind'], results[1]['label'], results[1]['tokens']) == (7, 3, lengths)
    acc, acc_norm = (float(scores.index(min(scores)) == 3)
                     for scores in (losses, [loss / n for loss, n in zip(losses, lengths)]))
    assert done.out == f'2 items; ± is the standard error\nacc      {acc:.4f} ± 0.0000\nacc_norm {acc_norm:.4f} ± 0.0000\n'
    assert not list(tmp_path.glob('*.tmp'))
    (tmp_path / 'full.py').write_text('import resource as _r\n_r.setrlimit(_r.RLIMIT_FSIZE, (10, 10))')  # a full disk
    full = run('hellaswag.py', tmp_path / 'full.py', f'--out_dir={tmp_path}', f'--data={tmp_path}/items.jsonl',
               '--limit=2', '--device=cpu', '--dtype=float32', f'--out={tmp_path}/more.jsonl', expect=1)
    assert full.out == done.out and full.err == f'out={tmp_path}/more.jsonl could not be written: File too large\n'


@pytest.mark.parametrize('line, words', [
    ('{"ctx": "a", "label": 1', ':2: not an item of HellaSwag: Expecting'),
    ('', ':2: not an item of HellaSwag: Expecting value'),
    ('{"ctx": "a", "ending": ["b"]}', ':2: the item has no label and no endings'),
    ('[1, 2]', ':2: the item has no ctx'),
    ('3', ':2: not an item of HellaSwag'),
    (json.dumps({**ITEM, 'label': 4}), ':2: ctx must be a string, endings four strings, and label 0 to 3'),
    (json.dumps({**ITEM, 'label': 'x'}), ':2: not an item of HellaSwag: invalid literal'),
    (json.dumps({**ITEM, 'label': float('inf')}), ':2: not an item of HellaSwag: cannot convert float infinity'),
    (json.dumps({**ITEM, 'endings': ['a', 'b', 'c']}), ':2: ctx must be'),
    (json.dumps({**ITEM, 'endings': ['a', 'b', 'c', 4]}), ':2: ctx must be'),
    (json.dumps({**ITEM, 'ctx': None}), ':2: ctx must be')])
def test_a_broken_line_is_named(tmp_path, line, words):
    path = tmp_path / 'items.jsonl'
    path.write_text(f'{json.dumps(ITEM)}\n{line}\n')
    with pytest.raises(UserError) as stop:
        hellaswag.load_items(path)
    assert str(stop.value).startswith(f'{path}{words}')
    assert len(hellaswag.load_items(path, limit=1)) == 1  # what comes after the limit does not matter


def test_what_a_user_can_get_wrong_is_one_line(tmp_path):
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'utf16').write_bytes(b'\xff\xfe')
    (tmp_path / 'good').write_text(json.dumps(ITEM))
    for name, words in ('gone', 'No such file'), ('empty', 'no items'), ('utf16', 'not an item of HellaSwag'):
        with pytest.raises(UserError, match=f'{tmp_path}/{name}: {words}'):
            hellaswag.load_items(tmp_path / name)
    for arguments, words in (([f'--data={tmp_path}/good', f'--out_dir={tmp_path}'], 'no checkpoint'),
                             ([f'--out={tmp_path}/no/results.jsonl'], 'no such folder'),
                             (['--out=/proc/1/results.jsonl'], '/proc/1 is not writable'),
                             ([f'--out={tmp_path}/good'], 'it exists')):
        done = run('hellaswag.py', *arguments, expect=1)
        assert words in done.err and done.err.count('\n') == 1 and done.out == ''


def test_labels_may_be_strings(tmp_path):
    """As they are in Hugging Face's copy."""
    (tmp_path / 'items.jsonl').write_text(json.dumps({**ITEM, 'label': '3'}))
    assert hellaswag.load_items(tmp_path / 'items.jsonl') == [ITEM]


requests = []  # paths that the server was asked for


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve tmp_path/site, from which hellaswag then fetches its file into tmp_path/data."""
    site = tmp_path / 'site'
    site.mkdir()

    requests.clear()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=site)

        def log_message(self, *args):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(hellaswag, 'URL', f'http://127.0.0.1:{server.server_port}/items.jsonl')
        monkeypatch.setattr(hellaswag, 'FILE', tmp_path / 'data' / 'items.jsonl')
        yield site
        server.shutdown()


def test_download(server, monkeypatch):
    """A missing or damaged file leaves nothing behind; a good one is fetched once."""
    content = json.dumps(ITEM).encode()
    with pytest.raises(UserError, match='could not be fetched .*--data=FILE'):
        hellaswag.load_items()
    (server / 'items.jsonl').write_bytes(content)
    with pytest.raises(UserError, match='not what it was'):
        hellaswag.load_items()
    assert not hellaswag.FILE.parent.exists()
    monkeypatch.setattr(hellaswag, 'SHA256', hashlib.sha256(content).hexdigest())
    assert hellaswag.load_items() == [ITEM]
    assert [path.name for path in hellaswag.FILE.parent.iterdir()] == ['items.jsonl']
    (server / 'items.jsonl').unlink()
    assert hellaswag.load_items() == [ITEM]
