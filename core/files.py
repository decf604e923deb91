"""Small files of the instance folder that nobody may ever see half written."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models import flush


def write_once(path: Path, text: str) -> None:
    """Write a file, 0600, unless there is one. Safe when several processes do it at once."""
    if path.exists():
        return
    draft = _draft(path, text)
    try:
        os.link(draft, path)  # fails when another process was first
    except FileExistsError:
        return
    finally:
        draft.unlink()


def replace(path: Path, text: str) -> None:
    """Write a file, 0600, in the place of what was there, through a loss of power too."""
    _draft(path, text).replace(path)
    flush(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While this holds, no other process is here with the same path."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _draft(path: Path, text: str) -> Path:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return draft
