"""
Writing a file so that it is never there in part.
"""
import contextlib
import os
import re
import uuid
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to, which replaces path once it is complete and on the disk. A failure leaves path as it
    was, and no temporary file; a kill leaves one for remove_leftovers."""
    temporary = Path(f'{path}.{uuid.uuid4().hex[:12]}.tmp')
    try:
        with open(temporary, 'xb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only file system
            temporary.unlink()
        raise


def write(path, content):
    """atomic_write of these bytes."""
    with atomic_write(path) as f:
        f.write(content)


def remove_leftovers(folder, names):
    """Remove what killed processes left of files in a folder that nobody else writes. names: a pattern of theirs."""
    for path in folder.iterdir():
        if re.fullmatch(rf'({names})\.[0-9a-f]{{12}}\.tmp', path.name):
            path.unlink()
