"""The paid call, on one screen: who → hold → send → capture or void → answer.

`serve` conducts, and every branch of the road is here. Nothing in this module moves credits itself.
"""

import errno
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from config import UpstreamSection
from core import access, clock, errors, idempotency, ledger, limits
from core.access import Principal
from core.adapters import Adapter, Charge, Course, Inbound, Order, Receipt, llm
from core.adapters.forward import Forward
from core.adapters.sms import SmsAdapter
from core.admission import Admission, admit, admit_paid
from core.catalog import MIB, Route
from core.errors import Refusal
from core.idempotency import Stored
from core.instance import Instance
from core.ledger import NewCall, Outcome, Resolved, Standing
from core.payments.claims import Tender
from core.payments.till import Till
from core.settlement import Settlement
from core.upstream import Reply, Unreached

log = logging.getLogger("farebox.gateway")

ADAPTERS: dict[str, Adapter] = {
    "forward": Forward(),
    "sms": SmsAdapter(),
    "chat": llm.CHAT,
    "completions": llm.COMPLETIONS,
    "embeddings": llm.EMBEDDINGS,
}
# An answer up to this size is read whole before its first byte is passed on.
WHOLE_BYTES = MIB
# These speak of the operator's credentials upstream, which are not the caller's business.
_OPERATORS_FAULT = frozenset({401, 403, 407})
_LARGE_BODY = 64 * 1024  # reading one costs more than asking for the rate first
# So long the upstream's count is waited for when a caller has left after the last word.
_HEAR_OUT_SECONDS = 1.0
# So long the end of an answer is waited for that has said that it is over.
_LINGER_SECONDS = 0.1
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
    caller: int | None = None  # the socket the answer goes to
    target: str = ""  # path and query as they stood in the request line


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
    till: Till | None = None
    if route.x402 and instance.desk is not None:
        least, about = route.least_price, f"One call of {route.path}"
        till = Till(instance, instance.desk, inbound, request.client, "call", least, about)
        principal = till.principal(lambda: _order(route, adapter, inbound))
    else:
        principal = access.identify(instance, inbound, request.client)
    access.authorize(principal, route)
    order = _too_soon(instance, principal, inbound) or _order(route, adapter, inbound)
    if isinstance(order, Order) and order.model is not None:
        access.authorize_model(principal, order.model)
    call = _call(instance, route, principal, request, order)
    most_calls = instance.settings.limits.concurrent_calls if principal.pays else ledger.NO_LIMIT
    tender = None if till is None else till.tender(principal, order, call.idempotency_key)
    admission = instance.db.write(
        lambda tx: admit(tx, principal, call, order, inbound, most_calls, tender),
        durable=isinstance(tender, Tender),
    )
    rate_headers = {} if admission.rate is None else admission.rate.headers()
    try:
        if till is not None:
            admission = _settle(till, admission, principal, most_calls)
        if admission.refusal is not None:
            raise admission.refusal
        if admission.stored is not None:
            reaction = _replay(principal, admission, admission.stored)
        elif admission.held is not None:
            call, order = admission.held
            reaction = _Road(
                instance, route, adapter, principal, call, order, inbound, request.caller
            ).travel()
        else:
            access.identify(instance, inbound, request.client)  # raises what it is now
            raise errors.invalid_api_key()
    except Refusal as refusal:
        refusal.headers.update(rate_headers)
        if till is not None:
            till.refuse(refusal, order)
        raise
    except Exception as error:
        if till is None or not till.was_paid:
            raise
        log.exception("a paid call failed (%s)", request.id)
        why = Refusal("internal_error", "Something went wrong here.")
        till.refuse(why, order)
        raise why from error
    reaction.headers.update(rate_headers)
    if till is not None:
        reaction.headers.update(till.headers(reaction.status))
    return reaction


def _settle(till: Till, admission: Admission, principal: Principal, most_calls: int) -> Admission:
    """The admission of a call whose payment was claimed, once that is settled."""
    claimed = admission.claimed
    if claimed is None:
        till.paid_by(admission.payment)
        return admission
    return till.collect(
        claimed.record,
        lambda tx, paid, now: admit_paid(tx, principal, claimed, paid, most_calls, now),
    )


def _read(route: Route, adapter: Adapter, request: Request) -> Inbound:
    """The request with its body. Raises `body_too_large`, `unsupported_media_type`."""
    body = request.read_body(route.body_bytes)
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal("unsupported_media_type", "A body with a Content-Encoding is not accepted.")
    adapter.check_media_type(request.headers.get("content-type", ""))
    return Inbound(
        request.method, request.path, request.query, request.headers, body, request.id,
        request.target,
    )  # fmt: skip


def _too_soon(instance: Instance, principal: Principal, inbound: Inbound) -> Refusal | None:
    """Whether the rate limit will refuse a large body anyway, so that nobody's refusals cost much.

    Counted is the attempt in the transaction, as every other.
    """
    if len(inbound.body) <= _LARGE_BODY or principal.rate_limit is None:
        return None
    subject, now = principal.rate_subject, clock.now_ms()
    rate = limits.look_at_rate(instance.db, subject, principal.rate_limit, now)
    return rate.refusal() if rate.exceeded else None


def _order(route: Route, adapter: Adapter, inbound: Inbound) -> Order | Refusal:
    """What is asked for, or what is wrong with it, to be said only after the rate limit."""
    try:
        if not _QUERY.fullmatch(inbound.query):
            raise errors.invalid_body("The query has characters that must be percent-encoded.")
        if inbound.method == "POST":
            idempotency.check_key(inbound.headers.get("idempotency-key"))
        return adapter.order(route, inbound)
    except Refusal as fault:
        return fault


def _call(
    instance: Instance, route: Route, principal: Principal, request: Request,
    order: Order | Refusal,
) -> NewCall:  # fmt: skip
    units, price, model = 1, 0, None  # of one that is refused
    if isinstance(order, Order):
        units, price, model = order.units, order.price, order.model
    return NewCall(
        id=request.call_id,
        request_id=request.id,
        account_id=principal.account_id,
        payer=principal.payer,
        key_id=principal.key_id,
        user_id=principal.user_id,
        route=route.path,
        method=request.method,
        units=units,
        price=price,
        held=price if principal.pays else 0,
        incarnation=instance.incarnation(),
        created_at=clock.now_ms(),
        idempotency_key=(
            request.headers.get("idempotency-key") if request.method == "POST" else None
        ),
        model=model,
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
    caller: int | None

    def travel(self) -> Reaction:
        settlement = Settlement(self.instance, self.call.id)
        status: int | None = None
        try:
            reply = self._send()
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

    def _send(self) -> Reply:
        """The answer of the first upstream, or of one that stands in for it."""
        *firsts, last = self.order.upstreams
        for upstream in firsts:
            try:
                reply = self._send_to(upstream)
            except Unreached:
                continue
            if reply.status != 429 and reply.status < 500:
                return reply
            reply.close()
        return self._send_to(last)

    def _send_to(self, upstream: UpstreamSection) -> Reply:
        outbound = self.adapter.outbound(self.route, self.inbound, self.order, upstream)
        return self.instance.send(upstream, outbound)

    def _conclude(self, reply: Reply, settlement: Settlement) -> Reaction:
        if not 200 <= reply.status < 300:
            return self._refused(reply, settlement)
        if self.inbound.method != "HEAD" and reply.status != 204:
            course = self.adapter.course(self.route, self.order, reply, too_large=False)
            if course is not None:
                return self._stream(reply, settlement, course, None)
        most = self.adapter.most_bytes(self.route)
        body, whole = reply.read(WHOLE_BYTES if most is None else most)
        if not whole:
            course = self.adapter.course(self.route, self.order, reply, too_large=True)
            if course is None:
                raise errors.provider_error("The upstream's answer is too large to be priced.")
            return self._stream(reply, settlement, course, body)
        answer = self.adapter.answer(self.route, self.order, reply, body)
        outcome = _outcome(reply, answer.charge)
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
        refused = self.adapter.refusal(self.route, self.order, reply, body)
        after = settlement.void(reply.status)
        headers = dict(refused.headers) | _charge(self.principal, 0, after)
        return Reaction(reply.status, headers, refused.body)

    def _stream(
        self, reply: Reply, settlement: Settlement, course: Course, first: bytes | None
    ) -> Reaction:
        held = {"X-Credits-Held": str(self.call.held)}
        headers = dict(course.headers) | course.framing | held
        chunks = reply.chunks(course.beat_seconds, self.caller)
        if first is None:
            # An upstream that fails before its first byte is still answered with an error.
            first = next(chunks, None)
        arriving = itertools.chain([] if first is None else [first], chunks)
        passage = _Passage(
            self.instance, reply, arriving, settlement, course, self.principal, self.call
        )
        return Reaction(reply.status, headers, passage.chunks(), passage.close)


def _outcome(reply: Reply, charge: Charge) -> Outcome:
    """What a success is charged and recorded as."""
    return Outcome(reply.status, None, *charge)


class _Passage:
    """A body passed on as it arrives, and charged when it ends, however that is."""

    def __init__(
        self, instance: Instance, reply: Reply, chunks: Iterator[bytes], settlement: Settlement,
        course: Course, principal: Principal, call: NewCall,
    ) -> None:  # fmt: skip
        self._instance = instance
        self._reply = reply
        self._chunks = chunks
        self._settlement = settlement
        self._course = course
        self._principal = principal
        self._call = call
        self._kept: list[bytes] | None = None if call.idempotency_key is None else []
        self._kept_bytes = 0

    def chunks(self) -> Iterator[bytes]:
        """The body. Whoever reads on has delivered what was read before."""
        course = self._course
        try:
            for chunk in self._chunks:
                piece = course.pass_on(chunk)
                if chunk:
                    self._note(piece)
                yield from self._sending(piece)
                if course.ended:
                    break
                if clock.monotonic() > self._instance.streams_end_at:
                    raise Refusal("overloaded", "This instance is being restarted.")
        except Refusal as refusal:
            apology = course.apology(refusal, self._call.request_id)
            if apology:
                yield apology
            # The head is gone out, so the break can only be shown by breaking off too.
            raise ConnectionResetError(errno.ECONNRESET, refusal.message) from refusal
        piece = course.end()
        self._note(piece)
        yield from self._sending(piece)
        words = self._complete()
        if words:
            yield words

    def close(self) -> None:
        """Charge what was delivered of an answer that did not come to its end."""
        try:
            if self._course.spoken_out and self._course.delivered:
                self._hear_out()
            charge = self._course.charge(complete=False)
            if charge is None:
                self._settlement.void(self._reply.status)
            else:
                outcome = _outcome(self._reply, charge)
                self._settlement.capture_sent(charge.price, outcome, None)
        finally:
            if self._course.ended:
                self._reply.finish(_LINGER_SECONDS)
            else:
                self._reply.close()

    def _hear_out(self) -> None:
        """Listen on for what it was that was said, for who left when all was said."""
        until = clock.monotonic() + _HEAR_OUT_SECONDS
        try:
            for chunk in self._reply.chunks(_HEAR_OUT_SECONDS):
                self._course.pass_on(chunk)
                if self._course.ended or clock.monotonic() >= until:
                    break
        except Refusal as refusal:
            log.info("call %s was not heard out: %s", self._call.id, refusal.message)

    def _sending(self, piece: bytes) -> Iterator[bytes]:
        for start, end in _cuts(len(piece), alone=not self._course.delivered):
            yield piece[start:end]
            self._course.sent(end, len(piece))

    def _complete(self) -> bytes:
        """Charge for the whole answer; what is said last."""
        charge = self._course.charge(complete=True)
        if charge is None:
            self._settlement.void(self._reply.status)
            return self._course.last_words(None)
        outcome = _outcome(self._reply, charge)
        resolved = self._settlement.capture_sent(charge.price, outcome, self._answer)
        return self._course.last_words(self._receipt(resolved))

    def _answer(self, resolved: Resolved) -> Stored | None:
        """What a repeat gets: the same, to what was charged the first time."""
        if self._kept is None:
            return None
        words = self._course.last_words(self._receipt(resolved))
        return Stored(self._reply.status, self._course.headers, b"".join([*self._kept, words]))

    def _receipt(self, resolved: Resolved | None) -> Receipt:
        """The charge, once it is on the disk."""
        if resolved is None:
            return Receipt(None, None)
        left = resolved.standing.available if self._principal.pays else None
        return Receipt(resolved.captured, left)

    def _note(self, piece: bytes) -> None:
        """Keep a copy for repeats, as long as all of it is small enough."""
        if self._kept is not None:
            self._kept_bytes += len(piece)
            if self._kept_bytes > idempotency.LARGEST_ANSWER:
                self._kept = None
            else:
                self._kept.append(piece)


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
