"""One file with all of an instance: database, config, generated secrets. And back again."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import apsw

from config import FILE_NAME, Settings
from core import clock, incarnation, ledger, session_tokens, sessions, signing
from models import Database, Tx, check_database, flush, latest_schema

DATABASE = "farebox.db"
MANIFEST = "MANIFEST.json"  # the SHA-256 of every other member; the last, so a cut shows
_FIRST_WITH_SESSIONS = 2  # schema
_LARGEST_SMALL_FILE = 1024 * 1024


class BackupError(Exception):
    """A backup or restore that did not happen, and why; nothing was changed."""


def _is_saved(name: str) -> bool:
    """Whether a file belongs to an instance besides its database: config, secrets, PEM files."""
    known = name in (FILE_NAME, "secret_key", signing.FILE_NAME) or name.endswith(".pem")
    return known and not name.startswith(".")


def _small_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and _is_saved(path.name))


def verify_copy(path: Path) -> str | None:
    """What is wrong with a copy of the database, as a file and as books; None when nothing is."""
    fault = check_database(path)
    if fault is not None:
        return fault
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        if connection.pragma("user_version") > latest_schema():
            return "it was written by a later version of Farebox"
        _, faults = ledger.verify(Tx(connection))
    except apsw.Error as error:
        return str(error)
    finally:
        connection.close()
    return faults[0] if faults else None


def backup(db: Database, settings: Settings, target: Path) -> None:
    """Write a verified backup, 0600, while others write. Raises BackupError."""
    if target.exists():
        raise BackupError(f"{target} exists already")
    for path in _small_files(settings.folder):
        if path.stat().st_size > _LARGEST_SMALL_FILE:
            raise BackupError(f"{path} is too large for a backup")
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".farebox-") as scratch:
        copy = Path(scratch) / DATABASE
        db.backup(copy)
        fault = verify_copy(copy)
        if fault is not None:
            raise BackupError(f"the copy is not sound: {fault}")
        draft = Path(scratch) / "backup.tar"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with (
            os.fdopen(handle, "wb") as file,
            tarfile.open(
                # What a link names is saved, not the link, which would mean nothing elsewhere.
                fileobj=file,
                mode="w",
                dereference=True,
            ) as archive,
        ):
            files = {DATABASE: copy} | {path.name: path for path in _small_files(settings.folder)}
            for name, path in files.items():
                archive.add(path, name)
            sums = json.dumps({name: _sum(path) for name, path in files.items()}).encode()
            entry = tarfile.TarInfo(MANIFEST)
            entry.size = len(sums)
            archive.addfile(entry, io.BytesIO(sums))
        flush(draft)
        os.link(draft, target)  # never over a file that came meanwhile
    flush(target)


def restore(folder: Path, source: Path) -> Path | None:
    """Put an instance back from a backup; the folder what it replaced was moved to, if any. Nobody
    is signed in afterwards.

    Raises BackupError while a worker of this instance runs, and for a backup that is not sound.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if incarnation.any_alive(folder / "workers"):
        raise BackupError("the server is running; stop it first")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".restore-") as scratch:
        new = Path(scratch)
        _extract(source, new)
        fault = verify_copy(new / DATABASE)
        if fault is not None:
            raise BackupError(f"{source} is not sound: {fault}")
        _end_sign_ins(new / DATABASE)
        replaced = [folder / path.name for path in new.iterdir() if (folder / path.name).exists()]
        # A log left beside the old database would be played back into the new one.
        replaced += [path for path in folder.glob(f"{DATABASE}-*") if path not in replaced]
        if incarnation.any_alive(folder / "workers"):  # unpacking takes a while
            raise BackupError("the server was started meanwhile; stop it first")
        aside = None
        if replaced:
            aside = Path(tempfile.mkdtemp(dir=folder, prefix="before-restore-"))
            for path in replaced:
                path.rename(aside / path.name)
        for path in sorted(new.iterdir()):
            path.chmod(0o600)
            path.rename(folder / path.name)
            flush(folder / path.name)
    return aside


def _end_sign_ins(copy: Path) -> None:
    """End every session and token in a copy: those that were ended after it was made would live
    again, and nobody could tell which."""
    connection = apsw.Connection(str(copy))
    try:
        if connection.pragma("user_version") >= _FIRST_WITH_SESSIONS:
            with connection:
                tx, now = Tx(connection), clock.now_ms()
                sessions.end_every(tx, now)
                session_tokens.end_every(tx, now)
    finally:
        connection.close()


def _extract(source: Path, target: Path) -> None:
    """Unpack only plain files with the names a backup has."""
    try:
        with tarfile.open(source, "r:") as archive:
            for member in archive:
                name = member.name
                known = name in (DATABASE, MANIFEST) or _is_saved(name)
                if not member.isfile() or not known or "/" in name:
                    raise BackupError(f"{source} holds {name!r}, which no backup does")
                if name != DATABASE and member.size > _LARGEST_SMALL_FILE:
                    raise BackupError(f"{name} in {source} is too large")
                content = archive.extractfile(member)
                assert content is not None  # it is a plain file
                with content, (target / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise BackupError(f"{source} cannot be read as a backup: {error}") from error
    _check_manifest(source, target)


def _check_manifest(source: Path, target: Path) -> None:
    """Raises BackupError unless exactly what was backed up is there, to the byte."""
    manifest = target / MANIFEST
    if not manifest.exists():
        raise BackupError(f"{source} has no manifest; it may have been cut short")
    found = {path.name: _sum(path) for path in target.iterdir() if path != manifest}
    try:
        wanted = json.loads(manifest.read_bytes())
    except ValueError as error:
        raise BackupError(f"the manifest of {source} cannot be read") from error
    if found != wanted or not {DATABASE, FILE_NAME, "secret_key"} <= set(found):
        raise BackupError(f"{source} does not hold what its manifest says")
    manifest.unlink()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
