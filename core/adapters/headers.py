"""Which headers cross, in either direction: a safe few, and those the config names."""

from collections.abc import Iterable

from config import UpstreamSection
from core.adapters import Inbound
from core.upstream import Reply

_FORWARDED = ("accept", "accept-language", "content-type")
_RETURNED = (
    "content-type", "content-encoding", "content-language", "content-disposition", "retry-after",
)  # fmt: skip


def to_upstream(inbound: Inbound, upstream: UpstreamSection) -> list[tuple[str, str]]:
    """What an upstream learns of a request's headers, and what it is told besides."""
    names = [*_FORWARDED, *(name.lower() for name in upstream.forward_headers)]
    fixed = {name.lower() for name in upstream.headers}
    found = [
        (name, inbound.headers[name])
        for name in dict.fromkeys(names)
        if name in inbound.headers and name not in fixed
    ]
    if inbound.body and "content-type" not in inbound.headers and "content-type" not in fixed:
        found.append(("content-type", "application/json"))
    return [*found, ("X-Request-Id", inbound.request_id), *upstream.headers.items()]


def to_caller(reply: Reply, upstreams: Iterable[UpstreamSection]) -> list[tuple[str, str]]:
    """What a caller learns of an answer's headers; any of `upstreams` may have given it."""
    configured = [name.lower() for upstream in upstreams for name in upstream.return_headers]
    names = dict.fromkeys([*_RETURNED, *configured])
    return [(name.title(), reply.headers[name]) for name in names if name in reply.headers]
