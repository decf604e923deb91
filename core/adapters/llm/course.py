"""A model's answer as it streams: read event by event, charged for what was delivered."""

from typing import Any

import msgspec

from core import sse
from core.adapters import Charge, Receipt
from core.adapters.llm.answer import (
    Mask,
    charge,
    content_bytes,
    error_in,
    fields_of,
    finished,
    read,
    usage_in,
)
from core.adapters.llm.request import Fields, Wish, raw
from core.errors import Refusal
from core.sse import Event

BEAT_SECONDS = 15.0
_BEAT = b": still there\n\n"
_DONE = b"[DONE]"
_OF_EVERY_CHUNK = ("id", "object", "created", "model")
_APOLOGIES = {
    "provider_error": "The upstream broke its answer off.",
    "provider_timeout": "The upstream fell silent.",
}


class ModelCourse:
    """Implements `Course`; what is delivered are bytes of content."""

    beat_seconds = BEAT_SECONDS

    def __init__(self, headers: list[tuple[str, str]], wish: Wish) -> None:
        self.headers = headers
        self.framing = {"X-Accel-Buffering": "no"}  # nginx would keep it until it is whole
        self.delivered = 0
        self.ended = False
        self._wish = wish
        self._model_id = raw(wish.model.id)
        self._mask = Mask(wish.model)
        self._parser = sse.Parser()
        self._failed = False
        self._finished: set[Any] = set()  # choices that have been said to be
        self._usage_from: Fields | None = None  # the last chunk that had it
        self._kept: Fields | None = None  # the last that was not passed on, for being about usage
        self._chunk: Fields = {}  # the last one
        self._before = 0  # content delivered before what was passed on last
        self._within = 0  # content in that

    def pass_on(self, chunk: bytes) -> bytes:
        return self._pass_on(self._parser.feed(chunk)) if chunk else _BEAT

    def end(self) -> bytes:
        # An event without its empty line, of an upstream that is careless; or half of one.
        whole = [e for e in self._parser.finish() if _is_end(e) or fields_of(e.data or b"")]
        return self._pass_on(whole)

    @property
    def spoken_out(self) -> bool:
        return not self.ended and len(self._finished) >= self._wish.choices

    def sent(self, part: int, of: int) -> None:
        self.delivered = self._before + -(-self._within * part // of)

    def charge(self, complete: bool) -> Charge | None:
        # An answer without content is an answer if the upstream says what it is to cost.
        is_answer = complete and self._usage_from is not None and not self._failed
        if not self.delivered and not is_answer:
            return None
        return charge(self._wish, usage_in(self._usage_from or {}), self.delivered)

    def last_words(self, receipt: Receipt | None) -> bytes:
        words = b""
        if self._wish.shows_usage and receipt is not None:
            words = _event(b"", msgspec.json.encode(self._usage_chunk(receipt)))
        return words + _event(b"", _DONE) if self.ended else words

    def apology(self, refusal: Refusal, request_id: str) -> bytes:
        error = refusal.body("object", request_id, "")["error"]
        error = {name: error[name] for name in ("code", "type", "param")}
        error["message"] = _APOLOGIES.get(refusal.code, refusal.message)
        return _event(b"", msgspec.json.encode({"error": error, "request_id": request_id}))

    def _pass_on(self, events: list[Event]) -> bytes:
        self._before, self._within = self.delivered, 0
        pieces = []
        for event in events:
            if self.ended:
                break
            pieces.append(self._piece(event))
        return b"".join(pieces)

    def _piece(self, event: Event) -> bytes:
        """What goes on of one event."""
        if event.data is None:
            return _BEAT  # a comment, which is a sign of life
        if _is_end(event):
            self.ended = True
            return b""  # said after the charge
        fields = fields_of(event.data)
        if fields is None:
            text = self._mask.clean(event.data.decode("utf-8", "replace"))
            return _event(event.name, text.encode())
        error = error_in(fields)
        if error is not None:
            self._failed = True
            fields = {name: raw(self._mask.clean(read(value))) for name, value in fields.items()}
            fields["error"] = raw(self._mask.clean(error))
        if "model" in fields:
            fields["model"] = self._model_id
        choices = read(fields.get("choices"))
        self._within += content_bytes(choices)
        self._finished |= finished(choices)
        self._chunk = fields
        if usage_in(fields) is not None:
            self._usage_from = dict(fields)
        tells_usage = read(fields.get("usage")) is not None
        if tells_usage and error is None and not choices:
            self._kept = fields
            return b""  # it comes last
        if not self._wish.shows_usage:
            fields.pop("usage", None)
        return _event(event.name, msgspec.json.encode(fields))

    def _usage_chunk(self, receipt: Receipt) -> Fields:
        """The chunk with what it was and cost: the upstream's own, or one like its others."""
        chunk = self._usage_from or self._chunk
        like = {name: chunk[name] for name in _OF_EVERY_CHUNK if name in chunk}
        source = like if self._kept is None else self._kept
        farebox = {"credits_charged": receipt.charged, "credits_remaining": receipt.remaining}
        known = {"choices": raw([]), "usage": self._usage(), "farebox": raw(farebox)}
        return {**source, **known}

    def _usage(self) -> msgspec.Raw:
        """What was charged for: the upstream's own words, unless it counted only a part."""
        found = self._usage_from or {}
        charged = charge(self._wish, usage_in(found), self.delivered)
        if not charged.estimated:
            return found["usage"]
        sent, said = charged.input_tokens or 0, charged.output_tokens or 0
        return raw({"prompt_tokens": sent, "completion_tokens": said, "total_tokens": sent + said})


def _is_end(event: Event) -> bool:
    return event.data is not None and event.data.strip() == _DONE


def _event(name: bytes, data: bytes) -> bytes:
    head = b"event: " + name + b"\n" if name else b""
    return head + b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n"
