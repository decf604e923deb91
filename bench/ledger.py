"""How many debits a second the ledger alone can make, without HTTP.

    python bench/ledger.py [--seconds 3]

A debit is what a paid call does to it: a hold, and a capture in a second transaction that is on the
disk before it counts. Afterwards every debit must be in the books.
"""

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

# A script finds its own folder first, and the project's modules are one up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import clock, ledger, tokens
from models import Database

GRANT = 1_000_000_000
MOST_CALLS = 1_000
START_SECONDS = 30.0
ALWAYS = ledger.Guard("1 = 1", {})
CASES = ((1, 1), (1, 16), (2, 16))  # processes, threads in each
WIDTHS = (9, 9, 12, 10, 10, 10)


@dataclass
class Measured:
    """What one process did: the durations of each writer's debits, in seconds."""

    writers: list[list[float]]
    elapsed: float


def debit(db: Database, account: str) -> None:
    """One hold and its capture, one credit."""
    call_id = tokens.new_id("call")
    now = clock.now_ms()
    call = ledger.NewCall(
        id=call_id, request_id=call_id, account_id=account, payer="api_key", key_id=None,
        user_id=None, route="/bench", method="POST", units=1, price=1, held=1,
        incarnation="bench", created_at=now,
    )  # fmt: skip
    outcome = ledger.Outcome(upstream_status=200, duration_ms=1, price=1)
    held = db.write(lambda tx: ledger.hold(tx, call, ALWAYS, MOST_CALLS))
    ended = db.write(lambda tx: ledger.capture(tx, call_id, 1, outcome, now), durable=True)
    if held is None or ended is None:
        raise RuntimeError("the ledger refused a debit that was covered")


def work(
    path: Path,
    account: str,
    threads: int,
    seconds: float,
    start: Barrier,
    results: "Queue[Measured]",
) -> None:
    """One process: debits from `threads` threads for `seconds`, begun together with the others."""
    db = Database(path)
    writers: list[list[float]] = [[] for _ in range(threads)]

    def write(durations: list[float], until: float) -> None:
        while (began := time.perf_counter()) < until:
            debit(db, account)
            durations.append(time.perf_counter() - began)

    debit(db, account)  # opens the connection, outside the measured time; counted in `measure`
    start.wait(START_SECONDS)
    began = time.perf_counter()
    pool = [threading.Thread(target=write, args=(own, began + seconds)) for own in writers]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    results.put(Measured(writers, time.perf_counter() - began))
    db.close()


def measure(folder: Path, processes: int, threads: int, seconds: float) -> str:
    """One case on a fresh database, as a line of the table. Raises when the books do not add up."""
    path = folder / f"{processes}x{threads}.db"
    db = Database(path)
    db.migrate()
    now = clock.now_ms()
    account = db.write(lambda tx: ledger.open_account(tx, now), durable=True)
    db.write(
        lambda tx: ledger.add_credits(tx, account, "grant", GRANT, "bench", None, now), durable=True
    )

    context = multiprocessing.get_context("spawn")  # a connection must not cross a fork
    start, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=work, args=(path, account, threads, seconds, start, results))
        for _ in range(processes)
    ]
    try:
        for worker in workers:
            worker.start()
        measured = [results.get(timeout=START_SECONDS + 2 * seconds) for _ in workers]
        for worker in workers:
            worker.join(START_SECONDS)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()

    writers = [writer for each in measured for writer in each.writers]
    durations = sorted(duration for writer in writers for duration in writer)
    with db.snapshot() as tx:
        _, faults = ledger.verify(tx)
        charged = GRANT - ledger.standing(tx, account).balance
    if faults or charged != len(durations) + processes:
        raise RuntimeError(f"{charged} credits charged for {len(durations)} debits; {faults}")
    db.close()

    rate = sum(sum(map(len, each.writers)) / each.elapsed for each in measured)
    p50, p99 = (1000 * durations[int(len(durations) * part)] for part in (0.5, 0.99))
    counts = sorted(map(len, writers))
    fairness = counts[0] / counts[-1]
    return f"{processes:>9}{threads:>9}{rate:>12.0f}{p50:>10.2f}{p99:>10.2f}{fairness:>10.2f}"


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description="Debits a second of the ledger alone.")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case (3)")
    args = parser.parse_args()
    # Fairness, beside the rest: pooled percentiles look best when one writer starves.
    names = ("processes", "threads", "debits/s", "p50 ms", "p99 ms", "min/max")
    print("".join(f"{name:>{width}}" for name, width in zip(names, WIDTHS, strict=True)))
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        for processes, threads in CASES:
            print(measure(Path(folder), processes, threads, args.seconds), flush=True)
    print("min/max: debits of the slowest writer / of the fastest")


if __name__ == "__main__":
    main()
