"""What an answer of a language model says of itself: how much it is, and in whose words."""

import json
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
_SHORTEST_SECRET = 8  # a shorter value would blot out words
# Keys, organisations and projects of the operator with OpenAI and those who copied its forms.
_IDS = re.compile(r"\b(?:sk|org|proj)[-_][A-Za-z0-9_*-]{6,}")
_SPOKEN = ("content", "reasoning_content", "reasoning", "refusal")


class Usage(NamedTuple):
    """Tokens as the upstream counted them; None of what it did not say."""

    input_tokens: int | None
    output_tokens: int | None


def raw(value: Any) -> msgspec.Raw:
    """A value as a field."""
    return msgspec.Raw(msgspec.json.encode(value))


def fields_of(text: bytes) -> Fields | None:
    """The fields of a JSON object, unread; None of anything else."""
    try:
        return strict_json.decode(text, Fields)
    except ValueError:
        return None


def read(raw: msgspec.Raw | None) -> Any:
    """A field, read; None of one that is missing or cannot be."""
    if raw is None:
        return None
    try:
        return strict_json.decode(bytes(raw))
    except ValueError:
        pass
    try:
        return json.loads(bytes(raw))  # lets halves of surrogate pairs through, which servers send
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


def error_in(fields: Fields) -> dict[str, Any] | None:
    """The error an answer tells, in OpenAI's shape; None when it tells none."""
    said = read(fields.get("error"))
    if isinstance(said, dict):
        return said
    if said is None and read(fields.get("object")) != "error":
        return None
    words = said if isinstance(said, str) else read(fields.get("message"))
    return error_of(words if isinstance(words, str) else "The upstream failed.", fields)


def error_of(message: str, fields: Fields) -> dict[str, Any]:
    """An error in OpenAI's shape, with what there is of it beside its words."""
    return {
        "message": message,
        **{name: read(fields.get(name)) for name in ("type", "param", "code")},
    }


def content_bytes(fields: Fields) -> int:
    """The bytes of what was said: text, reasoning, refusals and the arguments of tools."""
    choices = read(fields.get("choices"))
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
            calls = message.get("tool_calls")
            functions = [
                call.get("function")
                for call in (calls if isinstance(calls, list) else ())
                if isinstance(call, dict)
            ]
            for function in (*functions, message.get("function_call")):
                if isinstance(function, dict):
                    yield function.get("arguments")


def _size(value: Any) -> int:
    if isinstance(value, list):  # content in parts, as some servers have it
        return sum(_size(part.get("text")) for part in value if isinstance(part, dict))
    return len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else 0


def charge(wish: Wish, usage: Usage | None, delivered: int) -> Charge:
    """What an answer costs: by the upstream's count or, where that is missing, by an estimate of
    one token for four bytes of content, and of the input as it was held for."""
    usage = usage or Usage(None, None)
    estimated = usage.input_tokens is None
    input_tokens = wish.input_tokens if usage.input_tokens is None else usage.input_tokens
    output_tokens = 0
    if wish.tokens_each is not None:
        estimated = estimated or usage.output_tokens is None
        guess = -(-delivered // 4)
        output_tokens = guess if usage.output_tokens is None else usage.output_tokens
    return Charge(
        1,
        wish.model.price(output_tokens, input_tokens),
        estimated,
        wish.model.cost(output_tokens, input_tokens),
        input_tokens,
        output_tokens,
    )


class Mask:
    """Takes the operator's names and secrets out of what an upstream says of itself."""

    def __init__(self, model: Model) -> None:
        self._names = {model.upstream_id: model.id} if model.upstream_id != model.id else {}
        for upstream in model.upstreams:
            self._names.update(dict.fromkeys(_secrets(upstream), "…"))

    def clean(self, value: Any) -> Any:
        """The same value with every string in it masked."""
        if isinstance(value, str):
            for secret, shown in self._names.items():
                value = value.replace(secret, shown)
            return _IDS.sub("…", value)
        if isinstance(value, list):
            return [self.clean(item) for item in value]
        if isinstance(value, dict):
            return {self.clean(key): self.clean(item) for key, item in value.items()}
        return value


def _secrets(upstream: UpstreamSection) -> Iterable[str]:
    found = [part for value in upstream.headers.values() for part in (value, *value.split())]
    if upstream.base_url is not None:
        found += [upstream.base_url, urlsplit(upstream.base_url).netloc]
    return [secret for secret in found if len(secret) >= _SHORTEST_SECRET]
