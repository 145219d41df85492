"""Small text files, read whole and within bounds; what is wrong with one quotes nothing of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_FILE_BYTES = 2**20


class UnreadableError(Exception):
    """Why a file cannot be read, in a few words that quote nothing of it."""


class NotRegularError(UnreadableError):
    """It is a pipe, a device or a folder: nothing that can be read again and again."""


def read(path: Path, *, regular: bool = False) -> bytes:
    """Everything in it. `regular`: only of a regular file, as others give another answer each
    time, or none for ever. Raises UnreadableError."""
    try:
        # Without O_NONBLOCK the open itself waits where somebody has put a pipe.
        with open(path, "rb", opener=_nonblocking if regular else None) as stream:
            if regular and not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise NotRegularError("unreadable (not a regular file)")
            data = stream.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError as error:
        raise NotRegularError(f"unreadable ({error.strerror})") from None
    except OSError as error:
        raise UnreadableError(f"unreadable ({error.strerror})") from None
    except ValueError:
        raise UnreadableError("unreadable (no file can have this name)") from None
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableError("unreadable (larger than 1MiB)")
    return data


def decoded(data: bytes) -> str:
    """UTF-8 with or without a byte order mark. Raises UnreadableError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnreadableError("unreadable (not UTF-8)") from None


def _nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
