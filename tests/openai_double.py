"""A server of language models as OpenAI's clients expect it, and a wire that loses answers.

What `OpenAiDouble` answers is chosen by the last message (the prompt, the input): a plain text is
said back, and one that `order` made is carried out.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from doubles import Exchange, Server

OPERATORS_KEY = "sk-operators-own-key-0123456789abcdef"
FINGERPRINT = "fp_of_the_double"
VECTOR = (0.25, -0.5, 1.0)
_marks = itertools.count(1)


def order(**what: Any) -> str:
    """A text that has the double do something, the same each time this text is sent.

    `status` refuses (with `retry_after`, `error` as body), but only the first `times` if that is
    given. `cut` breaks a stream off after so many events, `fail` tells an error there. `size` is
    how many bytes are said. `gate` is what the answer waits for.
    """
    return json.dumps({"mark": next(_marks), **what})


def said_to(text: str) -> str:
    """What the double answers to a plain text."""
    return f"You said: {text}"


class Said(NamedTuple):
    """A generation: its pieces, each one token, and what it counts as."""

    pieces: list[str]
    input_tokens: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def usage(self, choices: int) -> dict[str, int]:
        made = len(self.pieces) * choices
        return {
            "prompt_tokens": self.input_tokens,
            "completion_tokens": made,
            "total_tokens": self.input_tokens + made,
        }


class OpenAiDouble(Server):
    """It wants the operator's key, as OpenAI does."""

    def respond(self, exchange: Exchange) -> None:
        hit = exchange.hit
        if hit.header("Authorization") != f"Bearer {OPERATORS_KEY}":
            exchange.json(401, _error("Incorrect API key provided.", "invalid_api_key"))
            return
        body = json.loads(hit.body)
        texts = _texts(body)
        wanted = _order_in(texts[-1])
        if "gate" in wanted:
            self.gate(wanted["gate"]).wait(exchange.wanted)
        if "status" in wanted and self._is_due(texts[-1], wanted):
            after = wanted.get("retry_after")
            headers = [] if after is None else [("Retry-After", str(after))]
            error = _error(wanted.get("error", "The double was told to."), "told_to")
            exchange.json(wanted["status"], error, headers)
        elif hit.path.endswith("/embeddings"):
            exchange.json(200, _embeddings(body, texts))
        else:
            said = _said(texts, wanted)
            whole, chunks = (
                _chat(body, said) if hit.path.endswith("/chat/completions") else _text(body, said)
            )
            if body.get("stream"):
                _stream(exchange, chunks, wanted)
            else:
                exchange.json(200, whole)

    def _is_due(self, text: str, wanted: dict[str, Any]) -> bool:
        quoted = json.dumps(text).encode()
        asked = sum(quoted in hit.body for hit in self.hits())
        return asked <= wanted.get("times", asked)

    def asked(self, text: str) -> list[Any]:
        """The bodies of the requests in which this text was the last."""
        return [body for body in (json.loads(hit.body) for hit in self.hits())
                if _texts(body)[-1] == text]  # fmt: skip


def _texts(body: dict[str, Any]) -> list[str]:
    if "messages" in body:
        return [str(message.get("content")) for message in body["messages"]]
    given = body.get("prompt", body.get("input"))
    return given if isinstance(given, list) else [str(given)]


def _order_in(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def _error(message: str, code: str) -> dict[str, Any]:
    return {
        "error": {
            "message": message, "type": "invalid_request_error", "param": None, "code": code,
        }
    }  # fmt: skip


def _said(texts: list[str], wanted: dict[str, Any]) -> Said:
    text = "x" * wanted["size"] if "size" in wanted else said_to(texts[-1])
    words = text.split(" ")
    pieces = [word if at == 0 else f" {word}" for at, word in enumerate(words)]
    return Said(pieces, sum(len(text.split()) for text in texts))


def _head(body: dict[str, Any], kind: str, object_: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-1", "object": object_, "created": 1_700_000_000, "model": body["model"],
        "system_fingerprint": FINGERPRINT,
    }  # fmt: skip


def _chat(body: dict[str, Any], said: Said) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer, and the same in chunks."""
    if body.get("tools"):
        return _tool_call(body, said)
    choices = range(body.get("n") or 1)
    message = {"role": "assistant", "content": said.text, "refusal": None}
    whole = _head(body, "chatcmpl", "chat.completion") | {
        "choices": [
            {"index": at, "message": message, "logprobs": None, "finish_reason": "stop"}
            for at in choices
        ],
        "usage": said.usage(len(choices)),
    }
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in said.pieces]
    return whole, _chunks(body, said, [*deltas, {}], "stop", len(choices))


def _tool_call(body: dict[str, Any], said: Said) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    name = body["tools"][0]["function"]["name"]
    arguments = json.dumps({"city": "Oslo", "unit": "°C"}, ensure_ascii=False)
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    whole = _head(body, "chatcmpl", "chat.completion") | {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, "tool_calls": [call]},
                "finish_reason": "tool_calls",
            }
        ],
        "usage": said.usage(1),
    }
    begun = {**call, "index": 0, "function": {"name": name, "arguments": ""}}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tool_calls": [begun]}]
    deltas += [
        {"tool_calls": [{"index": 0, "function": {"arguments": arguments[at : at + 7]}}]}
        for at in range(0, len(arguments), 7)
    ]
    return whole, _chunks(body, said, [*deltas, {}], "tool_calls", 1)


def _chunks(
    body: dict[str, Any], said: Said, deltas: list[dict[str, Any]], finish: str, choices: int
) -> list[dict[str, Any]]:
    head = _head(body, "chatcmpl", "chat.completion.chunk")
    found = [
        {**head, "choices": [{"index": at, "delta": delta, "finish_reason": None if delta else
                              finish}]}
        for delta in deltas
        for at in range(choices)
    ]  # fmt: skip
    return _with_usage(body, head, said, found, choices)


def _text(body: dict[str, Any], said: Said) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    head = _head(body, "cmpl", "text_completion")
    end = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    whole = head | {"choices": [end | {"text": said.text}], "usage": said.usage(1)}
    found = [
        {**head, "choices": [end | {"text": piece, "finish_reason": None}]} for piece in said.pieces
    ]
    return whole, _with_usage(body, head, said, [*found, {**head, "choices": [end]}], 1)


def _with_usage(
    body: dict[str, Any], head: dict[str, Any], said: Said, chunks: list[dict[str, Any]],
    choices: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """As OpenAI does when usage is asked for: null in every chunk, and a last one with it alone."""
    if not (body.get("stream_options") or {}).get("include_usage"):
        return chunks
    last = {**head, "choices": [], "usage": said.usage(choices)}
    return [*({**chunk, "usage": None} for chunk in chunks), last]


def _stream(exchange: Exchange, chunks: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    exchange.head(200, [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
    end = wanted.get("cut", wanted.get("fail", len(chunks)))
    for chunk in chunks[:end]:
        exchange.chunk(f"data: {json.dumps(chunk)}\n\n".encode())
    if "cut" in wanted:
        exchange.close()
        return
    if "fail" in wanted:
        error = _error("The double broke down.", "told_to")
        exchange.chunk(f"data: {json.dumps(error)}\n\n".encode())
    else:
        exchange.chunk(b"data: [DONE]\n\n")
    exchange.chunk(b"")


def _embeddings(body: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    vector: Any = list(VECTOR)
    if body.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()
    tokens = sum(len(text.split()) for text in texts)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": at, "embedding": vector} for at in range(len(texts))
        ],
        "model": body["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


class LossyWire(Server):
    """Passes requests on to a gateway and answers back; `lose` has it swallow the next answers,
    which the gateway has given to their end, as a connection does that dies on the way."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._to = port
        self._left = 0
        self._counting = threading.Lock()

    def lose(self, answers: int) -> None:
        with self._counting:
            self._left = answers

    def respond(self, exchange: Exchange) -> None:
        hit = exchange.hit
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._to, timeout=30)
        ) as connection:
            headers = dict(_end_to_end(hit.headers))
            connection.request(hit.method, hit.target, hit.body or None, headers)
            with connection.getresponse() as answer:
                body = answer.read()
        with self._counting:
            lost = self._left > 0
            self._left -= lost
        if lost:
            exchange.close()
            return
        exchange.head(
            answer.status,
            [*_end_to_end(answer.getheaders()), ("Content-Length", str(len(body)))],
        )
        exchange.send(body)


def _end_to_end(headers: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    of_one_connection = {"connection", "transfer-encoding", "content-length", "keep-alive"}
    return ((name, value) for name, value in headers if name.lower() not in of_one_connection)
