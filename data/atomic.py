"""
Writing a file so that it is never there in part.
"""
import contextlib
import os
import uuid
from pathlib import Path

TEMPORARY = '.prepare-'  # begins the name of every temporary file in a dataset's folder


@contextlib.contextmanager
def atomic_write(path, prefix=''):
    """A binary file to write to, which replaces path once it is complete and on the disk. A failure leaves path as it
    was, and no temporary file. prefix: begins the temporary file's name."""
    path = Path(path)
    temporary = path.with_name(f'{prefix}{path.name}.{uuid.uuid4().hex[:12]}.tmp')
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
    """Write bytes."""
    with atomic_write(path, TEMPORARY) as f:
        f.write(content)
