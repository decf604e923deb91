"""An OpenAI-compatible server that does what a test tells it to, and Farebox in front of it.

A test puts a `Play` on the `LlmUpstream` and names it in the request's field `play`, which is none
of the gateway's business and therefore arrives. Every byte of the answer is the test's own, so it
can be wrong in any way a server can be; every request is recorded before it is answered. A request
without a play gets a well-behaved answer.

Prices are worked out here once more, in fractions and by the contract's words, to compare with.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

from doubles import Exchange, Gone, Hit, Server
from inprocess import Box, Payer
from server import Answer

EVENTS = "text/event-stream"
SECRET = "sk-provider-0123456789abcdef"
ORGANISATION = "org-ProviderOfTests01"


@dataclass(frozen=True)
class Wait:
    """Between two pieces of an answer: the gate of this name must let one pass."""

    gate: str


@dataclass(frozen=True)
class Play:
    """An answer, piece by piece. `ending` is what comes after them: the end (`whole`), or `close`,
    `reset` or `hang`."""

    pieces: Sequence[bytes | Wait] = ()
    status: int = 200
    content_type: str = EVENTS
    headers: tuple[tuple[str, str], ...] = ()
    ending: str = "whole"
    before_head: str | None = None  # the gate the head waits for


def whole(value: object, status: int = 200, *headers: tuple[str, str]) -> Play:
    """An answer of JSON, as it is or to be encoded."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Play((body,), status, "application/json", headers)


class LlmUpstream(Server):
    """The server. `with` starts and stops it."""

    def __init__(self) -> None:
        super().__init__()
        self.plays: dict[str, Play] = {}
        self._names = itertools.count(1)

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def stage(self, play: Play) -> str:
        """The name under which a request asks for this answer."""
        name = f"play-{next(self._names)}"
        self.plays[name] = play
        return name

    def heard(self, play: str) -> list[Hit]:
        """The requests that asked for a play."""
        return [hit for hit in self.hits() if f'"{play}"'.encode() in hit.body]

    def respond(self, exchange: Exchange) -> None:
        asked = json.loads(exchange.hit.body)
        play = self.plays.get(asked.get("play", ""))
        if play is None:
            exchange.json(200, polite(asked, exchange.hit.path))
            return
        if play.before_head and not self.gate(play.before_head).wait(exchange.wanted):
            raise Gone
        content = ("Content-Type", play.content_type)
        exchange.head(play.status, [content, ("Transfer-Encoding", "chunked"), *play.headers])
        for piece in play.pieces:
            if isinstance(piece, bytes):
                exchange.chunk(piece)
            elif not self.gate(piece.gate).wait(exchange.wanted):
                raise Gone
        if play.ending == "whole":
            exchange.send(b"0\r\n\r\n")
        else:
            exchange.end(play.ending, self._released)


def polite(asked: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a server answers that has nothing to hide."""
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    answer: dict[str, Any] = {"id": "x-1", "created": 1, "model": asked["model"], "usage": usage}
    if path.endswith("/embeddings"):
        usage.pop("completion_tokens")
        return answer | {"object": "list", "data": [{"index": 0, "embedding": [0.5]}]}
    said = {"text": "Hello"} if path.endswith("/v1/completions") else {"message": message("Hello")}
    return answer | {"choices": [{"index": 0, "finish_reason": "stop", **said}]}


def message(content: str | None, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# A stream


def event(value: object, end: bytes = b"\n\n") -> bytes:
    """One event of JSON."""
    return b"data: " + json.dumps(value).encode() + end


def said(text: str | None = None, index: int = 0, **delta: object) -> dict[str, Any]:
    """A chunk in which the model says something, by the name the upstream has for it."""
    if text is not None:
        delta["content"] = text
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "qwen3:8b",
        "choices": [{"index": index, "delta": delta, "finish_reason": None}],
    }


def usage(sent: object, made: object) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": sent, "completion_tokens": made}}


def counted(sent: object = 11, made: object = 23) -> dict[str, Any]:
    """The usage chunk, as OpenAI has it: the last one, without choices."""
    return {**said(), "choices": [], **usage(sent, made)}


DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Heard:
    """An event stream as a client has it."""

    comments: int
    events: list[tuple[str, str]]  # name and data

    @classmethod
    def of(cls, body: bytes) -> Heard:
        """Read as simply as our own streams may be: LF alone, and an empty line after each."""
        comments, events = 0, []
        text = body.decode()
        assert "\r" not in text
        assert not text or text.endswith("\n\n"), text[-200:]
        for block in filter(None, text.split("\n\n")):
            lines = block.split("\n")
            if all(line.startswith(":") for line in lines):
                comments += 1
                continue
            name, data = "", []
            for line in lines:
                field, _, value = line.partition(": ")
                assert field in ("event", "data"), line
                if field == "event":
                    name = value
                else:
                    data.append(value)
            events.append((name, "\n".join(data)))
        return cls(comments, events)

    @property
    def values(self) -> list[Any]:
        """What is JSON in it."""
        return [json.loads(data) for _, data in self.events if data.startswith("{")]

    @property
    def done(self) -> int:
        return sum(data == "[DONE]" for _, data in self.events)

    @property
    def text(self) -> str:
        """All that was said, in the order in which it came."""
        found = "".join(
            part
            for value in self.values
            for choice in value.get("choices", [])
            for part in _parts(choice)
        )
        # Halves of a surrogate pair become one character again.
        return found.encode("utf-16", "surrogatepass").decode("utf-16")


def _parts(choice: Mapping[str, Any]) -> Iterator[str]:
    delta = choice.get("delta", {})
    for name in ("content", "reasoning_content", "refusal"):
        yield delta.get(name) or ""
    for call in delta.get("tool_calls", []):
        yield call["function"].get("arguments", "")
    yield choice.get("text", "")


# Farebox in front of it


@dataclass(frozen=True)
class Rates:
    """A model's prices, and the contract's sums over them."""

    request: int = 8
    included: int = 5
    output: str = "400.5"
    input: str = "12.25"
    most: int = 4096
    cost_input: str = "0.15"
    cost_output: str = "0.6"

    def price(self, made: int, sent: int | Fraction) -> int:
        """Summed exactly and rounded up once."""
        beyond = max(0, made - self.included)
        return ceil(
            self.request
            + Fraction(beyond) * Fraction(self.output) / 1000
            + Fraction(sent) * Fraction(self.input) / 1000
        )

    def cost(self, made: int, sent: int) -> Fraction:
        """Dollars."""
        return (Fraction(self.cost_output) * made + Fraction(self.cost_input) * sent) / 1_000_000

    def toml(self, name: str, **more: object) -> str:
        """The model's section."""
        settings = {
            "id": name,
            "credits_per_request": self.request,
            "included_output_tokens": self.included,
            "credits_per_1k_tokens": self.output,
            "credits_per_1k_input_tokens": self.input,
            "max_output_tokens": self.most,
            "cost_usd_per_1m_input": self.cost_input,
            "cost_usd_per_1m_output": self.cost_output,
            **more,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        return "\n".join(["[[models]]", *lines, ""])


RATES = Rates()
MODEL = "qwen3-8b"
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def upstream_toml(name: str, base_url: str, **more: object) -> str:
    settings = {"kind": "openai", "base_url": base_url, **more}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    header = f'headers = {{ Authorization = "Bearer {SECRET}" }}'
    return "\n".join([f"[upstreams.{name}]", *lines, header, ""])


def routes_toml(upstream: str = "llm", **more: object) -> str:
    """The three routes of language models."""
    made = []
    for path, adapter in ((CHAT, "chat"), (COMPLETIONS, "completions"), (EMBEDDINGS, "embeddings")):
        settings = {
            "path": path, "methods": ["POST"], "upstream": upstream, "adapter": adapter, **more,
        }  # fmt: skip
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        made.append("\n".join(["[[routes]]", *lines, ""]))
    return "\n".join(made)


def chat(content: str = "Say hello", **more: object) -> dict[str, Any]:
    """A request of a chat."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}


def size_of(*values: Any) -> int:
    """The bytes of every string in some JSON, as UTF-8."""
    total = 0
    for value in values:
        if isinstance(value, str):
            total += len(value.encode())
        elif isinstance(value, dict):
            total += size_of(*value.values())
        elif isinstance(value, list):
            total += size_of(*value)
    return total


@dataclass(frozen=True)
class Told:
    """An answer of a model as far as it came, whether it broke off, and its call's record."""

    answer: Answer
    broke: bool
    record: dict[str, Any]

    @property
    def heard(self) -> Heard:
        return Heard.of(self.answer.body)


class LlmBox(Box):
    """A `Box` whose answers may break off, or be read piece by piece."""

    def __init__(self, folder: Path, config: str, **environment: str) -> None:
        super().__init__(folder, config, **environment)
        self._broke = False
        self._opens = False
        self._body: Iterator[bytes] = iter(())
        self._close: Callable[[], None] = lambda: None
        self._serve = self.app.wsgi_app
        self.app.wsgi_app = self._watch  # type: ignore[method-assign]

    def _watch(self, environ: Any, start_response: Any) -> Any:
        body = self._serve(environ, start_response)
        if not self._opens:
            return _Breakable(self, body)
        self._body = iter(body)
        self._close = getattr(body, "close", lambda: None)
        return []

    def broke_off(self) -> None:
        self._broke = True

    def tell(self, who: Payer | str, value: object, path: str = CHAT, **headers: str) -> Told:
        """One call of a model, to its end; nothing may be held after it."""
        key = who.key if isinstance(who, Payer) else who
        self._broke = False
        answer = self.post(path, key, value, **headers)
        broke = self._broke
        if isinstance(who, Payer):
            assert self.standing(who)[1] == 0
        return Told(answer, broke, self.call(key, answer))

    def call(self, key: str, answer: Answer) -> dict[str, Any]:
        """The record of the call an answer came from; empty where nothing was held."""
        found = self.get(f"/api/v1/usage/{answer.request_id}", key)
        assert found.status in (200, 401, 404)
        record: dict[str, Any] = found.json() if found.status == 200 else {}
        return record

    @contextlib.contextmanager
    def opened(self, who: Payer, value: object) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        """The head of an answer, and its body piece by piece; leaving the block hangs up."""
        self._opens = True
        try:
            answer = self.post(CHAT, who.key, value)
        finally:
            self._opens = False
        body, close = self._body, self._close
        try:
            yield answer, body
        finally:
            close()


class _Breakable:
    """A body that ends where it breaks off."""

    def __init__(self, box: LlmBox, inner: Iterable[bytes]) -> None:
        self._box = box
        self._inner = inner

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._inner
        except ConnectionResetError:
            self._box.broke_off()

    def close(self) -> None:
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()
