"""What streaming costs through Farebox, beside no gateway and a bare pass-through.

    python bench/streams.py [--rounds 5] [--seconds 4] [--streams 16]
    python bench/streams.py --idle 500 [--threads 512] [--descriptors 8192]

The first: how long the first token takes with nothing else to do, and how many tokens a second come
through when many streams are wide open, each token an event and a write of its own. Rounds
alternate between all sides, because the machine drifts more than they differ.

The second: so many streams that say a word now and then, all open at once. Every one must be served
to its end; told are the memory of the workers and how long the first word took.

Afterwards the ledger must have captured one credit for each stream.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from load import post
from run import (
    BIN,
    GRANT,
    START_SECONDS,
    WHO,
    BenchmarkFailed,
    check_books,
    free_port,
    running,
    stop,
    tool,
)

ROUTE = "/v1/chat/completions"
WORKERS, THREADS = 2, 32
FIRSTS = 40  # first tokens measured in a round
LONG = 500  # tokens of a stream in the measure of throughput
TICKS = os.sysconf("SC_CLK_TCK")

CONFIG = """\
[upstreams.bench]
kind = "openai"
base_url = "http://127.0.0.1:{port}/v1"

[[routes]]
path = "{route}"
methods = ["POST"]
upstream = "bench"
adapter = "chat"

[[models]]
id = "bench"
credits_per_request = 1
max_output_tokens = 100000

[limits]
requests_per_minute = 100000000
concurrent_calls = 100000
"""


def asking(port: int, key: str | None, tokens: int, pause_ms: int = 0) -> bytes:
    """The bytes of a request for a stream of so many tokens."""
    body = {
        "model": "bench", "messages": [{"role": "user", "content": "Say so many words."}],
        "stream": True, "max_tokens": tokens, "pause_ms": pause_ms,
    }  # fmt: skip
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return post(port, ROUTE, json.dumps(body).encode(), headers)


@dataclass
class Side:
    """One way to the upstream, and what was measured there, round by round."""

    name: str
    port: int
    key: str | None = None
    server: int | None = None  # its process, whose children serve
    first_ms: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)  # of the workers, a token
    streams: int = 0  # all that were served


@contextlib.asynccontextmanager
async def connected(
    port: int,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to 127.0.0.1:port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        yield reader, writer
    finally:
        writer.close()


class Stream:
    """A stream as it is read: its tokens so far. Raises BenchmarkFailed where it is not one."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._tail = b""
        self.tokens = 0
        self.done = False

    async def read(self) -> None:
        """Whatever comes next."""
        data = await self._reader.read(2**18)
        if not data:
            raise BenchmarkFailed(f"a stream ended early: {self._tail!r}")
        data = self._tail + data
        mark = b'"content":'
        self.tokens += data.count(mark) - self._tail.count(mark)
        self.done = data.endswith(b"\r\n0\r\n\r\n")
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            raise BenchmarkFailed(f"a stream was refused: {data[:2000]!r}")
        self._tail = data[-64:]


async def first_token(
    side: Side, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> float:
    """Milliseconds from a request to its first token; the stream is read to its end."""
    stream = Stream(reader)
    began = time.perf_counter()
    writer.write(asking(side.port, side.key, 3))
    while not stream.tokens:
        await stream.read()
    took = time.perf_counter() - began
    while not stream.done:
        await stream.read()
    side.streams += 1
    return 1000 * took


async def firsts(sides: list[Side]) -> None:
    """The first tokens of all sides in turn, on kept connections, one stream at a time."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(connected(side.port)) for side in sides]
        taken: list[list[float]] = [[] for _ in sides]
        for number in range(FIRSTS + 2):
            for side, pair, own in zip(sides, pairs, taken, strict=True):
                took = await first_token(side, *pair)
                if number >= 2:  # the first ones open connections
                    own.append(took)
    for side, own in zip(sides, taken, strict=True):
        side.first_ms.append(statistics.median(own))


async def throughput(side: Side, streams: int, seconds: float) -> None:
    """Tokens a second over so many connections, each asking for its next stream at once."""
    count, measuring, stopping = 0, False, False

    async def keep_streaming() -> None:
        nonlocal count
        async with connected(side.port) as (reader, writer):
            while not stopping:
                writer.write(asking(side.port, side.key, LONG))
                stream, before = Stream(reader), 0
                while not stream.done:
                    await stream.read()
                    if measuring:
                        count += stream.tokens - before
                    before = stream.tokens
                if stream.tokens != LONG:
                    raise BenchmarkFailed(f"{side.name}: {stream.tokens} tokens of {LONG}")
                side.streams += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(keep_streaming())
        await asyncio.sleep(1)
        cpu, began, measuring = cpu_seconds(side.server), time.perf_counter(), True
        await asyncio.sleep(seconds)
        elapsed, measuring, stopping = time.perf_counter() - began, False, True
        used = cpu_seconds(side.server) - cpu
    side.tokens_per_second.append(count / elapsed)
    side.cpu_us.append(1e6 * used / max(1, count))


def workers(server: int) -> Iterator[Path]:
    """The /proc folders of a server's children."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == server:
                yield stat.parent


def cpu_seconds(server: int | None) -> float:
    """What a server's workers have used of the processors."""
    if server is None:
        return 0.0
    fields = [
        (folder / "stat").read_text().rpartition(")")[2].split() for folder in workers(server)
    ]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS


def megabytes(server: int) -> list[float]:
    """The memory each of a server's workers has in use."""
    found = [(folder / "status").read_text().split("VmRSS:")[1] for folder in workers(server)]
    return [int(text.split()[0]) / 1024 for text in found]


def descriptors(server: int) -> list[int]:
    """How many files and sockets each worker has open."""
    return [len(list((folder / "fd").iterdir())) for folder in workers(server)]


def compare(folder: Path, rounds: int, seconds: float, streams: int) -> None:
    """The alternating comparison."""
    with started(folder, WORKERS, THREADS, bare=True) as (sides, env):
        for number in range(rounds):
            asyncio.run(firsts(sides))
            for side in sides if number % 2 == 0 else reversed(sides):
                asyncio.run(throughput(side, streams, seconds))
            told = "   ".join(
                f"{side.name} {side.first_ms[-1]:.2f} ms, {side.tokens_per_second[-1]:.0f} tokens/s"
                for side in sides
            )
            print(f"round {number + 1} of {rounds}: {told}", flush=True)
        print_table(*sides)
        check_books(env, sides[-1].streams)


def print_table(direct: Side, bare: Side, farebox: Side) -> None:
    """The medians, and the ratios of the rounds that ran next to each other."""
    print(f"\n{'median of rounds':<24}{'first ms':>10}{'tokens/s':>12}{'cpu µs/token':>14}")
    for side in (direct, bare, farebox):
        figures = (side.first_ms, side.tokens_per_second, side.cpu_us)
        first, rate, cpu = map(statistics.median, figures)
        print(f"{side.name:<24}{first:>10.2f}{rate:>12.0f}{cpu:>14.1f}")
    added = [
        [own - none for own, none in zip(side.first_ms, direct.first_ms, strict=True)]
        for side in (bare, farebox)
    ]
    print(f"\n{'Farebox beside bare':<24}{'min':>10}{'median':>10}{'max':>10}")
    _print_ratios("first token, added", added[1], added[0])
    _print_ratios("tokens a second", farebox.tokens_per_second, bare.tokens_per_second)
    _print_ratios("cpu a token", farebox.cpu_us, bare.cpu_us)
    low, middle, high = min(added[1]), statistics.median(added[1]), max(added[1])
    print(f"\nadded to the first token by Farebox: {middle:.2f} ms ({low:.2f} to {high:.2f})")


def _print_ratios(name: str, ours: list[float], theirs: list[float]) -> None:
    found = sorted(own / other for own, other in zip(ours, theirs, strict=True))
    print(f"{name:<24}{found[0]:>10.2f}{statistics.median(found):>10.2f}{found[-1]:>10.2f}")


async def hold_open(side: Side, count: int, seconds: float) -> tuple[list[float], list[float], int]:
    """So many streams that last so long: milliseconds to each one's first word, the workers'
    memory and the most descriptors of one, with all of them open."""
    assert side.server is not None
    waits: list[float] = []
    all_open = asyncio.Event()

    async def one() -> None:
        async with connected(side.port) as (reader, writer):
            began = time.perf_counter()
            # A word every two seconds, on the whole.
            writer.write(asking(side.port, side.key, int(seconds / 2), 2000))
            stream = Stream(reader)
            while not stream.tokens:
                await stream.read()
            waits.append(1000 * (time.perf_counter() - began))
            if len(waits) == count:
                all_open.set()
            while not stream.done:
                await stream.read()
        side.streams += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
        try:
            await asyncio.wait_for(all_open.wait(), seconds)
        except TimeoutError:
            raise BenchmarkFailed(f"{len(waits)} of {count} were open at once") from None
        await asyncio.sleep(2)
        with_all, most = megabytes(side.server), max(descriptors(side.server))
    return sorted(waits), with_all, most


def idle(folder: Path, count: int, threads: int, limit: int | None, seconds: float) -> None:
    """Many streams at once that say little."""
    with started(folder, WORKERS, threads, bare=False, limit=limit) as (sides, env):
        side = sides[-1]
        assert side.server is not None
        for _ in range(4):  # either worker has served before its memory is looked at
            asyncio.run(hold_open(side, 4, 8.0 if side.streams == 0 else 2.0))
        before = megabytes(side.server)
        waits, with_all, most = asyncio.run(hold_open(side, count, seconds))
        print(
            f"{count} streams on {WORKERS} workers of {threads} threads, all open at once\n"
            f"first word after {statistics.median(waits):.0f} ms (median), {waits[-1]:.0f} (most)\n"
            f"memory of the workers: {sum(before):.0f} MB before, {sum(with_all):.0f} with all,"
            f" {1024 * (sum(with_all) - sum(before)) / count:.0f} kB a stream\n"
            f"at most {most} descriptors in a worker"
        )
        check_books(env, side.streams)


@contextlib.contextmanager
def started(
    folder: Path, workers: int, threads: int, bare: bool, limit: int | None = None
) -> Iterator[tuple[list[Side], dict[str, str]]]:
    """The upstream, the bare side if it is wanted, and Farebox, with the sides to measure."""
    ports = free_port(), free_port(), free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FAREBOX_")}
    env = {
        **clean,
        "FAREBOX_INSTANCE": str(folder),
        "FAREBOX_BIND": f"127.0.0.1:{ports[2]}",
        "FAREBOX_WORKERS": str(workers),
        "FAREBOX_THREADS": str(threads),
    }
    (folder / "farebox.toml").write_text(CONFIG.format(port=ports[0], route=ROUTE))
    tool(env, "flask", "users", "add", WHO)
    tool(env, "flask", "credits", "grant", WHO, str(GRANT))
    key = tool(env, "flask", "keys", "add", WHO, "--name", "bench")
    gunicorn = str(BIN / "gunicorn")
    sides = [Side("direct", ports[0])]
    with contextlib.ExitStack() as servers:
        command = [sys.executable, "bench/upstream.py", str(ports[0])]
        servers.enter_context(running(command, clean, folder / "upstream.log"))
        if bare:
            address = f"127.0.0.1:{ports[1]}"
            command = [gunicorn, "-c", "bench/bare.conf.py", "-b", address, "bench.bare:app"]
            bare_env = {**env, "BENCH_UPSTREAM": f"http://127.0.0.1:{ports[0]}"}
            server = servers.enter_context(running(command, bare_env, folder / "bare.log"))
            sides.append(Side("bare", ports[1], server=server.pid))
        command = [gunicorn, "-c", "gunicorn.conf.py"]
        if limit is not None:
            command = ["sh", "-c", f'ulimit -S -n {limit}; exec "$@"', "sh", *command]
        server = servers.enter_context(running(command, env, folder / "farebox.log"))
        sides.append(Side("Farebox", ports[2], key, server.pid))
        for side in sides:
            asyncio.run(_until_it_serves(side))
        yield sides, env


async def _until_it_serves(side: Side) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            async with connected(side.port) as pair:
                await first_token(side, *pair)
            return
        except OSError:
            if time.monotonic() > give_up:
                raise BenchmarkFailed(f"{side.name} does not answer") from None
            await asyncio.sleep(0.1)


def main() -> int:
    """Run one of the two; the exit code."""
    parser = argparse.ArgumentParser(description="Streams through Farebox.")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of throughput in a round (4)")
    parser.add_argument("--streams", type=int, default=16, help="at once, for throughput (16)")
    parser.add_argument("--idle", type=int, help="so many streams that say little, instead")
    parser.add_argument(
        "--threads", type=int, default=256, help="of each worker, with --idle (256)"
    )
    parser.add_argument("--descriptors", type=int, help="the soft limit of a process, with --idle")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    own = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (own, own))
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as name:
        folder = Path(name)
        try:
            if args.idle:
                idle(folder, args.idle, args.threads, args.descriptors, 30.0)
            else:
                compare(folder, args.rounds, args.seconds, args.streams)
        except (BenchmarkFailed, BaseExceptionGroup) as failure:
            why: BaseException = failure
            while isinstance(why, BaseExceptionGroup):
                why = why.exceptions[0]
            if not isinstance(why, BenchmarkFailed):
                raise
            print(f"\nbenchmark failed: {why}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
