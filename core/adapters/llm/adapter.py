"""The adapter of one of OpenAI's endpoints; `request.py` says what sets them apart."""

import dataclasses
import threading

import msgspec

from config import UpstreamSection
from core import errors
from core.adapters import Answer, Inbound, Order, Refused, headers
from core.adapters.llm.answer import (
    Mask,
    charge,
    content_bytes,
    error_in,
    error_of,
    fields_of,
    read,
    usage_in,
)
from core.adapters.llm.course import ModelCourse
from core.adapters.llm.request import Read, Wish, parse, raw
from core.catalog import MIB, Route
from core.upstream import Outbound, Reply

LARGEST_ANSWER = 32 * MIB
# A body is many times its size while it is read, so large ones are not all read at once.
_reading = threading.BoundedSemaphore(2)
_JSON = "application/json"
_EVENTS = "text/event-stream"


class LlmAdapter:
    """Implements `Adapter`."""

    def __init__(self, read_request: Read) -> None:
        self._read = read_request

    def check_media_type(self, content_type: str) -> None:
        if content_type.partition(";")[0].strip().lower() not in ("", _JSON):
            raise errors.Refusal("unsupported_media_type", "Send application/json.")

    def order(self, route: Route, inbound: Inbound) -> Order:
        if len(inbound.body) <= MIB:
            return _order(self._read(parse(inbound.body), route.models))
        with _reading:
            return _order(self._read(parse(inbound.body), route.models))

    def outbound(
        self, route: Route, inbound: Inbound, order: Order, upstream: UpstreamSection
    ) -> Outbound:
        wish: Wish = order.details
        told = {"accept": _EVENTS if wish.streams else _JSON, "content-type": _JSON}
        inbound = inbound._replace(headers={**inbound.headers, **told})
        return Outbound(
            "POST",
            route.url(inbound.path, upstream),
            headers.to_upstream(inbound, upstream),
            wish.body(wish.model.upstream_id),
            upstream.timeout_seconds,
            upstream.max_seconds,
        )

    def course(
        self, route: Route, order: Order, reply: Reply, too_large: bool
    ) -> ModelCourse | None:
        media_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        wish: Wish = order.details
        if not wish.streams or media_type != _EVENTS:
            return None
        if reply.headers.get("content-encoding", "identity").lower() != "identity":
            raise errors.provider_error("The upstream's answer is encoded, which was not asked.")
        return ModelCourse(_headers(order, reply, f"{_EVENTS}; charset=utf-8"), wish)

    def most_bytes(self, route: Route) -> int | None:
        return LARGEST_ANSWER

    def answer(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        wish: Wish = order.details
        fields = fields_of(body)
        if fields is None or error_in(fields) is not None:
            raise errors.provider_error("The upstream's answer is none.")
        usage = usage_in(fields)
        delivered = content_bytes(read(fields.get("choices")))
        embeds = wish.tokens_each is None and bool(read(fields.get("data")))
        if usage is None and not delivered and not embeds:
            raise errors.provider_error("The upstream's answer is empty.")
        if "model" in fields:
            fields["model"] = raw(wish.model.id)
        return Answer(
            reply.status,
            _headers(order, reply, _JSON),
            msgspec.json.encode(fields),
            charge(wish, usage, delivered),
        )

    def refusal(self, route: Route, order: Order, reply: Reply, body: bytes) -> Refused:
        wish: Wish = order.details
        fields = fields_of(body) or {}
        otherwise = f"The upstream refused the request with status {reply.status}."
        told = {name: read(value) for name, value in fields.items()}
        told["error"] = error_in(fields, otherwise) or error_of(fields, otherwise)
        told = Mask(wish.model).clean(told)
        return Refused(_headers(order, reply, _JSON), msgspec.json.encode(told))


def _headers(order: Order, reply: Reply, content_type: str) -> list[tuple[str, str]]:
    found = dict(headers.to_caller(reply, order.upstreams))
    found.pop("Content-Encoding", None)
    found["Content-Type"] = content_type
    wish: Wish = order.details
    if wish.lowered:
        found["X-Max-Tokens-Clamped"] = str(wish.tokens_each)
    return list(found.items())


def _order(wish: Wish) -> Order:
    may_be_less = wish.tokens_each is not None and not wish.names_limit
    return Order(
        1,
        wish.price,
        wish.model.upstreams,
        wish,
        wish.model.id,
        (lambda credits: _order(_within(wish, credits))) if may_be_less else None,
    )


def _within(wish: Wish, credits: int) -> Wish:
    """The same wish for as much output as `credits` pay for, if that is any and less."""
    if wish.price <= credits:
        return wish
    tokens = wish.model.affordable(credits, wish.input_tokens)
    each = 0 if tokens is None else tokens // wish.choices
    if each < 1:
        return wish
    return dataclasses.replace(wish, tokens_each=each, lowered=True)
