"""An instance with a long past: a million calls of one account, and 100,000 entries of its ledger.

    python bench/seed.py FOLDER [--calls 1000000] [--entries 100000]

The calls lie over 400 days, of five keys, three people and four routes. Nine in ten cost nothing,
because they were free or failed. As in a real past some things are rare and old: one route was
called ten times, one key has rested since the first month. The books add up. EMAIL and PASSWORD
sign in who owns the account, and runs the instance as well.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

# A script finds its own folder first, and the project's modules are one up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import apsw

from core import clock, firstrun, keys, ledger, members, passwords, users
from core.audit import COMMAND_LINE
from core.keys import NewSecret, Terms
from models import Database, Tx

EMAIL = "bench@example.com"
PASSWORD = "a-long-enough-pass-phrase"
DAYS = 400
BATCH = 50_000
GRANT = 1_000_000
GRANTS = 14  # one a month, and of the entries too
COST_USD = "0.0079"
PAID, FREE, RARE, MODEL = "/api/v1/paid", "/api/v1/free", "/api/v1/rare", "/v1/chat/completions"

CONFIG = """\
[upstreams.sandbox]
kind = "sandbox"
""" + "".join(
    f"""
[[routes]]
path = "{path}"
methods = ["GET", "POST"]
upstream = "sandbox"
credits = {credits}
cost_usd = "{COST_USD}"
"""
    for path, credits in ((PAID, 1), (FREE, 0), (RARE, 1), (MODEL, 0))
)

_CALL = (
    "id, request_id, account_id, number, payer, key_id, user_id, route, method, model,"
    " input_tokens, output_tokens, units, price, held, captured, status, upstream_status,"
    " duration_ms, cost_usd, created_at, incarnation"
)
_ENTRY = "id, account_id, number, kind, amount, balance, reference, key_id, created_at"
_CALL_DAY = (
    "account_id, day, key_id, user_id, route, model, calls, failed, captured, cost_usd,"
    " first_number, last_number"
)
_ENTRY_DAY = "account_id, day, kind, entries, amount, first_number, last_number"


class Seeded(NamedTuple):
    """What there is to filter by."""

    account_id: str
    keys: list[str]  # the last of them rests
    people: list[str]
    first_day: int
    last_day: int


class Past:
    """The past of one account, one call after the other."""

    def __init__(self, who: Seeded, calls: int, entries: int, now: int) -> None:
        self._who = who
        self._calls = calls
        self._paid = entries - GRANTS
        self._start = now - DAYS * clock.DAY_MS
        self._span = DAYS * clock.DAY_MS - clock.MINUTE_MS
        self._random = random.Random(1)
        self.balance = 0
        self.entries: list[tuple[Any, ...]] = []
        self.call_days: dict[tuple[Any, ...], list[Any]] = {}
        self.entry_days: dict[tuple[Any, ...], list[Any]] = {}
        self.last_entry = 0

    def calls(self) -> Iterator[tuple[Any, ...]]:
        """A row of `call` for each, with what it does to the rest noted down."""
        account, people = self._who.account_id, self._who.people
        granted = captured_calls = 0
        for number in range(1, self._calls + 1):
            at = self._start + self._span * number // self._calls
            while granted < GRANTS and number > granted * self._calls // GRANTS:
                granted += 1
                self._enter("grant", GRANT, f"seed {granted}", None, at)
            # Spread so that there are exactly as many charged calls as there shall be entries.
            is_paid = captured_calls < number * self._paid // self._calls
            captured_calls += is_paid
            fails = not is_paid and self._random.random() < 0.4
            chance = self._random.random()
            route = PAID if is_paid else (MODEL if chance < 0.3 else FREE)
            if number % (self._calls // 10) == 7:
                route, fails = (PAID if is_paid else RARE), not is_paid
            key = self._key(number)
            person = people[self._random.randrange(len(people))]
            price = 1 if route in (PAID, RARE) or fails else 0
            status = "voided" if fails else "captured"
            captured = price if status == "captured" else 0
            model = f"model-{number % 2}" if route == MODEL else None
            cost = COST_USD if status == "captured" else None
            call_id = f"call_{self._random.getrandbits(96):024x}"
            self._add_up(at, key, person, route, model or "", fails, captured, cost, number)
            if captured:
                self._enter("capture", -captured, call_id, key, at)
            yield (
                call_id, call_id, account, number, "api_key", key, person, route, "POST", model,
                100 if model else None, 200 if model else None, 1, price, price, captured, status,
                502 if fails else 200, self._random.randrange(2000), cost, at, "seed",
            )  # fmt: skip

    def _key(self, number: int) -> str:
        *busy, resting = self._who.keys
        if number < self._calls * 30 // DAYS and number % 100 == 0:
            return resting
        return busy[self._random.randrange(len(busy))]

    def _add_up(
        self, at: int, key: str, person: str, route: str, model: str, fails: bool, captured: int,
        cost: str | None, number: int,
    ) -> None:  # fmt: skip
        group = (self._who.account_id, at // clock.DAY_MS, key, person, route, model)
        sums = self.call_days.setdefault(group, [0, 0, 0, Decimal(0), number, number])
        sums[0] += 1
        sums[1] += fails
        sums[2] += captured
        sums[3] += Decimal(cost or 0)
        sums[5] = number

    def _enter(self, kind: str, amount: int, reference: str, key: str | None, at: int) -> None:
        self.balance += amount
        self.last_entry += 1
        number, account = self.last_entry, self._who.account_id
        entry_id = f"ent_{self._random.getrandbits(96):024x}"
        self.entries.append(
            (entry_id, account, number, kind, amount, self.balance, reference, key, at)
        )
        day = (account, at // clock.DAY_MS, kind)
        sums = self.entry_days.setdefault(day, [0, 0, number, number])
        sums[0] += 1
        sums[1] += amount
        sums[3] = number


def prepare(folder: Path) -> Seeded:
    """An instance whose one account has people and keys, and no past."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "farebox.toml").write_text(CONFIG, "utf-8")
    firstrun.prepare_folder(folder)
    now = clock.now_ms()
    begun = now - DAYS * clock.DAY_MS
    hashed = passwords.hashed(PASSWORD, EMAIL)
    secrets = [NewSecret("fare") for _ in range(5)]

    def work(tx: Tx) -> Seeded:
        owner = users.add(tx, EMAIL, hashed, True, begun, COMMAND_LINE)
        people = [owner.id]
        for name in ("bo", "cy"):
            person = users.add(tx, f"{name}@example.com", None, False, begun, COMMAND_LINE)
            members.enrol(tx, owner.account_id, person.id, "member", begun)
            people.append(person.id)
        made = [
            keys.add(tx, owner.account_id, people[n % 3], Terms(f"key {n}"), secret, begun,
                     COMMAND_LINE)
            for n, secret in enumerate(secrets)
        ]  # fmt: skip
        first, last = begun // clock.DAY_MS, now // clock.DAY_MS
        return Seeded(owner.account_id, made, people, first, last)

    db = Database(folder / "farebox.db")
    try:
        db.migrate()
        return db.write(work, durable=True)
    finally:
        db.close()


def fill(folder: Path, who: Seeded, calls: int, entries: int) -> None:
    """Give the account of a prepared instance its past. Nothing else may have the database open."""
    past = Past(who, calls, entries, clock.now_ms())
    db = apsw.Connection(str(folder / "farebox.db"))
    try:
        # It is made anew when this fails, so it need not survive that.
        db.execute("PRAGMA synchronous = 0; PRAGMA cache_size = -2000000")
        indexes = db.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'call'"
            " AND sql IS NOT NULL"
        ).fetchall()
        for name, _ in indexes:  # made at once at the end they cost less
            db.execute(f"DROP INDEX {name}")
        rows, done = past.calls(), False
        while not done:
            with db:
                batch = [row for _, row in zip(range(BATCH), rows, strict=False)]
                done = len(batch) < BATCH
                _insert(db, "call", _CALL, batch)
                _insert(db, "entry", _ENTRY, past.entries)
                past.entries.clear()
        with db:
            _insert(db, "call_day", _CALL_DAY, [
                (*group, *sums[:3], format(sums[3], "f"), *sums[4:])
                for group, sums in past.call_days.items()
            ])  # fmt: skip
            _insert(db, "entry_day", _ENTRY_DAY, [
                (*day, *sums) for day, sums in past.entry_days.items()
            ])  # fmt: skip
            db.execute(
                "UPDATE account SET balance = ?, last_call = ?, last_entry = ? WHERE id = ?",
                (past.balance, calls, past.last_entry, who.account_id),
            )
        for _, statement in indexes:
            db.execute(statement)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()


def _insert(db: apsw.Connection, table: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
    marks = ", ".join("?" for _ in columns.split(","))
    db.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)


def verified(folder: Path) -> ledger.Totals:
    """The totals of the books. Raises when they do not add up."""
    db = Database(folder / "farebox.db")
    try:
        with db.snapshot() as tx:
            totals, faults = ledger.verify(tx)
    finally:
        db.close()
    if faults:
        raise RuntimeError(f"{len(faults)} faults, such as {faults[0]}")
    return totals


def main() -> None:
    """Seed a folder and verify its books."""
    parser = argparse.ArgumentParser(description="An instance with a long past.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--entries", type=int, default=100_000)
    args = parser.parse_args()
    if (args.folder / "farebox.db").exists():
        parser.error("that folder holds an instance already")
    began = time.monotonic()
    fill(args.folder, prepare(args.folder), args.calls, args.entries)
    seeded = time.monotonic()
    totals = verified(args.folder)
    print(
        f"{totals.calls} calls and {totals.entries} entries in {seeded - began:.1f} s,"
        f" verified in {time.monotonic() - seeded:.1f} s; sign in as {EMAIL} with {PASSWORD}"
    )


if __name__ == "__main__":
    main()
