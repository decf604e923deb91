"""The adapter that passes requests and answers through as they are."""

import math

from config import UpstreamSection
from core.adapters import Answer, Charge, Inbound, Order, Receipt, Refused, headers
from core.catalog import Route, units_in_header, units_in_json
from core.errors import Refusal
from core.upstream import Outbound, Reply

STREAMED = ("text/event-stream", "application/x-ndjson")
LARGEST_JSON = 8 * 1024 * 1024


class AsItComes:
    """Implements `Course`: bytes that are passed on unread, for a price that is known before.

    It is charged once a byte was delivered or the answer is complete.
    """

    beat_seconds = math.inf  # what the bytes mean is unknown, so nothing can be said in between
    ended = spoken_out = False

    def __init__(
        self, headers: list[tuple[str, str]], framing: dict[str, str], charge: Charge
    ) -> None:
        self.headers = headers
        self.framing = framing
        self.delivered = 0
        self._charge = charge

    def pass_on(self, chunk: bytes) -> bytes:
        return chunk

    def end(self) -> bytes:
        return b""

    def sent(self, part: int, of: int) -> None:
        self.delivered = 1

    def charge(self, complete: bool) -> Charge | None:
        return self._charge if complete or self.delivered else None

    def last_words(self, receipt: Receipt | None) -> bytes:
        return b""

    def apology(self, refusal: Refusal, request_id: str) -> bytes:
        return b""


class Forward:
    """Implements `Adapter`."""

    def check_media_type(self, content_type: str) -> None:
        """Every type is passed on."""

    def order(self, route: Route, inbound: Inbound) -> Order:
        route.target(inbound.path)  # a path that is not passed on is refused before it is priced
        units = route.most_units
        return Order(units, route.price(units), (route.upstream,))

    def outbound(
        self, route: Route, inbound: Inbound, order: Order, upstream: UpstreamSection
    ) -> Outbound:
        query = f"?{inbound.query}" if inbound.query else ""
        return Outbound(
            inbound.method,
            route.url(inbound.path) + query,
            headers.to_upstream(inbound, upstream),
            inbound.body,
            upstream.timeout_seconds,
            upstream.max_seconds,
        )

    def course(
        self, route: Route, order: Order, reply: Reply, too_large: bool
    ) -> "AsItComes | None":
        media_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        streams = too_large or media_type in STREAMED
        if not streams or self.most_bytes(route) is not None:
            return None
        answer = self.answer(route, order, reply, b"")
        return AsItComes(answer.headers, _framing(reply), answer.charge)

    def most_bytes(self, route: Route) -> int | None:
        from_json = route.units is not None and route.units.from_ == "json"
        return LARGEST_JSON if from_json else None

    def answer(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        units = 1
        estimated = False
        if route.units is not None:
            found = (
                units_in_json(route.units, body)
                if route.units.from_ == "json"
                else units_in_header(
                    route.units, reply.headers.get((route.units.name or "").lower())
                )
            )
            units, estimated = (1, True) if found is None else (found, False)
        charge = Charge(units, route.price(units), estimated, route.cost(units))
        return Answer(reply.status, headers.to_caller(reply, order.upstreams), body, charge)

    def refusal(self, route: Route, order: Order, reply: Reply, body: bytes) -> Refused:
        return Refused(headers.to_caller(reply, order.upstreams), body)


def _framing(reply: Reply) -> dict[str, str]:
    """The length of an answer that is passed on, so that a client can tell that it was cut."""
    length = reply.headers.get("content-length", "")
    # With a transfer coding the length means nothing (RFC 9112, 6.3), and here would do harm.
    framed = "transfer-encoding" in reply.headers
    sound = length.isascii() and length.isdigit() and not framed
    return {"Content-Length": length} if sound else {}
