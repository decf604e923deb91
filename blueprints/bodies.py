"""Reading a request's body whole, or refusing it, from clients that may send anything."""

import time
from collections.abc import Callable

from gunicorn.http.errors import ParseException
from werkzeug.wsgi import get_input_stream

from blueprints.rendering import Environ
from core import errors
from core.errors import Refusal

_CHUNK = 64 * 1024
# A body that is too large is read and thrown away up to here, because a client that is still
# sending would otherwise see its connection reset instead of the answer.
_DRAIN_BYTES = 32 * 1024 * 1024
_DRAIN_SECONDS = 10.0
_UPLOAD_SECONDS = 300.0


def read_body(environ: Environ, limit: int) -> bytes:
    """The request's body. Raises `body_too_large` past `limit` bytes, however it was sent.

    The stream is read until it is empty: a chunked body has no other end.
    """
    length = environ.get("CONTENT_LENGTH", "")
    declared = int(length) if length.isascii() and length.isdigit() else None
    if declared == 0:
        return b""
    receive = _receiver(environ)
    if declared is not None and declared > limit:
        raise _too_large(limit, receive, unread=declared)
    deadline = time.monotonic() + _UPLOAD_SECONDS
    parts: list[bytes] = []
    size = 0
    while size != declared and (part := receive(min(_CHUNK, limit + 1 - size))):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise _too_large(limit, receive, unread=None)
        if time.monotonic() > deadline:
            raise errors.invalid_body("The body did not arrive in time.")
    if declared is not None and size < declared:
        raise errors.invalid_body("The body is shorter than its Content-Length.")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _receiver(environ: Environ) -> Callable[[int], bytes]:
    """Reads parts of the body. A sender that stalls or breaks off gets a 400 if it listens."""
    stream = get_input_stream(environ)

    def receive(size: int) -> bytes:
        try:
            return stream.read(size)
        except (OSError, ParseException) as error:
            raise errors.invalid_body("The body did not arrive whole.") from error

    return receive


def _too_large(limit: int, receive: Callable[[int], bytes], unread: int | None) -> Refusal:
    if unread is None or unread <= _DRAIN_BYTES:
        deadline = time.monotonic() + _DRAIN_SECONDS
        drained = 0
        try:
            while drained <= _DRAIN_BYTES and time.monotonic() < deadline:
                part = receive(_CHUNK)
                if not part:
                    break
                drained += len(part)
        except Refusal:
            drained = 0  # the sender has stopped, which is as well
    return Refusal(
        "body_too_large",
        f"The body is larger than the {limit} bytes this route accepts.",
    )
