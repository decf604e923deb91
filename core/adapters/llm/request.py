"""What a request to a language model asks for, and how much that is at most."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import compress, repeat
from typing import Any, NoReturn

import msgspec

from core import errors, strict_json
from core.tariff import Model

Fields = dict[str, msgspec.Raw]

MOST_CHOICES = 128  # OpenAI's limit
_LIMITS = ("max_completion_tokens", "max_tokens")  # the first that is named counts
# What some servers read in place of one of these, or of `n`: a limit that counts here holds there.
_LIMIT_ELSEWHERE = "n_predict"
_COUNTS = ("n", "best_of", "n_cmpl")
# With these a caller would choose, past the price and the scope of the model named, what a server
# in front of others calls: LiteLLM's fallbacks, OpenRouter's list of models.
_ROUTING = frozenset(
    {"api_base", "base_url", "content_policy_fallbacks", "context_window_fallback_dict",
     "context_window_fallbacks", "custom_llm_provider", "extra_body", "fallbacks",
     "mock_testing_content_policy_fallbacks", "mock_testing_context_fallbacks",
     "mock_testing_fallbacks", "models", "preset", "route", "user_config"}
)  # fmt: skip
_OURS = frozenset(
    {*_LIMITS, _LIMIT_ELSEWHERE, *_COUNTS, "model", "messages", "tools", "prompt", "input",
     "stream", "stream_options"}
)  # fmt: skip
# Where a data URL stands for an image or a file. Elsewhere it is text, which a model reads.
_FILES = frozenset({"url", "image_url", "video_url", "audio_url", "file_data", "file_url"})
_READ = frozenset({str, dict, list})  # kinds of values with something to read in them
# What costs time and memory to read, beside its bytes: lists and objects, and values in all. Text
# with as many of their signs in it is more than a model takes.
_MOST_PARTS = 300_000
_MOST_VALUES = 10**6


@dataclass(frozen=True, slots=True)
class Wish:
    """A request, read. `tokens_each` is the most output of each of `choices`; None where there is
    no output to bound, as in an embedding."""

    fields: Fields
    model: Model
    input_tokens: Fraction  # estimated, at most
    choices: int = 1
    tokens_each: int | None = None
    limits: tuple[str, ...] = ()  # the fields in which the limit is sent
    names_limit: bool = False  # whether the caller named one
    streams: bool = False
    shows_usage: bool = False
    lowered: bool = False  # to what can be spent

    @property
    def output_tokens(self) -> int:
        return self.choices * (self.tokens_each or 0)

    @property
    def price(self) -> int:
        """Credits it costs at most."""
        return self.model.price(self.output_tokens, self.input_tokens)

    def body(self, upstream_id: str) -> bytes:
        """The request as the upstream gets it."""
        fields = dict(self.fields)
        fields["model"] = raw(upstream_id)
        for name in self.limits:
            fields[name] = raw(min(_value(fields, name) or math.inf, self.tokens_each or 0))
        if _LIMIT_ELSEWHERE in fields and self.tokens_each is not None:
            wished = _value(fields, _LIMIT_ELSEWHERE)
            is_less = _is_whole(wished) and 1 <= wished < self.tokens_each
            fields[_LIMIT_ELSEWHERE] = raw(wished if is_less else self.tokens_each)
        if self.streams:
            options = _object(self.fields, "stream_options") or {}
            others = {k: v for k, v in options.items() if k.casefold() != "include_usage"}
            fields["stream_options"] = raw({**others, "include_usage": True})
        return msgspec.json.encode(fields)


Read = Callable[[Fields, Mapping[str, Model]], Wish]


def parse(body: bytes) -> Fields:
    """The fields of a JSON object, unread. Raises `validation_error`."""
    if body.count(b"[") + body.count(b"{") > _MOST_PARTS or body.count(b",") > _MOST_VALUES:
        raise errors.invalid_body("The body has more lists and values than are read here.")
    try:
        fields = strict_json.decode(body, Fields)
    except strict_json.WrongShape:
        raise errors.invalid_body("The body is a JSON object.") from None
    except strict_json.NotJson:
        raise errors.invalid_body("The body is not JSON.") from None
    for name in fields:
        # Some servers read names without regard to case, and would take another model than was
        # priced, or no limit.
        if name not in _OURS and name.casefold() in _OURS:
            raise errors.invalid_body(f"Write `{name.casefold()}` in small letters.", name)
        if name.casefold() in _ROUTING:
            raise errors.invalid_body("Which server answers is not the caller's to choose.", name)
    return fields


def read_chat(fields: Fields, models: Mapping[str, Model]) -> Wish:
    """`POST /v1/chat/completions`. Raises `validation_error`, `model_not_found`."""
    model = _model(fields, models)
    messages = _value(fields, "messages")
    if not isinstance(messages, list):
        _refuse("messages", "a list")
    input_tokens = _input_tokens(messages, _value(fields, "tools"))
    choices = max(_count(fields, "n"), _count(fields, "n_cmpl"))
    return _generation(fields, model, input_tokens, choices)


def read_completion(fields: Fields, models: Mapping[str, Model]) -> Wish:
    """`POST /v1/completions`. Raises `validation_error`, `model_not_found`."""
    model = _model(fields, models)
    prompts, input_tokens = _texts(fields, "prompt")
    choices = max(_count(fields, name) for name in _COUNTS) * prompts
    wish = _generation(fields, model, input_tokens, choices)
    # Here OpenAI knows this limit alone, and a server would pass over the other.
    return replace(wish, limits=tuple(dict.fromkeys([*wish.limits, "max_tokens"])))


def read_embedding(fields: Fields, models: Mapping[str, Model]) -> Wish:
    """`POST /v1/embeddings`. Raises `validation_error`, `model_not_found`."""
    model = _model(fields, models)
    _, input_tokens = _texts(fields, "input")
    return Wish(fields, model, input_tokens)


def _generation(fields: Fields, model: Model, input_tokens: Fraction, choices: int) -> Wish:
    most, named = model.section.max_output_tokens, []
    for name in _LIMITS:
        value = _value(fields, name)
        if value is None:
            continue
        if not _is_whole(value) or value < 1:
            _refuse(name, "a whole number, at least 1")
        named.append((name, value))
    limits = [name for name, _ in named] or [model.section.max_tokens_field]
    if model.passed_over.intersection(limits):
        limits.append("max_tokens")
    return Wish(
        fields,
        model,
        input_tokens,
        choices,
        min(most, named[0][1]) if named else most,
        tuple(dict.fromkeys(limits)),
        bool(named),
        _flag(fields, "stream"),
        bool((_object(fields, "stream_options") or {}).get("include_usage") is True),
    )


# Fields


def _model(fields: Fields, models: Mapping[str, Model]) -> Model:
    name = _value(fields, "model")
    if not isinstance(name, str):
        _refuse("model", "the id of a model, as a string")
    if name not in models:
        raise errors.model_not_found(name)
    return models[name]


def _texts(fields: Fields, name: str) -> tuple[int, Fraction]:
    """How many texts there are, and their tokens at most: one text, or a list of them, each a
    string or a list of tokens."""
    value = _value(fields, name)
    if not isinstance(value, str) and (not isinstance(value, list) or not value):
        _refuse(name, "a string, or a list that is not empty")
    is_one = isinstance(value, str) or all(_is_whole(item) for item in value)
    return 1 if is_one else len(value), _input_tokens(value, numbers_count=True)


def _count(fields: Fields, name: str) -> int:
    value = _value(fields, name)
    if value is None:
        return 1
    if not _is_whole(value) or not 1 <= value <= MOST_CHOICES:
        _refuse(name, f"a whole number from 1 to {MOST_CHOICES}")
    return int(value)


def _flag(fields: Fields, name: str) -> bool:
    value = _value(fields, name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, "true or false")
    return bool(value)


def _object(fields: Fields, name: str) -> dict[str, Any] | None:
    value = _value(fields, name)
    if value is not None and not isinstance(value, dict):
        _refuse(name, "an object")
    return value


def _value(fields: Fields, name: str) -> Any:
    """A field, read; None of one that is missing or null."""
    if name not in fields:
        return None
    try:
        return strict_json.decode(bytes(fields[name]))
    except ValueError:
        _refuse(name, "JSON")


def raw(value: Any) -> msgspec.Raw:
    """A value as a field."""
    return msgspec.Raw(msgspec.json.encode(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(name: str, expected: str) -> NoReturn:
    raise errors.invalid_body(f"`{name}` is {expected}.", name)


# Size


def _input_tokens(*texts: Any, numbers_count: bool = False) -> Fraction:
    """At most so many tokens are in what a model reads: one for three bytes of its strings, and one
    for each number where a text may be given as tokens. A data URL is an image or a file, which no
    count of bytes says anything of."""
    size = numbers = 0
    # What is being read, outermost first. A body may be millions of values, so they are not listed
    # once more, and those that count nothing are passed over without a step of Python for each.
    left: list[Iterator[tuple[str, Any]]] = [zip(repeat(""), texts, strict=False)]
    while left:
        for name, value in left[-1]:
            if isinstance(value, str):
                is_file = name in _FILES and value[:5].lower() == "data:"
                size += 0 if is_file else len(value.encode())
            elif isinstance(value, dict):
                left.append(iter(value.items()))
                break
            elif isinstance(value, list) and value:
                if numbers_count:
                    numbers += list(map(type, value)).count(int)
                read = compress(value, map(_READ.__contains__, map(type, value)))
                left.append(zip(repeat(name), read, strict=False))
                break
        else:
            left.pop()
    return Fraction(size, 3) + numbers
