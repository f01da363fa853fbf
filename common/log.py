"""log.jsonl: one JSON object a line, appended while a run trains; archived by the next run, rewound by a resume."""

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

from data.errors import UserError


def archive_previous_run(out_dir):
    """Give what an earlier run left in out_dir other names, so that a new one overwrites nothing."""
    earlier = [*Path(out_dir).glob('ckpt*.pt'), *Path(out_dir).glob('log.jsonl')]
    if earlier:
        n = next(n for n in itertools.count(1) if not any(Path(out_dir).glob(f'{n}.*')))
        for path in earlier:
            path.rename(path.with_name(f'{n}.{path.name}'))
        print(f'{out_dir} held an earlier run: its files are now called {n}.*', flush=True)


def read(path):
    """The entries of a log, a list of dicts. Raises UserError if there is no such file."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such log; train.py writes one into its out_dir')
    entries = []
    with open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):  # a kill, or a full disk, may leave half a line
                entries.append(json.loads(line))
    return entries


def rewind(path, step):
    """Drop from the log what a run that resumes at step will do, and log, again."""
    if os.path.exists(path):
        entries = read(path)
        with open(f'{path}.tmp', 'w') as f:
            f.writelines(json.dumps(entry) + '\n' for entry in entries
                         if entry['step'] < step or entry['step'] == step and 'loss' in entry)
        os.replace(f'{path}.tmp', path)


def write(path, entry):
    """Append an entry. A full disk is reported: better a gap in the log than the end of the run."""
    try:
        with open(path, 'a') as f:
            f.write(json.dumps(entry) + '\n')
    except OSError as error:
        print(f'{path} could not be written: {error.strerror}', file=sys.stderr, flush=True)
