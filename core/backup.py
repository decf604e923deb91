"""One file with all of an instance: database, config, generated secrets. And back again."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import apsw

from config import FILE_NAME, Settings
from core import incarnation, ledger
from models import Database, Tx, check_database, flush

DATABASE = "farebox.db"
_LARGEST_SMALL_FILE = 1024 * 1024


class BackupError(Exception):
    """A backup or restore that did not happen, and why; nothing was changed."""


def _small_files(folder: Path) -> list[Path]:
    """What belongs to an instance besides its database: the config, the secret, PEM files."""
    return sorted(
        path for path in folder.iterdir()
        if path.is_file() and (path.name in (FILE_NAME, "secret_key") or path.suffix == ".pem")
    )  # fmt: skip


def verify_copy(path: Path) -> str | None:
    """What is wrong with a copy of the database, as a file and as books; None when nothing is."""
    fault = check_database(path)
    if fault is not None:
        return fault
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
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
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".farebox-") as scratch:
        copy = Path(scratch) / DATABASE
        db.backup(copy)
        fault = verify_copy(copy)
        if fault is not None:
            raise BackupError(f"the copy is not sound: {fault}")
        draft = Path(scratch) / "backup.tar"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(copy, DATABASE)
            for path in _small_files(settings.folder):
                archive.add(path, path.name)
        flush(draft)
        os.link(draft, target)  # never over a file that came meanwhile
    flush(target)


def restore(folder: Path, source: Path) -> Path | None:
    """Put an instance back from a backup; the folder what it replaced was moved to, if any.

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
        replaced = [folder / path.name for path in new.iterdir() if (folder / path.name).exists()]
        # A log left beside the old database would be played back into the new one.
        replaced += [path for path in folder.glob(f"{DATABASE}-*") if path not in replaced]
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


def _extract(source: Path, target: Path) -> None:
    """Unpack only plain files with the names a backup has."""
    try:
        with tarfile.open(source, "r:") as archive:
            for member in archive:
                name = member.name
                known = name in (DATABASE, FILE_NAME, "secret_key") or name.endswith(".pem")
                if not member.isfile() or not known or "/" in name or name.startswith("."):
                    raise BackupError(f"{source} holds {name!r}, which no backup does")
                if name != DATABASE and member.size > _LARGEST_SMALL_FILE:
                    raise BackupError(f"{name} in {source} is too large")
                content = archive.extractfile(member)
                assert content is not None  # it is a plain file
                with content, (target / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BackupError(f"{source} cannot be read as a backup: {error}") from error
    if not (target / DATABASE).exists():
        raise BackupError(f"{source} holds no database")
