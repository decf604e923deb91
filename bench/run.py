"""`make bench`: what a metered call costs, beside the same call through bare Flask + urllib3.

Metered four times: with an API key, with a session token, and signed by a wallet of either kind.
Rounds alternate between all, because the machine drifts more than they differ; both servers run
under gunicorn with the same settings and are sent the same body. Every answer must be a 2xx, and at
the end the ledger must have captured exactly one credit for each metered one. Exit code 0 only when
all that holds.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NoReturn

import upstream
from load import Request, Result, load, post
from signing import Wallet

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ROUTE = "/api/v1/echo"
BODY = b'{"to": "+18148835337", "message": "Your code is 123456"}'
WHO = "bench@example.com"
GRANT = 100_000_000
WORKERS, THREADS = 2, 16
START_SECONDS = 30.0
MOST_PER_SECOND = 1200  # signed calls made ready for a round; any more are signed in it
STOP_SECONDS = 15.0

CONFIG = """\
[upstreams.bench]
kind = "http"
base_url = "http://127.0.0.1:{port}"

[[routes]]
path = "{route}"
methods = ["POST"]
upstream = "bench"
credits = 1

[limits]
requests_per_minute = 100000000
concurrent_calls = 1000
"""


class BenchmarkFailed(Exception):
    """The run proves nothing: something did not start, or an answer or the books were wrong."""


@dataclass
class Side:
    """One way to make the call: which server, which credential."""

    name: str
    port: int
    request: Request
    results: list[Result]


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    command: list[str], env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, none of which outlives the block."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield server
    except BenchmarkFailed as failure:
        tail = log.read_text(errors="replace")[-2000:].strip()
        told = f"\n--- {log.name}\n{tail}" if tail else ""
        raise BenchmarkFailed(f"{failure}{told}") from None
    finally:
        # Asked first, so that workers end what they are doing; the group is killed in any case,
        # because workers can outlive a master that died.
        with contextlib.suppress(ProcessLookupError):
            server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def tool(env: Mapping[str, str], *command: str) -> str:
    """What a command of the project prints; fails with what it says when it exits non-zero."""
    done = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchmarkFailed(f"{' '.join(command)} exited {done.returncode}:\n{done.stderr}")
    return done.stdout.strip()


def first_answer(server: subprocess.Popen[bytes], port: int, headers: Mapping[str, str]) -> None:
    """Wait until a server answers one call, and see that it passes the upstream's body through."""
    url = f"http://127.0.0.1:{port}{ROUTE}"
    call = urllib.request.Request(url, BODY, {"Content-Type": "application/json", **headers})
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(call, timeout=START_SECONDS) as answer:
                if answer.read() != upstream.BODY:
                    raise BenchmarkFailed(f"{url} did not give the upstream's answer")
                return
        except urllib.error.HTTPError as refusal:
            raise BenchmarkFailed(f"{url} answered {refusal.code}: {refusal.read()!r}") from None
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() > give_up:
                raise BenchmarkFailed(f"{url} does not answer") from None
            time.sleep(0.1)


def measure(side: Side, connections: int, seconds: float) -> None:
    """One round, printed and kept."""
    if isinstance(side.request, Wallet):
        side.request.prepare(int(MOST_PER_SECOND * (seconds + 2)))
    result = asyncio.run(load(side.port, side.request, connections, seconds))
    side.results.append(result)
    trouble = {status: n for status, n in result.statuses.items() if not 200 <= status < 300}
    notes = [f"{n} answered {status}" for status, n in sorted(trouble.items())]
    notes += [f"{result.lost} lost"] if result.lost else []
    notes += [f"{result.reconnects} reconnects"] if result.reconnects else []
    print(
        f"  {side.name:<14} {result.throughput:6.0f} req/s   p50 {result.p50_ms:6.1f} ms   "
        f"p99 {result.p99_ms:6.1f} ms   {', '.join(notes)}".rstrip(),
        flush=True,
    )


def print_table(bare: Side, key: Side, *others: Side) -> None:
    """The medians of all sides, and the ratios of the rounds that ran next to each other."""
    metered = (key, *others)
    print(f"\n{'median of rounds':<28}{'req/s':>10}{'p50 ms':>10}{'p99 ms':>10}")
    for side in (bare, *metered):
        rate = median(result.throughput for result in side.results)
        p50 = median(result.p50_ms for result in side.results)
        p99 = median(result.p99_ms for result in side.results)
        print(f"{side.name:<28}{rate:>10.0f}{p50:>10.1f}{p99:>10.1f}")
    for beside, sides in ((bare, metered), (key, others)):
        print(f"\n{f'beside {beside.name}':<28}{'min':>10}{'median':>10}{'max':>10}")
        for side in sides:
            _print_ratios(beside, side, "throughput", lambda result: result.throughput)
            _print_ratios(beside, side, "p99", lambda result: result.p99_ms)


def _print_ratios(beside: Side, side: Side, name: str, figure: Callable[[Result], float]) -> None:
    pairs = zip(beside.results, side.results, strict=True)
    values = sorted(figure(ours) / figure(other) for other, ours in pairs)
    label = f"{side.name} {name}"
    print(f"{label:<28}{values[0]:>10.2f}{median(values):>10.2f}{values[-1]:>10.2f}")


def check_books(env: Mapping[str, str], paid_answers: int) -> None:
    """Every 2xx answer was captured, once, and nothing else was."""
    print(f"\nledger verify: {tool(env, 'flask', 'ledger', 'verify')}")
    captured = GRANT - int(tool(env, "flask", "credits", "balance", WHO))
    if captured != paid_answers:
        raise BenchmarkFailed(f"{captured} credits captured for {paid_answers} answers")
    print(f"{captured} credits captured for {paid_answers} answers")


def compare(folder: Path, rounds: int, connections: int, seconds: float) -> None:
    """The whole benchmark, its servers' files and logs in `folder`."""
    upstream_port, bare_port, farebox_port = free_port(), free_port(), free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FAREBOX_")}
    env = {
        **clean,
        "FAREBOX_INSTANCE": str(folder),
        "FAREBOX_BIND": f"127.0.0.1:{farebox_port}",
        "FAREBOX_WORKERS": str(WORKERS),
        "FAREBOX_THREADS": str(THREADS),
    }
    bare_env = {**env, "BENCH_UPSTREAM": f"http://127.0.0.1:{upstream_port}"}
    (folder / "farebox.toml").write_text(CONFIG.format(port=upstream_port, route=ROUTE))
    tool(env, "flask", "users", "add", WHO)
    tool(env, "flask", "credits", "grant", WHO, str(GRANT))
    key = tool(env, "flask", "keys", "add", WHO, "--name", "bench")
    token = tool(env, "flask", "tokens", "mint", WHO)

    def paid_with(name: str, credential: str) -> Side:
        bearer = {"Authorization": f"Bearer {credential}"}
        return Side(name, farebox_port, post(farebox_port, ROUTE, BODY, bearer), [])

    bare = Side("bare", bare_port, post(bare_port, ROUTE, BODY), [])
    wallets = {
        "ed25519 wallet": Wallet("solana", farebox_port, ROUTE, BODY),
        "eip191 wallet": Wallet("eip155", farebox_port, ROUTE, BODY),
    }
    sides = [
        bare,
        paid_with("API key", key),
        paid_with("session token", token),
        *(Side(name, farebox_port, wallet, []) for name, wallet in wallets.items()),
    ]
    gunicorn = str(BIN / "gunicorn")
    farebox_command = [gunicorn, "-c", "gunicorn.conf.py"]
    bare_address = f"127.0.0.1:{bare_port}"
    bare_command = [gunicorn, "-c", "bench/bare.conf.py", "-b", bare_address, "bench.bare:app"]
    upstream_command = [sys.executable, "bench/upstream.py", str(upstream_port)]

    with contextlib.ExitStack() as servers:
        servers.enter_context(running(upstream_command, clean, folder / "upstream.log"))
        passing = servers.enter_context(running(bare_command, bare_env, folder / "bare.log"))
        metering = servers.enter_context(running(farebox_command, env, folder / "farebox.log"))
        first_answer(passing, bare_port, {})
        first_answer(metering, farebox_port, {"Authorization": f"Bearer {key}"})
        for wallet in wallets.values():
            wallet.link(token)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            # Who goes first alternates too, so that neither side always meets the warmer machine.
            for side in sides if number % 2 == 0 else reversed(sides):
                measure(side, connections, seconds)
        print_table(*sides)
        if not all(result.clean for side in sides for result in side.results):
            raise BenchmarkFailed("not every request was answered with a 2xx")
        paid = [result for side in sides[1:] for result in side.results]
        check_books(env, 1 + sum(result.succeeded for result in paid))


def stop(signum: int, frame: object) -> NoReturn:
    """Leave by an exception, so that every server is stopped."""
    raise SystemExit(128 + signum)


def main() -> int:
    """Run the comparison; the exit code."""
    parser = argparse.ArgumentParser(description="Farebox against bare Flask + urllib3.")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured in a round (5)")
    parser.add_argument("--connections", type=int, default=64, help="kept by the client (64)")
    args = parser.parse_args()
    if args.rounds < 1 or args.seconds <= 0 or args.connections < 1:
        parser.error("rounds, seconds and connections are positive")
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        try:
            compare(Path(folder), args.rounds, args.connections, args.seconds)
        except BenchmarkFailed as failure:
            print(f"\nbenchmark failed: {failure}", file=sys.stderr)
            return 1
        except TimeoutError:
            print("\nbenchmark failed: a server stopped answering", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
