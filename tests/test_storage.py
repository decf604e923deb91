"""The database itself: shared commits, fair turns, durability, migrations, a full disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from test_ledger import TORTURE, Books, refused

import models
from core import errors
from models import Database, SchemaTooNew, Tx

ROOT = Path(__file__).resolve().parent.parent
COUNT_UP = "UPDATE account SET last_call = last_call + 1 WHERE id = 'acct_operator'"
READ_COUNT = "SELECT last_call FROM account WHERE id = 'acct_operator'"
FAIR_SHARE = 0.3  # of the busiest writer's; SQLite's own waiting gave 0.0001
FAIR_SECONDS = 10.0 if TORTURE else 1.5


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "farebox.db")
    made.migrate()
    yield made
    made.close()


def count_up(tx: Tx) -> int:
    tx.run(COUNT_UP)
    row = tx.row(READ_COUNT)
    assert row is not None
    value: int = row[0]
    return value


def count_of(db: Database) -> int:
    row = db.row(READ_COUNT)
    assert row is not None
    value: int = row[0]
    return value


class Batch:
    """Jobs that wait together behind one that keeps the database busy, in the order given."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._threads: list[threading.Thread] = []
        self.answers: list[Any] = []
        self._go_on = threading.Event()
        entered = threading.Event()

        def occupy(tx: Tx) -> None:
            entered.set()
            assert self._go_on.wait(30)

        self._start(lambda: db.write(occupy))
        assert entered.wait(30)

    def _start(self, run: Callable[[], object]) -> None:
        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def add(self, work: Callable[[Tx], object], durable: bool = False) -> None:
        number = len(self.answers)
        self.answers.append(None)

        def run() -> None:
            try:
                self.answers[number] = self._db.write(work, durable)
            except BaseException as error:  # what a thread raised is part of the result
                self.answers[number] = error

        self._start(run)
        while len(self._db._queue) <= number:  # there is no other way to see who waits
            time.sleep(0.0005)

    def finish(self) -> list[Any]:
        self._go_on.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a writer waits for ever"
        return self.answers


# One commit for many


def test_a_write_returns_what_its_work_returned(db: Database) -> None:
    assert db.write(lambda tx: "done") == "done"
    assert db.write(count_up) == 1
    assert count_of(db) == 1


def test_a_write_that_raises_leaves_nothing_behind(db: Database) -> None:
    def work(tx: Tx) -> None:
        count_up(tx)
        raise errors.not_found()

    refused("not_found", lambda: db.write(work))
    assert count_of(db) == 0
    assert db.write(count_up) == 1


def test_a_failure_in_a_shared_commit_undoes_only_itself(db: Database) -> None:
    def fail(tx: Tx) -> None:
        tx.run("UPDATE account SET last_call = last_call + 1000")
        raise ValueError("mine alone")

    def break_a_rule(tx: Tx) -> None:
        tx.run("UPDATE account SET last_call = last_call + 1000")
        tx.run("UPDATE account SET balance = -1")

    batch = Batch(db)
    for work in (count_up, fail, count_up, break_a_rule, count_up):
        batch.add(work)
    first, failed, second, broken, third = batch.finish()
    assert (first, second, third) == (1, 2, 3)
    assert isinstance(failed, ValueError)
    assert isinstance(broken, apsw.ConstraintError)
    assert count_of(db) == 3


def test_work_that_ran_twice_answers_once_and_right(db: Database) -> None:
    runs: list[None] = []

    def counted(tx: Tx) -> int:
        runs.append(None)
        return count_up(tx)

    def fail(tx: Tx) -> None:
        count_up(tx)
        raise errors.not_found()

    batch = Batch(db)
    batch.add(counted)
    batch.add(fail)
    answer, failed = batch.finish()
    assert len(runs) == 2
    assert answer == 1 == count_of(db)
    assert isinstance(failed, errors.Refusal)


def test_who_is_refused_before_they_write_disturbs_nobody(db: Database) -> None:
    runs: list[None] = []

    def counted(tx: Tx) -> int:
        runs.append(None)
        return count_up(tx)

    def refuse(tx: Tx) -> None:
        tx.run("UPDATE account SET last_call = 7 WHERE id = 'nobody'")
        raise errors.not_found()

    batch = Batch(db)
    for work in (counted, refuse, counted, refuse):
        batch.add(work)
    first, refused_first, second, refused_last = batch.finish()
    assert (first, second, count_of(db)) == (1, 2, 2)
    assert len(runs) == 2, "the batch was made anew"
    assert isinstance(refused_first, errors.Refusal)
    assert isinstance(refused_last, errors.Refusal)
    refused("not_found", lambda: db.write(refuse))
    assert db.write(count_up) == 3


def test_jobs_that_wait_together_share_a_commit(db: Database) -> None:
    commits: list[None] = []

    def note() -> bool:
        commits.append(None)
        return False

    batch = Batch(db)
    assert db._writer is not None
    db._writer.set_commit_hook(note)
    for _ in range(20):
        batch.add(count_up)
    assert batch.finish() == list(range(1, 21))
    assert len(commits) == 2  # the one that kept the database busy, and all the rest


def test_more_jobs_than_one_commit_takes_all_come_through(db: Database) -> None:
    batch = Batch(db)
    many = models.BATCH_LIMIT * 2 + 5
    for _ in range(many):
        batch.add(count_up)
    assert sorted(batch.finish()) == list(range(1, many + 1))


def test_nobody_waits_for_ever_when_a_writer_is_torn_down(db: Database) -> None:
    def leave(tx: Tx) -> None:
        raise SystemExit

    batch = Batch(db)
    for work in (count_up, leave, count_up):
        batch.add(work)
    answers = batch.finish()
    assert isinstance(answers[1], SystemExit)
    before = count_of(db)
    assert before == sum(isinstance(answer, int) for answer in answers)
    assert db.write(count_up) == before + 1


def test_a_reader_never_sees_half_a_transaction(db: Database) -> None:
    seen = []

    def work(tx: Tx) -> None:
        count_up(tx)
        seen.append(db.row(READ_COUNT))
        count_up(tx)

    db.write(work)
    assert seen == [(0,)]
    assert count_of(db) == 2


def test_a_snapshot_shows_one_moment(db: Database) -> None:
    with db.snapshot() as tx:
        assert tx.row(READ_COUNT) == (0,)
        db.write(count_up)
        assert tx.row(READ_COUNT) == (0,)
    assert count_of(db) == 1


def test_a_reading_connection_cannot_write(db: Database) -> None:
    def write() -> None:
        with db.reading() as tx:
            tx.run(COUNT_UP)

    refused("storage_unavailable", write)
    assert count_of(db) == 0


# Many writers


def writer_process(
    path: Path, threads: int, seconds: float, ready: Any, results: Any
) -> None:  # pragma: no cover  (runs in a process of its own)
    """Write as fast as it goes, as a busy worker does: a hold, then a durable capture."""
    sys.setswitchinterval(0.0005)
    database = Database(path)
    written = [0] * threads
    longest = [0.0] * threads
    failures: list[str] = []

    def run(number: int, end: float) -> None:
        try:
            while (begun := time.monotonic()) < end:
                database.write(count_up, durable=written[number] % 2 == 1)
                written[number] += 1
                longest[number] = max(longest[number], time.monotonic() - begun)
        except BaseException as error:
            failures.append(repr(error))

    database.row(READ_COUNT)
    ready.wait(60)
    end = time.monotonic() + seconds
    workers = [threading.Thread(target=run, args=(n, end)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    results.put((written, max(longest), failures))


@pytest.mark.parametrize(("processes", "threads"), [(4, 1), (2, 8), (1, 16)])
def test_every_writer_gets_its_turn_and_no_update_is_lost(
    db: Database, processes: int, threads: int
) -> None:
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(processes), context.Queue()
    crowd = [
        context.Process(
            target=writer_process, args=(db.path, threads, FAIR_SECONDS, ready, results)
        )
        for _ in range(processes)
    ]
    for process in crowd:
        process.start()
    found = [results.get(timeout=60) for _ in crowd]
    for process in crowd:
        process.join(30)
        assert process.exitcode == 0
    assert [failures for _, _, failures in found if failures] == []  # no `database is locked`
    shares = [written for each, _, _ in found for written in each]
    assert count_of(db) == sum(shares)
    assert min(shares) >= FAIR_SHARE * max(shares), shares
    assert max(longest for _, longest, _ in found) < 5.0


def test_several_processes_make_one_new_database_together(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from models import Database
        database = Database(Path(sys.argv[1]))
        database.migrate()
        for _ in range(25):
            database.write(lambda tx: tx.run(sys.argv[2]))
        """
    )
    path = tmp_path / "farebox.db"
    crowd = [
        subprocess.Popen([sys.executable, "-c", program, str(path), COUNT_UP], cwd=ROOT)
        for _ in range(4)
    ]
    assert [process.wait(60) for process in crowd] == [0, 0, 0, 0]
    database = Database(path)
    assert count_of(database) == 100
    database.close()


# Durability


class Flushes(apsw.VFS):
    """The file system, with a note of each write and flush, and a disk that may be full."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []
        self.room: int | None = None  # bytes that may still be written; None for no bound
        self._base = apsw.vfs_names()[0]
        super().__init__("flushes", self._base, makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _NotingFile(self, self._base, name, flags)

    def taken(self) -> list[str]:
        """What was done to the write-ahead log since this was last asked."""
        done = [what for name, what in self.notes if name.endswith("-wal")]
        self.notes.clear()
        return done


class _NotingFile(apsw.VFSFile):
    def __init__(self, vfs: Flushes, base: str, name: Any, flags: list[int]) -> None:
        super().__init__(base, name, flags)
        self._vfs = vfs
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name or "temporary"

    def xWrite(self, data: bytes, offset: int) -> None:
        room = self._vfs.room
        # Only the log fills up: an exception for the main file, which SQLite writes after a commit
        # and whose errors it then ignores, would reach the caller through apsw nevertheless.
        if room is not None and self._name.endswith("-wal"):
            if len(data) > room:
                # A full disk takes what still fits.
                super().xWrite(data[:room], offset)
                self._vfs.room = 0
                raise apsw.FullError("no space left on the device")
            self._vfs.room = room - len(data)
        self._vfs.notes.append((self._name, "write"))
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._vfs.notes.append((self._name, "flush"))
        super().xSync(flags)


@pytest.fixture
def disk() -> Iterator[Flushes]:
    """The file system under every database that is opened from now on."""
    vfs = Flushes()
    yield vfs
    vfs.unregister()


def test_a_durable_write_is_flushed_before_it_returns_and_another_is_not(
    disk: Flushes, tmp_path: Path
) -> None:
    database = Database(tmp_path / "farebox.db")
    database.migrate()
    database.write(count_up)
    disk.taken()
    for durable in (False, True, False, False, True, True, False):
        database.write(count_up, durable)
        done = disk.taken()
        assert "write" in done
        assert (done[-1] == "flush") == durable
        assert ("flush" in done) == durable
    database.close()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_shared_commit_is_flushed_when_one_of_its_jobs_is_durable(
    disk: Flushes, tmp_path: Path, position: int
) -> None:
    database = Database(tmp_path / "farebox.db")
    database.migrate()
    database.write(count_up)
    batch = Batch(database)
    disk.taken()
    for number in range(3):
        batch.add(count_up, durable=number == position)
    assert batch.finish() == [2, 3, 4]
    assert disk.taken()[-1] == "flush"
    database.close()


def test_a_durable_write_is_flushed_though_another_failed_in_its_commit(
    disk: Flushes, tmp_path: Path
) -> None:
    database = Database(tmp_path / "farebox.db")
    database.migrate()

    def fail(tx: Tx) -> None:
        raise errors.not_found()

    batch = Batch(database)
    batch.add(fail)
    batch.add(count_up, durable=True)
    disk.taken()
    assert batch.finish()[1] == 1
    done = disk.taken()
    assert done[-1] == "flush"
    database.close()


# How connections are set up


def test_every_pragma_is_in_force_on_readers_and_writers(db: Database) -> None:
    wanted = {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "trusted_schema": 0,
        "wal_autocheckpoint": 1000,
        "journal_size_limit": models.WAL_LIMIT_BYTES,
        "busy_timeout": 5000,
    }

    def read(tx: Tx) -> dict[str, Any]:
        return {name: tx.rows(f"PRAGMA {name}")[0][0] for name in (*wanted, "synchronous")}

    with db.reading() as tx:
        reader = read(tx)
        assert tx.row("PRAGMA query_only") == (1,)
    assert reader == wanted | {"synchronous": 2}
    assert db.write(read) == wanted | {"synchronous": 1}
    assert db.write(read, durable=True) == wanted | {"synchronous": 2}


@pytest.mark.parametrize(
    "broken", ["journal_mode", "synchronous", "foreign_keys", "trusted_schema"]
)
def test_a_pragma_that_does_not_take_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    class Deaf(apsw.Connection):
        def pragma(self, name: str, *args: Any, **options: Any) -> Any:
            return "off" if name == broken else super().pragma(name, *args, **options)

    database = Database(tmp_path / "farebox.db")
    monkeypatch.setattr(apsw, "Connection", Deaf)
    with pytest.raises(RuntimeError, match=broken):
        database.migrate()
    database.close()


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("3.40.1", False),
        ("3.51.2", False),
        ("3.9.3", False),
        ("3.51.3", True),
        ("3.54.1", True),
        ("4.0", True),
    ],
)
def test_a_sqlite_that_can_corrupt_a_shared_log_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, good: bool
) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: version)
    if good:
        Database(tmp_path / "farebox.db").close()
        return
    with pytest.raises(RuntimeError, match=version.replace(".", r"\.")):
        Database(tmp_path / "farebox.db")
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_may_read_the_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        database = Database(tmp_path / "farebox.db")
        database.migrate()
        database.write(count_up)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert set(modes) >= {"farebox.db", "farebox.db-wal", "farebox.db-shm"}
    assert set(modes.values()) == {0o600}
    database.close()


# Migrations


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of migrations that starts with the real ones, to add more to."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for step in models.MIGRATIONS.glob("*.sql"):
        (folder / step.name).write_text(step.read_text())
    monkeypatch.setattr(models, "MIGRATIONS", folder)
    return folder


def next_step(folder: Path, sql: str) -> Path:
    number = len(list(folder.iterdir())) + 1
    path = folder / f"{number:04}_of_a_test.sql"
    path.write_text(sql)
    return path


def schema(path: Path) -> tuple[int, list[str]]:
    connection = apsw.Connection(str(path))
    try:
        version = int(connection.pragma("user_version"))
        tables = connection.execute("SELECT name FROM sqlite_master ORDER BY name").fetchall()
        return version, [str(row[0]) for row in tables]
    finally:
        connection.close()


def test_a_new_database_gets_every_step_and_no_copy(steps: Path, tmp_path: Path) -> None:
    next_step(steps, "CREATE TABLE extra (id TEXT PRIMARY KEY);")
    database = Database(tmp_path / "farebox.db")
    database.migrate()
    version, names = schema(database.path)
    assert version == len(list(steps.iterdir()))
    assert {"account", "entry", "extra"} <= set(names)
    assert list(tmp_path.glob("*.before-*")) == []
    database.migrate()  # a second start changes nothing
    assert schema(database.path) == (version, names)
    database.close()


def test_an_upgrade_keeps_the_data_and_a_copy_from_before(steps: Path, tmp_path: Path) -> None:
    books = Books(tmp_path / "farebox.db")
    account = books.account(57)
    books.close()
    before = schema(tmp_path / "farebox.db")
    next_step(
        steps,
        "CREATE TABLE extra (n BIGINT); INSERT INTO extra SELECT balance FROM account"
        " WHERE balance > 0;",
    )
    upgraded = Books(tmp_path / "farebox.db")
    assert upgraded.standing(account) == (57, 0)
    assert upgraded.db.rows("SELECT n FROM extra") == [(57,)]
    assert upgraded.faults() == []
    copy = next(tmp_path.glob("farebox.db.before-*"))
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert schema(copy) == before
    assert models.check_database(copy) is None
    kept = Books.__new__(Books)
    kept.db = Database(copy)
    assert kept.standing(account) == (57, 0)
    kept.close()
    upgraded.close()


def test_a_newer_schema_is_refused_and_left_alone(steps: Path, tmp_path: Path) -> None:
    later = next_step(steps, "CREATE TABLE extra (n BIGINT);")
    database = Database(tmp_path / "farebox.db")
    database.migrate()
    later.unlink()
    before = schema(database.path)
    newer = models.latest_schema() + 1
    with pytest.raises(SchemaTooNew, match=f"schema {newer}"):
        database.migrate()
    assert schema(database.path) == before
    database.close()


@pytest.mark.parametrize(
    "broken",
    [
        "CREATE TABLE extra (n BIGINT); ALTER TABLE account ADD COLUMN extra BIGINT; SELEC 1;",
        "CREATE TABLE extra (n BIGINT); INSERT INTO extra VALUES (1); DROP TABLE nowhere;",
        "CREATE TABLE extra (n BIGINT); UPDATE account SET balance = -1;",
    ],
)
def test_a_step_that_fails_leaves_the_schema_as_it_was(
    steps: Path, tmp_path: Path, broken: str
) -> None:
    books = Books(tmp_path / "farebox.db")
    account = books.account(57)
    before = schema(books.db.path)
    bad = next_step(steps, broken)
    with pytest.raises(apsw.Error):
        books.db.migrate()
    assert schema(books.db.path) == before
    # The instance still works, and the repaired step goes through.
    assert books.add(account, "grant", 1) == (58, 0)
    bad.write_text("CREATE TABLE extra (n BIGINT);")
    books.db.migrate()
    assert schema(books.db.path)[0] == before[0] + 1
    assert books.standing(account) == (58, 0)
    assert books.faults() == []
    books.close()


def test_the_copy_from_before_survives_a_second_attempt(steps: Path, tmp_path: Path) -> None:
    """A service manager starts a failing upgrade again and again; the original must remain."""
    books = Books(tmp_path / "farebox.db")
    books.account(57)
    books.close()
    before = schema(books.db.path)
    next_step(steps, "CREATE TABLE extra (n BIGINT);")
    next_step(steps, "SELEC 1;")
    for _ in range(2):
        database = Database(tmp_path / "farebox.db")
        with pytest.raises(apsw.Error):
            database.migrate()
        database.close()
    copies = [schema(copy) for copy in tmp_path.glob("farebox.db.before-*")]
    assert before in copies


def test_two_processes_upgrade_once(steps: Path, tmp_path: Path) -> None:
    Books(tmp_path / "farebox.db").close()
    next_step(steps, "CREATE TABLE extra (n BIGINT); INSERT INTO extra VALUES (1);")
    databases = [Database(tmp_path / "farebox.db") for _ in range(4)]
    failures: list[BaseException] = []

    def run(database: Database) -> None:
        try:
            database.migrate()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert databases[0].rows("SELECT n FROM extra") == [(1,)]
    for database in databases:
        database.close()


# The write-ahead log


def wal_bytes(db: Database) -> int:
    path = db.path.with_name(db.path.name + "-wal")
    return path.stat().st_size if path.exists() else 0


BLOB = (
    "INSERT INTO idempotency VALUES ('a', :key, x'00', 'c', 'lost', 1, '', zeroblob(60000), 1)"
    " ON CONFLICT (account_id, key) DO UPDATE SET body = zeroblob(60000)"
)


COUNT_TO_TEN_THOUSAND = (
    "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)"
    " SELECT COUNT(*) FROM n"
)


@pytest.fixture
def readers(db: Database) -> Iterator[None]:
    """Four who read all the time, so that there is never a moment without a reader."""
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with db.snapshot() as tx:
                tx.rows("SELECT COUNT(*) FROM account")
                # A few milliseconds, as an audit or a page of the ledger takes.
                tx.rows(COUNT_TO_TEN_THOUSAND)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join(30)


def largest_log(db: Database, writes: int, checkpoint_every: int) -> int:
    """The most bytes the log had while so many answers of 60 kB were stored."""
    largest = 0
    for number in range(writes):
        db.write(lambda tx, number=number: tx.run(BLOB, {"key": str(number % 200)}))
        largest = max(largest, wal_bytes(db))
        if number % checkpoint_every == checkpoint_every - 1:
            db.checkpoint()
    return largest


@pytest.mark.usefixtures("readers")
def test_upkeep_keeps_the_log_below_64_megabytes_while_others_read(db: Database) -> None:
    assert largest_log(db, writes=2400, checkpoint_every=400) < 64 * 1024 * 1024
    db.checkpoint()
    db.write(count_up)
    assert wal_bytes(db) <= models.WAL_LIMIT_BYTES + 4 * 1024 * 1024


@pytest.mark.usefixtures("readers")
def test_the_log_stays_below_64_megabytes_between_two_rounds_of_upkeep(db: Database) -> None:
    """Between two rounds, five seconds apart, a busy instance writes 200 MB into its log."""
    assert largest_log(db, writes=2400, checkpoint_every=2400) < 64 * 1024 * 1024


@pytest.fixture
def long_reader(db: Database) -> Iterator[Callable[[], None]]:
    """Starts someone who looks at one moment of the database until the test is over."""
    stop = threading.Event()
    looking = threading.Event()

    def look() -> None:
        with db.snapshot() as tx:
            tx.rows("SELECT * FROM account")
            looking.set()
            stop.wait(60)

    thread = threading.Thread(target=look)

    def start() -> None:
        thread.start()
        assert looking.wait(30)

    yield start
    stop.set()
    thread.join(30)


def test_shortening_the_log_does_not_keep_writers_waiting(
    db: Database, long_reader: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup or an audit may read for minutes; paid calls must not wait for it."""
    monkeypatch.setattr(models, "WAL_LIMIT_BYTES", 64 * 1024)
    db.write(count_up)
    long_reader()
    while wal_bytes(db) <= models.WAL_LIMIT_BYTES:
        db.write(count_up)
    checkpoints = threading.Thread(target=db.checkpoint)
    checkpoints.start()
    slowest = 0.0
    while checkpoints.is_alive():
        begun = time.monotonic()
        db.write(count_up)
        slowest = max(slowest, time.monotonic() - begun)
    checkpoints.join(30)
    assert slowest < 1.0


def test_a_log_in_use_is_left_for_later(
    db: Database, long_reader: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    db.write(count_up)
    long_reader()
    while wal_bytes(db) <= 64 * 1024:
        db.write(count_up)
    before = count_of(db)
    real = apsw.Connection.wal_checkpoint

    class Impatient(apsw.Connection):
        def wal_checkpoint(self, *args: Any, **options: Any) -> Any:
            self.set_busy_timeout(10)  # the wait itself has a test of its own
            return real(self, *args, **options)

    monkeypatch.setattr(models, "WAL_LIMIT_BYTES", 64 * 1024)
    monkeypatch.setattr(apsw, "Connection", Impatient)
    db.checkpoint()
    assert count_of(db) == before
    assert db.write(count_up) == before + 1


# A full disk


def spend(books: Books, account: str) -> str:
    """One whole paid call of one credit; its id."""
    call_id = books.hold(account, 1)
    assert call_id is not None
    assert books.capture(call_id, 1, durable=True) is not None
    return call_id


@pytest.mark.parametrize("level", range(20))
def test_a_full_disk_loses_nothing_and_is_survived(
    disk: Flushes, tmp_path: Path, level: int
) -> None:
    """The disk fills up after so many bytes: within a frame, between frames, in a checkpoint."""
    books = Books(tmp_path / "farebox.db")
    account = books.account(100_000)
    assert books.db._writer is not None
    books.db._writer.pragma("wal_autocheckpoint", 40)
    for _ in range(level):
        spend(books, account)
    done = [row[0] for row in books.db.rows("SELECT id FROM call WHERE status = 'captured'")]
    disk.room = 17 + level * level * 1009
    refusals = 0
    for _ in range(1000):
        try:
            done.append(spend(books, account))
        except errors.Refusal as refusal:
            assert refusal.code == "storage_unavailable"
            assert refusal.kind.status == 503
            refusals += 1
            if refusals == 3:
                break
    assert refusals == 3, "the disk was never full"
    # Reading goes on, and shows every call that was acknowledged and no half of another.
    assert books.faults() == []
    captured = {row[0] for row in books.db.rows("SELECT id FROM call WHERE status = 'captured'")}
    assert captured == set(done)

    disk.room = None
    for _ in range(3):
        done.append(spend(books, account))
    assert books.faults() == []
    open_calls = books.db.rows("SELECT id FROM call WHERE status = 'held'")
    for (call_id,) in open_calls:
        assert books.void(call_id) is not None
    assert books.standing(account) == (100_000 - len(done), 0)
    books.close()
    assert models.check_database(tmp_path / "farebox.db") is None


@pytest.mark.parametrize("pages", [1, 2, 3, 5, 8])
def test_a_database_that_may_not_grow_says_so_and_grows_when_it_may(
    tmp_path: Path, pages: int
) -> None:
    books = Books(tmp_path / "farebox.db")
    account = books.account(100_000)
    writer = books.db._writer
    assert writer is not None
    largest = writer.pragma("max_page_count")
    writer.pragma("max_page_count", writer.pragma("page_count") + pages)
    done = 0
    while done < 10_000:
        try:
            spend(books, account)
        except errors.Refusal as refusal:
            assert refusal.code == "storage_unavailable"
            break
        done += 1
    assert done < 10_000
    assert books.faults() == []
    assert books.moved() == 100_000 - done
    writer.pragma("max_page_count", largest)
    spend(books, account)
    assert books.moved() == 100_000 - done - 1
    books.close()


LIMITED = textwrap.dedent(
    """
    import resource, signal, sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[2]]
    from test_ledger import Books
    from core import errors
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    books = Books(Path(sys.argv[1]) / "farebox.db")
    account = books.account(10_000)
    books.db._writer.pragma("wal_autocheckpoint", int(sys.argv[4]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
    done = 0
    try:
        while True:
            call_id = books.hold(account, 1)
            books.capture(call_id, 1, durable=True)
            done += 1
    except errors.Refusal as refusal:
        assert refusal.code == "storage_unavailable", refusal
    assert books.faults() == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    books.capture(books.hold(account, 1), 1, durable=True)
    assert books.faults() == []
    assert books.moved() == 10_000 - done - 1, (books.moved(), done)
    """
)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system has no RLIMIT_FSIZE")
@pytest.mark.parametrize("checkpoint", [10, 1000])  # the database fills up first, or its log
@pytest.mark.parametrize("level", [200_001, 300_000, 524_288])
def test_a_file_that_the_system_lets_grow_no_further_loses_nothing(
    tmp_path: Path, level: int, checkpoint: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(Path(__file__).parent), str(level),
         str(checkpoint)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_database_that_is_gone_is_trouble_and_not_a_wrong_answer(tmp_path: Path) -> None:
    (tmp_path / "farebox.db").write_bytes(b"this is not a database, but long enough to look" * 40)
    database = Database(tmp_path / "farebox.db")
    refused("storage_unavailable", lambda: database.row("SELECT 1 FROM account"))
    refused("storage_unavailable", lambda: database.write(count_up))
    database.close()


def test_a_database_that_is_closed_twice_closes_nobody_elses_file(tmp_path: Path) -> None:
    database = Database(tmp_path / "closed.db")
    database.write(lambda tx: tx.run("CREATE TABLE t (x)"))
    database.close()
    # Whoever opens files now gets the lowest numbers there are, those just closed among them.
    others = [os.open(tmp_path / str(number), os.O_CREAT | os.O_RDWR) for number in range(20)]
    database.close()
    for descriptor in others:
        assert os.write(descriptor, b"still mine") == 10
        os.close(descriptor)
