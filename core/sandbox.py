"""The upstream that answers by itself: for the first run and for tests of clients.

Its answers look like a provider's and depend on the request alone, so a failure can be had on
purpose: by the number a message goes to, or by `?status=` on any other path.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from core import errors, strict_json
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
    """An answer that is already here, whole or as a list of chunks."""

    def __init__(self, status: int, headers: dict[str, str], chunks: list[bytes]) -> None:
        self.status = status
        self.headers = headers
        self._chunks = chunks

    def read(self, limit: int) -> tuple[bytes, bool]:
        body, self._chunks = b"".join(self._chunks), []
        return body, True

    def chunks(self, beat_seconds: float = math.inf) -> Iterator[bytes]:
        while self._chunks:
            yield self._chunks.pop(0)

    def finish(self, seconds: float) -> None:
        self.close()

    def close(self) -> None:
        self._chunks = []


def send(request: Outbound) -> SandboxReply:
    """Answer a request as a provider would. Raises `provider_timeout` where asked to."""
    parts = urlsplit(request.url)
    try:
        body = strict_json.decode(request.body) if request.body else None
    except ValueError:
        body = None
    if isinstance(body, dict):
        for path, answer in _MODELS.items():
            if parts.path.endswith(path):
                return answer(body)
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


def _chat(body: dict[str, Any]) -> SandboxReply:
    """An OpenAI chat completion that says back the last message, streamed when asked."""
    sent = body.get("messages")
    messages = [m for m in sent if isinstance(m, dict)] if isinstance(sent, list) else []
    said = str(messages[-1].get("content", "")) if messages else ""
    texts = [str(m.get("content", "")) for m in messages]
    return _generated(
        body, said, texts, "chatcmpl", ("chat.completion", "chat.completion.chunk"),
        lambda text: {"message": {"role": "assistant", "content": text}},
        lambda word: {"delta": {} if word is None else {"content": word}},
    )  # fmt: skip


def _completion(body: dict[str, Any]) -> SandboxReply:
    """An OpenAI text completion, likewise."""
    said = str(body.get("prompt", ""))
    return _generated(
        body, said, [said], "cmpl", ("text_completion", "text_completion"),
        lambda text: {"text": text}, lambda word: {"text": word or ""},
    )  # fmt: skip


def _embedding(body: dict[str, Any]) -> SandboxReply:
    """OpenAI embeddings: eight numbers for each text, which depend on it alone."""
    sent = body.get("input")
    texts = [str(text) for text in (sent if isinstance(sent, list) else [sent])]
    prints = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    data = [
        {"object": "embedding", "index": index, "embedding": [byte / 256 for byte in print_]}
        for index, print_ in enumerate(prints)
    ]
    tokens = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json(200, {"object": "list", "data": data, "model": body.get("model"), "usage": usage})


_MODELS = {
    "/chat/completions": _chat, "/completions": _completion, "/embeddings": _embedding,
}  # fmt: skip


def _generated(
    body: dict[str, Any], said: str, texts: list[str], kind: str, objects: tuple[str, str],
    whole: Callable[[str], dict[str, Any]], piece: Callable[[str | None], dict[str, Any]],
) -> SandboxReply:  # fmt: skip
    """What a model answers that says back what it heard, a token a word, as often as it is told;
    `whole` and `piece` say it as an answer and as a chunk, whose last one has no word."""
    words = f"The sandbox heard: {said}".split(" ")
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    finish = "stop"
    if isinstance(limit, int) and 0 < limit < len(words):
        words, finish = words[:limit], "length"
    asked = body.get("n")
    choices = range(asked if isinstance(asked, int) and 1 <= asked <= 128 else 1)
    sent = sum(len(text.split()) for text in texts)
    made = len(words) * len(choices)
    usage = {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made}
    digest = hashlib.blake2b(repr(texts).encode(), digest_size=12).hexdigest()
    head = {"id": f"{kind}-{digest}", "created": 1_700_000_000, "model": body.get("model")}
    if body.get("stream") is not True:
        said_at = {"finish_reason": finish, **whole(" ".join(words))}
        answer = {**head, "object": objects[0], "usage": usage}
        return _json(200, answer | {"choices": [{"index": at, **said_at} for at in choices]})
    head["object"] = objects[1]
    spoken = [*(word if at == 0 else f" {word}" for at, word in enumerate(words)), None]
    events: list[Any] = [
        {
            **head,
            "choices": [
                {"index": at, **piece(word), "finish_reason": finish if word is None else None}
            ],
        }
        for word in spoken
        for at in choices
    ]
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage") is True:
        events.append({**head, "choices": [], "usage": usage})
    chunks = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    chunks.append(b"data: [DONE]\n\n")
    return SandboxReply(200, {"content-type": "text/event-stream"}, chunks)
