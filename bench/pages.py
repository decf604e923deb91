"""`make bench-pages`: the dashboard over a million calls, beside an empty one.

    python bench/pages.py [--calls 1000000] [--entries 100000] [--rounds 15] [--keep FOLDER]

Two instances under gunicorn with the same people and keys, one of them with the past of
`bench/seed.py`. Somebody signs in at both and loads every page, in turn. Then the whole of the
seeded one's usage is downloaded as CSV while the worker's memory is watched. At the end the books
must add up. Exit code 0 only when every page answered 200.
"""

import argparse
import contextlib
import html
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from urllib.parse import urlencode

import seed
import urllib3
from run import BIN, START_SECONDS, BenchmarkFailed, free_port, running, stop

from core import clock

PAGE_SECONDS = 60.0
SAMPLE_SECONDS = 0.05


@dataclass
class Side:
    """One instance, and somebody signed in there."""

    name: str
    folder: Path
    who: seed.Seeded
    port: int = 0
    pool: urllib3.HTTPConnectionPool = field(init=False)
    cookie: str = ""

    def request(
        self, method: str, path: str, body: bytes | None = None, streamed: bool = False
    ) -> urllib3.BaseHTTPResponse:
        """One request with the cookie so far, never redirected."""
        headers = {"Cookie": self.cookie} if self.cookie else {}
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        answer = self.pool.request(
            method, path, body=body, headers=headers, redirect=False, retries=False,
            preload_content=not streamed,
        )  # fmt: skip
        for line in answer.headers.getlist("Set-Cookie"):
            self.cookie = line.partition(";")[0]
        return answer

    def sign_in(self) -> None:
        """As a browser does, with the form's token."""
        page = self.request("GET", "/login").data.decode()
        found = re.search(r'name="csrf_token" value="([^"]*)"', page)
        if found is None:
            raise BenchmarkFailed(f"{self.name}: no form on the page to sign in")
        fields = {
            "csrf_token": html.unescape(found[1]), "email": seed.EMAIL, "password": seed.PASSWORD,
        }  # fmt: skip
        answer = self.request("POST", "/login", urlencode(fields).encode())
        if answer.status != 303:
            raise BenchmarkFailed(f"{self.name}: signing in answered {answer.status}")

    def paths(self) -> dict[str, str]:
        """What is looked at, by a name that both sides share."""
        usage, busy, resting = "/dashboard/usage", self.who.keys[0], self.who.keys[-1]

        def day(back: int) -> str:
            return clock.rfc3339((self.who.last_day - back) * clock.DAY_MS)[:10]

        year = f"from={day(365)}&to={day(0)}"
        month = day(45)[:7]
        return {
            "/dashboard": "/dashboard",
            "usage": usage,
            "usage, not charged": f"{usage}?status=voided",
            "usage, in flight": f"{usage}?status=held",
            "usage of a route": f"{usage}?{urlencode({'route': seed.FREE})}",
            "usage of a key": f"{usage}?key={busy}",
            "usage of one day": f"{usage}?from={day(200)}&to={day(200)}",
            "usage of a year": f"{usage}?{year}",
            "year, later page": f"{usage}?{year}&before=500000",
            "year, rare route": f"{usage}?{year}&{urlencode({'route': seed.RARE})}",
            "year, key and route": f"{usage}?{year}&key={busy}&{urlencode({'route': seed.MODEL})}",
            "year, resting key": f"{usage}?{year}&key={resting}&status=voided",
            "billing": "/dashboard/billing",
            "ledger": "/dashboard/billing/ledger",
            "statement": f"/dashboard/billing/statement?month={month}",
            "settings": "/dashboard/settings",
            "/admin": "/admin",
            "admin, account": f"/admin/accounts/{self.who.account_id}",
            "admin, keys": "/admin/keys",
            "admin, prices": "/admin/prices",
            "admin, calls": "/admin/calls",
            "admin, audit": "/admin/audit",
            "admin, vouchers": "/admin/vouchers",
            "admin, health": "/admin/health",
        }


@contextlib.contextmanager
def served(side: Side) -> Iterator[None]:
    """The side's instance under gunicorn with one worker, so that there is one memory to watch."""
    side.port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FAREBOX_")}
    env = {
        **clean,
        "FAREBOX_INSTANCE": str(side.folder),
        "FAREBOX_BIND": f"127.0.0.1:{side.port}",
        "FAREBOX_WORKERS": "1",
        "FAREBOX_THREADS": "4",
    }
    command = [str(BIN / "gunicorn"), "-c", "gunicorn.conf.py"]
    with (
        running(command, env, side.folder / "server.log") as server,
        urllib3.HTTPConnectionPool("127.0.0.1", side.port, timeout=PAGE_SECONDS) as side.pool,
    ):
        give_up = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                if side.request("GET", "/healthz").status == 200:
                    break
            if server.poll() is not None or time.monotonic() > give_up:
                raise BenchmarkFailed(f"{side.name}: it does not start")
            time.sleep(0.1)
        yield


def compare(empty: Side, seeded: Side, rounds: int) -> list[str]:
    """Load every page of both sides in turn, and print the medians; what did not answer 200."""
    print(f"{'':<22}{'empty ms':>10}{'seeded ms':>11}{'ratio':>8}{'slowest':>9}{'KB':>7}")
    wrong = []
    paths = {side.name: side.paths() for side in (empty, seeded)}
    for name in paths[empty.name]:
        took: dict[str, list[float]] = {empty.name: [], seeded.name: []}
        statuses, size = set(), 0
        for number in range(rounds + 1):
            # Who goes first alternates, so that neither side always meets the warmer machine.
            for side in (empty, seeded) if number % 2 else (seeded, empty):
                began = time.perf_counter()
                answer = side.request("GET", paths[side.name][name])
                if number:  # the first is for both to warm up
                    took[side.name].append(1000 * (time.perf_counter() - began))
                statuses.add(answer.status)
                size = len(answer.data)
        of_empty, of_seeded = median(took[empty.name]), median(took[seeded.name])
        told = "" if statuses == {200} else f"  answered {sorted(statuses)}"
        wrong += [f"{name}{told}"] if told else []
        print(
            f"{name:<22}{of_empty:>10.1f}{of_seeded:>11.1f}{of_seeded / of_empty:>8.2f}"
            f"{max(took[seeded.name]):>9.1f}{size / 1024:>7.0f}{told}",
            flush=True,
        )
    return wrong


def workers_of(folder: Path) -> list[int]:
    """The processes that serve an instance and have a parent that does too."""
    found = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError, ValueError):
            if f"FAREBOX_INSTANCE={folder}".encode() in environ.read_bytes().split(b"\0"):
                stat = (environ.parent / "stat").read_text()
                found[int(environ.parent.name)] = int(stat.rpartition(")")[2].split()[1])
    return [pid for pid, parent in found.items() if parent in found]


def resident_mb(pid: int) -> float:
    """Memory of a process that is in RAM, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def download(side: Side) -> list[str]:
    """Download a year of calls as CSV and print how the worker's memory went; what was wrong."""
    (worker,) = workers_of(side.folder)
    samples: list[float] = [resident_mb(worker)]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append(resident_mb(worker))

    first = clock.rfc3339((side.who.last_day - 365) * clock.DAY_MS)[:10]
    last = clock.rfc3339(side.who.last_day * clock.DAY_MS)[:10]
    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    first_byte, lines, size = 0.0, -1, 0  # the line of names is no call
    try:
        answer = side.request("GET", f"/dashboard/usage.csv?from={first}&to={last}", streamed=True)
        for piece in answer.stream(64 * 1024):
            first_byte = first_byte or time.perf_counter() - began
            lines += piece.count(b"\n")
            size += len(piece)
        answer.release_conn()
    finally:
        over.set()
        sampler.join()
    took = time.perf_counter() - began
    print(
        f"\nusage.csv of a year: {lines} calls, {size / 1e6:.0f} MB in {took:.1f} s"
        f" ({lines / took:.0f} a second), first bytes after {1000 * first_byte:.0f} ms"
    )
    quarters = [samples[len(samples) * n // 4] for n in range(4)] + [samples[-1]]
    print(
        f"worker's memory: {' '.join(f'{mb:.0f}' for mb in quarters)} MB on the way,"
        f" {max(samples):.0f} at most"
    )
    return [] if answer.status == 200 else [f"usage.csv answered {answer.status}"]


def main() -> int:
    """Seed, serve, compare; the exit code."""
    parser = argparse.ArgumentParser(description="The dashboard over a long past.")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15, help="of each page on each side (15)")
    parser.add_argument("--keep", type=Path, help="use this folder, and keep it")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("there is at least one round")
    signal.signal(signal.SIGTERM, stop)
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="farebox-bench-"))
        )
        try:
            wrong = measure(folder, args.calls, args.entries, args.rounds)
        except BenchmarkFailed as failure:
            wrong = [str(failure)]
    for each in wrong:
        print(f"benchmark failed: {each}", file=sys.stderr)
    return 1 if wrong else 0


def measure(folder: Path, calls: int, entries: int, rounds: int) -> list[str]:
    """The whole benchmark in a folder; what was wrong."""
    empty, seeded = (
        Side(name, folder / name, seed.prepare(folder / name)) for name in ("empty", "seeded")
    )
    began = time.monotonic()
    seed.fill(seeded.folder, seeded.who, calls, entries)
    print(f"seeded {calls} calls and {entries} entries in {time.monotonic() - began:.0f} s\n")
    with served(empty), served(seeded):
        for side in (empty, seeded):
            side.sign_in()
        wrong = compare(empty, seeded, rounds)
        wrong += download(seeded)
    totals = seed.verified(seeded.folder)
    print(f"\nverified: {totals.calls} calls, {totals.entries} entries, balance {totals.balance}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
