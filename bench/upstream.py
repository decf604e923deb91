"""A fast upstream for the benchmark: every request gets the same small JSON answer, 200.

    python bench/upstream.py PORT

It shares two cores with everything that is measured, so it does the least that is still HTTP/1.1:
it finds the end of a request by its Content-Length, keeps the connection, and looks no further.
"""

import asyncio
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
            buffer = buffer[end:]
            self.transport.write(ANSWER)
        self.buffer = buffer


async def serve(port: int) -> None:
    """Serve on 127.0.0.1 until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
