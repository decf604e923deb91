"""Server-sent events, taken apart as they arrive (WHATWG HTML, 9.2.5 and 9.2.6)."""

import re
from typing import NamedTuple

from core import errors

LARGEST_EVENT = 8 * 1024 * 1024
_BREAK = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """What stood between two empty lines. `data` is None when there were only other fields."""

    name: bytes
    data: bytes | None


class Parser:
    """Takes bytes as they come, however they are cut, and gives whole events."""

    def __init__(self) -> None:
        self._line: list[bytes] = []  # the beginning of a line that has not ended
        self._name = b""
        self._data: list[bytes] = []
        self._any = False
        self._size = 0
        self._after_cr = False
        self._started = False

    def feed(self, data: bytes) -> list[Event]:
        """The events that are complete. Raises `provider_error` for one of unreasonable size."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]  # the second half of a line's end
            self._after_cr = False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        first, *others = _BREAK.split(data)
        self._line.append(first)
        self._size += len(first)
        found = []
        for line in others:
            event = self._end_line()
            if event is not None:
                found.append(event)
                self._size = 0
            self._line = [line]
            self._size += len(line)
        if self._size > LARGEST_EVENT:
            raise errors.provider_error("An event of the upstream's answer is too large.")
        return found

    def finish(self) -> list[Event]:
        """What came without an empty line after it, at the end of a whole answer."""
        event = self._end_line() or self._dispatch()
        return [] if event is None else [event]

    def _end_line(self) -> Event | None:
        line, self._line = b"".join(self._line), []
        if not self._started:
            line, self._started = line.removeprefix(_BOM), True
        if not line:
            return self._dispatch()
        self._any = True
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value
        return None

    def _dispatch(self) -> Event | None:
        """The event that an empty line completes; None when there was nothing before it."""
        if not self._any:
            return None
        event = Event(self._name, b"\n".join(self._data) if self._data else None)
        self._name, self._data, self._any = b"", [], False
        return event
