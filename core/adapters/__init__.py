"""What a route speaks with its caller, whatever its upstream speaks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from config import UpstreamSection
from core.catalog import Route
from core.errors import Refusal
from core.upstream import Outbound, Reply


class Inbound(NamedTuple):
    """A caller's request to a paid route: parsed, trusted in nothing."""

    method: str
    path: str  # as it was sent, undecoded
    query: str
    headers: Mapping[str, str]  # by lower-case name
    body: bytes
    request_id: str
    target: str = ""  # path and query as they stood in the request line, for who has signed them


class Order(NamedTuple):
    """What a request asks for, priced at most."""

    units: int
    price: int  # credits
    upstreams: tuple[UpstreamSection, ...]  # the first, then those that stand in for it
    details: Any = None
    model: str | None = None  # as the caller named it
    # The same for less, if less than its price can be spent; None when it cannot be less.
    fit: "Callable[[int], Order] | None" = None


class Charge(NamedTuple):
    """What an answer turned out to cost. The order of the fields is that of `ledger.Outcome`."""

    units: int
    price: int  # credits
    estimated: bool = False
    cost_usd: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class Answer(NamedTuple):
    """What goes back to the caller."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    charge: Charge


class Refused(NamedTuple):
    """An upstream's 4xx, as the caller gets it."""

    headers: list[tuple[str, str]]
    body: bytes


class Receipt(NamedTuple):
    """What a call was charged, None while the database cannot take it; and what is left, None
    where nobody pays."""

    charged: int | None
    remaining: int | None


class Course(Protocol):
    """A streamed answer on its way to the caller: what of it goes on, and what it comes to."""

    headers: list[tuple[str, str]]
    framing: dict[str, str]  # headers that belong to this passage, not to a repeat of the answer
    beat_seconds: float  # the longest silence the caller gets
    delivered: int  # so much has reached the caller, in whatever the price is about
    ended: bool  # whether nothing that still comes matters

    @property
    def spoken_out(self) -> bool:
        """Whether all is said but how much it was."""

    def pass_on(self, chunk: bytes) -> bytes:
        """What goes on of a chunk; of an empty one, what is said in a silence."""

    def end(self) -> bytes:
        """What is left to go on at the end of a whole answer."""

    def sent(self, part: int, of: int) -> None:
        """So many bytes of what was last passed on have been sent."""

    def charge(self, complete: bool) -> Charge | None:
        """What it costs if no more is sent; None when that is nothing."""

    def last_words(self, receipt: Receipt | None) -> bytes:
        """What is said after the charge, which is None when there was none."""

    def apology(self, refusal: Refusal, request_id: str) -> bytes:
        """What is said when the upstream has broken off."""


class Adapter(Protocol):
    """A way of speaking: reads a request, writes the upstream's, reads its answer."""

    def check_media_type(self, content_type: str) -> None:
        """Raises `unsupported_media_type`."""

    def order(self, route: Route, inbound: Inbound) -> Order:
        """What the request asks for. Raises `validation_error`, `model_not_found`."""

    def outbound(
        self, route: Route, inbound: Inbound, order: Order, upstream: UpstreamSection
    ) -> Outbound:
        """The request the upstream gets."""

    def course(self, route: Route, order: Order, reply: Reply, too_large: bool) -> Course | None:
        """How a successful answer is passed on as it arrives; None when it is read whole. It may be
        asked again for one that is `too_large` for that, if `most_bytes` is None."""

    def most_bytes(self, route: Route) -> int | None:
        """How large an answer read whole may be; None when a larger one is streamed instead."""

    def answer(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        """The caller's answer from an upstream's success. Raises `provider_error`."""

    def refusal(self, route: Route, order: Order, reply: Reply, body: bytes) -> Refused:
        """The caller's answer from an upstream's 4xx; not charged. May raise a Refusal instead."""
