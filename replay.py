"""
What a training step read: its documents, from the run's log and the dataset alone, whatever the number of processes.

    python replay.py --out_dir=out --step=1234                  # the documents of that step
    python replay.py --out_dir=out --find='some text'           # where a text stands, and the steps that read it

Each start of a run logs its settings and its position in the data; the order that follows is data/loader.py's. Steps
are numbered as train.py prints them, from 1.
"""
import sys
from pathlib import Path

import numpy as np

from common import log
from configurator import UserError, configure
from data.loader import Loader
from data.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run's, with its log.jsonl
step = 0  # print what this step read
find = ''  # or: a text to look for in the training data
characters = 200  # of each document to print; 0: all
# -----------------------------------------------------------------------------

CHUNK = 2**20  # blocks, or tokens, at a time


def starts(out_dir):
    """[(first step, last step, blocks a step, Loader at its position)] for each start of a run, in order.

    Raises UserError if the log is missing or tells nothing of its data, and if a dataset has changed since.
    """
    path = Path(out_dir, 'log.jsonl')
    entries = log.read(path)
    settings = [entry for entry in entries if 'data' in entry]
    last = max((entry['step'] for entry in entries if 'loss' in entry), default=0)
    if not settings:
        raise UserError(f'{path} does not say where the run was in its data: an older version wrote it')
    if not last:
        raise UserError(f'{path} has no step yet')
    result = []
    for entry, end in zip(settings, [*(later['step'] for later in settings[1:]), last]):
        c = entry['config']
        loader = Loader(c['dataset'], 'train', 1, c['block_size'], seed=c['seed'], shuffle=c['shuffle'])
        ...
    return result
