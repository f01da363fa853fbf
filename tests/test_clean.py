"""Cleaning: each rule drops what it is for and keeps good text; duplicates are dropped, once, near ones on demand."""
import json
import random

import numpy as np
import pytest
from conftest import run
from test_prepare import run_here

from data import clean
from data.tokenizer import get_tokenizer

WORDS = [a + b + c + d for a in ('ka', 'lo', 'mi', 'nu') for b in ('ra', 'se', 'ti', 'vo') 
         for c in ('', 'n', 's', 'th') for d in ('', 'da', 'ge', 'po', 'zi')]


def good(seed, words=120):
    return ' '.join(random.Random(seed).choices(WORDS, k=words))


@pytest.mark.parametrize('text, expected', [
    ('<html><head><title>x</title></head><body><p>Tom &amp; <b>Jer</b>ry</p><script>f(1 < 2)</script></body></html>',
     'Tom & Jerry'),
    ('one<br/>two<!-- three -->', 'one\ntwo'),
    ('if a < b and c > d: List<String>', 'if a < b and c > d: List<String>'),
    ('cafe\u0301', 'caf\u00e9'),
    ('a\x00b\x1b\u200bc\ufeff', 'abc'),
    ('a \t\u00a0 b  \r\n\r\n\r\n\r\n c\rd', 'a b\n\nc\nd'),
    ('  \n', ''),
])
def test_normalise(text, expected):
    assert clean.normalise(text) == expected
    assert clean.normalise(expected) == expected


BAD = {
    'too_short': good(1, words=20),
    'few_unique_words': ' '.join(random.Random(2).choices(['one', 'two', 'three', 'four'], k=300)),
    'repeated_phrase': ' '.join(f'word{i} buy it now' for i in range(100)),
    'mostly_symbols': ' '.join(f'w{i} ***' for i in range(100)),
    'boilerplate': good(3, words=60) + ' Please enable JavaScript. We use cookies: read our privacy policy.',
}


@pytest.mark.parametrize('rule', clean.RULES, ids=lambda rule: rule.__name__)
def test_each_rule(rule):
    bad = BAD[rule.__name__]
    kept, dropped = clean.clean([good(4), bad, good(5)])
    assert kept == [good(4), good(5)]
    assert {name for name, n in dropped.items() if n} == {rule.__name__}


def test_a_notice_does_not_condemn_an_article():
    article = good(6, words=2000) + ' We use cookies.'
    assert clean.clean([article])[0] == [article]


def write(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return f'--data_files={path}'


def documents(folder):
    ids = np.concatenate([np.load(path) for split in ('val', 'train') for path in sorted(folder.glob(f'{split}_*'))])
    return get_tokenizer('bytes').decode(ids).split('<|endoftext|>')[1:]


def test_duplicates_and_the_table(tmp_path):
    texts = [good(1), *BAD.values(), good(2), good(1).upper(), f'<p>{good(2)}</p>', good(3)]
    out = run_here('prepare_fineweb.py', write(tmp_path / 'a.jsonl', texts), f'--out_dir={tmp_path}/out', '--clean',
                   '--tokenizer=bytes', '--num_proc=1').out
    assert documents(tmp_path / 'out') == [good(1), good(2), good(3)]
    rows = {line.split()[-1] if 'doc' not in line else line.split('  ')[-1]: line.split()[0]
            for line in out.splitlines()[2:]}
    assert rows == {'documents in': '10', 'unreadable': '0', 'empty': '0', **dict.fromkeys(BAD, '1'), 'duplicate': '2',
                    'documents out': '3'}


def test_near_duplicates(tmp_path):
    pytest.importorskip('datasketch')
    base, other = good(1, words=1000).split(), good(2, words=1000)
    near = ' '.join(base[:500] + ['changed'] + base[501:])
    half = ' '.join(base[:500]) + ' ' + good(3, words=500)
    where = write(tmp_path / 'a.jsonl', [' '.join(base), other, near, half])
    run_here('prepare_fineweb.py', where, '--num_proc=1', f'--out_dir={tmp_path}/near', '--dedup=minhash', '--tokenizer=bytes')
    assert documents(tmp_path / 'near') == [' '.join(base), other, half]
    run_here('prepare_fineweb.py', where, '--num_proc=1', f'--out_dir={tmp_path}/exact', '--dedup=exact', '--tokenizer=bytes')
    assert documents(tmp_path / 'exact') == [' '.join(base), other, near, half]


def test_without_datasketch(tmp_path):
    (tmp_path / 'datasketch.py').write_text('raise ImportError')
    err = run('prepare_fineweb.py', write(tmp_path / 'a.jsonl', [good(1)]), f'--out_dir={tmp_path}/out', '--dedup=minhash',
              '--tokenizer=bytes', PYTHONPATH=str(tmp_path), expect=1).err
    assert err == '--dedup=minhash needs the package datasketch: pip install datasketch\n'


def test_seen_forgets_what_was_not_committed(tmp_path):
    seen = clean.Seen(tmp_path / 'seen', 0)
    assert seen.is_new([1, 2], 0) and not seen.is_new([2, 3], 1) and seen.is_new([3], 2)
    seen.commit()
    assert seen.is_new([4], 5)
    seen.db.close()
    seen = clean.Seen(tmp_path / 'seen', 2)     # going on behind two documents
    assert not seen.is_new([1], 2) and seen.is_new([3], 2) and seen.is_new([4], 5)
