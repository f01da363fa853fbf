"""
Cleaning of web text: `clean` normalises each text and drops the poor ones, `Seen` drops duplicates.

A rule is a function of the text and its words that returns True for a text to drop; its name, in the table at the
end, is the function's. To add one, write it and put it into RULES. The limits are mostly those of Gopher (Rae et
al. 2021, arXiv:2112.11446, appendix A.1) and C4 (Raffel et al. 2019, arXiv:1910.10683, section 2.2).
"""
import collections
import functools
import hashlib
import html
import re
import sqlite3
import unicodedata

import numpy as np

from data.dataset import START_OVER
from data.errors import UserError

# -----------------------------------------------------------------------------
# normalising: the same text without markup and control characters

UNSEEN = re.compile(r'(?is)<!--.*?-->|<(script|style|head|noscript|template|svg)\b[^<>]*>.*?</\1\s*>')
BLOCK = re.compile(r'(?i)</?(?:address|article|aside|blockquote|body|br|dd|div|dl|dt|fieldset|figure|footer|form|'
                   r'h[1-6]|header|hr|html|li|main|nav|ol|option|p|pre|section|table|td|th|title|tr|ul)'
                   r'(?:\s[^<>]*)?/?>|<!doctype[^<>]*>')
INLINE = re.compile(r'(?i)</?(?:a|abbr|b|bdi|bdo|big|button|center|cite|code|del|dfn|em|font|i|iframe|img|input|ins|'
                    r'kbd|label|link|mark|meta|q|s|samp|select|small|span|strike|strong|sub|sup|textarea|tt|u|var|wbr)'
                    r'(?:\s[^<>]*)?/?>')
CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffe\uffff]')  # not tab, newline


def normalise(text):
    """`text` without HTML tags and control characters, in Unicode's form NFC, with plain white space."""
    if '<' in text:  # only tags that HTML has, since "a < b and c > d" is text
        text = INLINE.sub('', BLOCK.sub('\n', UNSEEN.sub(' ', text)))
    text = unicodedata.normalize('NFC', html.unescape(text))
    lines = (' '.join(line.split()) for line in CONTROL.sub('', text).splitlines())
    return re.sub('\n{3,}', '\n\n', '\n'.join(lines)).strip()


# -----------------------------------------------------------------------------
# rules: what is dropped

BOILERPLATE = (
    'enable javascript', 'javascript is disabled', 'javascript is not enabled', 'javascript is required',
    'requires javascript', 'use cookies', 'uses cookies', 'using cookies', 'accept cookies', 'accept all cookies',
    'cookie policy', 'cookie notice', 'cookie settings', 'cookie preferences', 'privacy policy', 'privacy notice',
    'privacy statement', 'terms of use', 'terms of service', 'all rights reserved', 'lorem ipsum')


def too_short(text, words):
    return len(words) < 50


def few_unique_words(text, words):  # in pieces, because a long text naturally repeats its words
    return sum(len(set(words[i:i + 1000])) for i in range(0, len(words), 1000)) < 0.2 * len(words)


def repeated_phrase(text, words):
    phrases = collections.Counter(zip(words, words[1:], words[2:]))
    return max(phrases.values(), default=0) * 3 > 0.18 * len(words)


def mostly_symbols(text, words):
    return len(re.findall(r'[^\w\s]', text)) > 0.25 * len(text)


def boilerplate(text, words):  # relative to the length: a notice below a long article is harmless
    text = text.lower()
    return sum(text.count(phrase) for phrase in BOILERPLATE) * 100 > len(words)


RULES = [too_short, few_unique_words, repeated_phrase, mostly_symbols, boilerplate]


def clean(texts):
    """(the texts that are kept, normalised; {rule: how many it dropped, as the first that applies})"""
    kept, dropped = [], dict.fromkeys((rule.__name__ for rule in RULES), 0)
    for text in map(normalise, texts):
        words = text.lower().split()
        rule = next((rule for rule in RULES if rule(text, words)), None)
        if rule:
            dropped[rule.__name__] += 1
        else:
            kept.append(text)
    return kept, dropped


# -----------------------------------------------------------------------------
# duplicates: the keys of a text, and the keys seen so far

NEAR, PERMUTATIONS, SHINGLE = 0.8, 128, 5  # near duplicates share 80% of their runs of 5 words


def exact_keys(text):
    """One key: a hash of the text, whatever its case and its white space."""
    return [key(' '.join(text.lower().split()).encode())]


def minhash_keys(text):
    """
    Keys such that two near duplicates most likely have one in common: MinHash with locality-sensitive hashing
    (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, sections 3.3 and 3.4).
    """
    words = re.findall(r'\w+', text.lower())
    shingles = {' '.join(words[i:i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}
    minhash, bands, rows = minhash_lsh()
    signature = minhash.copy()
    signature.update_batch(shingles)
    bands = signature.hashvalues[:bands * rows].reshape(bands, rows)
    return exact_keys(text) + [key(b'%d:' % i + band.tobytes()) for i, band in enumerate(bands)]


@functools.cache
def minhash_lsh():
    """(an empty MinHash, the number of bands, the rows in each) that find texts of similarity NEAR."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise UserError('--dedup=minhash needs the package datasketch: pip install datasketch') from None
    lsh = MinHashLSH(NEAR, PERMUTATIONS)
    return MinHash(PERMUTATIONS), lsh.b, lsh.r


def key(content):
    """A 64-bit hash of bytes, as a signed integer, SQLite's native type."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'big', signed=True)


KEYS = {'exact': exact_keys, 'minhash': minhash_keys}


class Seen:
    """
    The keys of all documents so far, in a SQLite file: memory doesn't grow with them, and what a killed run added
    after its last commit is lost with it.
    """

    def __init__(self, path, documents):
        """Open it as it was after that many documents; 0 starts from scratch."""
        if not documents:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.is_symlink():
            raise UserError(f'{path} is missing, and without it duplicates would be kept: {START_OVER}')
        try:
            self.db = sqlite3.connect(path)
            self.db.execute('CREATE TABLE IF NOT EXISTS seen (key INTEGER PRIMARY KEY, document INTEGER)')
            self.db.execute('DELETE FROM seen WHERE document >= ?', (documents,))
        except sqlite3.OperationalError:
            raise  # a full disk, or one that can't be written
        except sqlite3.DatabaseError as error:
            raise UserError(f'{path} is damaged ({error}): {START_OVER}') from None
        self.commit = self.db.commit

    def is_new(self, keys, document):
        """Whether none of the keys has been seen; if so, they are added."""
        if self.db.execute(f'SELECT 1 FROM seen WHERE key IN ({",".join("?" * len(keys))}) LIMIT 1', keys).fetchone():
            return False
        self.db.executemany('INSERT OR IGNORE INTO seen VALUES (?, ?)', [(key, document) for key in keys])
        return True

    def drop(self, tokens, eot, keys, document):
        """
        The tokens of some documents, (n,), without the duplicates, and the number of duplicates. `keys` has a list
        for each document; they come after the first `document` ones.
        """
        new = np.array([self.is_new(each, document) for each in keys], bool)
        lengths = np.diff(np.flatnonzero(tokens == eot), append=len(tokens))
        return tokens[np.repeat(new, lengths)], int((~new).sum())
