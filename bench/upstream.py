"""A fast upstream for the benchmark: every request gets the same small JSON answer, 200.

    python bench/upstream.py PORT

A request to a path that ends in `/chat/completions` gets a stream instead, of as many tokens as its
`max_tokens` says, each an event of its own, `pause_ms` milliseconds apart if it has that field.

It shares two cores with everything that is measured, so it does the least that is still HTTP/1.1:
it finds the end of a request by its Content-Length, keeps the connection, and looks no further.
"""

import asyncio
import json
import sys

BODY = (
    b'{"success": true, "provider": "bench", "messageId": "msg_0123456789abcdef0123456789abcdef", '
    b'"to": "+18148835337", "segments": 1, "status": "queued", '
    b'"createdAt": "2026-01-01T00:00:00Z", "region": "local"}'
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
) + BODY
UNREADABLE = b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(more: dict[str, object]) -> bytes:
    """An event of a stream, as a chunk of its own, like those of the usual servers."""
    common = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": "chat.completion.chunk",
        "created": 1767225600, "model": "bench", "system_fingerprint": "fp_0123456789",
    }  # fmt: skip
    data = f"data: {json.dumps(common | more)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = event(
    {"choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None,
                  "finish_reason": None}]}
)  # fmt: skip
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def end(tokens: int) -> bytes:
    """What follows the last token."""
    usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}
    return event({"choices": [], "usage": usage}) + DONE


def body_length(head: bytes) -> int:
    """The Content-Length a message's head declares, 0 when it declares none."""
    lowered = head.lower()
    at = lowered.find(b"\r\ncontent-length:")
    if at < 0:
        return 0
    end = lowered.find(b"\r\n", at + 2)
    return int(lowered[at + 17 : end if end >= 0 else None])


class Upstream(asyncio.Protocol):
    """One kept connection: answers requests in order, pipelined ones too."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""
        self.streaming: asyncio.Task[None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.streaming is not None:
            self.streaming.cancel()

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer + data
        while (head_end := buffer.find(b"\r\n\r\n")) >= 0:
            head = buffer[:head_end]
            if b"\r\ntransfer-encoding:" in head.lower():
                self.transport.write(UNREADABLE)
                self.transport.close()
                return
            end = head_end + 4 + body_length(head)
            if len(buffer) < end:
                break
            body, buffer = buffer[head_end + 4 : end], buffer[end:]
            if head.split(b" ", 2)[1].endswith(b"/chat/completions"):
                asked = json.loads(body)
                work = self.stream(asked["max_tokens"], asked.get("pause_ms", 0) / 1000)
                self.streaming = asyncio.ensure_future(work)
            else:
                self.transport.write(ANSWER)
        self.buffer = buffer

    async def stream(self, tokens: int, pause: float) -> None:
        """One event a write, taking turns with the other streams."""
        self.transport.write(STREAM)
        for _ in range(tokens):
            self.transport.write(TOKEN)
            await asyncio.sleep(pause)
        self.transport.write(end(tokens))


async def serve(port: int) -> None:
    """Serve on 127.0.0.1 until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
