"""
Files from the network, each known by its sha256, and how a file is written that must never be there by half.
"""
import hashlib
import os
from pathlib import Path

import requests

from data.errors import UserError

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')


def download(url, sha256, path, option='--input=FILE'):
    """
    The file `path`, fetched from `url` if it isn't there. It appears under its name when it is whole and its sha256
    is right; otherwise this exits with one line, which says that `option` takes a copy instead.
    """
    path = Path(path)
    if not path.exists():
        try:
            response = requests.get(url, timeout=60)
            response.raise_for_status()
            if hashlib.sha256(response.content).hexdigest() != sha256:
                raise UserError(f'{url} is not what it was (its sha256 is not {sha256}): give a copy that is as {option}')
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, response.content)
        except OSError as error:  # the network's, requests' or the disk's
            raise UserError(f'{url} could not be fetched ({type(error).__name__}): go online, or give a copy as {option}')
    return path


def write(path, content):
    """Write bytes under a temporary name, and rename the file when it is on the disk."""
    temporary = f'{path}.{os.getpid()}.tmp'  # several processes may do this at once
    with open(temporary, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_text(path):
    """The text in a file of UTF-8."""
    try:
        return Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {getattr(error, "strerror", None) or "it is not UTF-8 text"}')
