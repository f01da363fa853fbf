"""
Files from the network, each known by its sha256.
"""
import hashlib
import os
import sys
from pathlib import Path

import requests

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')


def download(url, sha256, path):
    """
    The file `path`, fetched from `url` if it isn't there. It appears under its name when it is whole and its sha256
    is right; otherwise this exits.
    """
    path = Path(path)
    if not path.exists():
        try:
            response = requests.get(url, timeout=30)
            response.raise_for_status()
        except requests.RequestException as error:
            sys.exit(f'{url} could not be fetched ({type(error).__name__}): give a copy of it as --input=FILE')
        if hashlib.sha256(response.content).hexdigest() != sha256:
            sys.exit(f'{url} is not what it was: its sha256 differs from {sha256}')
        tmp = path.with_suffix('.tmp')
        tmp.write_bytes(response.content)
        os.replace(tmp, path)
    return path


def read_text(path):
    """The text in a file of UTF-8."""
    try:
        return Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path} cannot be read: {getattr(error, "strerror", None) or "it is not UTF-8 text"}')
