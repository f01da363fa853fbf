"""
WikiText-2, 2 million words of good Wikipedia articles (Merity et al. 2016, arXiv:1609.07843), as GPT-2's tokens.

    python data/wikitext2/prepare.py

Each article is a document. The text keeps WikiText's form, with spaces between words and punctuation.
"""
import hashlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from configurator import UserError, configure
from data.download import read_text
from data.prepare import corpus_of, prepare

name = 'wikitext-2-raw-v1'  # or 'wikitext-2-v1', with <unk> for rare words
held_out = 'validation'  # the split to validate on; or 'test', which published perplexities are measured on
input = ''  # a text file in this form, instead of the download; its last tenth of articles is for validation
tokenizer = 'gpt2'  # or 'bytes'
out_dir = ''  # the dataset's folder; empty: the one of this script
configure(globals())
if input and (name, held_out) != ('wikitext-2-raw-v1', 'validation'):
    raise UserError('name and held_out are for the download: with input they would be ignored')


def articles(text):
    """The articles of a text in which each begins with a line such as ' = Title = '."""
    return [article for article in re.split(r'(?m)^(?= = [^=\n].*[^=\n] = $)', text) if article.strip()]


def from_hub(split):
    from datasets import load_dataset  # here, because it takes a second that --input doesn't need
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # without network, a dozen lines about retries
    print(f'opening {name}, split {split}, on the hub', flush=True)
    try:
        return ''.join(load_dataset('Salesforce/wikitext', name, split=split)['text'])
    except Exception as error:  # many kinds: no network, no such name
        raise UserError(f'WikiText-2 could not be fetched ({type(error).__name__}): go online once, '
                        'or give a copy of its text as --input=FILE') from None


if input:
    found = articles(read_text(input))
    cut = len(found) - max(1, len(found) // 10)
    train, val = found[:cut], found[cut:]
else:
    train, val = articles(from_hub('train')), articles(from_hub(held_out))
digest = hashlib.sha256('\0'.join(train + val).encode()).hexdigest()
prepare(out_dir or Path(__file__).parent, train=corpus_of(train), val=corpus_of(val), tokenizer=tokenizer, num_proc=1,
        source={'dataset': 'WikiText-2', 'name': 'a copy' if input else name, 'held_out': held_out, 'sha256': digest})
