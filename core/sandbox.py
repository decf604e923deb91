"""The upstream that answers by itself: for the first run and for tests of clients.

Its answers look like a provider's and depend on the request alone, so a failure can be had on
purpose: by the number a message goes to, by what a language model is told
(`core/sandbox_models.py`), or by `?status=` on any other path.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from threading import Event
from typing import Any
from urllib.parse import parse_qs, urlsplit

from core import errors, sandbox_models, strict_json
from core.errors import Refusal
from core.sandbox_models import Part
from core.upstream import Outbound

# Twilio's magic numbers (https://www.twilio.com/docs/iam/test-credentials), with its error codes.
REFUSED_NUMBERS = {
    "+15005550001": (21211, "The number is not a valid phone number."),
    "+15005550002": (21612, "The number cannot be reached."),
    "+15005550003": (21408, "Messages to this region are not permitted."),
    "+15005550004": (21610, "The number is blocked."),
    "+15005550009": (21614, "The number cannot receive SMS."),
}
# Ours: failures of the provider itself.
FAILING_NUMBERS = {"+15005550429": 429, "+15005550500": 500, "+15005550503": 503}
TIMEOUT_NUMBER = "+15005550504"


class SandboxReply:
    """Implements `core.upstream.Reply`: an answer that is already here."""

    def __init__(self, status: int, headers: dict[str, str], parts: list[Part]) -> None:
        self.status = status
        self.headers = headers
        self._parts = parts

    def read(self, limit: int) -> tuple[bytes, bool]:
        return b"".join(self.chunks()), True

    def chunks(self, beat_seconds: float = math.inf, caller: int | None = None) -> Iterator[bytes]:
        while self._parts:
            part = self._parts.pop(0)
            if isinstance(part, bytes):
                yield part
            elif isinstance(part, Refusal):
                raise part
            else:
                yield from _silence(part, beat_seconds)

    def finish(self, seconds: float) -> None:
        self.close()

    def close(self) -> None:
        self._parts = []


def _silence(seconds: float, beat_seconds: float) -> Iterator[bytes]:
    while seconds > beat_seconds:
        Event().wait(beat_seconds)
        yield b""
        seconds -= beat_seconds
    Event().wait(seconds)


def send(request: Outbound) -> SandboxReply:
    """Answer a request as a provider would. Raises `provider_timeout` where asked to."""
    parts = urlsplit(request.url)
    try:
        body = strict_json.decode(request.body) if request.body else None
    except ValueError:
        body = None
    said = sandbox_models.answer(parts.path, body) if isinstance(body, dict) else None
    if said is not None:
        headers = {"content-type": said.content_type, **said.headers}
        return SandboxReply(said.status, headers, said.parts)
    if isinstance(body, dict) and set(body) == {"to", "message"}:
        return _sms(str(body["to"]), str(body["message"]))
    return _echo(request, body)


def _json(status: int, value: Any, **headers: str) -> SandboxReply:
    content = {"content-type": "application/json"} | {
        name.replace("_", "-"): text for name, text in headers.items()
    }
    return SandboxReply(status, content, [json.dumps(value).encode()])


def _sms(to: str, message: str) -> SandboxReply:
    if to in REFUSED_NUMBERS:
        code, words = REFUSED_NUMBERS[to]
        return _json(400, {"code": code, "message": words, "status": 400})
    if to in FAILING_NUMBERS:
        status = FAILING_NUMBERS[to]
        return _json(status, {"message": "The sandbox was asked to fail."}, retry_after="7")
    if to == TIMEOUT_NUMBER:
        raise errors.provider_timeout()
    digest = hashlib.blake2b(f"{to}\n{message}".encode(), digest_size=16).hexdigest()
    return _json(201, {"messageId": f"msg_{digest}", "status": "queued"})


def _echo(request: Outbound, body: Any) -> SandboxReply:
    parts = urlsplit(request.url)
    query = parse_qs(parts.query)
    status = query.get("status", ["200"])[0]
    answer = {
        "method": request.method,
        "path": parts.path,
        "query": query,
        "json": body,
        "body": base64.b64encode(request.body).decode() if body is None else None,
    }
    known = status.isascii() and status.isdigit() and 200 <= int(status[:4]) <= 599
    return _json(int(status[:4]) if known else 200, answer)
