"""What the JSON endpoints share: who asks, what they sent, and how pages of rows look."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from flask import Response, request

from blueprints.bodies import read_body
from blueprints.rendering import (
    client_address,
    headers,
    instance,
    json_response,
    raw_path,
    raw_target,
    request_ids,
)
from core import access, clock, errors, strict_json
from core.access import Principal
from core.adapters import Inbound
from core.audit import Actor
from core.errors import Refusal
from core.session_tokens import Bearer
from core.sessions import Seat
from core.signed import requests as signed_requests
from models import Tx

T = TypeVar("T")
B = TypeVar("B", bound=msgspec.Struct)

MOST_PER_PAGE = 100
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_LARGEST_BODY = 64 * 1024


def reader(manages: bool = False) -> Principal:
    """Who is asking; its rate-limit headers go on the answer. Only a session token `manages`."""
    principal, rate = access.read(instance(), inbound(), client_address(request.environ), manages)
    if rate is not None:
        request.environ["farebox.rate_headers"] = rate.headers()
    return principal


def inbound() -> Inbound:
    """The request as it was sent; with its body, which is read for nobody else, if it is signed."""
    environ = request.environ
    found = headers(environ)
    return Inbound(
        request.method, raw_path(environ), environ.get("QUERY_STRING", ""), found,
        raw_body() if signed_requests.is_signed(found) else b"", request_ids(environ)[0],
        raw_target(environ),
    )  # fmt: skip


def manager() -> Principal:
    """The person who asks to see or change what only people may."""
    return reader(manages=True)


def act(principal: Principal, work: Callable[[Tx, Bearer, Actor, int], T]) -> T:
    """Do something for a person in one durable transaction, unless they may not any more."""
    by, now = Actor(str(principal.user_id), client_address(request.environ)), clock.now_ms()

    def transaction(tx: Tx) -> T:
        return work(tx, access.reassert(tx, principal), by, now)

    return instance().db.write(transaction, durable=True)


def require_owner(who: Bearer | Seat) -> None:
    """Raises `forbidden` for a member who tries what owners do."""
    if not who.is_owner:
        raise Refusal("forbidden", "Only an owner of the account may do that.")


def managing(shape: type[B]) -> tuple[Principal, B]:
    """The person who asks, and the body they sent: refused in the order in which the contract says
    what wins. Raises as `manager`, `raw_body` and `parsed` do."""
    raw = raw_body()
    return manager(), parsed(raw, shape)


def raw_body() -> bytes:
    """The request's body. Raises `body_too_large`, `unsupported_media_type`."""
    known: bytes | None = request.environ.get("farebox.body")
    if known is not None:  # it can be read once
        return known
    raw = request.environ["farebox.body"] = read_body(request.environ, _LARGEST_BODY)
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise Refusal("unsupported_media_type", "A body with a Content-Encoding is not accepted.")
    if raw and request.mimetype not in ("", "application/json"):
        raise Refusal("unsupported_media_type", "The body must be application/json.")
    return raw


def parsed(raw: bytes, shape: type[B]) -> B:
    """What a JSON body says; an empty one counts as `{}`. Raises `validation_error` for what is not
    of that shape, unknown fields included."""
    try:
        return strict_json.decode(raw or b"{}", shape)
    except strict_json.WrongShape as error:
        raise errors.invalid_body(f"{error}.", error.field) from None
    except strict_json.NotJson:
        raise errors.invalid_body("The body is not JSON.") from None


def named(changes: msgspec.Struct) -> dict[str, Any]:
    """What a PATCH names, `null` included."""
    return {
        name: value
        for name, value in msgspec.structs.asdict(changes).items()
        if value is not msgspec.UNSET
    }


def timestamp(text: str | None, param: str) -> int | None:
    """The milliseconds of an RFC 3339 time. Raises `validation_error`."""
    try:
        return None if text is None else clock.parse_rfc3339(text)
    except (ValueError, OverflowError):
        raise errors.invalid_body(
            "Expected a time such as 2027-01-31T00:00:00Z (RFC 3339).", param
        ) from None


def moment(text: str | None, param: str) -> int | None:
    """The milliseconds of an RFC 3339 time, or of a day, which is its first moment in UTC. Raises
    `validation_error`."""
    is_day = text is not None and _DAY.fullmatch(text)
    try:
        return timestamp(f"{text}T00:00:00Z" if is_day else text, param)
    except Refusal:
        raise errors.invalid_body(
            "Expected a day such as 2027-01-31, or a time such as 2027-01-31T00:00:00Z.", param
        ) from None


def window() -> tuple[int, int | None]:
    """How many rows are asked for, and after which: `limit` and `cursor` of the query."""
    limit = number("limit", MOST_PER_PAGE, default=50)
    assert limit is not None  # it has a default
    return limit, number("cursor", 10**15, default=None)


def page(rows: Sequence[tuple[int, dict[str, Any]]], limit: int) -> Response:
    """A page of numbered rows, of which `rows` has one more when there are more; the cursor is the
    number of the last one shown."""
    shown = rows[:limit]
    more = len(rows) > len(shown)
    return json_response(
        {
            "data": [row for _, row in shown],
            "has_more": more,
            "next_cursor": str(shown[-1][0]) if more else None,
        }
    )


def number(name: str, most: int, default: int | None, least: int = 1) -> int | None:
    """A whole number of the query. Raises `validation_error`."""
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII) or not least <= int(text) <= most:
        raise errors.invalid_body(f"`{name}` is a whole number from {least} to {most}.", name)
    return int(text)
