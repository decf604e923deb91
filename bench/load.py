"""The load generator: N kept connections, each sending its next request when the last is answered.

    python bench/load.py PORT [--path /api/v1/echo] [--connections 64] [--seconds 5]

Every request sent is waited for, also those in flight when the time is up, so the answers counted
are exactly the calls the server made. Raw protocols instead of an HTTP library, because the client
shares two cores with the servers it measures.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from upstream import body_length

RAMP_SECONDS = 60.0
DRAIN_SECONDS = 30.0
UNREADABLE = 0
Request = bytes | Callable[[], bytes]


@dataclass
class Result:
    """One round. The statuses cover all of it, warm-up and drain too; the figures its window."""

    throughput: float
    p50_ms: float
    p99_ms: float
    statuses: Counter[int]
    reconnects: int
    lost: int

    @property
    def succeeded(self) -> int:
        """Answers with a 2xx status, in the whole round."""
        return sum(n for status, n in self.statuses.items() if 200 <= status < 300)

    @property
    def clean(self) -> bool:
        """Whether every request was answered, and with a 2xx."""
        return self.lost == 0 and self.succeeded == self.statuses.total()


@dataclass
class Tally:
    """What the connections of one round share."""

    request: Request
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    measuring: bool = False
    stopping: bool = False
    reconnects: int = 0
    lost: int = 0


class Connection(asyncio.Protocol):
    """One kept connection: at most one request in flight; `closed` is set when it is gone."""

    def __init__(self, tally: Tally, answered: asyncio.Event) -> None:
        self.tally = tally
        self.answered = answered
        self.closed = asyncio.Event()
        self.buffer = b""
        self.in_flight = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        """Send the next request, or close when the round is over."""
        if self.tally.stopping:
            self.transport.close()
            return
        self.in_flight = True
        self.sent_at = time.perf_counter()
        request = self.tally.request
        self.transport.write(request if isinstance(request, bytes) else request())

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer + data if self.buffer else data
        head_end = buffer.find(b"\r\n\r\n")
        if head_end < 0 or len(buffer) < head_end + 4 + body_length(buffer[:head_end]):
            self.buffer = buffer
            return
        self.buffer = b""
        self.in_flight = False
        status = buffer[9:12]
        self.tally.statuses[int(status) if status.isdigit() else UNREADABLE] += 1
        if self.tally.measuring:
            self.tally.latencies.append(time.perf_counter() - self.sent_at)
        self.answered.set()
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.tally.lost += self.in_flight
        self.closed.set()


async def keep_connected(port: int, tally: Tally, answered: asyncio.Event) -> None:
    """Keep one connection busy until the round is over, opening a new one when it is closed."""
    loop = asyncio.get_running_loop()
    while not tally.stopping:
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(tally, answered), "127.0.0.1", port
            )
            await connection.closed.wait()
        except OSError:
            await asyncio.sleep(0.1)
        tally.reconnects += not tally.stopping


async def load(
    port: int, request: Request, connections: int = 64, seconds: float = 5.0, warmup: float = 1.0
) -> Result:
    """One round against 127.0.0.1:port; `request` is sent as it is, over and over, or tells what is
    sent each time."""
    tally = Tally(request)
    clients = []
    async with asyncio.timeout(RAMP_SECONDS):
        # One connection after the other: a server that has just started is warmed, not stampeded.
        for _ in range(connections):
            answered = asyncio.Event()
            clients.append(asyncio.create_task(keep_connected(port, tally, answered)))
            await answered.wait()
    await asyncio.sleep(warmup)

    tally.measuring = True
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - started
    tally.measuring = False

    tally.stopping = True
    _, stuck = await asyncio.wait(clients, timeout=DRAIN_SECONDS)
    tally.lost += len(stuck)
    for client in stuck:
        client.cancel()

    ordered = sorted(tally.latencies) or [float("nan")]
    return Result(
        throughput=len(tally.latencies) / elapsed,
        p50_ms=1000 * ordered[len(ordered) // 2],
        p99_ms=1000 * ordered[len(ordered) * 99 // 100],
        statuses=tally.statuses,
        reconnects=tally.reconnects,
        lost=tally.lost,
    )


def post(port: int, path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a POST of JSON to 127.0.0.1:port."""
    fields = {
        "Host": f"127.0.0.1:{port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def main() -> None:
    """Load one server with a small POST and print the round."""
    parser = argparse.ArgumentParser(description="Load one server on 127.0.0.1.")
    parser.add_argument("port", type=int)
    parser.add_argument("--path", default="/api/v1/echo")
    parser.add_argument("--bearer", help="sent as Authorization: Bearer …")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    headers = {"Authorization": f"Bearer {args.bearer}"} if args.bearer else {}
    request = post(args.port, args.path, b'{"to": "+18148835337", "message": "hi"}', headers)
    result = asyncio.run(load(args.port, request, args.connections, args.seconds))
    print(
        f"{result.throughput:.0f} req/s, p50 {result.p50_ms:.1f} ms, p99 {result.p99_ms:.1f} ms, "
        f"statuses {dict(result.statuses)}, reconnects {result.reconnects}, lost {result.lost}"
    )


if __name__ == "__main__":
    main()
