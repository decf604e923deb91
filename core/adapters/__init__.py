"""What a route speaks with its caller, whatever its upstream speaks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from core.catalog import Route
from core.upstream import Outbound, Reply


class Inbound(NamedTuple):
    """A caller's request to a paid route: parsed, trusted in nothing."""

    method: str
    path: str  # as it was sent, undecoded
    query: str
    headers: Mapping[str, str]  # by lower-case name
    body: bytes
    request_id: str


class Order(NamedTuple):
    """What a request asks for, priced at most."""

    units: int
    details: Any = None


@dataclass(slots=True)
class Answer:
    """What goes back to the caller."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    units: int = 1  # what it turned out to be, for a charged answer
    estimated: bool = False


class Adapter(Protocol):
    """A way of speaking: reads a request, writes the upstream's, reads its answer."""

    def check_media_type(self, content_type: str) -> None:
        """Raises `unsupported_media_type`."""

    def order(self, route: Route, inbound: Inbound) -> Order:
        """What the request asks for. Raises `validation_error`."""

    def outbound(self, route: Route, inbound: Inbound, order: Order) -> Outbound:
        """The request the upstream gets."""

    def streams(self, route: Route, reply: Reply) -> bool:
        """Whether a successful answer is passed on as it arrives."""

    def most_bytes(self, route: Route) -> int | None:
        """How large an answer read whole may be; None when a larger one is streamed instead."""

    def answer(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        """The caller's answer from an upstream's success. Raises `provider_error`."""

    def refusal(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        """The caller's answer from an upstream's 4xx; not charged. May raise a Refusal instead."""
