"""From each earlier schema to that of today: nothing is lost, and sums are as if always kept."""

from __future__ import annotations

import random
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import argon2
import pytest
from browser import PASSWORD, Browser
from inprocess import Box, CheapSecret
from people import CONFIG, minted, pages, told

import config
import models
from core import backup, clock, firstrun, ledger, settlement, tokens, upkeep
from core.ledger import Guard, NewCall, Outcome
from models import Database, Tx

TABLES = (
    "account", "user", "one_time_link", "api_key", "rate_window", "credit_window", "call", "entry",
    "idempotency",
)  # fmt: skip
NEW = {
    "membership", "session", "session_token", "identity", "denied_token", "issuer_keys", "audit",
    "call_day", "entry_day", "voucher", "wallet", "payment", "used_nonce",
}  # fmt: skip
REAL = Path(models.__file__).parent / "migrations"
DAY = 86_400_000
_ID = re.compile(r"\b(acct|user|key|mem)_(?!id\b|operator\b)([a-z]+)\b")
_HASHER = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def named(text: str) -> str:
    """The text with every id in it (`acct_ann`) in the form that real ones have."""
    return _ID.sub(lambda found: f"{found[1]}_{found[2].encode().hex():0<24}", text)


def know(patches: pytest.MonkeyPatch, folder: Path, number: int) -> Path:
    """From now on only so many steps are known: the folder of steps."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for step in sorted(REAL.glob("*.sql"))[:number]:
        shutil.copy(step, folder)
    patches.setattr(models, "MIGRATIONS", folder)
    return folder


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this is there, only the first step is known: the folder of steps."""
    return know(monkeypatch, tmp_path / "migrations", 1)


class Old:
    """An instance folder whose database has schema 1 and something of everything in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "farebox.db"
        self.now = clock.now_ms()
        folder.mkdir()
        self.keys: dict[str, CheapSecret] = {}
        self.links = {"setup": tokens.new_secret(), "reset": tokens.new_secret()}
        self.db = Database(self.path)
        self.db.migrate()
        self.db.write(self._fill)

    def close(self) -> None:
        self.db.close()

    def _fill(self, tx: Tx) -> None:
        self.insert(
            tx, "account",
            # ann: 100 granted, 3 captured, 2 given back, 8 held in two calls
            {"id": "acct_ann", "balance": 99, "held": 8, "open_calls": 2, "last_call": 5,
             "last_entry": 3, "last_topup_at": 77, "created_at": 5},
            {"id": "acct_bob", "balance": 10**15, "last_entry": 1, "created_at": 5,
             "status": "suspended", "status_reason": "unpaid"},
            {"id": "acct_starter", "balance": 100, "last_entry": 1, "created_at": 5},
            {"id": "acct_empty", "created_at": 9},
        )  # fmt: skip
        tx.run("UPDATE account SET last_call = 1 WHERE id = 'acct_operator'")
        self.insert(
            tx, "user",
            {"id": "user_ann", "email": "ann@example.com", "account_id": "acct_ann",
             "password_hash": _HASHER.hash(PASSWORD), "is_operator": 1, "created_at": 5},
            {"id": "user_bob", "email": "bob@example.com", "account_id": "acct_bob",
             "created_at": 6},
            {"id": "user_eve", "email": "eve@example.com", "account_id": "acct_empty",
             "created_at": 6},
        )  # fmt: skip
        self.insert(
            tx, "one_time_link",
            *({"token_hash": tokens.digest(self.links[purpose].encode()), "purpose": purpose,
               "account_id": account, "user_id": user, "expires_at": self.now + DAY}
              for purpose, account, user in (
                  ("setup", "acct_starter", None), ("reset", "acct_bob", "user_bob"))),
            {"token_hash": b"used", "purpose": "reset", "account_id": "acct_bob",
             "user_id": "user_bob", "expires_at": 1, "used_at": 1},
        )  # fmt: skip
        known_keys: list[tuple[str, str, str | None, int, dict[str, object]]] = [
            ("key_c", "acct_ann", "user_ann", 50, {}),
            ("key_a", "acct_ann", "user_ann", 50, {"status": "revoked"}),
            ("key_b", "acct_ann", None, 50, {"scopes": '["sms:send"]', "rate_limit": 9}),
            ("key_z", "acct_ann", "user_ann", 40, {"credit_limit": 20, "credit_period": "total"}),
            ("key_y", "acct_ann", "user_ann", 60, {"status": "expired", "expires_at": 70}),
            ("key_q", "acct_bob", "user_bob", 50, {"status": "suspended", "suspended_by": "owner",
                                                   "status_reason": "why"}),
            ("key_p", "acct_bob", "user_bob", 50, {"previous_hash": "h", "previous_lookup": "l",
                                                   "previous_until": self.now + DAY}),
            ("key_s", "acct_starter", None, 50, {"last_used_at": 66}),
        ]  # fmt: skip
        for key_id, account, user, created_at, terms in known_keys:
            secret = self.keys[key_id] = CheapSecret("fare")
            known = {"id": key_id, "account_id": account, "user_id": user, "name": f"of {key_id}",
                     "lookup": secret.lookup, "start": secret.start, "hash": secret.hash,
                     "created_at": created_at}  # fmt: skip
            self.insert(tx, "api_key", known | terms)
        call = {"account_id": "acct_ann", "payer": "api_key", "key_id": "key_z", "held": 3,
                "user_id": "user_ann", "route": "/api/v1/echo", "method": "GET", "units": 1,
                "price": 3, "created_at": self.now, "incarnation": "inc_gone"}  # fmt: skip
        for number, more in enumerate((
            {"id": "req_1", "request_id": "req_1", "status": "captured", "captured": 3,
             "upstream_status": 200, "duration_ms": 4, "cost_usd": "0.01"},
            {"id": "req_2", "request_id": "chosen", "status": "voided", "estimated": 1},
            {"id": "req_3", "request_id": "req_3", "status": "captured", "captured": 0, "held": 0,
             "model": "m", "input_tokens": 1, "output_tokens": 2},
            {"id": "req_4", "request_id": "req_4", "idempotency_key": "once",
             "credit_window_at": 0},
            {"id": "req_5", "request_id": "req_5", "held": 5, "price": 5},
        ), start=1):  # fmt: skip
            self.insert(tx, "call", call | {"number": number} | more)
        self.insert(tx, "call", call | {
            "id": "req_op", "request_id": "req_op", "account_id": "acct_operator", "number": 1,
            "payer": "operator", "key_id": None, "held": 0, "status": "captured", "user_id": None,
        })  # fmt: skip
        entry = {"account_id": "acct_ann", "created_at": self.now, "note": "n"}
        for number, (kind, amount, balance, reference, whose) in enumerate((
            ("grant", 100, 100, "grant_1", None),
            ("capture", -3, 97, "req_1", "key_z"),
            ("adjustment", 2, 99, "adjustment_1", None),
        ), start=1):  # fmt: skip
            self.insert(tx, "entry", entry | {
                "id": f"ent_{number}", "number": number, "kind": kind, "amount": amount,
                "balance": balance, "reference": reference, "key_id": whose,
            })  # fmt: skip
        for account, amount in (("acct_bob", 10**15), ("acct_starter", 100)):
            self.insert(tx, "entry", entry | {
                "id": f"ent_{account}", "account_id": account, "number": 1, "kind": "grant",
                "amount": amount, "balance": amount, "reference": account, "note": None,
            })  # fmt: skip
        self.insert(tx, "rate_window", {"subject": "key_z", "minute": 1, "used": 2})
        self.insert(tx, "credit_window", {"subject": "key_z", "starts_at": 0, "used": 6})
        self.insert(tx, "idempotency", {
            "account_id": "acct_ann", "key": "once", "fingerprint": b"f", "call_id": "req_4",
            "state": "running", "created_at": self.now,
        })  # fmt: skip

    @staticmethod
    def insert(tx: Tx, table: str, *rows: dict[str, Any]) -> None:
        for row in rows:
            names = ", ".join(row)
            values = ", ".join(f":{name}" for name in row)
            real = {k: named(v) if isinstance(v, str) else v for k, v in row.items()}
            tx.run(f"INSERT INTO {table} ({names}) VALUES ({values})", real)


@pytest.fixture
def old(first: Path, tmp_path: Path) -> Iterator[Old]:
    made = Old(tmp_path / "instance")
    assert look(made.path).version == 1
    yield made
    made.close()


class look:
    """What is in a database file nobody has open."""

    def __init__(self, path: Path) -> None:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            self.version = connection.pragma("user_version")
            self.integrity = connection.pragma("integrity_check")
            self.astray = connection.execute("PRAGMA foreign_key_check").fetchall()
            asked = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
            self.schema: list[tuple[Any, ...]] = connection.execute(asked).fetchall()
            self.columns: dict[str, list[str]] = {}
            self.rows: dict[str, list[tuple[Any, ...]]] = {}
            for kind, name, _ in self.schema:
                if kind == "table":
                    rows = connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall()
                    self.rows[name] = rows
                    info = connection.execute(f"PRAGMA table_info({name})").fetchall()
                    self.columns[name] = [str(row[1]) for row in info]
        finally:
            connection.close()

    def as_dicts(self, table: str) -> list[dict[str, Any]]:
        return [dict(zip(self.columns[table], row, strict=True)) for row in self.rows[table]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, look) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def migrated(old: Old, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The same database with all the steps the application knows."""
    monkeypatch.setattr(models, "MIGRATIONS", REAL)
    old.db.migrate()
    return old.db


@pytest.fixture
def box(old: Old, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """The application of today on the old instance folder."""
    monkeypatch.setattr(models, "MIGRATIONS", REAL)
    with Box(old.folder, CONFIG) as box:
        assert box.instance.trouble is None
        yield box


def test_the_example_is_a_sound_instance_of_its_time(old: Old) -> None:
    found = look(old.path)
    assert set(found.rows) == set(TABLES) and all(found.rows.values())
    assert (found.integrity, found.astray) == ("ok", [])
    with old.db.snapshot() as tx:
        assert ledger.verify(tx)[1] == []


def test_every_row_and_every_column_is_still_there(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = look(old.path)
    migrated(old, monkeypatch)
    after = look(old.path)
    assert after.version == models.latest_schema()
    assert set(after.rows) == set(TABLES) | NEW
    assert not [name for _, name, _ in after.schema if "_new" in name]
    assert (after.integrity, after.astray) == ("ok", [])
    added: dict[str, dict[str, object]] = {
        "user": {"status": "active", "status_reason": None},
        "api_key": {"suspended_by_user": None},
        "call": {"member_window_at": None},
        "one_time_link": {"membership_id": None},
    }
    for table in TABLES:
        rows = after.as_dicts(table)
        if table == "api_key":
            for row in rows:
                del row["number"]
        assert rows == [row | added.get(table, {}) for row in before.as_dicts(table)], table
    kept = {name for _, name, _ in before.schema if not name.startswith("sqlite_")}
    assert kept <= {name for _, name, _ in after.schema}  # indexes and triggers too
    with old.db.snapshot() as tx:
        totals, faults = ledger.verify(tx)
    assert faults == [] and totals == (5, 5, 6, 99 + 10**15 + 100, 8)


def test_whoever_had_an_account_owns_it_as_a_member(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated(old, monkeypatch)
    found = look(old.path).as_dicts("membership")
    assert [" ".join((row["id"], row["account_id"], row["user_id"])) for row in found] == [
        named("mem_ann acct_ann user_ann"),
        named("mem_bob acct_bob user_bob"),
        named("mem_eve acct_empty user_eve"),
    ]
    for row in found:
        assert (row["role"], row["email"], row["credit_limit"]) == ("owner", None, None)
    assert [row["created_at"] for row in found] == [5, 6, 6]
    assert look(old.path).rows["audit"] == []


def test_keys_are_numbered_in_their_accounts_by_age_and_then_id(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated(old, monkeypatch)
    numbers = {row["id"]: row["number"] for row in look(old.path).as_dicts("api_key")}
    by_account = ("key_z", "key_a", "key_b", "key_c", "key_y"), ("key_p", "key_q"), ("key_s",)
    assert numbers == {
        named(key): number for keys in by_account for number, key in enumerate(keys, start=1)
    }
    twice = named("UPDATE api_key SET number = 1 WHERE id = 'key_a'")
    with pytest.raises(apsw.ConstraintError):
        old.db.write(lambda tx: tx.run(twice))


def test_an_account_of_very_many_keys_is_numbered_in_no_time(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.db.write(
        lambda tx: tx.run(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 15000)"
            " INSERT INTO api_key (id, account_id, name, lookup, start, hash, created_at, status)"
            " SELECT 'key_' || i, :account, 'n', i, 's', 'h', i / 7, 'revoked' FROM n",
            {"account": named("acct_empty")},
        )
    )
    started = clock.monotonic()
    migrated(old, monkeypatch)
    assert clock.monotonic() - started < 10  # counting for each key anew took 40 seconds
    assert old.db.row(
        "SELECT MIN(number), MAX(number), COUNT(DISTINCT number) FROM api_key"
        " WHERE account_id = :account",
        {"account": named("acct_empty")},
    ) == (1, 15000, 15000)


def test_a_copy_from_before_is_kept(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    before = look(old.path)
    db = migrated(old, monkeypatch)
    (copy,) = old.folder.glob("farebox.db.before-*")
    assert copy.name == "farebox.db.before-0002"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert look(copy) == before
    db.migrate()  # once is enough
    assert look(copy) == before and look(old.path).version == models.latest_schema()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET amount = 1 WHERE id = 'ent_1'",
        "DELETE FROM entry WHERE id = 'ent_1'",
        "INSERT OR REPLACE INTO entry SELECT * FROM entry WHERE id = 'ent_1'",
        "UPDATE account SET held = balance + 1 WHERE id = 'acct_ann'",
        "UPDATE account SET balance = -1 WHERE id = 'acct_empty'",
        "UPDATE account SET status = 'sleeping' WHERE id = 'acct_empty'",
        "INSERT INTO api_key (id, account_id, name, lookup, start, hash, created_at, number)"
        " VALUES ('key_x', 'acct_nobody', 'n', 'x', 's', 'h', 0, 1)",
        "INSERT INTO user (id, account_id, created_at) VALUES ('user_x', 'acct_ann', 0)",
        "INSERT INTO user (id, email, account_id, created_at)"
        " VALUES ('user_x', 'ann@example.com', 'acct_starter', 0)",
        "INSERT INTO membership (id, account_id, user_id, role, created_at)"
        " VALUES ('mem_x', 'acct_ann', 'user_ann', 'member', 0)",
        "DELETE FROM account WHERE id = 'acct_ann'",
        "DELETE FROM user WHERE id = 'user_ann'",
        "UPDATE call SET account_id = 'acct_nobody' WHERE id = 'req_1'",
    ],
)
def test_what_could_not_be_written_before_still_cannot(
    old: Old, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    db = migrated(old, monkeypatch)
    before = look(old.path)
    with pytest.raises(apsw.ConstraintError):
        db.write(lambda tx: tx.run(named(statement)))
    assert look(old.path) == before


def test_foreign_keys_are_on_again_wherever_the_database_is_used(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = migrated(old, monkeypatch)
    for read in (db, Database(old.path)):
        assert read.row("PRAGMA foreign_keys") == (1,)
        assert read.write(lambda tx: tx.row("PRAGMA foreign_keys")) == (1,)
        assert read.row("PRAGMA legacy_alter_table") == (0,)
        if read is not db:
            read.close()


# A step that fails.


@pytest.mark.parametrize(
    "more",
    [
        "SELEC 1;",
        "INSERT INTO account (id, created_at) VALUES ('acct_ann', 0);",
        "INSERT INTO account (id, balance, created_at) VALUES ('acct_x', -1, 0);",
        "UPDATE entry SET amount = 5;",
        "DELETE FROM user WHERE id = 'user_ann';",  # whom keys and memberships refer to
        "DROP TABLE account;",
    ],
)
@pytest.mark.parametrize("fails", [2, 3])
def test_a_step_that_fails_at_its_very_end_leaves_everything_as_it_was(
    old: Old, first: Path, monkeypatch: pytest.MonkeyPatch, fails: int, more: str
) -> None:
    know(monkeypatch, first, fails - 1)
    old.db.migrate()
    before = look(old.path)
    know(monkeypatch, first, fails)
    (broken,) = first.glob(f"000{fails}_*.sql")
    with broken.open("a", encoding="utf-8") as step:
        step.write(named(more))
    for _ in range(2):
        with pytest.raises((apsw.Error, RuntimeError)):
            old.db.migrate()
        assert look(old.path) == before
    assert old.db.row("PRAGMA foreign_keys") == (1,)
    with old.db.snapshot() as tx:
        assert ledger.verify(tx)[1] == []
    migrated(old, monkeypatch)
    assert look(old.path).version == models.latest_schema()


# Sums of what was there before them.

SUMS = ("call_day", "entry_day")
_COSTS = (
    None, "0.1", "0.2", "0.10", "0", "0.0079", "0.000000000001", "999999999.999999999999",
    "123456789", "7.000", "9007199254740.000000000001",
)  # fmt: skip


def lived(tx: Tx, plan: random.Random, calls: int) -> None:
    """Calls and entries of two accounts over six days, in no order of time, as the running code
    makes them. One call is left in flight."""
    start = 20_000 * DAY
    accounts = [ledger.open_account(tx, start) for _ in range(2)]
    for account in accounts:
        ledger.add_credits(tx, account, "grant", 10**6, tokens.new_id("grant"), None, start)
    for number in range(calls):
        account, at = plan.choice(accounts), start + plan.randrange(6 * DAY)
        at = plan.choice((at, at // DAY * DAY, at // DAY * DAY + DAY - 1))
        call_id, price = tokens.new_id("req"), plan.choice((0, 1, 3))
        new = NewCall(
            call_id, call_id, account, "session",
            plan.choice((None, named("key_a"), named("key_b"))),
            plan.choice((None, named("user_a"))), plan.choice(("/api/v1/echo", "/api/v1/sms/send")),
            "POST", 1, price, price, "inc_gone", at,
        )  # fmt: skip
        assert ledger.hold(tx, new, Guard("TRUE", {}), 10) is not None
        model = {"id": call_id, "model": plan.choice((None, None, "m"))}
        tx.run("UPDATE call SET model = :model WHERE id = :id", model)
        if number > 0:
            _end(tx, plan, call_id, price, at)


def _end(tx: Tx, plan: random.Random, call_id: str, price: int, at: int) -> None:
    if plan.random() < 0.25:
        assert ledger.void(tx, call_id, Outcome(502, 1))
        return
    outcome = Outcome(200, 1, cost_usd=plan.choice(_COSTS))
    assert ledger.capture(tx, call_id, price, outcome, at + plan.randrange(DAY))
    if price and plan.random() < 0.1:
        ledger.refund(tx, call_id, None, at + plan.randrange(DAY))


class Second:
    """An instance folder of schema 2, and the sums the running code made of the same calls."""

    def __init__(self, folder: Path, patches: pytest.MonkeyPatch, calls: int) -> None:
        folder.mkdir()
        self.path = folder / "farebox.db"
        twin = Database(folder / "twin.db")
        twin.migrate()
        twin.write(lambda tx: lived(tx, random.Random(calls), calls))
        twin.close()
        of_today = look(folder / "twin.db")
        self.sums = {table: of_today.rows[table] for table in SUMS}
        know(patches, folder.with_name("steps"), 2)
        self.db = Database(self.path)
        self.db.migrate()

        def fill(tx: Tx) -> None:
            tx.run("DELETE FROM account")
            for table in ("account", "call", "entry"):
                Old.insert(tx, table, *of_today.as_dicts(table))

        self.db.write(fill)


@pytest.fixture(params=[0, 1, 40, 800])
def second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Second]:
    made = Second(tmp_path / "instance", monkeypatch, request.param)
    found = look(made.path)
    assert found.version == 2 and not set(SUMS) & set(found.rows)
    yield made
    made.db.close()


def test_the_sums_are_those_the_running_code_would_have_kept(
    second: Second, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MIGRATIONS", REAL)
    second.db.migrate()
    found = look(second.path)
    assert found.version == models.latest_schema() and (found.integrity, found.astray) == ("ok", [])
    for table in SUMS:
        # To the letter: a cost has as many places as it would have.
        assert sorted(found.rows[table]) == sorted(second.sums[table]), table
    with second.db.snapshot() as tx:
        assert ledger.verify(tx)[1] == []


def test_the_sums_are_kept_on_from_where_they_began(
    second: Second, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MIGRATIONS", REAL)
    second.db.migrate()
    outcome = Outcome(200, 1, cost_usd="0.3")
    calls = second.db.rows("SELECT id, account_id, status, created_at FROM call")
    for call_id, account, status, at in calls[-20:]:
        again = NewCall(
            f"{call_id}_2", f"{call_id}_2", account, "session", "key_a", "user_a",
            "/api/v1/echo", "POST", 1, 2, 2, "inc_gone", at,
        )  # fmt: skip
        second.db.write(lambda tx, new=again: ledger.hold(tx, new, Guard("TRUE", {}), 10))
        for ending in (again.id, *([call_id] * (status == "held"))):
            assert second.db.write(lambda tx, of=ending: ledger.capture(tx, of, 2, outcome, 1))
        with second.db.snapshot() as tx:
            assert ledger.verify(tx)[1] == []


@pytest.mark.parametrize("schema", [1, 2])
def test_a_backup_of_an_earlier_version_is_restored_and_brought_up_to_date(
    old: Old, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: int
) -> None:
    know(monkeypatch, tmp_path / "migrations", schema)
    old.db.migrate()
    (old.folder / "farebox.toml").write_text(CONFIG)
    firstrun.prepare_folder(old.folder)
    settings = config.load({"FAREBOX_INSTANCE": str(old.folder)})
    before, saved = look(old.path), tmp_path / "backup.tar"
    backup.backup(old.db, settings, saved)
    monkeypatch.setattr(models, "MIGRATIONS", REAL)
    restored = tmp_path / "restored"
    assert backup.restore(restored, saved) is None
    found = look(restored / "farebox.db")
    assert found.version == schema and found.rows["entry"] == before.rows["entry"]
    with Box(restored) as box:  # which proves its books when it ends
        assert box.instance.trouble is None
        assert box.row("PRAGMA user_version") == (models.latest_schema(),)
        assert box.get("/api/v1/echo", old.keys["key_z"].token).status == 200
        assert box.row("SELECT SUM(calls) FROM call_day") == (5,)


@pytest.mark.parametrize("second", [40], indirect=True)
def test_wrong_books_of_an_earlier_version_are_not_backed_up(
    second: Second, tmp_path: Path
) -> None:
    firstrun.prepare_folder(second.path.parent)
    settings = config.load({"FAREBOX_INSTANCE": str(second.path.parent)})
    second.db.write(lambda tx: tx.run("UPDATE account SET balance = balance + 1"))
    with pytest.raises(backup.BackupError, match="not sound"):
        backup.backup(second.db, settings, tmp_path / "backup.tar")


# The application of today on what it was given.


def test_old_keys_pay_and_old_calls_and_entries_are_read(box: Box, old: Old) -> None:
    key = old.keys["key_z"].token
    answer = box.get("/api/v1/echo", key)
    assert answer.status == 200, answer.body
    assert box.standing(named("acct_ann")) == (99 - 8 - 3, 8)
    record = box.record(key, answer)
    assert (record["key_id"], record["user_id"]) == (named("key_z"), named("user_ann"))
    assert told(box.get("/api/v1/echo", old.keys["key_b"].token)) == (403, "missing_scope")
    for ended in ("key_a", "key_y"):
        assert told(box.get("/api/v1/echo", old.keys[ended].token)) == (401, "invalid_api_key")
    for ours in ("key_p", "key_q"):
        assert box.get("/api/v1/echo", old.keys[ours].token).status == 403
    assert box.get("/api/v1/echo", old.keys["key_s"].token).status == 200
    token = minted(box, "ann@example.com")
    calls = [c["request_id"] for page in pages(box, "/api/v1/usage", token, 2) for c in page]
    assert calls == [answer.request_id, "req_5", "req_4", "req_3", "chosen", "req_1"]
    entries = [e["kind"] for page in pages(box, "/api/v1/ledger", token, 2) for e in page]
    assert entries == ["capture", "adjustment", "capture", "grant"]
    # Of the old limit of 20, 6 were counted before, and 3 just now.
    outcomes = [box.get("/api/v1/echo", key).status for _ in range(4)]
    assert outcomes == [200, 200, 200, 403]


def test_what_was_held_is_settled_after_the_upgrade(box: Box) -> None:
    now = clock.now_ms()
    outcome = Outcome(200, 1, 1, 3)
    resolved = box.write(lambda tx: settlement.capture(tx, "req_4", 3, outcome, None, now))
    assert resolved is not None and (resolved.captured, resolved.member_window_at) == (3, None)
    assert box.standing(named("acct_ann")) == (91, 5)
    assert upkeep.void_orphans(box.instance) == 1  # its worker is gone
    assert box.standing(named("acct_ann")) == (96, 0)
    assert box.row("SELECT state FROM idempotency WHERE key = 'once'") == ("lost",)
    assert box.cli("ledger", "verify").exit_code == 0


def test_old_people_sign_in_and_manage_their_keys(box: Box, old: Old) -> None:
    browser = Browser(box)
    assert browser.sign_in("ann@example.com").status == 303
    token = browser.token()
    keys = [key for page in pages(box, "/api/v1/keys", token, 2) for key in page]
    assert " ".join(key["id"] for key in keys) == named("key_y key_c key_b key_a key_z")
    made = box.post("/api/v1/keys", token, {"name": "new"}).json()
    listed = box.get("/api/v1/keys?limit=1", token).json()
    assert listed["data"][0]["id"] == made["id"]
    (me,) = box.get("/api/v1/members", token).json()["data"]
    assert (me["id"], me["role"], me["status"]) == (named("mem_ann"), "owner", "active")
    assert box.get("/api/v1/audit?account=all", token).status == 200  # ann runs the instance
    assert told(box.get("/api/v1/account", minted(box, "bob@example.com"))) == (
        403, "account_suspended",
    )  # fmt: skip


def test_old_links_can_still_be_followed(box: Box, old: Old) -> None:
    setup = Browser(box)
    answer = setup.submit(
        f"/setup?token={old.links['setup']}", email="first@example.com", password=PASSWORD
    )
    assert answer.status == 303
    account = box.get("/api/v1/account", setup.token()).json()
    assert (account["account"], account["credits"]) == (named("acct_starter"), 100)
    reset = Browser(box)
    assert reset.submit(f"/reset?token={old.links['reset']}", password=PASSWORD).status == 303
    assert Browser(box).sign_in("bob@example.com").status == 303
    assert Browser(box).get(f"/reset?token={old.links['reset']}").status == 404
