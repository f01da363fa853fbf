"""The page that writes, run by node as a browser would: the same logits, text and tokens as PyTorch's, and its size."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

import pytest
import torch

from common import page
from common.generate import stream
from conftest import needs_gpt2
from data.errors import UserError
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig

needs_node = pytest.mark.skipif(not shutil.which('node'), reason='node is not installed')
TINY = GPTConfig(block_size=24, vocab_size=257, n_layer=2, n_head=4, n_embd=32)
ARCHITECTURES = {
    'gpt2': {},
    'no biases': dict(bias=False),
    'untied': dict(tie_embeddings=False),
    'rope': dict(position='rope', rope_theta=500.0),
    'rmsnorm': dict(norm='rmsnorm', norm_eps=1e-2),
    'qk_norm': dict(qk_norm=True),
    'relu2': dict(mlp='relu2'),
    'swiglu': dict(mlp='swiglu', n_mlp=40),
    'grouped heads': dict(n_kv_head=2),
    'one head for keys': dict(n_kv_head=1),
    'wide heads': dict(head_size=20),
    'rope linear': dict(position='rope', rope_type='linear', rope_factor=2.0),
    'rope llama3': dict(position='rope', rope_type='llama3', rope_factor=2.0, rope_original_context=12),
    'rope yarn': dict(position='rope', rope_type='yarn', rope_factor=4.0, rope_original_context=6),
    'no gains': dict(norm_gain=False, qk_norm=True),
    'embedding_norm': dict(embedding_norm=True, norm='rmsnorm'),
    'softcap': dict(softcap=2.0),
    'everything': dict(bias=False, position='rope', norm='rmsnorm', qk_norm=True, mlp='swiglu', n_mlp=40, n_kv_head=2,
                       tie_embeddings=False, softcap=5.0),
}
PROMPT = 'Übermut, 9 €'
NEW = 24  # tokens written: the window slides over its end

# What the page itself does to write, without its buttons; the engine is the page's own script.
DRIVER = '''
const {load, pick} = new Function(process.argv[1] + '; return {load, pick}')();
const {header, weights, prompt, ids: given, count} = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const {gpt, tokenizer} = load(header, weights);
const ids = given ?? tokenizer.encode(prompt), logits = [];
for (let n = 0; n < count; n++) {
  const next = gpt.next(ids);
  logits.push(Array.from(next));
  ids.push(pick(next, 0, 50));
}
console.log(JSON.stringify({ids, logits, text: tokenizer.decode(ids)}));
'''


def scrambled(config):
    """A GPT whose weights, biases and gains all differ, so that none can be left out or mixed up unseen."""
    torch.manual_seed(1)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def part(text, name):
    return re.search(rf'<script[^>]* id="{name}">(.*?)</script>', text, re.DOTALL)[1]


def node(code, data):
    """What a piece of JavaScript, given data on stdin, prints as JSON."""
    done = subprocess.run(['node', '-e', code[0], *code[1:]], input=json.dumps(data), capture_output=True, text=True,
                          encoding='utf-8', timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_with_page(path, **job):
    """{'ids', 'logits', 'text'} of greedy writing by the page at path."""
    text = path.read_text(encoding='utf-8')
    return node([DRIVER, part(text, 'gpt')], {'header': part(text, 'header'), 'weights': part(text, 'weights')} | job)


@torch.no_grad()
def load_stored(model, dtype):
    """Give a GPT the weights that its page has: those of page.stored in float32. In place; returns the model."""
    arrays = page.stored(model, dtype)
    for name, p in model.named_parameters():
        w = torch.from_numpy(arrays[name].astype('float32'))
        if f'{name}.scale' in arrays:
            w *= torch.from_numpy(arrays[f'{name}.scale'])[:, None]
        p[:len(w)] = w
    return model


@needs_node
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_logits_and_greedy_text_are_pytorchs(tmp_path, name):
    """With the weights that the page stores, in float32: logits within 1e-5 of their scale, the same tokens."""
    tokenizer = get_tokenizer('bytes')
    for dtype in ('int8', 'float16') if name == 'everything' else ('int8',):
        model = scrambled(replace(TINY, **dict(n_kv_head=0, n_mlp=0, head_size=0) | ARCHITECTURES[name]))
        page.write(tmp_path / 'gpt.html', model, tokenizer, dtype)
        found = write_with_page(tmp_path / 'gpt.html', prompt=PROMPT, count=NEW)
        load_stored(model, dtype)
        ids = torch.tensor([tokenizer.encode(PROMPT).tolist()])
        T = ids.size(1)
        ids = torch.cat([ids, *stream(model, ids, NEW, temperature=0)], dim=1)
        assert found['ids'] == ids[0].tolist() and len(set(found['ids'][T:])) > 1
        assert found['text'] == tokenizer.decode(ids[0])
        for n, logits in enumerate(found['logits']):
            expected, _ = model(ids[:, max(0, T + n - TINY.block_size):T + n])
            torch.testing.assert_close(torch.tensor(logits), expected[0, -1], atol=1e-5 * expected.abs().max().item(),
                                       rtol=0)


def test_what_is_stored_is_near_the_weights():
    model = scrambled(TINY)
    for dtype, bound in (('int8', 0.5 / 127), ('float16', 2**-11)):
        stored = load_stored(scrambled(TINY), dtype)
        for (name, p), q in zip(model.named_parameters(), stored.parameters()):
            error = (p - q).abs()
            assert (error <= bound * 1.01 * (p.abs().amax(dim=-1, keepdim=True) if p.dim() > 1 else 0)).all(), name


@needs_node
@needs_gpt2
def test_gpt2_tokens_are_tiktokens(tmp_path):
    """Texts that GPT-2's pattern splits in every way, whitespace that JavaScript and Unicode disagree on, and all
    characters up to U+2FFF in words of three. (Letters newer than a browser's Unicode tables may be split otherwise.)"""
    tokenizer = get_tokenizer('gpt2')
    texts = ["Hello world, it's what they'll've done; WE'LL", '  two  spaces\n\n\n and\tlines \r\n ', 'x = 3.14159e-26 # π≈',
             'Übermut naïve Καλημέρα 日本語テキスト नमस्ते 😀👩‍👩‍👧', '<|endoftext|>', '', '   ', "don't'd'x 'S", 'a\u0085b\ufeffc\u00a0d\u2003 e\x1cf',
             'antidisestablishmentarianism' * 5, 'lone \ud83d surrogate',
             *(''.join(map(chr, range(n, n + 3))) for n in range(1, 0x3000, 3) if not 0xD800 <= n < 0xE000)]
    header = json.dumps({'tokenizer': page.tables(tokenizer)})
    code = part(page.template(), 'gpt') + '; return Tokenizer'
    found = node(['''
const Tokenizer = new Function(process.argv[1])();
const {header, texts} = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const tokenizer = new Tokenizer(JSON.parse(header).tokenizer);
console.log(JSON.stringify(texts.map(text => [tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))])));
''', code], {'header': header, 'texts': texts})
    for text, (ids, decoded) in zip(texts, found):
        expected = tokenizer.encode(text).tolist()
        assert ids == expected, (text, ids, expected)
        assert decoded == tokenizer.decode(expected), text


@needs_node
def test_sampling_keeps_the_k_most_likely_tokens():
    found = node(['''
const {pick, expected, softmax} = new Function(process.argv[1] + '; return {pick, expected, softmax}')();
const {logits} = JSON.parse(require('fs').readFileSync(0, 'utf8')), x = Float32Array.from(logits);
const draw = (temperature, k) => Array.from({length: 20000}, () => pick(x, temperature, k));
console.log(JSON.stringify({greedy: pick(x, 0, 0), two: draw(0.5, 2), all: draw(1, 0), best: expected(x).best}));
''', part(page.template(), 'gpt')], {'logits': [0.0, 1.0, -2.0, 1.5, 0.5, -1.0]})
    logits = torch.tensor([0.0, 1.0, -2.0, 1.5, 0.5, -1.0])
    assert found['greedy'] == 3 and set(found['two']) == {1, 3}
    probs = logits.softmax(0)
    shares = torch.bincount(torch.tensor(found['all']), minlength=6) / 20000
    assert (shares - probs).abs().max() < 0.02  # over five standard deviations
    two = (torch.tensor(found['two']) == 3).float().mean().item()
    assert two == pytest.approx((logits[[1, 3]] / 0.5).softmax(0)[1].item(), abs=0.02)
    assert [i for i, _ in found['best']] == logits.topk(5).indices.tolist()
    assert [p for _, p in found['best']] == pytest.approx(probs.topk(5).values.tolist(), abs=1e-6)


def test_a_small_model_is_a_small_file_that_needs_nothing_else(tmp_path):
    config = GPTConfig(block_size=128, vocab_size=257, n_layer=4, n_head=4, n_embd=128, bias=False, position='rope',
                       norm='rmsnorm', qk_norm=True, mlp='relu2')  # config/quickstart.py's
    size = page.write(tmp_path / 'gpt.html', GPT(config), get_tokenizer('bytes'))
    assert size == (tmp_path / 'gpt.html').stat().st_size < 2e6
    text = (tmp_path / 'gpt.html').read_text(encoding='utf-8')
    assert not re.search(r'https?:|//[a-z]+\.|\bsrc=|\bhref=|@import|url\(|fetch\(', text.replace(part(text, 'weights'), ''))
    assert "default-src 'none'" in text
    assert [path.name for path in tmp_path.iterdir()] == ['gpt.html']


def test_what_the_page_cannot_do_is_refused_by_name(tmp_path):
    tokenizer = get_tokenizer('bytes')

    @dataclass
    class Later(GPTConfig):
        window: int = 0

    for config, words in ((replace(Later(**vars(TINY)), window=8), 'window=8'),):
        model = GPT(TINY)
        model.config = config
        with pytest.raises(UserError, match=words):
            page.write(tmp_path / 'gpt.html', model, tokenizer)
    model.config = Later(**vars(TINY))  # at its default it is no matter
    page.write(tmp_path / 'gpt.html', model, tokenizer)
    model.config.mlp = 'maxout'
    with pytest.raises(UserError, match="mlp='maxout'"):
        page.check(model.config)

    class Other:
        name, vocab_size = 'words', 257

    model.config = TINY
    with pytest.raises(UserError, match='no tokenizer words'):
        page.write(tmp_path / 'other.html', model, Other)
    with pytest.raises(UserError, match='int8 or float16'):
        page.write(tmp_path / 'other.html', model, tokenizer, 'int4')
    with pytest.raises(UserError, match='cannot be written'):
        page.write(tmp_path / 'nowhere' / 'other.html', model, tokenizer)
    assert not (tmp_path / 'other.html').exists()
