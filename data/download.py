"""
Files from the network, each identified by its sha256.
"""
import hashlib
from pathlib import Path

from data.atomic import write
from data.errors import UserError

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')


def download(url, sha256, path, option='--input=FILE'):
    """
    The file `path`, fetched from `url` if it isn't there. It gets its name when it is complete and its sha256 is
    right. Raises UserError otherwise, naming `option` as the way to use a copy instead.
    """
    if not path.exists():
        import requests  # here, because it takes a while that most preparations don't need
        print(f'fetching {url}', flush=True)
        try:
            response = requests.get(url, timeout=60)
            response.raise_for_status()
        except OSError as error:  # all of requests' errors are
            raise UserError(f'{url} could not be fetched ({type(error).__name__}): go online once, '
                            f'or give a copy as {option}') from None
        if hashlib.sha256(response.content).hexdigest() != sha256:
            raise UserError(f'{url} is not what it was (its sha256 is not {sha256}): give a copy that is as {option}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, response.content)
        except OSError as error:
            raise UserError(f'{path} cannot be written: {error.strerror}') from None
    return path


def read_text(path):
    """The text in a UTF-8 file. Raises UserError."""
    try:
        return Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, 'strerror', None) or 'it is not UTF-8 text'
        raise UserError(f'{path} cannot be read: {why}') from None
