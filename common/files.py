"""Files in out_dir: reserved for one run, replaced only by complete ones, removed only if this program made them."""

import contextlib
import math
import os
import re
import shutil
import socket
from pathlib import Path

import filelock

from data.atomic import atomic_write, remove_leftovers
from data.errors import UserError


def lock(out_dir, timeout=0):
    """Make out_dir if need be, reserve it for this process, and remove what a killed run left half-written there.

    Keep what it returns: the lock lasts as long. The system releases it when the process ends, however it ends (where
    the file system has no locks, filelock leaves a file, and ignores one whose process is gone). timeout: seconds to
    wait for the holder to finish. Raises UserError if another process holds the lock or the folder can't be written.
    """
    if not str(out_dir):
        raise UserError('out_dir is empty: name a folder')
    path = Path(out_dir, '.lock')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = path.read_text().strip() if path.is_file() else ''
        held = filelock.FileLock(path)
        held.acquire(timeout=timeout)
    except filelock.Timeout:
        holder = ', '.join(holder.splitlines()) or 'another process'
        raise UserError(f'{out_dir} is in use by another run ({holder}): wait for it or stop it, '
                        'or choose another out_dir') from None
    except OSError as error:
        why = 'it is a file' if os.path.isfile(out_dir) else error.strerror
        raise UserError(f'out_dir={out_dir} cannot be written: {why}') from None
    with contextlib.suppress(OSError):  # a full disk
        if isinstance(held, filelock.UnixFileLock):
            path.write_text(f'pid {os.getpid()} on {socket.gethostname()}\n')
        remove_leftovers(path.parent, r'(\d+\.)?(ckpt\w*\.pt|log\.jsonl|tokenizer\w*\.json)')
    return held


def copy(source, path):
    """An independent copy of a file, atomically; it shares blocks with the source where the file system can (Btrfs,
    XFS), until either is overwritten."""
    with open(source, 'rb') as old, atomic_write(path) as new:
        try:
            while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):
                pass
        except (AttributeError, OSError):  # only Linux has it, and not for every file system
            shutil.copyfileobj(old, new, 1 << 20)


def numbered(folder, last=math.inf, name=r'ckpt_(\d{6,})\.pt'):
    """The checkpoints ckpt_000250.pt and so on up to step `last`, the newest first. name: the pattern
    of their names, the number in a group."""
    numbers = {path: int(found[1]) for path in Path(folder).glob('*.pt') if (found := re.fullmatch(name, path.name))}
    return sorted((path for path in numbers if numbers[path] <= last), key=numbers.get, reverse=True)


def reason(error):
    """'No space left on device' and the like: an OSError in the system's words, any other error by its first line."""
    cause = error
    while cause and not isinstance(cause, OSError):  # torch.save raises its own while it handles one
        cause = cause.__context__
    return getattr(cause, 'strerror', None) or (str(error).strip() or type(error).__name__).splitlines()[0]
