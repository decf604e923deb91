"""Which workers are alive, known by locks and not by clocks.

A worker names its holds after its incarnation and keeps a lock on a file of that name for as long
as it lives. The kernel drops the lock however the process ends, so a hold whose incarnation nobody
locks belongs to nobody, and may be voided at once.
"""

import fcntl
import os
from pathlib import Path

from core import tokens


class Incarnation:
    """This worker, from now until its process ends."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        while True:
            self.id = tokens.new_id("inc")
            path = folder / self.id
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            # A sweeper may have taken the file for a dead one before the lock was on it.
            if path.exists():
                return
            os.close(self._file)

    def end(self) -> None:
        """Give the name up; whatever it still holds is then an orphan."""
        (self._folder / self.id).unlink(missing_ok=True)
        os.close(self._file)


def is_alive(folder: Path, incarnation: str) -> bool:
    """Whether a process still holds that incarnation; the file of a dead one is removed."""
    path = folder / incarnation
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(handle)


def any_alive(folder: Path) -> bool:
    """Whether any worker of this instance runs; removes the files of those that do not."""
    alive = [is_alive(folder, path.name) for path in folder.glob("inc_*")]
    return any(alive)
