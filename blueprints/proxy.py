"""The paid routes: a request in, `gateway.serve`, an answer out.

A WSGI application in front of Flask's, because what Flask does for a request costs as much as what
the ledger does, and a paid call needs none of it.
"""

import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from gunicorn.http.errors import ParseException
from werkzeug.wsgi import ClosingIterator, get_input_stream

from blueprints import cors
from blueprints.rendering import (
    Environ,
    check_host,
    client_address,
    finishing,
    headers,
    raw_path,
    refusal,
    request_ids,
    unexpected,
)
from core import errors, gateway
from core.errors import Refusal
from core.gateway import Reaction
from core.instance import Instance

Wsgi = Callable[[Environ, Any], Iterable[bytes]]

_CHUNK = 64 * 1024
# A body that is too large is read and thrown away up to here, because a client that is still
# sending would otherwise see its connection reset instead of the answer.
_DRAIN_BYTES = 32 * 1024 * 1024
_DRAIN_SECONDS = 10.0
_UPLOAD_SECONDS = 300.0
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class PaidRoutes:
    """Serves what is in the catalog; everything else goes on to `otherwise`."""

    def __init__(self, instance: Instance, otherwise: Wsgi) -> None:
        self._instance = instance
        self._otherwise = otherwise

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        # The path as it was sent is what counts, so no other spelling of it is the same route.
        if not self._instance.catalog.methods_at(raw_path(environ)):
            return self._otherwise(environ, start_response)
        reaction = self._react(environ)
        found = reaction.headers
        found.update(finishing(self._instance, environ, found.get("Content-Type")))
        found.update(cors.sharing(self._instance, environ))
        found["Cache-Control"] = "no-store"
        body = reaction.body
        silent = environ["REQUEST_METHOD"] == "HEAD" or reaction.status == 204
        if isinstance(body, bytes) and not silent:
            found["Content-Length"] = str(len(body))
        status = _STATUS_LINES.get(reaction.status, f"{reaction.status} Unknown")
        start_response(status, list(found.items()))
        if isinstance(body, bytes):
            return [] if silent else [body]
        return ClosingIterator(body, reaction.close)

    def _react(self, environ: Environ) -> Reaction:
        """The answer, whatever happens."""
        try:
            check_host(self._instance, environ)
            permission = cors.preflight(self._instance, environ)
            if permission is not None:
                return Reaction(204, dict(permission), b"")
            request_id, call_id = request_ids(environ)
            return gateway.serve(
                self._instance,
                gateway.Request(
                    request_id, call_id, environ["REQUEST_METHOD"], raw_path(environ),
                    environ.get("QUERY_STRING", ""), headers(environ), client_address(environ),
                    lambda limit: read_body(environ, limit),
                ),
            )  # fmt: skip
        except Refusal as why:
            return Reaction(*refusal(self._instance, environ, why))
        except Exception as error:
            return Reaction(*refusal(self._instance, environ, unexpected(environ, error)))


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
