"""Backup and restore: one sound file, and back again; whatever is not one changes nothing."""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import StartFarebox
from server import Farebox
from test_ledger import Books, new_call

import config
import models
from core import backup, incarnation, ledger, tokens, upkeep
from core.backup import BackupError
from core.instance import Instance
from models import Tx

CONFIG = '[upstreams.demo]\nkind = "sandbox"\n'


def instance_in(folder: Path, text: str = CONFIG) -> Instance:
    folder.mkdir(exist_ok=True)
    (folder / config.FILE_NAME).write_text(text)
    (folder / "secret_key").write_text(tokens.new_secret() + "\n")
    (folder / "secret_key").chmod(0o600)
    made = Instance(config.load({"FAREBOX_INSTANCE": str(folder)}))
    made.db.migrate()
    return made


def books_of(instance: Instance) -> Books:
    made = Books.__new__(Books)
    made.db = instance.db
    return made


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    made = instance_in(tmp_path / "instance")
    yield made
    made.db.close()


@pytest.fixture
def saved(instance: Instance, tmp_path: Path) -> Path:
    """A backup of an instance with one account of 57 credits, 5 of them spent, 2 held."""
    books = books_of(instance)
    account = books.account(57)
    books.captured_call(account, 5)
    books.hold(account, 2)
    target = tmp_path / "backup.tar"
    backup.backup(instance.db, instance.settings, target)
    return target


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as opened:
        return {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr]


def write_tar(path: Path, content: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def look(folder: Path) -> Books:
    """The books of a folder that was restored."""
    return Books(folder / "farebox.db")


# There and back


def test_a_backup_holds_database_config_and_secret_for_its_owner_alone(
    instance: Instance, saved: Path
) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    found = members(saved)
    folder = instance.settings.folder
    assert set(found) == {"farebox.db", "farebox.toml", "secret_key", "MANIFEST.json"}
    assert found["farebox.toml"] == (folder / "farebox.toml").read_bytes()
    assert found["secret_key"] == (folder / "secret_key").read_bytes()
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_a_backup_is_restored_into_another_folder(
    instance: Instance, saved: Path, tmp_path: Path
) -> None:
    target = tmp_path / "elsewhere"
    assert backup.restore(target, saved) is None
    assert set(snapshot(target)) == {"farebox.db", "farebox.toml", "secret_key"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    restored = look(target)
    assert restored.faults() == []
    old = instance.db.rows("SELECT * FROM entry ORDER BY id")
    assert restored.db.rows("SELECT * FROM entry ORDER BY id") == old
    (name,) = next(iter(restored.db.rows("SELECT id FROM account WHERE balance > 0")))
    assert restored.standing(name) == (52, 2)
    settings = config.load({"FAREBOX_INSTANCE": str(target)})
    assert settings.secret_key == instance.settings.secret_key
    restored.close()


def test_what_a_restore_replaces_is_kept_aside(
    instance: Instance, saved: Path, tmp_path: Path
) -> None:
    other = instance_in(tmp_path / "other", CONFIG + "# another\n")
    account = books_of(other).account(3)
    other.db.close()
    before = (tmp_path / "other" / "secret_key").read_bytes()
    aside = backup.restore(tmp_path / "other", saved)
    assert aside is not None and aside.parent == tmp_path / "other"
    assert (aside / "secret_key").read_bytes() == before
    kept = look(aside)
    assert kept.standing(account) == (3, 0)
    kept.close()
    assert (tmp_path / "other" / "farebox.toml").read_text() == CONFIG


def test_a_backup_under_load_is_one_sound_moment(instance: Instance, tmp_path: Path) -> None:
    books = books_of(instance)
    accounts = [books.account(10_000) for _ in range(4)]
    stop = threading.Event()
    failures: list[BaseException] = []
    paid = [0] * len(accounts)

    def spend(number: int) -> None:
        try:
            while not stop.is_set():
                call_id = books.hold(accounts[number], 1)
                assert call_id
                if paid[number] % 3 == 2:
                    books.void(call_id)
                else:
                    books.capture(call_id, 1, durable=True)
                paid[number] += 1
        except BaseException as error:
            failures.append(error)

    spenders = [threading.Thread(target=spend, args=(n,)) for n in range(len(accounts))]
    for spender in spenders:
        spender.start()
    try:
        for number in range(5):
            already = books.moved()
            target = tmp_path / f"backup-{number}.tar"
            backup.backup(instance.db, instance.settings, target)
            folder = tmp_path / f"restored-{number}"
            backup.restore(folder, target)
            restored = look(folder)
            assert restored.faults() == []
            # All that was acknowledged before the backup began is in it.
            assert restored.moved() <= already
            restored.close()
    finally:
        stop.set()
        for spender in spenders:
            spender.join(30)
    assert failures == []
    assert min(paid) > 0
    assert books.faults() == []


def test_a_backup_never_writes_over_a_file(instance: Instance, saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(BackupError, match="exists already"):
        backup.backup(instance.db, instance.settings, saved)
    assert saved.read_bytes() == before


def test_books_that_do_not_add_up_are_not_backed_up(instance: Instance, tmp_path: Path) -> None:
    books_of(instance).account(5)
    instance.db.write(lambda tx: tx.run("UPDATE account SET balance = 6 WHERE balance = 5"))
    with pytest.raises(BackupError, match="not sound"):
        backup.backup(instance.db, instance.settings, tmp_path / "backup.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["instance"]


def linked_config(folder: Path) -> None:
    real = folder.parent / "managed-elsewhere.toml"
    (folder / config.FILE_NAME).rename(real)
    (folder / config.FILE_NAME).symlink_to(real)


def linked_certificate(folder: Path) -> None:
    (folder.parent / "live.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (folder / "issuer.pem").symlink_to(folder.parent / "live.pem")


def one_certificate_twice(folder: Path) -> None:
    (folder / "a.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    os.link(folder / "a.pem", folder / "b.pem")


def hidden_certificate(folder: Path) -> None:
    (folder / ".old.pem").write_text("-----BEGIN CERTIFICATE-----\n")


def large_bundle(folder: Path) -> None:
    (folder / "bundle.pem").write_bytes(b"x" * (1024 * 1024 + 1))


@pytest.mark.parametrize(
    "arrange",
    [
        linked_config,
        linked_certificate,
        one_certificate_twice,
        hidden_certificate,
        large_bundle,
    ],
    ids=lambda arrange: arrange.__name__,
)
def test_whatever_was_backed_up_can_be_restored(
    instance: Instance, tmp_path: Path, arrange: Callable[[Path], None]
) -> None:
    folder = instance.settings.folder
    arrange(folder)
    target = tmp_path / "backup.tar"
    try:
        backup.backup(instance.db, instance.settings, target)
    except BackupError:
        return  # refusing at once is as good
    backup.restore(tmp_path / "elsewhere", target)
    restored = tmp_path / "elsewhere" / config.FILE_NAME
    assert not restored.is_symlink()
    assert restored.read_bytes() == (folder / config.FILE_NAME).read_bytes()


# Refused, with nothing changed


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Path]:
    """The folder of another instance, which the test's restore must leave exactly as it is."""
    other = instance_in(tmp_path / "other", CONFIG + "# another\n")
    books_of(other).account(3)
    other.db.close()
    folder = tmp_path / "other"
    before = snapshot(folder)
    outside = snapshot_outside(tmp_path)
    yield folder
    assert snapshot(folder) == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert snapshot_outside(tmp_path) - outside <= {"evil.tar", "backup.tar", "restored"}


def snapshot_outside(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()}


def refuse(folder: Path, archive: Path) -> None:
    with pytest.raises(BackupError):
        backup.restore(folder, archive)


EVIL: dict[str, Callable[[], tarfile.TarInfo]] = {}


def evil(name: str, **fields: Any) -> Callable[[], tarfile.TarInfo]:
    def make() -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        for field_name, value in fields.items():
            setattr(member, field_name, value)
        return member

    EVIL[f"{name!r} {fields}"] = make
    return make


for bad_name in (
    "../farebox.toml",
    "/nowhere/evil.pem",
    "./farebox.toml",
    "sub/secret_key",
    "..",
    "..pem",
    ".pem",
    "farebox.db-wal",
    "writer.lock",
    "workers/inc_1",
    "evil.py",
    "a\\..\\b.pem\x00",
    "zero\x00byte.pem",
):
    evil(bad_name)
evil("secret_key", type=tarfile.SYMTYPE, linkname="/etc/passwd")
evil("cert.pem", type=tarfile.LNKTYPE, linkname="farebox.db")
evil("cert.pem", type=tarfile.FIFOTYPE)
evil("cert.pem", type=tarfile.CHRTYPE)
evil("cert.pem", type=tarfile.DIRTYPE)


@pytest.mark.parametrize("which", [*EVIL])
def test_an_archive_with_anything_else_in_it_is_refused(
    saved: Path, unchanged: Path, tmp_path: Path, which: str
) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as made:
        member = EVIL[which]()
        for name, data in members(saved).items():
            if name != member.name:
                whole = tarfile.TarInfo(name)
                whole.size = len(data)
                made.addfile(whole, io.BytesIO(data))
        if member.isfile():
            member.size = 4
            if "\x00" in member.name:
                member.pax_headers = {"path": member.name}
        made.addfile(member, io.BytesIO(b"evil"))
    refuse(unchanged, archive)


def test_a_small_file_that_is_huge_is_refused(saved: Path, unchanged: Path, tmp_path: Path) -> None:
    content = members(saved) | {"farebox.toml": b"#" * (2 * 1024 * 1024)}
    write_tar(tmp_path / "evil.tar", content)
    refuse(unchanged, tmp_path / "evil.tar")


@pytest.mark.parametrize("missing", ["farebox.db", "farebox.toml", "secret_key"])
def test_an_archive_without_all_a_backup_has_is_refused(
    saved: Path, unchanged: Path, tmp_path: Path, missing: str
) -> None:
    """Restored, it would pair one instance's database with another's config or secret."""
    content = members(saved)
    del content[missing]
    write_tar(tmp_path / "evil.tar", content)
    refuse(unchanged, tmp_path / "evil.tar")


def unsound_database(kind: str, tmp_path: Path, good: bytes) -> bytes:
    path = tmp_path / "unsound" / "farebox.db"
    path.parent.mkdir()
    path.write_bytes(good)
    if kind == "empty":
        return b""
    if kind == "not a database":
        return b"not a database at all, though long enough to look at" * 100
    if kind == "cut":
        return good[: len(good) // 2]
    if kind == "another database":
        path.unlink()
    connection = apsw.Connection(str(path))
    if kind == "books that do not add up":
        connection.execute("UPDATE account SET balance = balance + 1 WHERE balance > 0")
    elif kind == "another database":
        connection.execute("CREATE TABLE of_another_program (n)")
    elif kind == "an index that lies":
        connection.pragma("writable_schema", True)
        connection.execute("DELETE FROM sqlite_master WHERE name = 'entry_of_key'")
    connection.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    "kind",
    ["empty", "not a database", "cut", "another database", "books that do not add up",
     "an index that lies"],
)  # fmt: skip
def test_a_database_that_is_not_sound_is_refused(
    saved: Path, unchanged: Path, tmp_path: Path, kind: str
) -> None:
    content = members(saved)
    content["farebox.db"] = unsound_database(kind, tmp_path, content["farebox.db"])
    write_tar(tmp_path / "evil.tar", content)
    for path in sorted((tmp_path / "unsound").iterdir()):
        path.unlink()
    (tmp_path / "unsound").rmdir()
    refuse(unchanged, tmp_path / "evil.tar")


def test_a_database_of_a_later_version_is_refused(
    saved: Path, unchanged: Path, tmp_path: Path
) -> None:
    """It would be put in place, and then the server would refuse to start on it."""
    later = tmp_path / "backup.db"
    later.write_bytes(members(saved)["farebox.db"])
    connection = apsw.Connection(str(later))
    connection.pragma("user_version", 9999)
    connection.close()
    write_tar(tmp_path / "evil.tar", members(saved) | {"farebox.db": later.read_bytes()})
    later.unlink()
    refuse(unchanged, tmp_path / "evil.tar")


def test_a_truncated_backup_is_refused_wherever_it_was_cut(
    saved: Path, unchanged: Path, tmp_path: Path
) -> None:
    whole = saved.read_bytes()
    with tarfile.open(saved) as opened:
        edges = [member.offset for member in opened] + [member.offset_data for member in opened]
        end = max(member.offset_data + member.size for member in opened)
    cuts = {0, 1, 511, 512, *edges, *(edge + 1 for edge in edges), end - 1}
    cuts |= set(range(0, end, max(1, end // 20)))
    archive = tmp_path / "evil.tar"
    accepted = []
    for cut in sorted(cut for cut in cuts if cut < end):
        archive.write_bytes(whole[:cut])
        try:
            backup.restore(tmp_path / "restored", archive)
        except BackupError:
            continue
        accepted.append(cut)
    assert accepted == [], f"of {end} bytes"


def test_a_damaged_backup_is_refused_or_restored_sound(
    saved: Path, unchanged: Path, tmp_path: Path
) -> None:
    """Damage is told as a BackupError, never as another exception, and never gives bad books."""
    whole = saved.read_bytes()
    chance = random.Random(11)
    with tarfile.open(saved) as opened:
        headers = [member.offset for member in opened]
    archive, folder = tmp_path / "evil.tar", tmp_path / "restored"
    refusals = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.choice(headers) + chance.randrange(512)
            if chance.random() < 0.5:
                at = chance.randrange(len(whole))
            damaged[at] = chance.choice((0, 0xFF, 0x80, chance.randrange(256)))
        archive.write_bytes(damaged)
        try:
            backup.restore(folder, archive)
        except BackupError:
            refusals += 1
        else:
            assert backup.verify_copy(folder / "farebox.db") is None
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert refusals > 20


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"\x1f\x8b" + b"0" * 2000])
def test_a_file_that_is_no_archive_is_refused(
    unchanged: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "evil.tar").write_bytes(content)
    refuse(unchanged, tmp_path / "evil.tar")


def test_a_restore_is_refused_while_a_worker_lives(
    saved: Path, unchanged: Path, tmp_path: Path
) -> None:
    worker = incarnation.Incarnation(unchanged / "workers")
    with pytest.raises(BackupError, match="running"):
        backup.restore(unchanged, saved)
    worker.end()
    (unchanged / "workers").rmdir()


def test_a_restore_goes_ahead_when_the_workers_are_dead(saved: Path, tmp_path: Path) -> None:
    """The file of a worker that was killed is there; nobody locks it."""
    folder = tmp_path / "other"
    instance_in(folder).db.close()
    (folder / "workers").mkdir()
    (folder / "workers" / "inc_dead").touch()
    assert backup.restore(folder, saved) is not None


# What must not leak in


def test_a_stale_log_is_not_played_into_the_restored_database(
    instance: Instance, saved: Path
) -> None:
    """A server that was killed leaves a log with commits that belong to the old database."""
    books = books_of(instance)
    (account,) = next(iter(instance.db.rows("SELECT id FROM account WHERE balance > 0")))
    books.add(account, "grant", 1000)
    folder = instance.settings.folder
    log = (folder / "farebox.db-wal").read_bytes()
    assert len(log) > 4096
    shared = (folder / "farebox.db-shm").read_bytes()
    instance.db.close()
    del instance.db._local.tx  # closes the reading connection too, as the end of a process does
    (folder / "farebox.db-wal").write_bytes(log)
    (folder / "farebox.db-shm").write_bytes(shared)
    aside = backup.restore(folder, saved)
    assert aside is not None
    assert {path.name for path in aside.iterdir()} >= {"farebox.db", "farebox.db-wal"}
    restored = look(folder)
    assert restored.standing(account) == (52, 2)
    assert restored.faults() == []
    restored.close()
    instance.db._lock = os.open(folder / "writer.lock", os.O_RDWR)  # the fixture closes it again


def test_the_holds_in_a_backup_are_voided_after_the_restore(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    backup.restore(folder, saved)
    restored = Instance(config.load({"FAREBOX_INSTANCE": str(folder)}))
    assert upkeep.void_orphans(restored) == 1
    assert restored.db.rows("SELECT SUM(held) FROM account") == [(0,)]
    restored.db.close()


# By command, on an instance that runs


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox) -> Farebox:
    return start_farebox()


def test_a_running_server_is_backed_up_and_never_restored_over(
    box: Farebox, tmp_path: Path
) -> None:
    """Before its first paid call too: no worker has held anything yet."""
    made = box.run_flask("backup", str(tmp_path / "backup.tar"))
    assert made.stdout.strip() == f"wrote {tmp_path / 'backup.tar'}"
    refused = box.run_flask("restore", str(tmp_path / "backup.tar"), may_fail=True)
    assert refused.returncode == 1
    assert "running" in refused.stderr
    assert list(box.instance.glob("before-restore-*")) == []


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Farebox]:
    """An instance that never started, for its commands alone."""
    made = Farebox()
    yield made
    made._remove()


def test_a_restore_by_command_brings_everything_back(stopped: Farebox, tmp_path: Path) -> None:
    email, _ = stopped.account(credits=57)
    stopped.flask("backup", str(tmp_path / "backup.tar"))
    stopped.flask("credits", "grant", email, "1000")
    stopped.flask("restore", str(tmp_path / "backup.tar"))
    assert stopped.flask("credits", "balance", email) == "57"
    stopped.ledger_ok()


def test_a_restore_by_command_works_when_the_database_is_broken(
    stopped: Farebox, tmp_path: Path
) -> None:
    """That is what a backup is for."""
    email, _ = stopped.account(credits=57)
    stopped.flask("backup", str(tmp_path / "backup.tar"))
    (stopped.instance / "farebox.db").write_bytes(b"not a database any more" * 1000)
    done = stopped.run_flask("restore", str(tmp_path / "backup.tar"), may_fail=True)
    assert done.returncode == 0, done.stderr[-600:]
    assert stopped.flask("credits", "balance", email) == "57"


def test_a_calls_record_and_its_key_come_back_as_they_were(
    instance: Instance, tmp_path: Path
) -> None:
    books = books_of(instance)
    account = books.account(9)
    call = new_call(account, 3, key_id="key_1", idempotency_key="k")
    guard = ledger.Guard("TRUE", {})

    def work(tx: Tx) -> None:
        assert ledger.hold(tx, call, guard, 10)

    instance.db.write(work)
    backup.backup(instance.db, instance.settings, tmp_path / "backup.tar")
    backup.restore(tmp_path / "elsewhere", tmp_path / "backup.tar")
    restored = look(tmp_path / "elsewhere")
    same = "SELECT * FROM call"
    assert restored.db.rows(same) == instance.db.rows(same)
    assert models.check_database(tmp_path / "elsewhere" / "farebox.db") is None
    restored.close()
