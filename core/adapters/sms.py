"""The adapter that speaks one SMS contract, whatever the upstream speaks.

In: `{"to": "+18148835337", "message": "hi"}`. Out: `{"success": true, "provider", "messageId",
"to", "segments"}`. The price is fixed by our own count of segments before anything is sent, and the
answer gives that count, whatever the provider counts later.
"""

import base64
import json
import re
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlencode

import msgspec
import phonenumbers

from config import UpstreamSection
from core import errors, segments, strict_json
from core.adapters import Answer, Charge, Inbound, Order
from core.catalog import Route
from core.upstream import Outbound, Reply

LONGEST_MESSAGE = 1600  # characters; Twilio's limit
_E164 = re.compile(r"\+[1-9][0-9]{6,14}")
TWILIO_URL = "https://api.twilio.com"

# Twilio error codes that speak of the number or the text (https://www.twilio.com/docs/api/errors).
# Everything else in the 4xx speaks of the operator's account, and is the provider's failure.
_ABOUT_THE_NUMBER = frozenset(
    {21201, 21211, 21214, 21217, 21219, 21265, 21401, 21407, 21408, 21421, 21601, 21604, 21608,
     21610, 21612, 21614, 21615, 21635}
)  # fmt: skip
_ABOUT_THE_TEXT = frozenset({21602, 21605, 21617, 21619, 30038})


class Sms(NamedTuple):
    to: str
    message: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request."""

    to: str
    message: str


class SmsAdapter:
    """Implements `Adapter`."""

    def check_media_type(self, content_type: str) -> None:
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type not in ("", "application/json"):
            raise errors.Refusal("unsupported_media_type", "Send application/json.")

    def order(self, route: Route, inbound: Inbound) -> Order:
        sms = _read(inbound.body)
        route.target(inbound.path)
        parts = segments.count(sms.message)
        details = (sms, parts, inbound.request_id)
        return Order(parts, route.price(parts), (route.upstream,), details)

    def outbound(
        self, route: Route, inbound: Inbound, order: Order, upstream: UpstreamSection
    ) -> Outbound:
        sms: Sms = order.details[0]
        if upstream.kind == "twilio":
            account = upstream.account_sid
            base = (upstream.base_url or TWILIO_URL).rstrip("/")
            url = f"{base}/2010-04-01/Accounts/{account}/Messages.json"
            basic = base64.b64encode(f"{account}:{upstream.auth_token}".encode()).decode()
            form = {"To": sms.to, "From": upstream.from_, "Body": sms.message}
            headers = [
                ("Content-Type", "application/x-www-form-urlencoded"),
                ("Authorization", f"Basic {basic}"),
            ]
            body = urlencode(form).encode()
        else:
            url = route.url(inbound.path, upstream)
            headers = [
                ("Content-Type", "application/json"),
                ("X-Request-Id", inbound.request_id),
                *upstream.headers.items(),
            ]
            body = json.dumps({"to": sms.to, "message": sms.message}).encode()
        return Outbound(
            "POST",
            url,
            [*headers, ("Accept", "application/json")],
            body,
            upstream.timeout_seconds,
            upstream.max_seconds,
        )

    def course(self, route: Route, order: Order, reply: Reply, too_large: bool) -> None:
        return None

    def most_bytes(self, route: Route) -> int | None:
        return 1024 * 1024

    def answer(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        said = _object(body)
        if said is None:
            raise errors.provider_error("The provider's answer cannot be read.")
        sms, parts, request_id = order.details
        answer = {
            "success": True,
            "provider": route.upstream_name,
            "messageId": _message_id(said, request_id),
            "to": sms.to,
            "segments": parts,
        }
        charge = Charge(parts, route.price(parts), cost_usd=route.cost(parts))
        return Answer(200, _JSON, json.dumps(answer).encode(), charge)

    def refusal(self, route: Route, order: Order, reply: Reply, body: bytes) -> NoReturn:
        said = _object(body) or {}
        code = said.get("code") if isinstance(said.get("code"), int) else None
        if code in _ABOUT_THE_NUMBER:
            raise errors.invalid_body(f"The provider refused the number ({code}).", "to")
        if code in _ABOUT_THE_TEXT:
            raise errors.invalid_body(f"The provider refused the text ({code}).", "message")
        if reply.status == 429:
            wait = reply.headers.get("retry-after", "")
            seconds = int(wait) if re.fullmatch(r"[0-9]{1,5}", wait) else 1
            raise errors.rate_limited("The provider has too much to do.", seconds)
        if reply.status in (400, 422) and route.upstream.kind == "http":
            raise errors.invalid_body("The provider refused the message.")
        raise errors.provider_error("The provider refused the message for a reason of its own.")


_JSON = [("Content-Type", "application/json")]


def _read(body: bytes) -> Sms:
    try:
        message = strict_json.decode(body, Message)
    except strict_json.WrongShape as error:
        raise errors.invalid_body(str(error), error.field) from None
    except strict_json.NotJson:
        raise errors.invalid_body("The body is not JSON.") from None
    if not _E164.fullmatch(message.to) or not _is_possible(message.to):
        raise errors.invalid_body("`to` is a phone number in E.164, such as +18148835337.", "to")
    if not message.message or len(message.message) > LONGEST_MESSAGE:
        raise errors.invalid_body(f"`message` has 1 to {LONGEST_MESSAGE} characters.", "message")
    return Sms(message.to, message.message)


def _is_possible(number: str) -> bool:
    """Whether such a number can exist: its country code does, and its length fits there."""
    try:
        return phonenumbers.is_possible_number(phonenumbers.parse(number))
    except phonenumbers.NumberParseException:
        return False


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = strict_json.decode(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _message_id(said: dict[str, Any], request_id: str) -> str:
    """The provider's id for the message in the contract's form, or the request's instead."""
    for name in ("messageId", "message_id", "sid", "id"):
        value = said.get(name)
        text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", text):
            return text if text.startswith("msg_") else f"msg_{text}"
    return f"msg_{request_id}"
