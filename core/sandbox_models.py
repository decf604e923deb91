"""The sandbox's language models: they say back what they heard, a token a word, in the shapes of
OpenAI's API (https://platform.openai.com/docs/api-reference).

What goes wrong with real ones can be had on purpose, by a last message (or prompt, or input) that
begins with `sandbox:`; docs/llm.md lists what may follow.
"""

import base64
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from core import errors
from core.errors import Refusal

Part = bytes | float | Refusal  # of a body: what comes, seconds of silence, or how it breaks off
_ORDER = re.compile(r"sandbox: *(?P<verb>[a-z]+(?: usage)?)? *(?P<number>[0-9]{1,6})?")
_RETRY_AFTER = "7"
_MOST_WORDS = 10_000
_LONGEST_PAUSE_MS = 20_000
_MOST_CHOICES = 128
_DIMENSIONS = 8
_CREATED = 1_700_000_000
_FAILED = {"message": "The sandbox was asked to fail.", "type": "sandbox_error"}
_ERROR = {"error": {**_FAILED, "param": None, "code": None}}


class Said(NamedTuple):
    """An answer, as it will come."""

    status: int
    content_type: str
    parts: list[Part]
    headers: Mapping[str, str] = MappingProxyType({})


class _Orders(NamedTuple):
    """What a text asks the sandbox to do."""

    verb: str | None = None
    number: int | None = None

    @classmethod
    def of(cls, text: str) -> "_Orders":
        found = _ORDER.fullmatch(text.strip())
        if found is None:
            return cls()
        number = found["number"]
        return cls(found["verb"], None if number is None else int(number))

    def up_to(self, most: int, otherwise: int) -> int:
        return otherwise if self.number is None else min(self.number, most)


def answer(path: str, body: dict[str, Any]) -> Said | None:
    """What a model answers at such a path; None where there is none. Raises `provider_timeout`
    where asked to."""
    for end, say in _PATHS.items():
        if path.endswith(end):
            return say(body)
    return None


def _chat(body: dict[str, Any]) -> Said:
    sent = body.get("messages")
    messages = [m for m in sent if isinstance(m, dict)] if isinstance(sent, list) else []
    texts = [_text(message.get("content")) for message in messages]
    return _Generation(body, texts, [texts[-1] if texts else ""], _CHAT).said()


def _completion(body: dict[str, Any]) -> Said:
    texts = [_text(prompt) for prompt in _several(body.get("prompt"))]
    return _Generation(body, texts, texts, _COMPLETION).said()


def _embedding(body: dict[str, Any]) -> Said:
    """Numbers for each text, which depend on it alone."""
    texts = [_text(text) for text in _several(body.get("input"))]
    failure = _failure(_Orders.of(texts[-1]))
    if failure is not None:
        return failure
    size = _number(body.get("dimensions"), 4096, _DIMENSIONS)
    data = [
        {"object": "embedding", "index": at, "embedding": _vector(text, size, body)}
        for at, text in enumerate(texts)
    ]
    tokens = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _whole({"object": "list", "data": data, "model": body.get("model"), "usage": usage})


_PATHS: dict[str, Callable[[dict[str, Any]], Said]] = {
    "/chat/completions": _chat, "/completions": _completion, "/embeddings": _embedding,
}  # fmt: skip


def _vector(text: str, size: int, body: dict[str, Any]) -> list[float] | str:
    digest = hashlib.shake_128(text.encode("utf-8", "replace")).digest(size)
    numbers = [byte / 256 for byte in digest]
    if body.get("encoding_format") != "base64":
        return numbers
    return base64.b64encode(struct.pack(f"<{size}f", *numbers)).decode()


def _text(value: Any) -> str:
    """What is said in a message, which may come in parts."""
    if isinstance(value, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in value)
        return " ".join(str(part) for part in parts if part is not None)
    return "" if value is None else str(value)


def _several(value: Any) -> list[Any]:
    """Texts, of which there may be one, as a string or as numbers of tokens."""
    if not isinstance(value, list) or all(isinstance(item, int) for item in value):
        return [value]
    return value


def _number(value: Any, most: int, otherwise: int) -> int:
    """A number of a request, if it is one from 1 to `most`."""
    is_one = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
    return value if is_one else otherwise


def _whole(value: Any, status: int = 200, **headers: str) -> Said:
    return Said(status, "application/json", [json.dumps(value).encode()], headers)


def _failure(orders: _Orders) -> Said | None:
    """A failure before anything is said, if one was asked for."""
    if orders.verb is None and 400 <= (orders.number or 0) <= 599:
        waits = orders.number in (429, 503)
        return _whole(
            _ERROR, orders.number or 500, **{"retry-after": _RETRY_AFTER} if waits else {}
        )
    if orders.verb == "timeout":
        raise errors.provider_timeout()
    return None


class _Kind(NamedTuple):
    """How an endpoint says what was generated: whole, and piece by piece."""

    prefix: str
    objects: tuple[str, str]
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]
    first: dict[str, Any] | None  # what comes before the first piece
    last: dict[str, Any]


_CHAT = _Kind(
    "chatcmpl",
    ("chat.completion", "chat.completion.chunk"),
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text}},
    {"delta": {"role": "assistant", "content": "", "refusal": None}},
    {"delta": {}},
)
_COMPLETION = _Kind(
    "cmpl",
    ("text_completion", "text_completion"),
    lambda text: {"text": text},
    lambda text: {"text": text},
    None,
    {"text": ""},
)


class _Generation:
    """What is generated for a request: `n` choices for each prompt."""

    def __init__(
        self, body: dict[str, Any], sent: list[str], prompts: list[str], kind: _Kind
    ) -> None:
        self._body = body
        self._kind = kind
        self._orders = _Orders.of(prompts[-1])
        self._tool = self._called_tool()
        each = [self._words(prompt) for prompt in prompts]
        count = _number(body.get("n"), _MOST_CHOICES, 1)
        self._choices = [words for words in each for _ in range(count)]
        tokens_in = sum(len(text.split()) for text in sent)
        tokens_out = sum(len(words) for words, _ in self._choices)
        self._usage = {
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "total_tokens": tokens_in + tokens_out,
        }
        digest = hashlib.blake2b(repr(sent).encode("utf-8", "replace"), digest_size=12).hexdigest()
        self._call_id = f"call_{digest[:12]}"
        self._head: dict[str, Any] = {
            "id": f"{kind.prefix}-{digest}", "created": _CREATED, "model": body.get("model"),
        }  # fmt: skip

    def said(self) -> Said:
        """The answer, whole or streamed as it was asked for."""
        failure = _failure(self._orders)
        if failure is not None:
            return failure
        if self._body.get("stream") is True:
            parts = list(self._stream())
            return Said(200, "text/event-stream; charset=utf-8", parts)
        if self._orders.verb == "error":
            return _whole(_ERROR)
        return self._at_once()

    def _words(self, prompt: str) -> tuple[list[str], str]:
        """What is said to a prompt, in words, and why it ends there."""
        if self._tool is not None:
            return [self._tool, "{}"], "tool_calls"
        words = f"The sandbox heard: {prompt}".split(" ")
        if self._orders.verb == "words":
            words = ["word"] * max(1, self._orders.up_to(_MOST_WORDS, 100))
        limit = self._body.get("max_completion_tokens") or self._body.get("max_tokens")
        if isinstance(limit, int) and 0 < limit < len(words):
            return words[:limit], "length"
        return words, "stop"

    def _called_tool(self) -> str | None:
        """The first tool that was offered, when it is to be called."""
        offered = self._body.get("tools")
        if self._orders.verb != "tool" or self._kind is not _CHAT or not isinstance(offered, list):
            return None
        names = (tool["function"]["name"] for tool in offered if _is_function(tool))
        return next(names, None)

    def _at_once(self) -> Said:
        choices = [
            {"index": at, **self._told(words), "logprobs": None, "finish_reason": why}
            for at, (words, why) in enumerate(self._choices)
        ]
        answer = {**self._head, "object": self._kind.objects[0], "choices": choices}
        if self._orders.verb != "no usage":
            answer["usage"] = self._usage
        said = _whole(answer)
        (text,) = said.parts
        assert isinstance(text, bytes)  # made a moment ago
        if self._orders.verb == "break":
            return said._replace(parts=[text[: len(text) // 2], _broken()])
        return said._replace(parts=[*self._pause(), text])

    def _told(self, words: list[str]) -> dict[str, Any]:
        if self._tool is None:
            return self._kind.whole(" ".join(words))
        calls = [self._call("{}")]
        return {
            "message": {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls}
        }

    def _call(self, arguments: str) -> dict[str, Any]:
        function = {"name": self._tool, "arguments": arguments}
        return {"id": self._call_id, "type": "function", "function": function}

    def _stream(self) -> Iterator[Part]:
        spoken = list(self._spoken())
        verb, half = self._orders.verb, len(spoken) // 2
        for at, piece in enumerate(spoken):
            if at == half and verb == "break":
                yield _broken()
                return
            if at == half and verb == "error":
                yield _event(_ERROR)
                break
            yield from self._pause()
            yield _event(piece)
        else:
            if self._asks_usage and verb != "no usage":
                chunk = self._chunk([])
                yield _event(chunk | {"usage": self._usage})
        yield b"data: [DONE]\n\n"

    @property
    def _asks_usage(self) -> bool:
        options = self._body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def _spoken(self) -> Iterator[dict[str, Any]]:
        """The chunks: one choice's words beside another's, as servers send them."""
        deltas = [list(self._deltas(words, why)) for words, why in self._choices]
        for at in range(max(map(len, deltas))):
            for index, of_choice in enumerate(deltas):
                if at < len(of_choice):
                    piece, why = of_choice[at]
                    yield self._chunk(
                        [{"index": index, **piece, "logprobs": None, "finish_reason": why}]
                    )

    def _deltas(self, words: list[str], why: str) -> Iterator[tuple[dict[str, Any], str | None]]:
        if self._tool is not None:
            first = {"role": "assistant", "content": None}
            calls = [{"index": 0, **self._call("")}]
            yield {"delta": {**first, "tool_calls": calls}}, None
            more = [{"index": 0, "function": {"arguments": "{}"}}]
            yield {"delta": {"tool_calls": more}}, None
        else:
            if self._kind.first is not None:
                yield self._kind.first, None
            for at, word in enumerate(words):
                yield self._kind.piece(word if at == 0 else f" {word}"), None
        yield self._kind.last, why

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self._kind.objects[1], "choices": choices}
        return chunk | ({"usage": None} if self._asks_usage else {})

    def _pause(self) -> list[Part]:
        if self._orders.verb != "slow":
            return []
        return [self._orders.up_to(_LONGEST_PAUSE_MS, 500) / 1000]


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _broken() -> Refusal:
    return errors.provider_error("The upstream's answer broke off.")


def _is_function(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
