"""The paid call, on one screen: who → hold → send → capture or void → answer.

`serve` conducts, and every branch of the road is here. Nothing in this module moves credits itself.
"""

import errno
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from core import access, clock, errors, idempotency
from core.access import Principal
from core.adapters import Adapter, Answer, Inbound, Order
from core.adapters.forward import Forward
from core.adapters.sms import SmsAdapter
from core.admission import Admission, admit
from core.catalog import MIB, Route
from core.errors import Refusal
from core.idempotency import Stored
from core.instance import Instance
from core.ledger import NewCall, Outcome, Standing
from core.settlement import Settlement
from core.upstream import Reply

ADAPTERS: dict[str, Adapter] = {"forward": Forward(), "sms": SmsAdapter()}
# An answer up to this size is read whole before its first byte is passed on.
WHOLE_BYTES = MIB
# These speak of the operator's credentials upstream, which are not the caller's business.
_OPERATORS_FAULT = frozenset({401, 403, 407})
_NO_LIMIT = 10**9
_PIECE_BYTES = 16 * 1024
_QUERY = re.compile(r"[\x21-\x7e]*")


class Request(NamedTuple):
    """What arrived at the door."""

    id: str
    call_id: str  # ours alone; the same as `id` unless the caller chose that
    method: str
    path: str  # as it was sent, undecoded
    query: str
    headers: Mapping[str, str]  # by lower-case name
    client: str
    read_body: Callable[[int], bytes]  # raises `body_too_large` past so many bytes


@dataclass(slots=True)
class Reaction:
    """What goes back: a whole body, or an iterator whose `close` must be called in the end."""

    status: int
    headers: dict[str, str]
    body: bytes | Iterator[bytes]
    close: Callable[[], None] | None = None


def serve(instance: Instance, request: Request) -> Reaction:
    """Serve one request to a paid route. Raises Refusal for everything a client can be refused."""
    route = instance.catalog.match(request.method, request.path)
    adapter = ADAPTERS[route.adapter]
    inbound = _read(route, adapter, request)
    principal = access.identify(instance, request.headers, request.client)
    access.authorize(principal, route.scope)
    order, fault = _order(route, adapter, inbound)
    call = _call(instance, route, principal, request, order)
    most_calls = instance.settings.limits.concurrent_calls if principal.pays else _NO_LIMIT
    admission = instance.db.write(lambda tx: admit(tx, principal, call, fault, inbound, most_calls))
    rate_headers = {} if admission.rate is None else admission.rate.headers()
    try:
        if admission.refusal is not None:
            raise admission.refusal
        if admission.stored is not None:
            reaction = _replay(principal, admission, admission.stored)
        elif admission.held:
            reaction = _Road(instance, route, adapter, principal, call, order, inbound).travel()
        else:
            access.identify(instance, request.headers, request.client)  # raises what it is now
            raise errors.invalid_api_key()
    except Refusal as refusal:
        refusal.headers.update(rate_headers)
        raise
    reaction.headers.update(rate_headers)
    return reaction


def _read(route: Route, adapter: Adapter, request: Request) -> Inbound:
    """The request with its body. Raises `body_too_large`, `unsupported_media_type`."""
    body = request.read_body(route.body_bytes)
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal("unsupported_media_type", "A body with a Content-Encoding is not accepted.")
    adapter.check_media_type(request.headers.get("content-type", ""))
    return Inbound(request.method, request.path, request.query, request.headers, body, request.id)


def _order(route: Route, adapter: Adapter, inbound: Inbound) -> tuple[Order, Refusal | None]:
    """What is asked for. What is wrong with it is kept, to be said only after the rate limit."""
    try:
        if not _QUERY.fullmatch(inbound.query):
            raise errors.invalid_body("The query has characters that must be percent-encoded.")
        if inbound.method == "POST":
            idempotency.check_key(inbound.headers.get("idempotency-key"))
        return adapter.order(route, inbound), None
    except Refusal as fault:
        return Order(1), fault


def _call(
    instance: Instance, route: Route, principal: Principal, request: Request, order: Order
) -> NewCall:
    price = route.price(order.units)
    return NewCall(
        id=request.call_id,
        request_id=request.id,
        account_id=principal.account_id,
        payer=principal.payer,
        key_id=principal.key_id,
        user_id=principal.user_id,
        route=route.path,
        method=request.method,
        units=order.units,
        price=price,
        held=price if principal.pays else 0,
        incarnation=instance.incarnation(),
        created_at=clock.now_ms(),
        idempotency_key=(
            request.headers.get("idempotency-key") if request.method == "POST" else None
        ),
    )


def _replay(principal: Principal, admission: Admission, stored: Stored) -> Reaction:
    """The answer of an earlier call with the same Idempotency-Key; nothing is charged."""
    headers = dict(stored.headers) | {"Idempotent-Replayed": "true"}
    return Reaction(stored.status, headers | _charge(principal, 0, admission.standing), stored.body)


def _charge(principal: Principal, credits: int, standing: Standing | None) -> dict[str, str]:
    headers = {"X-Credits-Charged": str(credits)}
    if principal.pays and standing is not None:
        headers["X-Credits-Remaining"] = str(standing.available)
    return headers


class _Road(NamedTuple):
    """A held call on its way to the upstream and back. It ends settled, whatever happens."""

    instance: Instance
    route: Route
    adapter: Adapter
    principal: Principal
    call: NewCall
    order: Order
    inbound: Inbound

    def travel(self) -> Reaction:
        settlement = Settlement(self.instance, self.call.id)
        status: int | None = None
        try:
            outbound = self.adapter.outbound(self.route, self.inbound, self.order)
            reply = self.instance.send(self.route, outbound)
            status = reply.status
            try:
                return self._conclude(reply, settlement)
            except BaseException:
                reply.close()
                raise
        except BaseException as error:
            after = settlement.void(status)
            if isinstance(error, Refusal):
                error.headers.update(_charge(self.principal, 0, after))
            raise

    def _conclude(self, reply: Reply, settlement: Settlement) -> Reaction:
        if not 200 <= reply.status < 300:
            return self._refused(reply, settlement)
        empty = self.inbound.method == "HEAD" or reply.status == 204
        if not empty and self.adapter.streams(self.route, reply):
            return self._stream(reply, settlement, b"")
        most = self.adapter.most_bytes(self.route)
        body, whole = reply.read(WHOLE_BYTES if most is None else most)
        if not whole and most is None:
            return self._stream(reply, settlement, body)
        if not whole:
            raise errors.provider_error("The upstream's answer is too large to be priced.")
        answer = self.adapter.answer(self.route, self.order, reply, body)
        outcome = self._outcome(reply, answer)
        stored = Stored(answer.status, answer.headers, answer.body)
        resolved = settlement.capture(outcome.price, outcome, stored)
        charged, after = (0, None) if resolved is None else (resolved.captured, resolved.standing)
        headers = dict(answer.headers) | _charge(self.principal, charged, after)
        return Reaction(answer.status, headers, answer.body)

    def _refused(self, reply: Reply, settlement: Settlement) -> Reaction:
        """An upstream's 4xx goes back uncharged; every other failure is the provider's."""
        if not 400 <= reply.status < 500 or reply.status in _OPERATORS_FAULT:
            raise errors.provider_error(f"The upstream failed with status {reply.status}.")
        body, whole = reply.read(WHOLE_BYTES)
        if not whole:
            raise errors.provider_error("The upstream's refusal is too large to be passed on.")
        answer = self.adapter.refusal(self.route, self.order, reply, body)
        after = settlement.void(reply.status)
        headers = dict(answer.headers) | _charge(self.principal, 0, after)
        return Reaction(answer.status, headers, answer.body)

    def _stream(self, reply: Reply, settlement: Settlement, first: bytes) -> Reaction:
        answer = self.adapter.answer(self.route, self.order, reply, b"")
        headers = dict(answer.headers) | {"X-Credits-Held": str(self.call.held)}
        length = reply.headers.get("content-length", "")
        # With a transfer coding the length means nothing (RFC 9112, 6.3), and here would do harm.
        framed = "transfer-encoding" in reply.headers
        if length.isascii() and length.isdigit() and not framed:
            headers["Content-Length"] = length  # so that a client can tell that it was cut
        outcome = self._outcome(reply, answer)
        keeps = self.call.idempotency_key is not None
        chunks = reply.chunks()
        # An upstream that fails before its first byte is still answered with an error.
        first = first or next(chunks, b"")
        passage = _Passage(reply, chunks, settlement, first, outcome, answer.headers, keeps)
        return Reaction(reply.status, headers, passage.chunks(), passage.close)

    def _outcome(self, reply: Reply, answer: Answer) -> Outcome:
        """What a success will be charged and recorded as."""
        units = answer.units
        price, cost = self.route.price(units), self.route.cost(units)
        return Outcome(reply.status, None, units, price, answer.estimated, cost)


class _Passage:
    """A body passed on as it arrives, and charged when it ends, however that is."""

    def __init__(
        self, reply: Reply, chunks: Iterator[bytes], settlement: Settlement, first: bytes,
        outcome: Outcome, headers: list[tuple[str, str]], keeps: bool,
    ) -> None:  # fmt: skip
        self._reply = reply
        self._chunks = chunks
        self._settlement = settlement
        self._first = first
        self._outcome = outcome
        self._headers = headers
        self._kept: list[bytes] | None = [] if keeps else None
        self._kept_bytes = 0
        self._delivered = False
        self._complete = False

    def chunks(self) -> Iterator[bytes]:
        """The body. Whoever reads on has delivered what was read before."""
        try:
            for chunk in itertools.chain([self._first], self._chunks):
                self._note(chunk)
                for start, end in _cuts(len(chunk), alone=not self._delivered):
                    yield chunk[start:end]
                    self._delivered = True
        except Refusal as refusal:
            # The head is gone out, so the break can only be shown by breaking off too.
            raise ConnectionResetError(errno.ECONNRESET, refusal.message) from refusal
        self._complete = True

    def close(self) -> None:
        """Charge the price once a byte was delivered or the answer is complete; else nothing."""
        stored = None
        if self._complete and self._kept is not None:
            status = self._outcome.upstream_status or 200
            stored = Stored(status, self._headers, b"".join(self._kept))
        try:
            if self._complete or self._delivered:
                self._settlement.capture_sent(self._outcome.price, self._outcome, stored)
            else:
                self._settlement.void(self._outcome.upstream_status)
        finally:
            self._reply.close()

    def _note(self, chunk: bytes) -> None:
        """Keep a copy for repeats, as long as all of it is small enough."""
        if self._kept is not None:
            self._kept_bytes += len(chunk)
            if self._kept_bytes > idempotency.LARGEST_ANSWER:
                self._kept = None
            else:
                self._kept.append(chunk)


def _cuts(length: int, alone: bool) -> Iterator[tuple[int, int]]:
    """Where a piece is cut for sending, its first byte apart if it is to go `alone`.

    A piece counts as delivered when the server has sent all of it, so a large one would be free to
    a client that takes most of it and hangs up.
    """
    start = 0
    while start < length:
        end = min(length, start + (1 if alone and start == 0 else _PIECE_BYTES))
        yield start, end
        start = end
