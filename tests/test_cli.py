"""What an operator types, what is printed, and how it ends; and the links that are made by it."""

from __future__ import annotations

import re
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw
import argon2
import pytest
from browser import PASSWORD, Browser
from conftest import StartFarebox
from doubles import Twilio, Upstream, refused_port
from inprocess import STRANGERS_KEY, Box, Clock
from issuer import Issuer
from server import OPERATOR_KEY, TRACEBACK, Answer, Farebox, free_port

from core import backup as backups
from core import clock, firstrun, ledger, links, tokens
from core.errors import Refusal

CONFIG = """
[instance]
signup_credits = 25

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
scope = "sms:send"
credits = 2
per = "sms_segment"
cost_usd = "0.0079"

[[routes]]
path = "/api/v1/echo"
methods = ["GET", "POST"]
upstream = "sandbox"
credits = 5

[[routes]]
path = "/api/v1/pages/*"
methods = ["GET"]
upstream = "sandbox"
credits = 3
per = "unit"
units = { from = "json", pointer = "/pages", max = 20 }
cost_usd = "0.05"
"""
ACCOUNT = re.compile(r"acct_[0-9a-f]{24}")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("instance"), CONFIG) as box:
        yield box


def said(box: Box, *words: str, stdin: str | None = None) -> str:
    """What a command that succeeds prints on standard output; it prints nothing else."""
    done = box.cli(*words, stdin=stdin)
    assert done.exit_code == 0, (words, done.output, done.exception)
    assert done.stderr == ""
    assert done.stdout.endswith("\n") or done.stdout == ""
    text: str = done.stdout
    return text.removesuffix("\n")


def complaint(box: Box, *words: str, stdin: str | None = None, code: int = 1) -> str:
    """What a command that fails prints on standard error: no trace, and nothing on stdout."""
    done = box.cli(*words, stdin=stdin)
    assert done.exit_code == code, (words, done.exit_code, done.output)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert TRACEBACK not in done.stderr
    text: str = done.stderr
    if code == 1:
        assert len(text.strip().splitlines()) == 1, text
        assert text.startswith("Error: ")
    return text


def new_user(box: Box, name: str = "") -> tuple[str, str]:
    """A user made on the command line: e-mail and account."""
    email = f"{name or tokens.random_text(8).lower()}@example.com"
    line = said(box, "users", "add", email)
    assert line.split(" ")[0] == email
    return email, line.split(" ")[1]


# Users.


def test_a_user_is_added_with_an_account_and_the_credits_of_signing_up(box: Box) -> None:
    email, account = new_user(box, "ada.lovelace")
    assert (email, bool(ACCOUNT.fullmatch(account))) == ("ada.lovelace@example.com", True)
    assert said(box, "credits", "balance", email) == "25"
    assert f"{email} {account}" in said(box, "users", "list").splitlines()
    (entry,) = box.instance.db.rows(
        "SELECT kind, amount FROM entry WHERE account_id = :id", {"id": account}
    )
    assert entry == ("signup", 25)


def test_an_operator_is_listed_as_one(box: Box) -> None:
    said(box, "users", "add", "root@example.com", "--operator")
    (line,) = [line for line in said(box, "users", "list").splitlines() if "root@" in line]
    assert line.endswith(" operator")


def test_users_are_listed_by_address(box: Box) -> None:
    lines = said(box, "users", "list").splitlines()
    assert lines == sorted(lines)


def test_an_address_is_one_user_whatever_its_case(box: Box) -> None:
    said(box, "users", "add", "Case@Example.COM")
    assert "case@example.com" in said(box, "users", "list")
    assert "case@example.com" in complaint(box, "users", "add", "case@example.com")
    assert said(box, "credits", "balance", "CASE@example.com") == "25"


@pytest.mark.parametrize(
    "email",
    ["", "nobody", "@example.com", "a@", "a b@example.com", "a@b@c", "a@exa mple.com",
     "<a@example.com>", "a@example.com\n", "a@example.com,b@example.com", "a\x00@example.com"],
)  # fmt: skip
def test_what_is_no_address_is_refused(box: Box, email: str) -> None:
    assert "e-mail" in complaint(box, "users", "add", "--", email)


def password_hash(box: Box, email: str) -> str | None:
    found: str | None = box.row("SELECT password_hash FROM user WHERE email = :e", e=email)[0]
    return found


def test_a_password_is_read_from_standard_input_and_stored_hashed(box: Box) -> None:
    said(box, "users", "add", "pw@example.com", "--password-stdin", stdin=f"{PASSWORD}\n")
    stored = password_hash(box, "pw@example.com")
    assert stored is not None and stored.startswith("$argon2id$")
    assert argon2.PasswordHasher().verify(stored, PASSWORD)
    said(box, "users", "add", "nopw@example.com")
    assert password_hash(box, "nopw@example.com") is None


@pytest.mark.parametrize(
    "password",
    ["", "short", "elevenchars", "x" * 129, "aaaaaaaaaaaaaaaa", "abababababababab",
     "my name is weak.user for sure"],
)  # fmt: skip
def test_a_weak_password_makes_no_user(box: Box, password: str) -> None:
    line = complaint(
        box, "users", "add", "weak.user@example.com", "--password-stdin", stdin=f"{password}\n"
    )
    assert "password" in line
    assert not password or password not in line
    assert "weak.user@" not in said(box, "users", "list")


@pytest.mark.parametrize("password", ["twelve chars", "éàüöçñ" + "kadfbz", "x1Y2z=-9" * 16])
def test_twelve_to_128_characters_are_a_password(box: Box, password: str) -> None:
    email = f"{tokens.random_text(20)}@example.com".lower()
    said(box, "users", "add", email, "--password-stdin", stdin=f"{password}\n")


def test_a_short_name_does_not_spoil_every_password(box: Box) -> None:
    # A name of one letter is in nearly every pass phrase there is.
    said(box, "users", "add", "a@example.com", "--password-stdin", stdin=f"{PASSWORD}\n")


# WHO.


def test_who_is_an_address_or_an_account(box: Box) -> None:
    email, account = new_user(box)
    said(box, "credits", "grant", email, "10")
    assert said(box, "credits", "balance", account) == "35"
    assert said(box, "credits", "balance", email) == "35"


@pytest.mark.parametrize(
    "who",
    ["nobody@example.com", "acct_000000000000000000000000", "acct_", "", "solana:7xKX",
     "eip155:0x1", "did:privy:x", "user_1", "%", "' OR 1=1 --"],
)  # fmt: skip
@pytest.mark.parametrize(
    "command",
    [
        ["credits", "balance"],
        ["credits", "grant", "5"],
        ["credits", "adjust", "5", "--note", "x"],
        ["keys", "add", "--name", "x"],
        ["keys", "list"],
        ["users", "reset-link"],
    ],
    ids=" ".join,
)
def test_nobody_is_told_as_nobody(box: Box, who: str, command: list[str]) -> None:
    before = said(box, "ledger", "verify")
    line = complaint(box, *command[:2], who, *command[2:])
    assert "no" in line.lower()
    assert said(box, "ledger", "verify") == before


# Keys.


def test_a_new_key_is_printed_alone_and_works(box: Box) -> None:
    email, _ = new_user(box)
    key = said(box, "keys", "add", email, "--name", "laptop")
    assert re.fullmatch(r"fare_live_[A-Za-z0-9]{32}", key)
    assert box.get("/api/v1/echo", key).status == 200
    listed = said(box, "keys", "list", email)
    assert key not in listed
    fields = listed.split(" ")
    assert re.fullmatch(r"key_[0-9a-f]{24}", fields[0])
    assert key.startswith(fields[1].rstrip("…"))
    assert (fields[2], fields[4]) == ("active", "laptop")
    assert key not in said(box, "keys", "list")


def test_a_key_is_made_on_the_terms_that_were_asked_for(box: Box) -> None:
    email, account = new_user(box)
    key = said(
        box, "keys", "add", email, "--name", "limited", "--scope", "sms:send", "--scope", "other",
        "--expires", "2099-01-31T12:00:00Z", "--credit-limit", "50", "--period", "week",
        "--rate", "7",
    )  # fmt: skip
    row = box.row(
        "SELECT name, scopes, expires_at, credit_limit, credit_period, rate_limit, user_id"
        " FROM api_key WHERE account_id = :id",
        id=account,
    )
    assert row[:6] == (
        "limited", '["sms:send", "other"]', clock.parse_rfc3339("2099-01-31T12:00:00Z"), 50,
        "week", 7,
    )  # fmt: skip
    assert row[6].startswith("user_")
    answer = box.sms(key)
    assert (answer.status, answer.headers["X-RateLimit-Limit"]) == (200, "7")
    assert box.get("/api/v1/echo", key).code == "missing_scope"
    record = box.record(key, answer)
    assert record["user_id"] == row[6]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 2),
        (["--name"], 2),
        (["--name", ""], 1),
        (["--name", "x" * 200], 1),
        (["--name", "x", "--expires", "tomorrow"], 2),
        (["--name", "x", "--expires", "2099-01-31T12:00:00"], 2),
        (["--name", "x", "--expires", "2001-01-31T12:00:00Z"], 1),
        (["--name", "x", "--credit-limit", "5"], 1),
        (["--name", "x", "--period", "day"], 1),
        (["--name", "x", "--credit-limit", "-5", "--period", "day"], 1),
        (["--name", "x", "--credit-limit", "many", "--period", "day"], 2),
        (["--name", "x", "--credit-limit", "5", "--period", "year"], 2),
        (["--name", "x", "--rate", "-1"], 1),
        (["--name", "x", "--rate", "fast"], 2),
        (["--name", "x", "--scope", "Not A Scope"], 1),
        (["--name", "x", "--colour", "red"], 2),
    ],
)
def test_terms_that_cannot_be_make_no_key(box: Box, options: list[str], code: int) -> None:
    email, _ = new_user(box)
    complaint(box, "keys", "add", email, *options, code=code)
    assert said(box, "keys", "list", email) == ""


def test_a_key_is_suspended_resumed_and_revoked_for_the_very_next_request(box: Box) -> None:
    email, _ = new_user(box)
    key = said(box, "keys", "add", email, "--name", "k")
    key_id = said(box, "keys", "list", email).split(" ")[0]

    def state() -> tuple[str | None, str]:
        answer = box.get("/api/v1/account", key)
        return answer.code, said(box, "keys", "list", email).split(" ")[2]

    assert state() == (None, "active")
    assert said(box, "keys", "suspend", key_id, "--reason", "on holiday") == ""
    assert state() == ("key_suspended", "suspended")
    assert box.get("/api/v1/account", key).json()["reason"] == "on holiday"
    assert said(box, "keys", "resume", key_id) == ""
    assert state() == (None, "active")
    assert "active" in complaint(box, "keys", "resume", key_id)
    assert said(box, "keys", "revoke", key_id) == ""
    assert state() == ("invalid_api_key", "revoked")
    assert said(box, "keys", "revoke", key_id) == ""
    for word in ("suspend", "resume"):
        assert "revoked" in complaint(box, "keys", word, key_id)


@pytest.mark.parametrize("word", ["revoke", "suspend", "resume"])
@pytest.mark.parametrize(
    "key_id", ["key_000000000000000000000000", "", pytest.param(STRANGERS_KEY, id="a key")]
)
def test_a_key_nobody_has_cannot_be_changed(box: Box, word: str, key_id: str) -> None:
    assert STRANGERS_KEY not in complaint(box, "keys", word, key_id)


def test_all_keys_are_listed_page_by_page(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    email, account = new_user(box)
    ids = {box.key(account)[1] for _ in range(12)}
    from core import keys

    page = keys.page
    monkeypatch.setattr(keys, "page", lambda tx, acct, after, limit: page(tx, acct, after, 5))
    listed = [line.split(" ")[0] for line in said(box, "keys", "list", email).splitlines()]
    assert set(listed) == ids
    assert len(listed) == 12
    assert ids < {line.split(" ")[0] for line in said(box, "keys", "list").splitlines()}


def test_an_expired_key_is_listed_as_expired(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    email, _ = new_user(box)
    time = Clock(monkeypatch, "2027-03-17T12:00:00Z")
    said(box, "keys", "add", email, "--name", "k", "--expires", "2027-03-18T12:00:00+00:00")
    time.forward(days=2)
    assert said(box, "keys", "list", email).split(" ")[2] == "expired"


# Credits.


def test_a_grant_adds_and_the_balance_is_printed_alone(box: Box) -> None:
    email, account = new_user(box)
    assert said(box, "credits", "grant", email, "100", "--note", "for March") == (
        "+100 credits; 125 available"
    )
    assert said(box, "credits", "balance", email) == "125"
    row = box.row(
        "SELECT kind, amount, balance, note FROM entry WHERE account_id = :id"
        " ORDER BY number DESC LIMIT 1",
        id=account,
    )
    assert row == ("grant", 100, 125, "for March")


@pytest.mark.parametrize("amount", ["0", "-5", "1.5", "many", "", "1e3", "٣", "1_0"])
def test_a_grant_is_a_positive_whole_number(box: Box, amount: str) -> None:
    email, _ = new_user(box)
    done = box.cli("credits", "grant", email, amount)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert said(box, "credits", "balance", email) == "25"


def test_a_balance_has_an_end(box: Box) -> None:
    email, _ = new_user(box)
    complaint(box, "credits", "grant", email, str(10**15 + 1))
    complaint(box, "credits", "grant", email, str(10**15))
    complaint(box, "credits", "grant", email, "9" * 30)
    assert said(box, "credits", "balance", email) == "25"
    said(box, "credits", "grant", email, str(10**15 - 25))
    assert said(box, "credits", "balance", email) == str(10**15)
    said(box, "credits", "adjust", email, f"-{10**15}", "--note", "back")


def test_an_adjustment_goes_both_ways_and_never_below_zero(box: Box) -> None:
    email, account = new_user(box)
    assert said(box, "credits", "adjust", email, "-5", "--note", "x") == (
        "-5 credits; 20 available"
    )
    assert said(box, "credits", "adjust", email, "+7", "--note", "x") == (
        "+7 credits; 27 available"
    )
    assert said(box, "credits", "adjust", email, "7", "--note", "x").startswith("+7 ")
    assert said(box, "credits", "adjust", "--note", "first", email, "-4").startswith("-4 ")
    assert said(box, "credits", "balance", email) == "30"
    line = complaint(box, "credits", "adjust", email, "-31", "--note", "x")
    assert "30" in line
    assert said(box, "credits", "balance", email) == "30"
    said(box, "credits", "adjust", email, "-30", "--note", "all")
    assert said(box, "credits", "balance", email) == "0"
    rows = box.instance.db.rows(
        "SELECT amount FROM entry WHERE account_id = :id AND kind = 'adjustment' ORDER BY number",
        {"id": account},
    )
    assert [row[0] for row in rows] == [-5, 7, 7, -4, -30]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-5"], 2),
        (["0", "--note", "x"], 1),
        (["five", "--note", "x"], 2),
        (["-5", "--note"], 2),
        (["-5", "--nte", "x"], 2),
        (["--note", "x"], 2),
        (["-5.5", "--note", "x"], 2),
    ],
)
def test_an_adjustment_needs_an_amount_and_a_note(box: Box, words: list[str], code: int) -> None:
    email, _ = new_user(box)
    complaint(box, "credits", "adjust", email, *words, code=code)
    assert said(box, "credits", "balance", email) == "25"


def test_what_is_held_cannot_be_adjusted_away(box: Box) -> None:
    email, account = new_user(box)
    box.run("UPDATE account SET held = 20 WHERE id = :id", id=account)
    assert said(box, "credits", "balance", email) == "5"
    complaint(box, "credits", "adjust", email, "-6", "--note", "x")
    said(box, "credits", "adjust", email, "-5", "--note", "x")
    box.run("UPDATE account SET held = 0 WHERE id = :id", id=account)
    assert said(box, "credits", "balance", email) == "20"


def test_a_refund_gives_a_call_back_once(box: Box) -> None:
    email, _ = new_user(box)
    key = said(box, "keys", "add", email, "--name", "k")
    call = box.get("/api/v1/echo", key)
    assert said(box, "credits", "balance", email) == "20"
    assert said(box, "credits", "refund", call.request_id, "--note", "sorry") == (
        "+5 credits; 25 available"
    )
    assert "before" in complaint(box, "credits", "refund", call.request_id)
    assert said(box, "credits", "balance", email) == "25"


def test_a_refund_finds_a_call_by_an_id_its_caller_chose(box: Box) -> None:
    email, _ = new_user(box)
    key = said(box, "keys", "add", email, "--name", "k")
    name = tokens.new_id("mine")
    box.get("/api/v1/echo", key, X_Request_Id=name)
    assert said(box, "credits", "refund", name) == "+5 credits; 25 available"
    twice = tokens.new_id("twice")
    for _ in range(2):
        box.get("/api/v1/echo", key, X_Request_Id=twice)
    line = complaint(box, "credits", "refund", twice)
    ids = re.findall(r"req_[0-9a-f]{24}", line)
    assert len(ids) == 2
    for call in ids:
        said(box, "credits", "refund", call)
    assert said(box, "credits", "balance", email) == "25"


def test_what_cost_nothing_cannot_be_refunded(box: Box) -> None:
    email, _ = new_user(box)
    key = said(box, "keys", "add", email, "--name", "k")
    failed = box.get("/api/v1/echo?status=500", key)
    assert failed.status == 502
    complaint(box, "credits", "refund", failed.request_id)
    free = box.get("/api/v1/echo", OPERATOR_KEY)
    complaint(box, "credits", "refund", free.request_id)
    for unknown in ("req_000000000000000000000000", "", "%"):
        complaint(box, "credits", "refund", unknown)


# The books.


def test_the_books_are_verified_in_a_line_of_totals(box: Box) -> None:
    line = said(box, "ledger", "verify")
    assert re.fullmatch(r"ok: \d+ accounts, \d+ entries, \d+ calls, balance \d+, held \d+", line)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE account SET balance = balance + 1 WHERE id = :id",
        "UPDATE account SET held = 1 WHERE id = :id",
        "UPDATE account SET open_calls = 1 WHERE id = :id",
        "UPDATE call SET captured = captured - 1 WHERE account_id = :id",
        "UPDATE call SET status = 'voided' WHERE account_id = :id",
        "UPDATE call SET status = 'held' WHERE account_id = :id",
    ],
)
def test_damage_to_the_books_is_found_and_named(tmp_path: Path, damage: str) -> None:
    with Box(tmp_path / "i", CONFIG) as box:
        payer = box.payer()
        assert box.get("/api/v1/echo", payer.key).status == 200
        said(box, "ledger", "verify")

        copy = tmp_path / "i" / "before.db"
        box.instance.db.backup(copy)
        box.run(damage, id=payer.account)
        done = box.cli("ledger", "verify")
        assert done.exit_code == 1
        assert "ok" not in done.stdout
        assert payer.account in done.stderr or "req_" in done.stderr
        connection = apsw.Connection(str(box.folder / "farebox.db"))
        with connection.backup("main", apsw.Connection(str(copy)), "main") as restoring:
            restoring.step(-1)
        connection.close()


def test_an_entry_that_was_forged_is_found(tmp_path: Path) -> None:
    with Box(tmp_path / "i", CONFIG) as box:
        payer = box.payer()
        box.get("/api/v1/echo", payer.key)

        def forge(tx: Any) -> None:
            tx.run("DROP TRIGGER entry_is_never_edited")
            tx.run("UPDATE entry SET amount = amount + 1, balance = balance + 1"
                   " WHERE account_id = :id AND number = 1", {"id": payer.account})  # fmt: skip

        box.write(forge)
        done = box.cli("ledger", "verify")
        assert done.exit_code == 1
        assert payer.account in done.stderr
        box.run("UPDATE entry SET amount = amount - 1, balance = balance - 1"
                " WHERE account_id = :id AND number = 1", id=payer.account)  # fmt: skip


# What a call costs.


@pytest.mark.parametrize(
    ("words", "body", "has"),
    [
        (["/api/v1/echo"], None, ["per call, 5 credits", "5 credits ($0.05)", "unknown"]),
        (["/api/v1/echo", "--method", "POST"], None, ["POST /api/v1/echo"]),
        (
            ["/api/v1/sms/send"],
            '{"to": "+18148835337", "message": "' + "x" * 161 + '"}',
            ["units     2", "4 credits ($0.04)", "$0.0158"],
        ),
        (["/api/v1/pages/any/thing"], None, ["60 credits", "3 to 60 credits", "/api/v1/pages/*"]),
    ],
)
def test_price_says_what_a_call_would_hold_and_cost(
    box: Box, tmp_path: Path, words: list[str], body: str | None, has: list[str]
) -> None:
    options: list[str] = []
    if body is not None:
        file = tmp_path / "body.json"
        file.write_text(body)
        options = ["--body", str(file)]
    text = said(box, "price", *words, *options)
    for words_ in has:
        assert words_ in text, text
    if body is not None:
        assert said(box, "price", *words, "--body", "-", stdin=body) == text


def test_price_refuses_what_a_call_would_refuse(box: Box, tmp_path: Path) -> None:
    assert "/nothing" in complaint(box, "price", "/nothing")
    complaint(box, "price", "/api/v1/echo", "--method", "DELETE")
    complaint(box, "price", "/api/v1/sms/send")
    bad = tmp_path / "bad.json"
    bad.write_text('{"to": "911", "message": "x"}')
    assert "to" in complaint(box, "price", "/api/v1/sms/send", "--body", str(bad))
    complaint(box, "price", "/api/v1/sms/send", "--body", str(tmp_path / "none"), code=2)
    complaint(box, "price", code=2)


# The doctor.


def test_the_doctor_finds_a_sound_instance_sound(box: Box) -> None:
    lines = said(box, "doctor").splitlines()
    assert {line.split(" ")[0] for line in lines} <= {"ok", "warn"}
    text = "\n".join(lines)
    for word in ("config", "database", "SQLite", "sandbox"):
        assert word in text
    # $0.05 a page is more than the three cents it brings.
    (dear,) = [line for line in lines if "/api/v1/pages" in line]
    assert dear.startswith("warn") and "0.05" in dear and "0.03" in dear
    assert not [line for line in lines if "/api/v1/sms/send" in line]


def test_the_doctor_tries_the_upstreams(tmp_path: Path, upstream: Upstream, twilio: Twilio) -> None:
    config = f"""
[upstreams.up]
kind = "http"
base_url = "{upstream.url}"
[upstreams.down]
kind = "http"
base_url = "http://127.0.0.1:{refused_port()}"
[upstreams.sms]
kind = "twilio"
base_url = "{twilio.url}"
account_sid = "AC1"
auth_token = "a-token-of-twilio"
from = "+15005550006"
[[routes]]
path = "/api/v1/x"
methods = ["GET"]
upstream = "up"
credits = 1
"""
    with Box(tmp_path / "i", config) as box:
        done = box.cli("doctor")
        assert done.exit_code == 1
        found = {
            line.split("upstream ")[1].split(":")[0]: line.split(" ")[0]
            for line in done.stdout.splitlines()
            if "upstream " in line and "no route" not in line
        }
        assert found == {"up": "ok", "down": "bad", "sms": "ok"}
        unused = [line for line in done.stdout.splitlines() if "no route" in line]
        assert [line.split(" ")[0] for line in unused] == ["warn", "warn"]
        assert "a-token-of-twilio" not in done.output
    assert upstream.hits() == []
    assert twilio.hits() == []


def test_the_doctor_tries_those_who_vouch_for_people_and_the_mail_server(tmp_path: Path) -> None:
    dead = free_port()
    with Issuer() as issuer:
        config = f"""
[[issuers]]
issuer = "privy.io"
audience = "app"
jwks_url = "{issuer.jwks_url}"

[[issuers]]
issuer = "gone"
audience = "app"
jwks_url = "http://127.0.0.1:{dead}/jwks"

[[issuers]]
issuer = "by-file"
audience = "app"
pem_file = "their.pem"

[oidc.away]
server_metadata_url = "http://127.0.0.1:{dead}/.well-known/openid-configuration"
client_id = "x"
client_secret = "{PASSWORD}"

[smtp]
url = "smtp://127.0.0.1:{dead}"
from = "farebox@example.com"
"""
        folder = tmp_path / "i"
        folder.mkdir()
        (folder / "their.pem").write_text(issuer.pem)
        with Box(folder, config) as box:
            done = box.cli("doctor")
        lines = done.stdout.splitlines()
        assert done.exit_code == 1
        assert "ok    issuer privy.io: reachable" in lines
        assert "ok    issuer by-file: its key is here" in lines
        for name in ("issuer gone", "oidc away", "smtp 127.0.0.1"):
            assert any(line.startswith(f"bad   {name}: ") for line in lines), (name, lines)


def test_the_doctor_finds_books_that_do_not_add_up(tmp_path: Path) -> None:
    with Box(tmp_path / "i", CONFIG) as box:
        payer = box.payer()
        box.run("UPDATE account SET balance = balance + 1 WHERE id = :id", id=payer.account)
        done = box.cli("doctor")
        assert done.exit_code == 1
        assert [line for line in done.stdout.splitlines() if line.startswith("bad")]
        box.run("UPDATE account SET balance = balance - 1 WHERE id = :id", id=payer.account)


# Backup and restore.


def test_a_backup_is_one_file_for_its_owner_and_restores_all_of_an_instance(
    tmp_path: Path,
) -> None:
    target = tmp_path / "all.farebox"
    with Box(tmp_path / "i", CONFIG) as box:
        payer = box.payer(50)
        (box.folder / "issuer.pem").write_text("PEM")
        assert said(box, "backup", str(target)) == f"wrote {target}"
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        with tarfile.open(target) as archive:
            names = sorted(archive.getnames())
        assert names == ["MANIFEST.json", "farebox.db", "farebox.toml", "issuer.pem", "secret_key"]
        assert box.get("/api/v1/echo", payer.key).status == 200
        assert "exists" in complaint(box, "backup", str(target))
        complaint(box, "backup", str(tmp_path / "no" / "folder"))
        secret = box.settings.secret_key
    with Box(tmp_path / "j") as other:
        assert f"restored into {other.folder}" in said(other, "restore", str(target))
        other.instance.db = type(other.instance.db)(other.settings.database_path)
        assert other.standing(payer.account) == (50, 0)
        assert other.get("/api/v1/account", payer.key).status == 200
        assert (other.folder / "secret_key").read_text().strip() == secret
        assert (other.folder / "farebox.toml").read_text() == CONFIG
        for name in ("farebox.db", "secret_key", "farebox.toml"):
            assert stat.S_IMODE((other.folder / name).stat().st_mode) == 0o600
        asides = list(other.folder.glob("before-restore-*"))
        assert len(asides) == 1
        assert (asides[0] / "farebox.db").exists()


def test_a_backup_of_unsound_books_is_not_made(tmp_path: Path) -> None:
    with Box(tmp_path / "i", CONFIG) as box:
        payer = box.payer()
        box.run("UPDATE account SET balance = balance + 1 WHERE id = :id", id=payer.account)
        assert "sound" in complaint(box, "backup", str(tmp_path / "b"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["i"]
        box.run("UPDATE account SET balance = balance - 1 WHERE id = :id", id=payer.account)


def broken_backups(folder: Path, good: Path) -> Iterator[Path]:
    """Files that are no sound backup, each in its own way."""
    content = good.read_bytes()
    for name, data in (
        ("empty", b""),
        ("noise", b"\x00\xff" * 5000),
        ("half", content[: len(content) // 2]),
        ("flipped", content.replace(b"CREATE TABLE account", b"CREATE TABLE accounx")),
    ):
        path = folder / name
        path.write_bytes(data)
        yield path
    for name, member, kind in (
        ("escapes", "../evil.pem", tarfile.REGTYPE),
        ("absolute", "/tmp/evil.pem", tarfile.REGTYPE),
        ("stranger", "evil.sh", tarfile.REGTYPE),
        ("link", "evil.pem", tarfile.SYMTYPE),
        ("hidden", ".evil.pem", tarfile.REGTYPE),
    ):
        path = folder / name
        path.write_bytes(content)
        info = tarfile.TarInfo(member)
        info.type, info.linkname = kind, "/etc/passwd"
        with tarfile.open(path, "a") as archive:
            archive.addfile(info)
        yield path


def test_a_backup_that_is_not_sound_restores_nothing(tmp_path: Path) -> None:
    good = tmp_path / "good"
    with Box(tmp_path / "i", CONFIG) as box:
        payer = box.payer(50)
        said(box, "backup", str(good))
        before = sorted(path.name for path in box.folder.iterdir())
        for bad in broken_backups(tmp_path, good):
            with pytest.raises(backups.BackupError):
                backups.restore(box.folder, bad)
            assert sorted(path.name for path in box.folder.iterdir()) == before, bad.name
            assert box.standing(payer) == (50, 0)
    assert not list(tmp_path.rglob("evil*"))


def test_a_broken_database_is_found_by_the_doctor_and_mended_by_a_backup(tmp_path: Path) -> None:
    """The moment a backup is for: the database cannot be opened any more."""
    good = tmp_path / "good"
    with Box(tmp_path / "i", CONFIG) as box:
        payer = box.payer(50)
        said(box, "backup", str(good))
    served = Farebox(CONFIG)
    try:
        broken = served.instance / "farebox.db"
        broken.write_bytes(b"this is no database " * 1000)
        doctor = served.run_flask("doctor", may_fail=True)
        restored = served.run_flask("restore", str(good), may_fail=True)
        balance = served.run_flask("credits", "balance", payer.account, may_fail=True)
        assert (restored.returncode, balance.stdout.strip()) == (0, "50"), restored.stderr[-500:]
        assert TRACEBACK not in doctor.stderr
        assert doctor.returncode == 1
        assert "bad" in doctor.stdout and "database" in doctor.stdout
    finally:
        shutil.rmtree(served.instance)


# Through the real programs.


@pytest.fixture(scope="module")
def served(start_farebox: StartFarebox) -> Farebox:
    return start_farebox(CONFIG, workers=2)


def test_an_idle_server_is_running_too_and_restore_refuses(
    start_farebox: StartFarebox, tmp_path: Path
) -> None:
    idle = start_farebox(CONFIG, workers=1)
    target = tmp_path / "b"
    idle.flask("backup", str(target))
    done = idle.run_flask("restore", str(target), may_fail=True)
    assert done.returncode == 1, done
    assert "running" in done.stderr
    assert not list(idle.instance.glob("before-restore-*"))


def test_commands_work_while_it_serves(served: Farebox, tmp_path: Path) -> None:
    email = "served@example.com"
    served.flask("users", "add", email)
    key = served.flask("keys", "add", email, "--name", "laptop")
    assert served.flask("credits", "balance", email) == "25"
    assert served.get("/api/v1/echo", key).status == 200
    assert served.flask("credits", "adjust", email, "-5", "--note", "x").startswith("-5 credits")
    assert served.flask("credits", "balance", email) == "15"
    target = tmp_path / "b"
    assert served.flask("backup", str(target)) == f"wrote {target}"
    done = served.run_flask("restore", str(target), may_fail=True)
    assert (done.returncode, "running" in done.stderr) == (1, True)
    assert served.get("/api/v1/account", key).json()["credits"] == 15
    failed = served.run_flask("credits", "balance", "nobody@example.com", may_fail=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("Error: ")
    doctor = served.run_flask("doctor")
    assert doctor.returncode == 0
    helped = served.flask("--help")
    for command in ("users", "keys", "credits", "ledger", "backup", "restore", "doctor", "price"):
        assert re.search(rf"^  {command} ", helped, re.MULTILINE), command


def test_every_command_of_the_contract_is_there(box: Box) -> None:
    wanted = {
        "users": {
            "add",
            "list",
            "reset-link",
            "suspend",
            "resume",
            "sign-out",
            "close",
            "operator",
        },
        "accounts": {"suspend", "resume", "close"},
        "tokens": {"mint", "rotate-key", "deny", "allow"},
        "keys": {"add", "list", "revoke", "suspend", "resume"},
        "credits": {"grant", "adjust", "refund", "balance"},
        "vouchers": {"add", "list", "cancel"},
        "ledger": {"verify"},
    }
    for group, commands in wanted.items():
        assert commands <= set(getattr(box.app.cli.commands[group], "commands", {}))
    assert {"backup", "restore", "doctor", "price"} <= set(box.app.cli.commands)


# Links.


def form(box: Box, path: str, **fields: str) -> Answer:
    """What a browser makes of a form: the page it leads to, and all it is redirected to."""
    browser = Browser(box)
    return browser.follow(browser.post(path, {"csrf_token": browser.csrf("/login")} | fields))


def token_of(link: str) -> str:
    return link.partition("?token=")[2]


def problem(answer: Answer) -> str:
    found = re.search(r'role="alert">([^<]+)<', answer.body.decode())
    assert found, answer
    return found[1]


def test_a_reset_link_sets_a_password_once(box: Box) -> None:
    email, _ = new_user(box)
    link = said(box, "users", "reset-link", email)
    assert re.fullmatch(r"http://127\.0\.0\.1:8402/reset\?token=[A-Za-z0-9_-]{43}", link)
    token = token_of(link)
    for _ in range(2):  # looking does not use it
        page = box.get(f"/reset?token={token}")
        assert page.status == 200
        assert email in page.body.decode()
        assert '<label for="email">Email</label>' in page.body.decode()
        assert '<label for="password">Password</label>' in page.body.decode()
    done = form(box, "/reset", token=token, email=email, password=PASSWORD)
    assert done.status == 200
    stored = password_hash(box, email)
    assert stored is not None
    assert argon2.PasswordHasher().verify(stored, PASSWORD)
    assert PASSWORD not in done.body.decode() and token not in done.body.decode()
    again = form(box, "/reset", token=token, email=email, password="another-long-pass-phrase")
    assert again.status == 404
    assert password_hash(box, email) == stored
    assert box.get(f"/reset?token={token}").status == 404


def test_a_bad_password_is_told_on_the_page_and_the_link_still_works(box: Box) -> None:
    email, _ = new_user(box)
    token = token_of(said(box, "users", "reset-link", email))
    for password in ("short", "", "a" * 200, "aaaaaaaaaaaaaaaa"):
        page = form(box, "/reset", token=token, email=email, password=password)
        assert page.status == 400
        assert page.headers["Content-Type"].startswith("text/html")
        assert "password" in problem(page).lower()
        assert not password or f">{password}<" not in page.body.decode()
        assert f'value="{token}"' in page.body.decode()
    assert password_hash(box, email) is None
    assert form(box, "/reset", token=token, email=email, password=PASSWORD).status == 200


def test_a_reset_link_is_for_its_user_alone_whatever_is_typed(box: Box) -> None:
    mine, _ = new_user(box)
    theirs, _ = new_user(box)
    token = token_of(said(box, "users", "reset-link", mine))
    assert form(box, "/reset", token=token, email=theirs, password=PASSWORD).status in (200, 400)
    assert password_hash(box, theirs) is None


def test_a_link_ends_after_its_life(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Clock(monkeypatch, "2027-03-17T12:00:00Z")
    email, _ = new_user(box)
    token = token_of(said(box, "users", "reset-link", email))
    time.forward(days=1, ms=-1)
    assert box.get(f"/reset?token={token}").status == 200
    time.forward(ms=1)
    assert box.get(f"/reset?token={token}").status == 404
    assert form(box, "/reset", token=token, email=email, password=PASSWORD).status == 404
    assert password_hash(box, email) is None


def test_of_two_who_use_a_link_at_once_one_has_used_it(box: Box) -> None:
    email, _ = new_user(box)
    token = token_of(said(box, "users", "reset-link", email))
    now = clock.now_ms()
    with box.instance.db.reading() as tx:  # both have looked before either acts
        assert links.look_at(tx, "reset", token, now)
    box.write(lambda tx: links.use(tx, "reset", token, now))
    with pytest.raises(Refusal) as refused:
        box.write(lambda tx: links.use(tx, "reset", token, now))
    assert refused.value.code == "not_found"


def test_nobody_without_a_user_gets_a_reset_link(box: Box) -> None:
    account = box.write(lambda tx: ledger.open_account(tx, clock.now_ms()))
    assert account in complaint(box, "users", "reset-link", account)


@pytest.mark.parametrize("path", ["/setup", "/reset"])
@pytest.mark.parametrize(
    "token", ["", "x", "a" * 43, "%00", "é", "' OR 1=1 --", "<script>alert(1)</script>", "x" * 5000]
)
def test_a_link_nobody_made_is_a_page_that_says_so(box: Box, path: str, token: str) -> None:
    for answer in (
        box.get(f"{path}?token={quote(token)}"),
        form(box, path, token=token, email="a@example.com", password=PASSWORD),
    ):
        assert answer.status == 404
        assert answer.headers["Content-Type"].startswith("text/html")
        assert b"<script" not in answer.body
    assert box.get(path).status == 404


def made(tmp_path: Path) -> tuple[Box, firstrun.Welcome]:
    box = Box(tmp_path / "i", CONFIG)
    welcome = firstrun.welcome(box.instance.db, box.settings)
    assert welcome is not None
    return box, welcome


def test_the_setup_link_makes_the_first_user_who_owns_the_starter_keys_account(
    tmp_path: Path,
) -> None:
    box, welcome = made(tmp_path)
    with box:
        assert firstrun.welcome(box.instance.db, box.settings) is None
        assert box.get("/api/v1/account", welcome.starter_key).json()["credits"] == 100
        page = box.get(f"/setup?token={welcome.setup_token}")
        assert page.status == 200
        text = page.body.decode()
        assert '<label for="email">Email</label>' in text
        assert '<label for="password">Password</label>' in text
        bad = form(box, "/setup", token=welcome.setup_token, email="no address", password=PASSWORD)
        assert (bad.status, "e-mail" in problem(bad)) == (400, True)
        bad = form(box, "/setup", token=welcome.setup_token, email="o@example.com", password="x")
        assert bad.status == 400
        assert 'value="o@example.com"' in bad.body.decode()
        assert said(box, "users", "list") == ""
        email = "owner@example.com"
        done = form(box, "/setup", token=welcome.setup_token, email=email, password=PASSWORD)
        assert done.status == 200, done
        (line,) = said(box, "users", "list").splitlines()
        assert line.startswith("owner@example.com acct_") and line.endswith(" operator")
        assert said(box, "credits", "balance", email) == "100"
        assert box.get("/api/v1/account", welcome.starter_key).json()["account"] in line
        for again in (
            box.get(f"/setup?token={welcome.setup_token}"),
            form(
                box, "/setup", token=welcome.setup_token, email="2@example.com", password=PASSWORD
            ),
        ):
            assert again.status == 404
        assert len(said(box, "users", "list").splitlines()) == 1


def test_a_setup_link_for_an_address_that_is_taken_still_works_for_another(
    tmp_path: Path,
) -> None:
    box, welcome = made(tmp_path)
    with box:
        new_user(box, "taken")
        token = welcome.setup_token
        taken = form(box, "/setup", token=token, email="Taken@example.com", password=PASSWORD)
        assert taken.status == 409
        assert "user" in problem(taken)
        other = form(box, "/setup", token=token, email="other@example.com", password=PASSWORD)
        assert other.status == 200


def test_a_setup_link_is_no_reset_link_and_the_other_way_round(tmp_path: Path) -> None:
    box, welcome = made(tmp_path)
    with box:
        email, _ = new_user(box)
        reset = token_of(said(box, "users", "reset-link", email))
        assert box.get(f"/reset?token={welcome.setup_token}").status == 404
        assert box.get(f"/setup?token={reset}").status == 404
        assert (
            form(box, "/setup", token=reset, email="x@example.com", password=PASSWORD).status == 404
        )


def test_what_is_typed_comes_back_escaped(tmp_path: Path) -> None:
    box, welcome = made(tmp_path)
    with box:
        typed = '"><script>alert(1)</script>@example.com'
        page = form(box, "/setup", token=welcome.setup_token, email=typed, password=PASSWORD)
        assert page.status == 400
        assert b"<script>alert" not in page.body


def test_links_are_kept_only_as_digests(tmp_path: Path) -> None:
    box, welcome = made(tmp_path)
    with box:
        email, _ = new_user(box)
        reset = token_of(said(box, "users", "reset-link", email))
        copy = tmp_path / "copy.db"
        box.instance.db.backup(copy)
        data = copy.read_bytes()
        assert welcome.setup_token.encode() not in data
        assert reset.encode() not in data
        assert links.LIFE_MS["setup"] == 7 * 86_400_000


def test_the_pages_load_nothing_from_elsewhere_and_need_no_script(tmp_path: Path) -> None:
    box, welcome = made(tmp_path)
    with box:
        for path in (f"/setup?token={welcome.setup_token}", "/setup", "/", "/docs/errors"):
            text = box.get(path).body.decode()
            assert "<script" not in text
            assert not re.search(r'(?:src|href|action)="(?:https?:)?//', text), path
            assert not re.search(r"\son[a-z]+=|style=", text)
            assert '<html lang="en">' in text and "<title>" in text
        sheet = box.get("/static/farebox.css")
        assert (sheet.status, sheet.headers["Content-Type"]) == (200, "text/css; charset=utf-8")
        assert b"//" not in sheet.body.replace(b"/*", b"").replace(b"*/", b"")


def test_a_set_up_link_works_over_the_real_server(served: Farebox) -> None:
    link = re.search(r"/setup\?token=\S+", served.log())
    assert link is not None
    page = served.get(link[0])
    assert page.status == 200
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "same-origin"
    browser = Browser(served)
    done = browser.submit(link[0], email="first@example.com", password=PASSWORD)
    assert (done.status, done.headers["Location"]) == (303, "/dashboard")
    assert "first@example.com" in browser.get("/dashboard").body.decode()
    assert "first@example.com" in served.flask("users", "list")
    key = re.search(r"fare_live_[A-Za-z0-9]{32}", served.log())
    assert key is not None
    before = int(served.flask("credits", "balance", "first@example.com"))
    assert served.sms(key[0]).status == 200
    assert int(served.flask("credits", "balance", "first@example.com")) == before - 2
