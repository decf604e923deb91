"""The paid routes: a request in, `gateway.serve`, an answer out."""

import time

from flask import Blueprint, Response, request

from blueprints.rendering import client_address, headers, instance, raw_path, request_ids
from core import errors, gateway
from core.errors import Refusal

blueprint = Blueprint("proxy", __name__)

_CHUNK = 64 * 1024
# A body that is too large is read and thrown away up to here, because a client that is still
# sending would otherwise see its connection reset instead of the answer.
_DRAIN_BYTES = 32 * 1024 * 1024
_DRAIN_SECONDS = 10.0
_UPLOAD_SECONDS = 300.0


class PaidResponse(Response):
    """An answer whose headers are the upstream's and ours: Flask adds no type of its own."""

    default_mimetype = None
    automatically_set_content_length = False  # which would be wrong for HEAD (RFC 9110, 8.6)


@blueprint.before_app_request
def pay() -> Response | None:
    """Whatever Flask has no view for is a paid route, or nothing at all."""
    if request.url_rule is not None or getattr(request.routing_exception, "code", None) == 405:
        return None
    environ = request.environ
    request_id, call_id = request_ids(environ)
    reaction = gateway.serve(
        instance(),
        gateway.Request(
            request_id, call_id, environ["REQUEST_METHOD"], raw_path(environ),
            environ.get("QUERY_STRING", ""),
            headers(environ), client_address(environ), read_body,
        ),
    )  # fmt: skip
    response = PaidResponse(reaction.body, reaction.status, reaction.headers)
    if isinstance(reaction.body, bytes) and environ["REQUEST_METHOD"] != "HEAD":
        response.content_length = len(reaction.body)
    if reaction.close is not None:
        response.call_on_close(reaction.close)
    return response


def read_body(limit: int) -> bytes:
    """The request's body. Raises `body_too_large` past `limit` bytes, however it was sent.

    The stream is read until it is empty, because Werkzeug would cut a chunked body at its limit
    and say nothing.
    """
    declared = request.content_length
    if declared == 0:
        return b""
    if declared is not None and declared > limit:
        raise _too_large(limit, unread=declared)
    deadline = time.monotonic() + _UPLOAD_SECONDS
    parts: list[bytes] = []
    size = 0
    while size != declared and (chunk := _receive(min(_CHUNK, limit + 1 - size))):
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise _too_large(limit, unread=None)
        if time.monotonic() > deadline:
            raise errors.invalid_body("The body did not arrive in time.")
    if declared is not None and size < declared:
        raise errors.invalid_body("The body is shorter than its Content-Length.")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _receive(size: int) -> bytes:
    """The next part of the body. A sender that stalls or breaks off gets a 400 if it listens."""
    try:
        part: bytes = request.stream.read(size)
    except OSError as error:
        raise errors.invalid_body("The body did not arrive whole.") from error
    return part


def _too_large(limit: int, unread: int | None) -> Refusal:
    if unread is None or unread <= _DRAIN_BYTES:
        deadline = time.monotonic() + _DRAIN_SECONDS
        drained = 0
        while drained <= _DRAIN_BYTES and time.monotonic() < deadline:
            chunk = _receive(_CHUNK)
            if not chunk:
                break
            drained += len(chunk)
    return Refusal(
        "body_too_large",
        f"The body is larger than the {limit} bytes this route accepts.",
        headers={"Connection": "close"},
    )
