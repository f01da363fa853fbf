"""train_tokenizer.py: a folder that the preparation takes, the same from the same text; and the worked example's settings."""
import json
import re
import sys

import numpy as np
import pytest
from conftest import ROOT, run

import train_tokenizer
from configurator import UserError
from data.dataset import Split
from data.files import corpus_of_files
from data.prepare import corpus_of, prepare
from data.tokenizer import END_OF_TEXT, TokenizerJSON, get_tokenizer

TEXT = (ROOT / 'data/prepare.py').read_text() + 'naïve 漢字 🙂\n'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    for i in range(3):
        rows = [json.dumps({'text': text}) for text in TEXT.split('\n\n')[i::3]]
        (folder / f'{i}.jsonl').write_text('\n'.join(rows))
    return folder


def test_the_command(corpus, tmp_path):
    arguments = 'train_tokenizer.py', f'--data_files={corpus}/*.jsonl', '--vocab_size=400', f'--out_dir={tmp_path / "tok"}'
    out = run(*arguments).out
    assert re.search(r'of 3 files\n.*tok: 400 ids\n\d\.\d\d bytes a token in text held out, (gpt2 \d|not compared)', out)
    tokenizer = get_tokenizer(str(tmp_path / 'tok'))
    assert tokenizer.vocab_size == 400 and tokenizer.end == END_OF_TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert 'is there already' in run(*arguments, expect=1).err
    prepare(tmp_path / 'data', corpus_of([TEXT]), tokenizer=str(tmp_path / 'tok'), num_proc=1)
    assert Split(str(tmp_path / 'data'), 'train').vocab_size == 400


@pytest.mark.parametrize('kind', ['bpe', 'wordpiece', 'unigram'])
def test_kinds(kind):
    texts = TEXT.split('\n\n')
    content = train_tokenizer.train(kind, 350, texts)
    tokenizer = TokenizerJSON(content)
    assert tokenizer.vocab_size <= 350 and tokenizer.end == END_OF_TEXT
    assert [token['content'] for token in json.loads(content)['added_tokens']] == \
        ['[UNK]'] * (kind == 'wordpiece') + [END_OF_TEXT]
    assert tokenizer.eot not in tokenizer.encode(TEXT + END_OF_TEXT)
    if kind == 'wordpiece':
        assert tokenizer.decode(tokenizer.encode('return the tokens')) == 'return the tokens'
    else:
        assert tokenizer.decode(tokenizer.encode('漢 unseen Ω\t\n ')) == '漢 unseen Ω\t\n '
    assert all(train_tokenizer.train(kind, 350, texts) == content for _ in range(3))  # each has hash tables of another order


def test_the_sample_is_even_and_bounded(corpus):
    files = sorted(map(str, corpus.glob('*')))
    reader = corpus_of_files(files, 'text', 'file', False)
    everything = list(train_tokenizer.pieces(reader))
    chosen, held_out = train_tokenizer.sample(reader, 1, 10**9)
    assert sorted(chosen + held_out) == sorted(everything) and len(held_out) == -(-(len(everything) - 1) // 20)
    chosen, held_out = train_tokenizer.sample(reader, 0.25, 10**9)
    places = sorted(everything.index(text) for text in chosen + held_out)
    assert len(places) == len(everything) // 4 and max(np.diff(places)) <= 5
    chosen, held_out = train_tokenizer.sample(reader, 1, 3000)
    n_bytes = train_tokenizer.count_bytes(chosen + held_out)
    assert n_bytes <= 3000 < n_bytes + train_tokenizer.count_bytes([everything[len(chosen + held_out)]])
    assert [*train_tokenizer.pieces(corpus_of(['a' * 9000, None, '', 'b']))] == ['a' * 4000, 'a' * 4000, 'a' * 1000, 'b']
    with pytest.raises(UserError, match='holds too little text'):
        train_tokenizer.sample(corpus_of(['one']), 1, 10)


@pytest.mark.parametrize('arguments, why', [
    (['--kind=word'], 'kind=word is not one of bpe, wordpiece, unigram'), ([], "--data_files='corpus/.*' names the text"),
    (['--data_files=none', '--out_dir={tmp}', '--vocab_size=100'], 'vocab_size=100 must be at least 258'),
    (['--data_files=none', '--out_dir={tmp}'], "no file is named 'none'")])
def test_mistakes(arguments, why, tmp_path, monkeypatch):
    import runpy
    monkeypatch.setattr(sys, 'argv', ['train_tokenizer.py', *(a.format(tmp=tmp_path) for a in arguments)])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    with pytest.raises(UserError, match=why):
        runpy.run_path(str(ROOT / 'train_tokenizer.py'), run_name='__main__')
    assert not [*tmp_path.iterdir()]


def test_the_worked_example_at_toy_size(tmp_path):
    """config/wikitext2.py trains as it is, but for its tokenizer, width and length; and its sample has its settings."""
    text = ''.join(f' = Article {i} = \n\n Machine learning is number {i} of the words . \n\n' for i in range(300))
    (tmp_path / 'wiki.txt').write_text(text)
    data, out = tmp_path / 'data', tmp_path / 'out'
    run('data/wikitext2/prepare.py', f'--input={tmp_path / "wiki.txt"}', '--tokenizer=bytes', f'--out_dir={data}')
    trained = run('train.py', 'config/wikitext2.py', f'--dataset={data}', f'--out_dir={out}', '--n_embd=32', '--max_iters=8',
                  '--warmup_iters=2', '--learning_rate=1e-2', '--eval_tokens=1024', '--sample_interval=0', '--log_interval=1',
                  '--curves=False', '--device=cpu', '--dtype=float32', '--compile=False').out
    found = [float(loss) for loss in re.findall(r'\| loss ([\d.]+)', trained)]
    assert len(found) == 8 and found[-1] < found[0] - 1 and '2,048 tokens a step' in trained
    assert ' | lr 0.00e+00' not in trained and '| lr 1.67e-03' in trained  # linear: the last of six steps down to 0
    header = (ROOT / 'config/wikitext2.py').read_text()
    flags = re.search(r"sample.py .*?(--temperature.*)", header)[1].split()
    sampled = run('sample.py', f'--out_dir={out}', '--start=Machine learning is', *flags, '--num_samples=1',
                  '--max_new_tokens=20', '--device=cpu').out
    assert sampled.startswith('Machine learning is') and flags == ['--temperature=0.9', '--top_k=50', '--top_p=0.95']
