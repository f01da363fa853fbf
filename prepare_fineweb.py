"""
Text to tokens: a dataset of the Hugging Face hub, or your own files, into shards that train.py reads.

    python prepare_fineweb.py                                       # 10 billion tokens of FineWeb-Edu
    python prepare_fineweb.py --max_tokens=50_000_000 --out_dir=data/taste
    python prepare_fineweb.py --dataset=HuggingFaceFW/fineweb --name=sample-10BT --out_dir=data/fineweb_10B
    python prepare_fineweb.py --data_files='corpus/*.jsonl' --clean --out_dir=data/corpus

The beginning is for validation: a tenth of the tokens, at most a shard. If it is stopped or killed, the same command
continues after the last complete shard, and the files end up the same, byte for byte.
"""
import os
import re

from configurator import UserError, configure
from data.files import corpus_of_files, find_files
from data.prepare import earlier_source, prepare

# -----------------------------------------------------------------------------
# where the text comes from
dataset = 'HuggingFaceFW/fineweb-edu'  # on the hub, or a folder on this machine
name = ''  # its configuration; empty: sample-10BT of FineWeb-Edu, the default one of another dataset
split = 'train'  # of the hub's dataset
revision = ''  # a commit, tag or branch; empty is the newest
streaming = True  # tokenize while it downloads; False: download all of it first, and keep it in the cache of `datasets`
data_files = ''  # your own files instead: patterns as 'a/*.jsonl.gz,b/**/*.txt'; json, jsonl, parquet, csv or text
text_key = 'text'  # the column that holds the text
txt_split = 'file'  # a document in a text file: the 'file', a 'line', or, for large files, between 'blank' lines
skip_bad = False  # skip and count documents that cannot be read, rather than stop and name the first
# how it is prepared
tokenizer = 'gpt2'  # or 'bytes', 'cl100k_base' …, a folder with a tokenizer.json (train_tokenizer.py), a hub model
max_tokens = 0  # stop after this many tokens; 0: no limit
clean = False  # clean the text, drop poor documents and exact duplicates (the rules are in data/clean.py)
dedup = ''  # 'exact' or 'minhash': drop duplicates, or near duplicates too
# where it goes
out_dir = 'data/fineweb_edu_10B'
shard_size = 100_000_000  # tokens
num_proc = 0  # workers; 0: one per core
# -----------------------------------------------------------------------------
defaults = dict(globals())
configure(globals())


def hub():
    """A dataset on the hub: (corpus, source, number of documents or None). data/prepare.py says what a corpus is."""
    from datasets import load_dataset_builder  # here, because it takes a second that your own files don't need
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # without network, a dozen lines about retries
    earlier = earlier_source(out_dir)
    commit = revision or (str(earlier.get('revision', '')) if earlier.get('dataset') == dataset else '')
    print(f'opening {dataset} (--dataset)', flush=True)
    try:
        builder = load_dataset_builder(dataset, name or None, revision=commit or None)
        if not streaming:
            builder.download_and_prepare()
        rows = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split).to_iterable_dataset()
    except Exception as error:  # many kinds: no such dataset, name or split, no network, no access
        raise UserError(f'{dataset} cannot be loaded ({type(error).__name__}: {error}): check its name, go online, '
                        'or give files of your own as --data_files') from None
    rows = rows.with_format('arrow')

    def corpus(state):
        try:
            if state:
                rows.load_state_dict(state)
            for table in rows.iter(64):
                yield texts_of(table), rows.state_dict()
        except UserError:
            raise
        except Exception as error:  # the network's, mostly
            raise UserError(f'{dataset}: {type(error).__name__}: {error}; the same command continues') from None

    files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
    pinned = re.search(r'@([0-9a-f]{40})/', ' '.join(files))
    source = {'dataset': dataset, 'name': name, 'split': split, 'revision': pinned[1] if pinned else revision,
              'files': files, 'streaming': streaming}  # their resume states differ
    known = (builder.info.splits or {}).get(split)
    return corpus, source, known and known.num_examples


def texts_of(table):
    """The texts in a pyarrow table, None for a value that is no string."""
    if text_key not in table.column_names:
        raise UserError(f"{dataset} has no column '{text_key}', but {', '.join(table.column_names)}: "
                        'name the one with the text as --text_key')
    texts = [text if isinstance(text, str) else None for text in table[text_key].to_pylist()]
    if None in texts and not skip_bad:
        raise UserError(f"{dataset} has values in '{text_key}' that are not strings (--skip_bad skips and counts them)")
    return texts


def check_settings():
    """Raises UserError for a setting that the other source of text would use, and for FineWeb-Edu's folder."""
    for key in ('dataset', 'name', 'split', 'revision', 'streaming') if data_files else ('txt_split',):
        if globals()[key] != defaults[key]:
            raise UserError(f'{key} would be ignored: it is '
                            + ('for the hub, and data_files are given' if data_files else 'for data_files'))
    fineweb = dataset == defaults['dataset'] and name in ('', 'sample-10BT') and not data_files
    if out_dir == defaults['out_dir'] and not fineweb:
        raise UserError(f'{out_dir} is for FineWeb-Edu: give --out_dir=data/NAME, and train with --dataset=NAME')


if __name__ == '__main__':
    check_settings()
    name = name or 'sample-10BT' * (dataset == defaults['dataset'])
    if data_files:
        files = find_files(data_files)
        corpus, total = corpus_of_files(files, text_key, txt_split, skip_bad), None
        source = {'data_files': data_files, 'files': {file: os.path.getsize(file) for file in files}}
    else:
        corpus, source, total = hub()
    prepare(out_dir, corpus, source=source, total=total, tokenizer=tokenizer, shard_size=shard_size,
            max_tokens=max_tokens, num_proc=num_proc, clean=clean, dedup=dedup or 'exact' * clean,
            settings={'text_key': text_key, 'txt_split': txt_split, 'skip_bad': skip_bad})
