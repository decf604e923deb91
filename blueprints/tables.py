"""Tables as CSV (RFC 4180), streamed: however long, only a piece of one is in memory."""

import csv
import io
import re
import threading
from collections.abc import Iterable, Iterator, Sequence

from flask import Response

from core.errors import Refusal

Cell = str | int | bool | None

# At once in this process: each keeps a thread for as long as its reader takes.
_downloads = threading.BoundedSemaphore(4)
_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # of formulas; the last four are wide letters
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?", re.ASCII)


def csv_response(
    name: str, columns: Sequence[str], rows: Iterable[list[Sequence[Cell]]]
) -> Response:
    """An answer that downloads as `name`; `rows` come in batches. Raises `overloaded`."""
    if not _downloads.acquire(blocking=False):
        told = "Too many tables are being downloaded at this moment."
        raise Refusal("overloaded", told, headers={"Retry-After": "10"})
    answer = Response(_lines(columns, rows), mimetype="text/csv")
    answer.call_on_close(_downloads.release)
    answer.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return answer


def _lines(columns: Sequence[str], batches: Iterable[list[Sequence[Cell]]]) -> Iterator[str]:
    yield _text([columns])
    for batch in batches:
        yield _text(batch)


def _text(rows: Iterable[Sequence[Cell]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def _harmless(cell: Cell) -> Cell:
    """A cell as the API writes it, which no spreadsheet takes for a formula (OWASP, CSV
    injection)."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, str) and cell.startswith(_STARTS):
        return cell if _NUMBER.fullmatch(cell) else f"'{cell}"
    return cell
