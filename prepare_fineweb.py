"""
Text to tokens: a dataset of the Hugging Face hub, or your own files, into shards that train.py reads.

    python prepare_fineweb.py                                       # 10 billion tokens of FineWeb-Edu
    python prepare_fineweb.py --max_tokens=50_000_000 --out_dir=data/taste
    python prepare_fineweb.py --dataset=HuggingFaceFW/fineweb --name=sample-10BT --out_dir=data/fineweb_10B
    python prepare_fineweb.py --data_files='corpus/*.jsonl' --clean --out_dir=data/corpus

The first shard is for validation; of text that fits into one shard, the first tenth. If it is stopped or killed, the
same command goes on from the last whole shard, and ends with the bytes that it would have made undisturbed.
"""
import os
import re

from configurator import UserError, configure
from data.files import corpus_of_files, find_files
from data.prepare import earlier_source, prepare

# -----------------------------------------------------------------------------
# where the text is from
dataset = 'HuggingFaceFW/fineweb-edu'  # on the hub, or a folder on this machine
name = ''  # its configuration; empty: sample-10BT of FineWeb-Edu, the default one of another dataset
split = 'train'
revision = ''  # a commit, tag or branch; empty is the newest
streaming = True  # tokenize while it downloads; False: download it all first, and keep it in the cache of `datasets`
data_files = ''  # your own files instead: patterns as 'a/*.jsonl.gz,b/**/*.txt'; json, jsonl, parquet, csv or text
text_key = 'text'  # the column that holds the text
txt_split = 'file'  # a document in a text file: the 'file', a 'line', or, for large files, between 'blank' lines
skip_bad = False  # skip and count what cannot be read, rather than stop and say where it is
# what is made of it
tokenizer = 'gpt2'  # or 'bytes'
max_tokens = 0  # stop after so many; 0: at the end
clean = False  # clean the text, drop poor documents and exact duplicates (the rules are in data/clean.py)
dedup = ''  # 'exact' or 'minhash': drop duplicates, or near duplicates too
# where it goes
out_dir = 'data/fineweb_edu_10B'
shard_size = 100_000_000  # tokens
num_proc = 0  # workers; 0: one a core
# -----------------------------------------------------------------------------
FINEWEB, FINEWEB_DIR = dataset, out_dir
configure(globals())
name = name or 'sample-10BT' * (dataset == FINEWEB)


def hub():
    """A dataset on the hub: (corpus, source, number of documents or None). data/prepare.py says what a corpus is."""
    from datasets import load_dataset_builder  # here, because it takes a second that your own files don't need
    earlier = earlier_source(out_dir)
    commit = revision or (earlier['revision'] if earlier.get('dataset') == dataset else '')  # go on with what it was
    try:
        builder = load_dataset_builder(dataset, name or None, revision=commit or None)
        if not streaming:
            builder.download_and_prepare()
        rows = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split).to_iterable_dataset()
    except Exception as error:  # of many kinds: no such dataset, name or split, no network, no access
        raise UserError(f'{dataset} cannot be loaded: {type(error).__name__}: {one_line(error)}')
    rows = rows.with_format('arrow')

    def corpus(mark):
        if mark:
            rows.load_state_dict(mark)
        try:
            for table in rows.iter(64):
                yield texts_of(table), rows.state_dict()
        except Exception as error:  # the network's, mostly
            raise UserError(f'{dataset}: {type(error).__name__}: {one_line(error)}: the same command goes on from here')

    files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
    pinned = re.search(r'@([0-9a-f]{40})/', ' '.join(files))
    source = {'dataset': dataset, 'name': name, 'split': split, 'revision': pinned[1] if pinned else revision,
              'files': files, 'streaming': streaming}  # which counts its place in another way
    known = (builder.info.splits or {}).get(split)
    return corpus, source, known and known.num_examples


def texts_of(table):
    """The texts in a pyarrow table, None for what is none."""
    if text_key not in table.column_names:
        raise UserError(f"{dataset} has no column '{text_key}', but {', '.join(table.column_names)}: --text_key names the one")
    texts = [text if isinstance(text, str) else None for text in table[text_key].to_pylist()]
    if None in texts and not skip_bad:
        raise UserError(f"{dataset} has something else than a string in '{text_key}' (--skip_bad skips and counts such)")
    return texts


def one_line(error):
    return ' '.join(str(error).split())


def own_files():
    """Files of one's own: (corpus, source, None)."""
    files = find_files(data_files)
    return (corpus_of_files(files, text_key, txt_split, skip_bad),
            {'data_files': data_files, 'files': {file: os.path.getsize(file) for file in files}}, None)


if __name__ == '__main__':
    if out_dir == FINEWEB_DIR and (data_files or (dataset, name) != (FINEWEB, 'sample-10BT')):
        raise UserError(f'{out_dir} is for FineWeb-Edu: give --out_dir=data/NAME, and train with --dataset=NAME')
    corpus, source, total = own_files() if data_files else hub()
    prepare(out_dir, corpus, source=source, total=total, tokenizer=tokenizer, shard_size=shard_size,
            max_tokens=max_tokens, num_proc=num_proc, clean=clean, dedup=dedup or 'exact' * clean,
            settings={'text_key': text_key, 'txt_split': txt_split, 'skip_bad': skip_bad})
