"""What an answer of a language model says of itself: how much it is, and in whose words."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from config import UpstreamSection
from core import strict_json
from core.adapters import Charge
from core.adapters.llm.request import Fields, Wish
from core.tariff import Model

_LARGEST_COUNT = 10**12
_MISCOUNTED = 16
_SHORTEST_SECRET = 8  # a shorter value would blot out words
# Keys, organisations and projects of the operator with OpenAI and those who copied its forms.
_IDS = re.compile(r"\b(?:sk|org|proj)[-_][A-Za-z0-9_*-]{6,}")
_SPOKEN = ("content", "refusal")
_GAP = re.compile(r"[ \t\n\r]*")
_JSON = json.JSONDecoder()
_DEEPEST = 100  # so far down an error is read
_ERROR = ("message", "type", "param", "code")
_SHAPE = frozenset({"error", *_ERROR})  # stays, though a model were called so


class Usage(NamedTuple):
    """Tokens as the upstream counted them; None of what it did not say."""

    input_tokens: int | None
    output_tokens: int | None


def fields_of(text: bytes) -> Fields | None:
    """The fields of a JSON object, unread; None of anything else. Servers send what clients read
    though it is no JSON: halves of surrogate pairs, NaN, bytes that are not UTF-8."""
    try:
        return strict_json.decode(text, Fields)
    except ValueError:
        pass
    try:
        return _fields_of(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _fields_of(text: str) -> Fields:
    """As `fields_of`, by a more lenient reader. Raises ValueError."""
    found: Fields = {}
    at = _past("{", text, 0)
    while text[at : at + 1] != "}":
        if found:
            at = _past(",", text, at)
        name, at = _JSON.raw_decode(text, at)
        if not isinstance(name, str):
            raise ValueError("no name")
        start = _past(":", text, at)
        _, end = _JSON.raw_decode(text, start)
        found[_writable(name)] = msgspec.Raw(text[start:end].encode())
        at = _skip(text, end)
    if _skip(text, at + 1) != len(text):
        raise ValueError("more than an object")
    return found


def _past(sign: str, text: str, at: int) -> int:
    """Where to read on after a sign, which may stand apart."""
    at = _skip(text, at)
    if text[at : at + 1] != sign:
        raise ValueError(f"no {sign}")
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    assert gap is not None  # it may be empty
    return gap.end()


def _writable(text: str) -> str:
    """The same text without halves of surrogate pairs, which UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()


def read(raw: msgspec.Raw | None) -> Any:
    """A field, read; None of one that is missing or cannot be."""
    if raw is None:
        return None
    try:
        return strict_json.decode(bytes(raw))
    except ValueError:
        pass
    try:
        return json.loads(bytes(raw).decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def usage_in(fields: Fields) -> Usage | None:
    """The tokens an answer says it is; None when it says nothing that can be believed."""
    said = read(fields.get("usage"))
    if not isinstance(said, dict):
        return None
    found = Usage(_count(said.get("prompt_tokens")), _count(said.get("completion_tokens")))
    return None if found == (None, None) else found


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and 0 <= value <= _LARGEST_COUNT else None


def error_in(fields: Fields, otherwise: str = "The upstream failed.") -> dict[str, Any] | None:
    """The error an answer tells, in OpenAI's shape, with the words `otherwise` where it has none;
    None when it tells no error."""
    said = read(fields.get("error"))
    if not said and ("object" not in fields or bytes(fields["object"]) != b'"error"'):
        return None
    if isinstance(said, dict):
        return {**dict.fromkeys(_ERROR), **said, "message": _words(otherwise, said.get("message"))}
    return error_of(fields, otherwise, said)


def error_of(fields: Fields, otherwise: str, *words: Any) -> dict[str, Any]:
    """An error in OpenAI's shape of one that is told in other fields: the first words there are."""
    words = (*words, read(fields.get("message")), read(fields.get("detail")))
    told = {name: read(fields.get(name)) for name in _ERROR}
    return told | {"message": _words(otherwise, *words)}


def _words(otherwise: str, *found: Any) -> str:
    return next((words for words in found if isinstance(words, str)), otherwise)


def finished(choices: Any) -> set[Any]:
    """The choices that say that they are."""
    if not isinstance(choices, list):
        return set()
    said = [choice for choice in choices if isinstance(choice, dict)]
    return {repr(choice.get("index")) for choice in said if choice.get("finish_reason")}


def content_bytes(choices: Any) -> int:
    """The bytes of what was said: text, reasoning, refusals and the arguments of tools."""
    return sum(map(_size, _said(choices))) if isinstance(choices, list) else 0


def _said(choices: list[Any]) -> Iterable[Any]:
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        yield choice.get("text")
        for message in (choice.get("delta"), choice.get("message")):
            if not isinstance(message, dict):
                continue
            yield from (message.get(name) for name in _SPOKEN)
            yield message.get("reasoning_content") or message.get("reasoning")  # some send it twice
            audio = message.get("audio")
            yield audio.get("transcript") if isinstance(audio, dict) else None
            calls = message.get("tool_calls")
            functions = [
                call.get(kind)
                for call in (calls if isinstance(calls, list) else ())
                if isinstance(call, dict)
                for kind in ("function", "custom")
            ]
            for function in (*functions, message.get("function_call")):
                if isinstance(function, dict):
                    yield from (function.get("arguments"), function.get("input"))


def _size(value: Any) -> int:
    if isinstance(value, list):  # content in parts, as some servers have it
        return sum(_size(part.get("text")) for part in value if isinstance(part, dict))
    if not isinstance(value, str):
        return 0
    # Half of a surrogate pair is half of four bytes.
    halves = 0 if value.isascii() else sum("\ud800" <= sign <= "\udfff" for sign in value)
    return len(value.encode("utf-8", "replace")) + halves


def charge(wish: Wish, usage: Usage | None, delivered: int) -> Charge:
    """What an answer costs: by the upstream's count or, where that is missing, by an estimate of
    one token for four bytes of content, and of the input as it was held for."""
    usage = usage or Usage(None, None)
    estimated = usage.input_tokens is None
    exact = wish.input_tokens if usage.input_tokens is None else usage.input_tokens
    input_tokens = math.ceil(exact)
    output_tokens = 0
    if wish.tokens_each is not None:
        estimated = estimated or usage.output_tokens is None
        guess = -(-delivered // 4)
        output_tokens = guess if usage.output_tokens is None else usage.output_tokens
        _watch_limit(wish, delivered // 16 if usage.output_tokens is None else output_tokens)
    return Charge(
        1,
        wish.model.price(output_tokens, exact),
        estimated,
        wish.model.cost(output_tokens, input_tokens),
        input_tokens,
        output_tokens,
    )


def _watch_limit(wish: Wish, least_tokens: int) -> None:
    """Remember whether an answer is longer than the limit that was sent, by more than servers
    differ in counting: the next call sends its limit under the oldest name too."""
    if least_tokens > wish.output_tokens + _MISCOUNTED:
        wish.model.passed_over.update(wish.limits)


class Mask:
    """Takes the operator's names and secrets out of what an upstream says of itself."""

    def __init__(self, model: Model) -> None:
        self._model = model
        found = {secret for upstream in model.upstreams for secret in _secrets(upstream)}
        # The longest first: one may be a part of another.
        self._secrets = sorted(found, key=len, reverse=True)

    def clean(self, value: Any, depth: int = 0) -> Any:
        """The same value with every string in it masked, and without what is too deep in it."""
        if isinstance(value, str):
            return self._hide(value)
        if depth == _DEEPEST:
            return None
        if isinstance(value, list):
            return [self.clean(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {
                key if key in _SHAPE else self._hide(key): self.clean(item, depth + 1)
                for key, item in value.items()
            }
        return value

    def _hide(self, text: str) -> str:
        text = _writable(text)
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return _IDS.sub("…", text).replace(self._model.upstream_id, self._model.id)


def _secrets(upstream: UpstreamSection) -> Iterable[str]:
    values = [part for value in upstream.headers.values() for part in (value, *value.split())]
    yield from (value for value in values if len(value) >= _SHORTEST_SECRET)
    if upstream.base_url is not None:
        parts = urlsplit(upstream.base_url)
        yield upstream.base_url
        for host in (parts.netloc, parts.hostname or ""):
            if len(host) >= _SHORTEST_SECRET or re.search(r"[.:]", host):
                yield host
