"""Storage, without meaning: one SQLite file, its transactions and its migrations.

Two rules shape this module. Writers are queued by us, first in the process and then between
processes, because SQLite's own busy handler sleeps and is not fair. And writers that wait together
share one commit, so that a paid call costs the disk one flush at most, and less under load.
"""

import fcntl
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import apsw

from core import clock, errors

log = logging.getLogger("farebox.storage")

T = TypeVar("T")
Row = tuple[Any, ...]
Params = Mapping[str, Any]

MIGRATIONS = Path(__file__).parent / "migrations"
# Below this SQLite can corrupt a WAL that several processes write and checkpoint
# (https://sqlite.org/wal.html#walresetbug).
OLDEST_SQLITE = (3, 51, 3)
BATCH_LIMIT = 32
WAL_LIMIT_BYTES = 32 * 1024 * 1024
_CHECKPOINT_PATIENCE_MS = 100
_NORMAL, _FULL = 1, 2


class SchemaTooNew(Exception):
    """The file was written by a later version of Farebox."""


class Tx:
    """A transaction in progress. Whoever is given one never commits it."""

    __slots__ = ("_connection", "_cursor")

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._cursor = connection.cursor()

    def run(self, sql: str, params: Params | None = None) -> int:
        """Execute one statement; the number of rows it changed."""
        self._cursor.execute(sql, params)
        return self._connection.changes()

    def row(self, sql: str, params: Params | None = None) -> Row | None:
        """The first row, or None. The statement runs to its end, so no cursor stays open."""
        rows = self._cursor.execute(sql, params).fetchall()
        return rows[0] if rows else None

    def rows(self, sql: str, params: Params | None = None) -> list[Row]:
        """All rows."""
        return self._cursor.execute(sql, params).fetchall()


class _Job(Generic[T]):
    """One write that waits its turn; `turn` is released when it is done or must lead."""

    __slots__ = ("context", "done", "durable", "error", "result", "turn", "work")

    def __init__(self, work: Callable[[Tx], T], durable: bool) -> None:
        self.work = work
        # Whoever leads runs it: what it asks of its surroundings must be its own all the same.
        self.context = copy_context()
        self.durable = durable
        self.done = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.turn = threading.Lock()
        self.turn.acquire()


class Database:
    """The database file of one instance, used by one process. Make it after the fork."""

    def __init__(self, path: Path) -> None:
        version = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
        if version < OLDEST_SQLITE:
            raise RuntimeError(f"SQLite {apsw.sqlite_lib_version()} can corrupt a shared WAL")
        self.path = path
        self._local = threading.local()
        self._writer: apsw.Connection | None = None
        self._tx: Tx | None = None
        self._synchronous = _NORMAL
        self._queue: deque[_Job[Any]] = deque()
        self._leading = False
        self._mutex = threading.Lock()
        lock_path = path.with_name("writer.lock")
        self._lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    # Reading

    def row(self, sql: str, params: Params | None = None) -> Row | None:
        """The first row of a read, outside any transaction. Raises `storage_unavailable`."""
        with self.reading() as tx:
            return tx.row(sql, params)

    def rows(self, sql: str, params: Params | None = None) -> list[Row]:
        """All rows of a read, outside any transaction. Raises `storage_unavailable`."""
        with self.reading() as tx:
            return tx.rows(sql, params)

    @contextmanager
    def reading(self) -> Iterator[Tx]:
        """The calling thread's read-only connection. Each statement sees the latest commit."""
        try:
            tx = getattr(self._local, "tx", None)
            if tx is None:
                connection = self._connect()
                connection.pragma("query_only", True)
                tx = self._local.tx = Tx(connection)
            yield tx
        except apsw.Error as error:
            raise _refusal(error) from error

    @contextmanager
    def snapshot(self) -> Iterator[Tx]:
        """As `reading`, but every statement sees the same moment."""
        with self.reading() as tx:
            tx.run("BEGIN")
            try:
                yield tx
            finally:
                tx.run("ROLLBACK")

    # Writing

    def write(self, work: Callable[[Tx], T], durable: bool = False) -> T:
        """Run `work(tx)` in a write transaction of its own and return what it returned.

        With `durable` the commit is on the disk before this returns, and every earlier commit with
        it; without, a loss of power may undo it (a crash of the process may not). If `work` raises,
        all it wrote is undone. `work` may run twice, when another's failure undid the batch, so it
        does nothing but speak to `tx`. Raises `storage_unavailable` when SQLite cannot.
        """
        job = _Job(work, durable)
        with self._mutex:
            self._queue.append(job)
            leads, self._leading = not self._leading, True
        if not leads:
            job.turn.acquire()
        if not job.done:
            self._lead()
        if job.error is not None:
            if isinstance(job.error, apsw.Error) and not isinstance(
                job.error, apsw.ConstraintError
            ):
                raise _refusal(job.error) from job.error
            raise job.error
        return job.result  # type: ignore[return-value]  # done without an error: `work` returned it

    def _lead(self) -> None:
        """Commit the jobs that wait, then hand the lead to the next that came meanwhile."""
        with self._mutex:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_LIMIT))]
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                self._commit(batch)
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        except BaseException as error:
            # The lock itself failed, or the interpreter is on its way out. Nobody waits for ever.
            for job in batch:
                if not job.done:
                    job.error = error
            raise
        finally:
            with self._mutex:
                heir = self._queue[0] if self._queue else None
                self._leading = heir is not None
            if heir is not None:
                heir.turn.release()
            for job in batch:
                job.done = True
                job.turn.release()

    def _commit(self, batch: list[_Job[Any]]) -> None:
        try:
            self._transact(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            # One of them failed and took the others along: each gets a transaction of its own.
            for job in batch:
                self._commit([job])

    def _transact(self, batch: list[_Job[Any]]) -> None:
        if self._tx is None:
            self._writer = self._connect()
            self._tx = Tx(self._writer)
            self._synchronous = _FULL
        tx = self._tx
        level = _FULL if any(job.durable for job in batch) else _NORMAL
        if level != self._synchronous:
            # apsw prepares a PRAGMA anew each time, which is when SQLite obeys this one.
            tx.run(f"PRAGMA synchronous = {level}")
            self._synchronous = level
        tx.run("BEGIN IMMEDIATE")
        try:
            for job in batch:
                self._run(job, tx)
            tx.run("COMMIT")
        except BaseException:
            assert self._writer is not None
            try:
                if self._writer.in_transaction:  # SQLite itself rolls back when the disk is full
                    tx.run("ROLLBACK")
            except apsw.Error:
                self._tx = None  # the next batch begins with a fresh connection
            raise

    def _run(self, job: _Job[Any], tx: Tx) -> None:
        """Run one job. A refusal that comes before the job has written anything is its own affair:
        there is nothing to undo, and those who share the commit do not notice."""
        assert self._writer is not None
        written, job.error = self._writer.total_changes(), None
        try:
            job.result = job.context.run(job.work, tx)
        except errors.Refusal as refusal:
            if self._writer.total_changes() != written:
                raise
            job.error = refusal

    # Care

    def migrate(self) -> None:
        """Bring the schema up to date, each step in one transaction, with a copy kept before.

        Raises SchemaTooNew for a file of a later version.
        """
        steps = sorted(MIGRATIONS.glob("[0-9][0-9][0-9][0-9]_*.sql"))
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        connection = self._connect()
        try:
            version = int(connection.pragma("user_version"))
            if version > len(steps):
                raise SchemaTooNew(
                    f"{self.path.name} has schema {version}, this version knows {len(steps)}"
                )
            if 0 < version < len(steps):
                copy = self.path.with_name(f"{self.path.name}.before-{version + 1:04}")
                copy_database(connection, copy)
            # A table that is made anew is away for a moment; what refers to it is checked after
            # each step (https://sqlite.org/lang_altertable.html#otheralter).
            connection.pragma("foreign_keys", 0)
            for number, step in enumerate(steps[version:], start=version + 1):
                with connection:
                    connection.execute(step.read_text("utf-8"))
                    connection.execute(f"PRAGMA user_version = {number}")
                    astray = connection.execute("PRAGMA foreign_key_check").fetchall()
                    if astray:
                        raise apsw.ConstraintError(f"{step.name} leaves rows astray: {astray}")
        finally:
            connection.close()
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def backup(self, target: Path) -> None:
        """Write a consistent copy to `target` (0600) through SQLite, while others write."""
        connection = self._connect()
        try:
            copy_database(connection, target)
        finally:
            connection.close()

    def checkpoint(self) -> None:
        """Shorten the write-ahead log once it has grown past what commits keep in check."""
        log_path = self.path.with_name(self.path.name + "-wal")
        if log_path.exists() and log_path.stat().st_size > WAL_LIMIT_BYTES:
            connection = self._connect()
            # Writers wait as long as this waits for readers; those that come meanwhile are short.
            connection.set_busy_timeout(_CHECKPOINT_PATIENCE_MS)
            try:
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.BusyError:
                log.info("the write-ahead log is in use; it will be shortened later")
            finally:
                connection.close()

    def close(self) -> None:
        """Close what this process opened; for short-lived processes and tests. Once: a descriptor
        that is closed again may be somebody else's by then, the database file's of another."""
        if self._lock < 0:
            return
        if self._writer is not None:
            self._writer.close()
        os.close(self._lock)
        self._lock = -1

    def _connect(self) -> apsw.Connection:
        created = not self.path.exists()
        connection = apsw.Connection(str(self.path))
        if created:
            self.path.chmod(0o600)
        connection.set_busy_timeout(5_000)  # only for those outside our queue, such as a shell
        wanted: dict[str, Any] = {
            "journal_mode": "wal",
            "synchronous": _FULL,
            "foreign_keys": 1,
            "trusted_schema": 0,
            "wal_autocheckpoint": 1000,
            "journal_size_limit": WAL_LIMIT_BYTES,
        }
        for name, value in wanted.items():
            connection.pragma(name, value)
            if connection.pragma(name) != value:
                connection.close()
                raise RuntimeError(f"SQLite did not accept PRAGMA {name} = {value}")
        return connection


def latest_schema() -> int:
    """The schema version this version of Farebox writes."""
    return len(list(MIGRATIONS.glob("[0-9][0-9][0-9][0-9]_*.sql")))


def copy_database(source: apsw.Connection, target: Path) -> None:
    """Copy a database through SQLite's backup API and flush it; the file is 0600 from the start."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    copy = apsw.Connection(str(target))
    try:
        with copy.backup("main", source, "main") as backup:
            backup.step(-1)
        copy.pragma("journal_mode", "delete")  # one file, without a log beside it
    finally:
        copy.close()
    flush(target)


def check_database(path: Path) -> str | None:
    """What SQLite finds wrong with the file, or None. For copies no one has open."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        verdict = connection.pragma("integrity_check")
        return None if verdict == "ok" else str(verdict)
    except apsw.Error as error:
        return str(error)
    finally:
        connection.close()


def flush(path: Path) -> None:
    """Make a finished file, and its name in the folder, survive a loss of power."""
    for name in (path, path.parent):
        handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refusal(error: apsw.Error) -> errors.Refusal:
    log.error("the database refused: %s: %s (%d)", type(error).__name__, error, clock.now_ms())
    return errors.storage_unavailable()
