"""
Your own text: documents from json, jsonl, parquet, csv and text files (as a whole or in pieces); all but parquet,
which compresses itself, also as .gz or .zst.

A reader is a generator of (line, text) for one file; a line that cannot be read gives (line, Bad('why')), and a file
that is not in its format raises. READERS lists them by the file's ending.
"""
import codecs
import csv
import glob
import io
import itertools
import json
import os
import re

import pyarrow
import pyarrow.parquet

from data.errors import UserError
from data.prepare import in_batches, position


class Bad(str):
    """Why a document could not be read, in place of its text."""


def find_files(patterns, setting='data_files'):
    """The files that comma-separated glob patterns name, sorted. '**' goes through folders."""
    files = set()
    for pattern in patterns.split(','):
        pattern = os.path.expanduser(pattern.strip())
        found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not found:
            raise UserError(f"{setting}: no file is named '{pattern}'"
                            + f', but a folder is: try {pattern}/*' * os.path.isdir(pattern))
        files |= set(found)
    return sorted(files)


def corpus_of_files(files, text_key, txt_split, skip_bad):
    """The corpus (see data/prepare.py) of all documents in `files`, one file after the other."""
    if txt_split not in ('file', 'line', 'blank'):
        raise UserError(f'txt_split={txt_split} is not one of file, line, blank')

    def corpus(state):
        return in_batches(documents(*position(state, 'file', 'document')))

    def documents(file, document):
        for i in range(file, len(files)):
            for n, (line, text) in enumerate(read(files[i], text_key, txt_split)):
                if isinstance(text, Bad):
                    if not skip_bad:
                        raise UserError(f'{files[i]}:{line}: {text} (--skip_bad skips such documents and counts them)')
                    text = None
                if i > file or n >= document:
                    yield text, {'file': i, 'document': n + 1}
    return corpus


def read(path, text_key, txt_split):
    """(line, text) for each document in a file; an error of the file as a whole is one more Bad."""
    line = 0
    try:
        with pyarrow.input_stream(path) as file:  # decompresses, by the file's ending
            for line, text in reader_of(path)(io.BufferedReader(file, 1 << 20), text_key, txt_split):
                yield line, text
    except (OSError, ValueError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
        yield line + 1, Bad(' '.join(str(error).split()))


def reader_of(path):
    """The reader for a file's ending, whether or not it is compressed."""
    name = path.lower().removesuffix('.gz').removesuffix('.zst')
    return READERS.get(os.path.splitext(name)[1], read_text)


def read_json(file, text_key, _):
    if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    if file.peek(1).lstrip()[:1] == b'[':  # one array of all documents
        for i, row in enumerate(json.load(file), 1):
            yield i, field(row, text_key)
        return
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, field(json.loads(line), text_key)
            except (ValueError, RecursionError) as error:
                yield number, Bad(f'not JSON ({error})')


def read_csv(file, text_key, _):
    csv.field_size_limit(1 << 30)
    lines = io.TextIOWrapper(file, 'utf-8-sig', errors='surrogateescape', newline='')  # one bad byte costs one row
    rows = csv.DictReader(lines, restkey='')
    for row in rows:
        text = field(row, text_key)
        if '' in row and '' not in rows.fieldnames:
            text = Bad('more fields than names in the first line')
        elif re.search('[\udc80-\udcff]', text):
            text = Bad('not UTF-8 text')
        yield rows.line_num, text


def read_parquet(file, text_key, _):
    table = pyarrow.parquet.ParquetFile(file)
    if text_key not in table.schema_arrow.names:
        yield 1, field(dict.fromkeys(table.schema_arrow.names), text_key)
        return
    batches = (batch.to_pylist() for batch in table.iter_batches(256, columns=[text_key]))
    for number, row in enumerate(itertools.chain.from_iterable(batches), 1):
        yield number, field(row, text_key)


def read_text(file, _, txt_split):
    if txt_split == 'file':
        yield decode(file.read(), 1)
        return
    piece = []
    for number, line in enumerate(itertools.chain(file, [b'']), 1):
        if line.strip():
            piece.append(line)
        if piece and (txt_split == 'line' or not line.strip()):
            first = number - len(piece) + (line.strip() != b'')
            yield decode(b''.join(piece).rstrip(b'\r\n'), first)
            piece = []


def decode(text, line):
    """(line, text) of UTF-8 bytes that begin on that line; (line of the first wrong byte, Bad) for others."""
    try:
        return line, text.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        return line + text.count(b'\n', 0, error.start), Bad('not UTF-8 text')


def field(row, key):
    """row[key], if it is a text; key(row), if key is a function."""
    if callable(key):
        return key(row)
    if not isinstance(row, dict):
        return Bad(f'not an object with the key {key}')
    if key not in row:
        return Bad(f"no '{key}' in it, but {', '.join(map(str, row))}: --text_key names the one to take")
    return row[key] if isinstance(row[key], str) else Bad(f'{key} is of type {type(row[key]).__name__}, not a string')


READERS = {'.json': read_json, '.jsonl': read_json, '.ndjson': read_json, '.csv': read_csv, '.parquet': read_parquet}
