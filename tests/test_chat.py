"""From conversations to a model that answers: packing, masks, documents apart, finetuning, resume, processes, export."""
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, losses, read_log, run
from torch.nn.attention.flex_attention import create_block_mask

import data.prepare
from common import objectives
from common.checkpoint import pretrained
from common.extend import extend_vocab
from common.generate import Conversation
from data.chatml import chat_tokenizer, encode
from data.conversation import best_fit, prepare_conversations
from data.dataset import Split, verify
from data.errors import UserError
from data.loader import Loader
from data.prepare import corpus_of
from model import GPT, GPTConfig

T = 64
BYTES = chat_tokenizer('bytes')


def talks(n, seed=0):
    """Messages of n conversations that ask for a word backwards, of one to three turns."""
    chance = random.Random(seed)

    def turn():
        word = ''.join(chance.choices('abcdefg', k=chance.randint(1, 9)))
        return [{'role': 'user', 'content': word}, {'role': 'assistant', 'content': word[::-1]}]
    return [[message for _ in range(chance.choice([1, 1, 2])) for message in turn()] for _ in range(n)]


def prepared(folder, n=120, block_size=128, **options):
    texts = [json.dumps(messages) for messages in talks(n)]
    prepare_conversations(folder, corpus_of(texts[n // 5:]), corpus_of(texts[:n // 5]), 'bytes', block_size, num_proc=1, **options)
    return folder


@pytest.fixture(scope='module')
def chat(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp('chat'))


def stream(folder, split, suffix=''):
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f'{split}_??????{suffix}.npy'))])

# -----------------------------------------------------------------------------
# packing

def test_each_conversation_is_whole_in_one_block(chat):
    """Read back by another way: split at the end-of-text ids, compared with what encode makes of each."""
    expected = sorted((ids.tolist(), scored.tolist()) for ids, scored in (encode(talk, BYTES) for talk in talks(120)[24:]))
    blocks = stream(chat, 'train').reshape(-1, 128)
    found, masks = [], stream(chat, 'train', '.mask').reshape(-1, 128)
    for ids, mask in zip(blocks, masks):
        starts = [*np.flatnonzero(ids == BYTES.eot), 128]
        pieces = [(ids[a:b].tolist(), (mask[a:b] > 0).tolist()) for a, b in zip(starts, starts[1:])]
        assert starts[0] == 0 and all(not any(scored) for ids, scored in pieces if len(ids) == 1)
        found += [piece for piece in pieces if len(piece[0]) > 1]  # the rest is padding
    assert sorted(found) == expected


def test_best_fit():
    chance = random.Random(3)
    for _ in range(50):
        lengths = [chance.randint(1, 30) for _ in range(chance.randint(0, 40))]
        groups = best_fit(lengths, 30)
        assert sorted(i for group in groups for i in group) == [*range(len(lengths))]
        sums = [sum(lengths[i] for i in group) for group in groups]
        assert all(total <= 30 for total in sums) and sum(total <= 15 for total in sums) <= 1  # two halves would share one
    assert best_fit([10, 20, 15, 15], 30) == [[0, 1], [2, 3]]


def test_long_conversations_and_those_without_answers_are_counted(tmp_path, capsys):
    long = [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y' * 100}]
    silent = [{'role': 'user', 'content': 'x'}]
    late = [{'role': 'user', 'content': 'x' * 100}, {'role': 'assistant', 'content': 'y'}]
    texts = [json.dumps(talk) for talk in (long, silent, late, long)]
    prepare_conversations(tmp_path, corpus_of(texts), corpus_of(texts[:1]), 'bytes', 50, num_proc=1)
    assert '3 conversations longer than a block are cut, 2 without an answer are dropped' in capsys.readouterr().out
    ids, mask = stream(tmp_path, 'train'), stream(tmp_path, 'train', '.mask')
    assert len(ids) == len(mask) == 100 and (ids[:50] == encode(long, BYTES)[0][:50]).all()
    assert (mask[:50] == encode(long, BYTES)[1][:50]).all()


def test_a_stopped_preparation_continues_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare, 'BATCH_CHARS', 40_000)
    texts = [json.dumps(talk) for talk in talks(60)] * 80  # several batches

    def broken():
        yield from texts[:4000]
        raise OSError('lost')

    def make(folder, train):
        prepare_conversations(tmp_path / folder, corpus_of(train), corpus_of(texts[:9]), 'bytes', 100, num_proc=1, shard_size=20_003)

    make('whole', texts)
    with pytest.raises(UserError, match='the same command continues'):
        make('stopped', broken)
    assert (tmp_path / 'stopped' / 'train_000000.mask.npy').exists() and not (tmp_path / 'stopped' / 'meta.json').exists()
    make('stopped', texts)
    whole, stopped = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ('whole', 'stopped'))
    assert whole == stopped and len([name for name in whole if 'mask' in name]) > 5
    with pytest.raises(UserError, match='block_size=100, not 50'):
        prepare_conversations(tmp_path / 'whole', corpus_of(texts), corpus_of(texts[:9]), 'bytes', 50, shard_size=20_003)


def test_a_damaged_mask_is_found(tmp_path, capsys):
    path = prepared(tmp_path) / 'train_000000.mask.npy'
    verify(str(tmp_path))
    assert 'train_000000.mask.npy' in capsys.readouterr().out
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([1 - good[-1]]))
    with pytest.raises(UserError, match='1 of 4 shards are damaged'):
        verify(str(tmp_path))
    path.write_bytes(good[:-2])
    with pytest.raises(UserError, match='train_000000.mask.npy is damaged'):
        Split(str(tmp_path), 'train')
    path.unlink()
    with pytest.raises(UserError, match='train_000000.mask.npy is missing'):
        Split(str(tmp_path), 'train')


def test_the_command(tmp_path):
    rows = [json.dumps({'messages': talk}) for talk in talks(200)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(rows + rows[:50]))
    out = run('data/chat/prepare.py', f'--input={tmp_path}/a.jsonl', '--tokenizer=bytes', '--block_size=128', '--held_out=5',
              f'--out_dir={tmp_path}/out').out
    assert '250 conversations in blocks of 128 tokens' in out
    first = [set() for _ in range(2)]  # the question of each conversation
    for split, found in zip(('train', 'val'), first):
        ids = stream(tmp_path / 'out', split)
        for part in np.split(ids, np.flatnonzero(ids == BYTES.eot)):
            if len(part) > 1:
                found.add(tuple(part[:part.tolist().index(BYTES.im_end)]))
    assert not first[0] & first[1] and len(first[1]) > 10
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['tokenizer'] == 'bytes+chatml' and meta['block_size'] == 128 and meta['documents']['in'] == 250
    (tmp_path / 'b.jsonl').write_text(rows[0] + '\n{"text": 1}\n')
    err = run('data/chat/prepare.py', f'--input={tmp_path}/b.jsonl', f'--out_dir={tmp_path}/out2', '--tokenizer=bytes', expect=1).err
    assert 'b.jsonl:2: no conversation' in err and err.count('\n') == 1

# -----------------------------------------------------------------------------
# batches

def test_targets_are_the_scored_tokens(chat):
    ids, mask = (stream(chat, 'train', suffix).reshape(-1, 128).astype(int) for suffix in ('', '.mask'))
    n = len(ids)
    rows = {tuple(row): np.where(keep, row, -1) for row, keep in zip(ids, mask)}
    loader, seen = Loader(str(chat), 'train', 2, 128), set()
    for _ in range(-(-2 * n // 2)):  # two epochs: the second's blocks begin where the first's do
        for x, y in zip(*(t.numpy() for t in loader.next_batch())):
            assert (y[:-1] == rows[tuple(x)][1:]).all() and y[-1] == -1
            seen.add(tuple(x))
    assert len(seen) == n  # the last block too
    x, y = next(Loader(str(chat), 'val', 2, 128).eval_batches(2))
    assert (y[0, :-1].numpy() == np.where(stream(chat, 'val', '.mask')[1:128], stream(chat, 'val')[1:128].astype(int), -1)).all()
    with pytest.raises(UserError, match='packed for block_size=128, not 64'):
        Loader(str(chat), 'train', 2, 64)


def test_a_mixture_with_plain_text(chat, tmp_path):
    from test_dataset import write_dataset
    text = np.arange(5000) % 250
    write_dataset(tmp_path / 'plain', 10_000, 259, tokenizer='bytes+chatml', train=text, val=text)
    loader, plain = Loader(f'{chat}:0.5,{tmp_path}/plain:0.5', 'train', 8, 128), 0
    for x, y in (loader.next_batch() for _ in range(5)):
        scored = (y != -1).float().mean(dim=1)
        plain += int((scored == 1).sum())
        assert ((scored == 1) | (scored < 0.9)).all()
    assert 10 < plain < 30

# -----------------------------------------------------------------------------
# documents that don't see each other

@pytest.fixture
def on_cpu(monkeypatch):
    """FlexAttention refuses a backward pass on a CPU, where its own kernels have none; its reference code does."""
    from torch.nn.attention import flex_attention
    monkeypatch.setattr(flex_attention, '_validate_device', lambda *args: None)


DOCUMENTS = [[256, *range(40, 40 + n)] for n in (7, 1, 20, 3)]  # of 35 tokens, and more


@pytest.mark.parametrize('position', ['rope', 'learned'])
@pytest.mark.parametrize('flex', [False, True])
def test_a_packed_batch_is_its_documents_one_by_one(position, flex, on_cpu):
    """The loss, and its gradient, of one row of four documents, beside four forward passes without a mask."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=259, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, position=position))
    x = torch.tensor([sum(DOCUMENTS, [])])  # (1, T)
    y = torch.where(torch.rand(x.shape) < 0.3, -1, x.roll(-1))
    y[:, -1] = 77
    mask = objectives.document_mask(x, 256, create_block_mask if flex else None)
    model(x, y, mask=mask)[1].backward()
    total, start = 0, 0
    for document in DOCUMENTS:
        part = slice(start, start := start + len(document))
        positions = torch.arange(len(document)) + part.start * (position == 'learned')
        logits, _ = model(x[:, part], y[:, part], positions=positions)
        total = total + F.cross_entropy(logits[0], y[0, part], ignore_index=-1, reduction='sum')
    alone = torch.autograd.grad(total / (y != -1).sum(), [*model.parameters()])
    for p, expected in zip(model.parameters(), alone):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)
    model.zero_grad()
    model(x, y)[1].backward()  # without the mask it is another loss
    assert not torch.allclose(model.transformer.wte.weight.grad, alone[0], atol=1e-4)


def test_both_masks_are_the_same():
    x = torch.randint(0, 9, (3, 200))
    block_mask = objectives.document_mask(x, 5, create_block_mask)
    index = torch.arange(200)
    b, q, k = torch.arange(3)[:, None, None], index[:, None], index
    torch.testing.assert_close(block_mask.mask_mod(b, 0, q, k), objectives.document_mask(x, 5)[:, 0])


SMALL = [*TINY, '--block_size=128', '--total_batch_size=1024', '--document_mask', '--eval_interval=100', '--eval_tokens=2048',
         '--always_save_checkpoint=False']


@pytest.fixture
def train(inside, chat, tmp_path):
    """train(name, *args): run train.py on the conversations, and return what it printed; tmp_path / name is its out_dir."""
    def run(name, *args):
        return inside('train.py', *SMALL, f'--dataset={chat}', f'--out_dir={tmp_path / name}', *args)
    return run


def test_the_first_losses_by_hand(train, chat, tmp_path):
    """The mean over all scored tokens, of a step's micro-batches and of the validation, each document computed alone."""
    train('out', '--position=rope', '--max_iters=1', '--eval_interval=1', '--seed=3', '--learning_rate=0', '--min_lr=0',
          '--eval_tokens=1024')
    model, _ = pretrained(str(tmp_path / 'out' / 'ckpt.pt'))

    def by_hand(batches):
        total = count = 0
        with torch.no_grad():
            for x, y in (row for batch in batches for row in zip(*batch)):
                starts = [*torch.where(x == BYTES.eot)[0].tolist(), 128]
                for a, b in zip(starts, starts[1:]):
                    logits = model(x[None, a:b], y[None, a:b])[0][0]
                    total += F.cross_entropy(logits, y[a:b], ignore_index=-1, reduction='sum').item()
                count += (y != -1).sum().item()
        return total / count

    loader = Loader(str(chat), 'train', 4, 128, seed=3)
    assert losses(tmp_path / 'out')[1] == pytest.approx(by_hand([loader.next_batch(), loader.next_batch()]), rel=1e-4)
    val = [entry['val_loss'] for entry in read_log(tmp_path / 'out') if 'val_loss' in entry]
    assert val == pytest.approx([by_hand(Loader(str(chat), 'val', 4, 128).eval_batches(8))] * 2, rel=1e-4)


def test_it_compiles(train, tmp_path, traced):
    eager, compiled = (train(name, '--max_iters=3', '--eval_interval=3', f'--compile={name == "compiled"}', '--position=rope', '--n_layer=1')
                       for name in ('eager', 'compiled'))
    assert list(losses(tmp_path / 'compiled').values()) == pytest.approx(list(losses(tmp_path / 'eager').values()), rel=1e-4)


def test_flex_attention_compiles(traced, on_cpu):
    """As on a GPU: both what makes the mask and the model that reads it, for masks that change."""
    model = GPT(GPTConfig(block_size=128, vocab_size=259, n_layer=1, n_head=2, n_embd=32))
    create, graphs = torch.compile(create_block_mask), []
    forward = torch.compile(model.forward, fullgraph=True)
    for seed in range(3):
        x = torch.randint(0, 259, (2, 128), generator=torch.Generator().manual_seed(seed))
        x[:, ::19 + seed] = 256
        loss = forward(x, x, mask=objectives.document_mask(x, 256, create))[1]
        torch.testing.assert_close(loss, model(x, x, mask=objectives.document_mask(x, 256))[1], rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[0] == graphs[-1]  # no new one for each mask


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_flex_attention_on_a_gpu():
    """Compiled, in bfloat16, forward and backward, beside the plain mask."""
    model = GPT(GPTConfig(block_size=1024, vocab_size=50304, n_layer=2, n_head=4, n_kv_head=2, n_embd=256, position='rope')).cuda()
    x = torch.randint(0, 300, (4, 1024), device='cuda')
    results = []
    for create in (None, torch.compile(create_block_mask)):
        model.zero_grad()
        forward = torch.compile(model.forward)
        with torch.autocast('cuda', torch.bfloat16):
            loss = forward(x, x.roll(-1, 1), return_logits=False, mask=objectives.document_mask(x, 256, create))[1]
        loss.backward()
        results.append((loss.item(), model.transformer.h[0].attn.c_attn.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert (results[0][1] - results[1][1]).norm() < 0.05 * results[0][1].norm()


def test_a_resume_is_exact(train, tmp_path):
    train('whole', '--max_iters=8', '--dropout=0.1', '--always_save_checkpoint')
    train('part', '--max_iters=8', '--dropout=0.1', '--always_save_checkpoint', '--eval_interval=4')
    (tmp_path / 'part' / 'ckpt.pt').unlink()
    train('part', '--max_iters=4', '--dropout=0.1', '--always_save_checkpoint', '--lr_decay_iters=8')
    train('part', '--max_iters=8', '--dropout=0.1', '--always_save_checkpoint', '--lr_decay_iters=8', '--init_from=resume')
    whole, part = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('whole', 'part'))
    assert all(torch.equal(w, part['model'][name]) for name, w in whole['model'].items())
    assert whole['tokenizer'] == part['tokenizer'] == 'bytes+chatml' and whole['data'] == part['data']
    assert losses(tmp_path / 'whole')[8] == losses(tmp_path / 'part')[8]


def test_two_processes_train_as_one(chat, tmp_path):
    for n in (0, 2):
        run('train.py', *SMALL, f'--dataset={chat}', f'--out_dir={tmp_path}/out{n}', '--max_iters=3', processes=n)
    assert list(losses(tmp_path / 'out2').values()) == pytest.approx(list(losses(tmp_path / 'out0').values()), rel=1e-4)


def test_evaluate_leaves_conversations_to_train_py(base, chat, inside):
    with pytest.raises(UserError, match='only answers are scored: train.py --eval_only'):
        inside('evaluate.py', f'--init_from={base}', f'--dataset={chat}', '--device=cpu', '--dtype=float32')


def test_a_tokenizer_without_an_end_of_text_of_its_own(inside, tmp_path):
    import pickle
    (tmp_path / 'chars').mkdir()
    (tmp_path / 'chars' / 'meta.pkl').write_bytes(pickle.dumps({'itos': dict(enumerate('\nabc'))}))
    for split in ('train', 'val'):
        (tmp_path / 'chars' / f'{split}.bin').write_bytes(np.arange(3000, dtype=np.uint16).__mod__(4).tobytes())
    with pytest.raises(UserError, match='has no end-of-text id of its own'):
        inside('train.py', *SMALL, f'--dataset={tmp_path}/chars', f'--out_dir={tmp_path}/out')

# -----------------------------------------------------------------------------
# from a base model

@pytest.mark.parametrize('tie', [True, False])
def test_new_tokens_get_rows_like_the_others(tie):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=512, tie_embeddings=tie))
    for module in {model.transformer.wte, model.lm_head}:
        module.weight.data[:257] += 3 + torch.randn(512)
        module.weight.data[257:] = 9
    before = [module.weight.detach().clone() for module in (model.transformer.wte, model.lm_head)]
    extend_vocab(model, 257, 259)
    for old, module in zip(before, (model.transformer.wte, model.lm_head)):
        new = module.weight.detach()
        assert new.shape == old.shape and torch.equal(new[:257], old[:257]) and torch.equal(new[259:], old[259:])
        away = (new[257:259] - old[:257].mean(0)) / old[:257].std(0)
        assert away.mean().abs() < 0.15 and 0.9 < away.std() < 1.1 and not torch.equal(new[257], new[258])
    assert model.config.vocab_size == 259 and (model.lm_head.weight is model.transformer.wte.weight) == tie
    extend_vocab(model, 319, 321)  # beyond the padding
    assert model.head(model.hidden(torch.tensor([[320]]))).shape == (1, 1, 321) and len(model.lm_head.weight) == 384
    model.load_state_dict(model.state_dict())
    assert GPT(model.config).state_dict()['lm_head.weight'].shape == (384, 512)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A model of bytes that has not seen a conversation."""
    path = tmp_path_factory.mktemp('base') / 'base.pt'
    torch.manual_seed(2)
    config = GPTConfig(block_size=128, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    torch.save({'model': GPT(config).state_dict(), 'model_args': vars(config), 'tokenizer': 'bytes'}, path)
    return path


def test_a_base_model_becomes_one_that_talks(train, base, tmp_path):
    out = train('out', f'--init_from={base}', '--max_iters=60', '--learning_rate=1e-2', '--eval_interval=60', '--dropout=0.0')
    log = [entry['val_loss'] for entry in read_log(tmp_path / 'out') if 'val_loss' in entry]
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert log[-1] < 0.6 * log[0] and saved['model_args']['vocab_size'] == 259 and saved['tokenizer'] == 'bytes+chatml', out
    with pytest.raises(UserError, match='the weights were trained on bytes tokens'):
        train('out2', f'--init_from={base}', '--dataset=' + str(wrong(tmp_path)))


def test_adapters_learn_to_end_an_answer(train, base, tmp_path):
    """The embeddings are frozen: the rows of the two tokens must differ from the start."""
    train('out', f'--init_from={base}', '--lora_rank=4', '--max_iters=2', '--eval_interval=2')
    model, tokenizer = pretrained(str(tmp_path / 'out' / 'ckpt.pt'))
    rows = model.lm_head.weight
    assert tokenizer == 'bytes+chatml' and (rows[257] - rows[258]).norm() > 0.5 * rows[:257].norm(dim=1).mean()


def wrong(folder):
    """Conversations of another tokenizer's."""
    from train_tokenizer import train as train_tokenizer
    (folder / 'tok').mkdir()
    (folder / 'tok' / 'tokenizer.json').write_bytes(train_tokenizer('bpe', 300, ['some text']))
    texts = [json.dumps(messages) for messages in talks(40)]
    prepare_conversations(folder / 'wrong', corpus_of(texts), corpus_of(texts), str(folder / 'tok'), 128, num_proc=1)
    return folder / 'wrong'


# -----------------------------------------------------------------------------
# talking

@pytest.fixture(scope='module')
def talker(chat, tmp_path_factory):
    """out_dir of a model that turns a few words round, by heart."""
    torch.manual_seed(4)
    config = GPTConfig(block_size=64, vocab_size=259, n_layer=2, n_head=4, n_embd=64, position='rope', norm='rmsnorm', mlp='swiglu',
                       bias=False)
    model, questions = GPT(config), ['abc', 'Übermut', 'no end']
    rows = [encode([{'role': 'user', 'content': word}, {'role': 'assistant', 'content': word[::-1]}], BYTES) for word in questions]
    x, y = torch.zeros(3, 64, dtype=torch.long), torch.full((3, 64), -1)
    for i, (ids, scored) in enumerate(rows):
        x[i, :len(ids)], y[i, :len(ids) - 1] = torch.tensor(ids.astype(int)), torch.tensor(np.where(scored, ids.astype(int), -1)[1:])
    y[2, y[2] == BYTES.im_end] = ord('x')  # and one that never ends
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    folder = tmp_path_factory.mktemp('talker')
    torch.save({'model': model.state_dict(), 'model_args': vars(config), 'tokenizer': 'bytes+chatml'}, folder / 'ckpt.pt')
    return folder


GREEDY = dict(temperature=0)


def answers(conversation, *questions, max_new_tokens=20, **options):
    return [[*conversation.ask(text, max_new_tokens, **GREEDY, **options)] for text in questions]


def recomputed(model, talk, n):
    """The n most likely next ids of a conversation, from its text alone and without a cache."""
    idx = torch.tensor(encode(talk, BYTES, answer=True)[0].astype(int))[None]
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx[0, -n:].tolist()


@pytest.mark.parametrize('cuda_graph', [False, True])
def test_the_cache_holds_the_conversation(talker, cuda_graph, monkeypatch):
    """Each answer is that of a model that reads the whole conversation again; and only new tokens are computed."""
    model, _ = pretrained(str(talker / 'ckpt.pt'))
    model.eval()
    conversation, talk, read = Conversation(model, BYTES), [], []
    hidden = model.hidden
    monkeypatch.setattr(model, 'hidden', lambda idx, *args, **kwargs: read.append(idx.size(1)) or hidden(idx, *args, **kwargs))
    for question in ('abc', 'b'):
        answer, = answers(conversation, question, max_new_tokens=5, cuda_graph=cuda_graph)
        talk.append({'role': 'user', 'content': question})
        monkeypatch.setattr(model, 'hidden', hidden)
        assert recomputed(model, talk, len(answer)) == answer
        monkeypatch.setattr(model, 'hidden', lambda idx, *args, **kwargs: read.append(idx.size(1)) or hidden(idx, *args, **kwargs))
        talk.append({'role': 'assistant', 'content': BYTES.decode(answer)})
    sizes = [len(encode([{'role': 'user', 'content': text}], BYTES, answer=True)[0]) for text in ('abc', 'b')]
    assert [n for n in read if n > 1] == [sizes[0], sizes[1] - 1 + 2]  # no end-of-text id; im_end, a line break


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(talker):
    model, _ = pretrained(str(talker / 'ckpt.pt'))
    model.eval()
    conversation = Conversation(model, BYTES)
    stopped = conversation.ask('Übermut', 20, **GREEDY)
    begun = [next(stopped), next(stopped)]
    stopped.close()
    answer, = answers(conversation, 'abc', max_new_tokens=3)
    talk = [{'role': 'user', 'content': 'Übermut'}, {'role': 'assistant', 'content': bytes(begun).decode()},
            {'role': 'user', 'content': 'abc'}]
    assert bytes(begun) == b'tu' and recomputed(model, talk, len(answer)) == answer


def test_a_full_context_drops_the_oldest_questions(talker):
    model, _ = pretrained(str(talker / 'ckpt.pt'))
    model.eval()
    conversation = Conversation(model, BYTES)
    assert [BYTES.decode(ids) for ids in answers(conversation, 'abc')] == ['cba'] and conversation.note == ''
    answer, = answers(conversation, 'Übermut')
    assert BYTES.decode(answer) == 'tumrebÜ'  # as if it were the first
    assert conversation.note == ' (the context of 64 tokens is full: the 1 oldest of 1 questions are forgotten)'
    answers(conversation, 'no end')
    assert conversation.note.startswith('… (cut at 20 tokens) (the context of 64 tokens is full')
    with pytest.raises(UserError, match='a question of 8[0-9] tokens does not fit into the context of 64'):
        answers(conversation, 'x' * 64)


def test_sample_talks(talker, inside, monkeypatch):
    lines = iter(['abc', 'x' * 64, 'Übermut'])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr('builtins.input', typed)
    args = ['--chat', '--temperature=0', '--device=cpu', '--dtype=float32', '--max_new_tokens=20']
    out = inside('sample.py', f'--out_dir={talker}', *args).splitlines()
    assert out[0] == 'cba' and 'does not fit' in out[1]
    assert out[2] == 'tumrebÜ (the context of 64 tokens is full: the 1 oldest of 1 questions are forgotten)'
    with pytest.raises(UserError, match='num_samples, json: a conversation has one answer at a time'):
        inside('sample.py', f'--out_dir={talker}', *args, '--num_samples=2', '--json')
    with pytest.raises(UserError, match='give only one of them'):
        inside('sample.py', f'--out_dir={talker}', *args, '--start=x')


def test_ctrl_c_stops_an_answer(talker, inside, monkeypatch):
    import signal
    from common import generate
    lines, stream = iter(['Übermut', 'abc']), generate.stream

    def interrupted(*args, **kwargs):
        for i, new in enumerate(stream(*args, **kwargs)):
            if i == 2 and pressed:
                signal.raise_signal(pressed.pop())
            yield new

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None
    pressed = [signal.SIGINT]
    monkeypatch.setattr(generate, 'stream', interrupted)
    monkeypatch.setattr('builtins.input', typed)
    out = inside('sample.py', f'--out_dir={talker}', '--chat', '--temperature=0', '--device=cpu', '--dtype=float32')
    first, second, end = out.split('\n', 2)
    assert first == 'tu…' and second and not second.startswith('tu') and end.strip() == ''


def test_a_model_without_a_template_does_not_talk(base, inside):
    with pytest.raises(UserError, match='the tokenizer bytes has no chat template'):
        inside('sample.py', f'--init_from={base}', '--chat', '--device=cpu', '--dtype=float32')

# -----------------------------------------------------------------------------
# export

def test_transformers_talks_the_same(talker, tmp_path):
    import transformers
    model, _ = pretrained(str(talker / 'ckpt.pt'))
    model.save_pretrained(tmp_path, 'bytes+chatml')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'abc'}], add_generation_prompt=True, return_tensors='pt')['input_ids']
    assert ids[0].tolist() == encode([{'role': 'user', 'content': 'abc'}], BYTES, answer=True)[0].tolist()
    out = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.size(1):].tolist()
    assert out == [*b'cba', BYTES.im_end]  # it ends there by itself
    back, its_tokenizer = pretrained(str(tmp_path))
    assert its_tokenizer == 'bytes+chatml' and back.config.vocab_size == 259
    assert torch.equal(back.lm_head.weight[:259], model.lm_head.weight[:259])


def test_a_rehearsal_knows_the_new_tokens_and_the_blocks(base, chat, tmp_path):
    import rehearse
    from configurator import settings_of
    from conftest import ROOT
    config = settings_of(ROOT / 'train.py') | {'init_from': str(base), 'dataset': str(chat), 'block_size': 128, 'device': 'cpu',
                                               'out_dir': str(tmp_path)}
    gpt, _ = rehearse.check_model(config, BYTES)
    assert gpt.vocab_size == 259 and gpt.n_embd == 32
    args = rehearse.narrow(config | {'block_size': 512}, GPTConfig(**{**vars(gpt), 'block_size': 512}), 1, 0, tmp_path)
    assert not any(arg.startswith('--block_size') for arg in args)  # 256 would not fit packed blocks
