"""A wallet belongs to one account: linked, unlinked, claimed and merged, whoever else does what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import StartFarebox
from doubles import Exchange, Upstream, behaviour
from inprocess import HOST, Background, Box
from rpc_server import need
from server import OPERATOR_KEY, Answer, Farebox, until
from settler import BASE, SOLANA, Settler, section

need("eth_account", "solders", "x402")

from bearers import Everywhere, Said, at_once  # noqa: E402
from payers import EvmWallet, SolanaWallet, decode  # noqa: E402
from people import Person, joined, person, told  # noqa: E402
from signers import EvmKey, Key, SolanaKey, signed  # noqa: E402
from test_migrations import know  # noqa: E402
from test_payment_checks import NODE  # noqa: E402
from test_wallets import KINDS, account_of, message_of, new_key, sign_in  # noqa: E402

from core import clock, users  # noqa: E402
from core.audit import COMMAND_LINE  # noqa: E402

WALLETS, TOP_UP, SMS = "/api/v1/wallets", "/api/v1/credits/top-up", "/api/v1/sms/send"
TEXT = json.dumps({"to": "+18148835337", "message": "hi"}).encode()
SIGNUP_CREDITS = 5
PAYEE = {BASE: EvmWallet().address, SOLANA: SolanaKey().address}
CONFIG = """
[instance]
signup = "open"
signup_credits = 5

[upstreams.sandbox]
kind = "sandbox"

[upstreams.double]
kind = "http"
base_url = "{url}"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
per = "sms_segment"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 3

[limits]
requests_per_minute = 1000000
failed_auth_per_minute = 1000000
"""


@behaviour("mends-late")
def _mends_late(server: Upstream, exchange: Exchange) -> None:
    """The first request to a target fails, every later one is served."""
    first = len(server.hits(exchange.hit.target)) == 1
    exchange.json(500 if first else 200, {"served": not first})


class Facilitator(Settler):
    """Says nothing that can be understood while it is `vague`."""

    vague = False

    def respond(self, exchange: Exchange) -> None:
        if self.vague and exchange.hit.path.endswith("/settle"):
            exchange.json(200, {"success": False, "errorReason": "settlement_pending"})
            return
        super().respond(exchange)


@pytest.fixture(scope="module")
def facilitator() -> Iterator[Facilitator]:
    with Facilitator() as server:
        yield server


@pytest.fixture(scope="module")
def toml(facilitator: Facilitator, upstream_server: Upstream) -> str:
    return CONFIG.format(url=upstream_server.url) + section(facilitator, PAYEE)


@pytest.fixture(scope="module")
def box(toml: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("accounts") / "instance", toml) as made:
        yield made


def link(box: Box, key: Key, token: str) -> Answer:
    return box.post(WALLETS, token, message_of(box, key))


def linked(box: Box, key: Key, token: str) -> None:
    answer = link(box, key, token)
    assert answer.status == 201, answer.body


def unlink(box: Box, wallet: str, token: str) -> Answer:
    return box.request("DELETE", f"{WALLETS}/{wallet}", key=token)


def listed(box: Box, token: str) -> list[str]:
    answer = box.get(WALLETS, token)
    assert answer.status == 200, answer.body
    return [each["id"] for each in answer.json()["data"]]


def signed_call(box: Box, key: Key, path: str = SMS, body: bytes = TEXT, **more: str) -> Answer:
    """A paid call that the wallet signs."""
    sent = signed(key, "POST", f"http://{HOST}{path}", body)
    return box.request("POST", path, body=body, headers=sent | more)


def payer(key: Key) -> EvmWallet | SolanaWallet:
    """The same wallet, to pay with."""
    if isinstance(key, SolanaKey):
        return SolanaWallet(NODE, key.keypair)
    return EvmWallet(key.account.key.hex())


class Payment:
    """A request that the wallet pays for on the spot, which can be sent again."""

    def __init__(self, box: Box, key: Key, path: str = SMS, body: bytes = TEXT) -> None:
        self._box, self._path, self._body = box, path, body
        asked = box.request("POST", path, body=body)
        assert asked.status == 402, asked.body
        self._header = payer(key).header(decode(asked.headers["PAYMENT-REQUIRED"]))

    def send(self, **more: str) -> Answer:
        sent = {"PAYMENT-SIGNATURE": self._header} | more
        return self._box.request("POST", self._path, body=self._body, headers=sent)


def top_up(box: Box, key: Key, credits: int = 20) -> Answer:
    answer = Payment(box, key, TOP_UP, json.dumps({"credits": credits}).encode()).send()
    assert answer.status == 200, answer.body
    return answer


def of_wallet(box: Box, key: Key) -> str | None:
    """The account that has the wallet."""
    found = box.instance.db.row("SELECT account_id FROM wallet WHERE id = :id", {"id": stored(key)})
    return None if found is None else str(found[0])


def stored(key: Key) -> str:
    return key.wallet.lower() if key.namespace == "eip155" else key.wallet


def with_password(box: Box, who: Person) -> Person:
    """They have another way to sign in."""
    box.run("UPDATE user SET password_hash = 'x' WHERE id = :id", id=who.id)
    return who


# Linking


@KINDS
def test_a_wallet_is_linked_listed_and_unlinked(box: Box, kind: str) -> None:
    key, me = new_key(kind), with_password(box, person(box, 40))
    answer = link(box, key, me.token)
    assert answer.status == 201 and answer.json()["id"] == key.wallet
    assert box.get(WALLETS, me.token).json() == {
        "data": [answer.json()], "has_more": False, "next_cursor": None,
    }  # fmt: skip
    again = link(box, key, me.token)
    assert (again.status, again.json()) == (200, answer.json())
    assert account_of(box, me.token)["wallets"] == [key.wallet]
    assert signed_call(box, key).status == 200
    assert account_of(box, sign_in(box, key))["credits"] == 39
    name = key.wallet.upper().replace("EIP155:0X", "eip155:0x") if kind == "eip155" else key.wallet
    assert unlink(box, name, me.token).status == 204
    assert listed(box, me.token) == []
    assert told(unlink(box, key.wallet, me.token)) == (404, "not_found")
    found = box.instance.db.rows(
        "SELECT action FROM audit WHERE subject = :id ORDER BY number", {"id": stored(key)}
    )
    assert found == [("wallet.linked",), ("wallet.unlinked",)]


def test_only_a_person_sees_and_changes_wallets(box: Box) -> None:
    key, spare = SolanaKey(), SolanaKey()
    me, poor = person(box), box.payer()
    linked(box, key, me.token)
    body = message_of(box, spare)
    raw = json.dumps(body).encode()
    for method, path, sent in (
        ("GET", WALLETS, b""), ("POST", WALLETS, raw), ("DELETE", f"{WALLETS}/{key.wallet}", b""),
    ):  # fmt: skip
        for credential in (poor.key, OPERATOR_KEY):
            answer = box.request(method, path, key=credential, body=sent or None)
            assert told(answer) == (403, "session_required"), (method, credential)
        headers = signed(key, method, f"http://{HOST}{path}", sent)
        answer = box.request(method, path, body=sent or None, headers=headers)
        assert told(answer) == (403, "session_required"), method
        answer = box.request(method, path, body=sent or None)
        assert told(answer) == (401, "missing_api_key"), method
    assert link(box, key, me.token).status == 200
    assert box.post(WALLETS, me.token, body).status == 201  # nothing of it was used up


def test_wallets_are_linked_in_the_account_one_owns(box: Box) -> None:
    host, key = person(box), SolanaKey()
    for role in ("member", "owner"):
        guest = joined(box, host, role=role)
        body = message_of(box, key)
        assert told(box.post(WALLETS, guest.token, body)) == (403, "forbidden")
        assert told(unlink(box, key.wallet, guest.token)) == (403, "forbidden")
        assert of_wallet(box, key) is None
    linked(box, SolanaKey(), host.token)
    assert len(listed(box, guest.token)) == 1  # to be seen by members
    assert box.post(WALLETS, host.token, body).status == 201


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"message": None}, "message"), ({"signature": None}, "signature"),
        ({"account": "acct_x"}, "account"), ({"message": 5}, "message"),
    ],
)  # fmt: skip
def test_a_link_takes_a_message_and_its_signature(
    box: Box, change: dict[str, Any], param: str
) -> None:
    me, key = person(box), SolanaKey()
    value = {name: each for name, each in (message_of(box, key) | change).items() if each}
    answer = box.post(WALLETS, me.token, value)
    assert (told(answer), answer.json()["param"]) == ((400, "validation_error"), param)


@pytest.mark.parametrize("name", ["nonsense", "solana:x", "eip155:0x", "acct_x", "solana%3A1"])
def test_what_is_no_wallet_of_ones_own_cannot_be_unlinked(box: Box, name: str) -> None:
    assert told(unlink(box, name, person(box).token)) == (404, "not_found")


def test_a_wallet_of_another_account_is_not_linked_and_its_message_still_good(box: Box) -> None:
    key, me = EvmKey(), person(box)
    token = sign_in(box, key)
    body = message_of(box, key)
    answer = box.post(WALLETS, me.token, body)
    assert told(answer) == (409, "wallet_linked")
    assert answer.headers["x-should-retry"] == "false"
    assert told(unlink(box, key.wallet, me.token)) == (404, "not_found")
    assert box.post(WALLETS, token, body).status == 200


def test_the_only_way_to_sign_in_stays(box: Box) -> None:
    first, second = SolanaKey(), EvmKey()
    token = sign_in(box, first)
    refused = unlink(box, first.wallet, token)
    assert told(refused) == (409, "conflict") and refused.headers["x-should-retry"] == "false"
    linked(box, second, token)
    assert unlink(box, first.wallet, token).status == 204
    assert told(unlink(box, second.wallet, token)) == (409, "conflict")
    # An account of its own again, and no way back into the former one.
    assert account_of(box, sign_in(box, first))["wallets"] == [first.wallet]


def test_unlinking_ends_what_the_wallet_signed_in_but_for_who_unlinks(box: Box) -> None:
    key, other, me = SolanaKey(), SolanaKey(), person(box, 9)
    linked(box, key, me.token)
    linked(box, other, me.token)
    here, there, by_other = sign_in(box, key), sign_in(box, key), sign_in(box, other)
    assert unlink(box, key.wallet, here).status == 204
    assert told(box.get("/api/v1/account", there)) == (401, "invalid_token")
    for token in (here, by_other, me.token):
        assert box.get("/api/v1/account", token).status == 200
    assert told(signed_call(box, key)) == (401, "invalid_signature")
    assert signed_call(box, other).status == 200


def test_who_is_closed_leaves_their_wallets_to_whoever_signs_next(box: Box) -> None:
    key = EvmKey()
    before = account_of(box, sign_in(box, key))["account"]
    assert box.cli("users", "close", key.wallet).exit_code == 0
    assert of_wallet(box, key) is None
    assert told(signed_call(box, key)) == (401, "invalid_signature")
    after = account_of(box, sign_in(box, key))
    assert after["account"] != before and after["credits"] == SIGNUP_CREDITS
    me = person(box)
    assert told(link(box, key, me.token)) == (409, "wallet_linked")


# Accounts that a payment has opened


@KINDS
def test_a_payers_account_is_claimed_by_signing_in(toml: str, tmp_path: Path, kind: str) -> None:
    with Box(tmp_path / "i", toml.replace('"open"', '"closed"')) as box:
        key = new_key(kind)
        top_up(box, key)
        account = of_wallet(box, key)
        assert account is not None
        assert box.cli("users", "suspend", key.wallet).exit_code == 1  # nobody's yet
        token = sign_in(box, key)
        mine = account_of(box, token)
        assert (mine["account"], mine["credits"]) == (account, 20)  # and none for signing up
        made = box.post("/api/v1/keys", token, {"name": "mine"})
        assert box.sms(made.json()["key"]).status == 200
        assert signed_call(box, key).status == 200
        top_up(box, key)
        assert account_of(box, token)["credits"] == 38
        calls = box.get("/api/v1/usage", token).json()["data"]
        assert [call["payer"] for call in calls] == ["wallet", "api_key"]
        assert len({call["user_id"] for call in calls}) == 1
        entries = box.get("/api/v1/ledger", token).json()["data"]
        assert [each["kind"] for each in entries] == ["topup", "capture", "capture", "topup"]
        assert told(box.post("/api/v1/session-tokens", value=message_of(box, new_key(kind)))) == (
            403, "signup_closed",
        )  # fmt: skip


def test_what_a_failed_call_left_is_spent_by_signing(box: Box) -> None:
    key = EvmKey()
    failed = Payment(box, key, "/api/v1/up/status/500").send()
    assert told(failed) == (502, "provider_error") and failed.json()["credited"] == 3
    spent = signed_call(box, key, "/api/v1/up/ok/spent")
    assert (spent.status, spent.headers["X-Credits-Remaining"]) == (200, "0")
    assert told(signed_call(box, key, "/api/v1/up/ok/more")) == (402, "insufficient_credits")


@KINDS
def test_linking_a_payers_wallet_merges_its_account(box: Box, kind: str) -> None:
    key, me = new_key(kind), person(box, 7)
    paid, failed = Payment(box, key), Payment(box, key, "/api/v1/up/status/500")
    first = paid.send()
    assert first.status == 200 and failed.send().status == 502
    top_up(box, key)
    before = of_wallet(box, key)
    linked(box, key, me.token)
    assert of_wallet(box, key) == me.account and account_of(box, me.token)["credits"] == 7 + 23
    mine, *_ = box.get("/api/v1/ledger", me.token).json()["data"]
    assert (mine["kind"], mine["amount"], mine["balance"]) == ("adjustment", 23, 30)
    assert mine["note"] == f"from {key.wallet}"
    theirs = box.instance.db.rows(
        "SELECT kind, amount, balance FROM entry WHERE account_id = :id ORDER BY number DESC",
        {"id": before},
    )
    assert theirs[0] == ("adjustment", -23, 0) and len(theirs) == 5
    assert box.row("SELECT status, balance FROM account WHERE id = :id", id=before) == ("closed", 0)
    # What it had paid is answered as before, and nothing is charged for it.
    again = paid.send()
    assert (again.status, again.body) == (200, first.body)
    assert again.headers["Idempotent-Replayed"] == "true"
    # What it had paid in vain is served on its credits, which are here now; and once.
    assert failed.send().status == 502
    assert account_of(box, me.token)["credits"] == 30
    # And what it pays from now on is here too.
    top_up(box, key)
    assert account_of(box, me.token)["credits"] == 50
    assert signed_call(box, key).status == 200
    assert box.faults() == []


def test_a_merged_accounts_stored_answers_are_given_under_their_keys(
    box: Box, upstream: Upstream
) -> None:
    key, me = EvmKey(), person(box, 50)
    top_up(box, key)
    again = {"Idempotency-Key": "before-the-merge"}
    path = "/api/v1/up/ok/asked-before"
    first = signed_call(box, key, path, **again)
    paid = Payment(box, key, "/api/v1/up/ok/paid-before")
    second = paid.send(**{"Idempotency-Key": "paid"})
    linked(box, key, me.token)
    had = account_of(box, me.token)["credits"]
    repeat = signed_call(box, key, path, **again)
    assert repeat.headers["Idempotent-Replayed"] == "true" and repeat.body == first.body
    # By another payment of the same wallet too, which is not taken.
    anew = Payment(box, key, "/api/v1/up/ok/paid-before").send(**{"Idempotency-Key": "paid"})
    assert anew.headers["Idempotent-Replayed"] == "true" and anew.body == second.body
    assert paid.send(**{"Idempotency-Key": "paid"}).body == second.body
    assert paid.send().body == second.body
    assert account_of(box, me.token)["credits"] == had
    assert len(upstream.hits("/ok/asked-before")) == len(upstream.hits("/ok/paid-before")) == 1


def test_a_key_that_both_accounts_have_used_stays_as_each_had_it(box: Box) -> None:
    key, me = SolanaKey(), person(box, 50)
    top_up(box, key)
    both = {"Idempotency-Key": "both"}
    mine = box.request("POST", "/api/v1/up/ok/mine", key=me.token, body=b"{}", headers=both)
    paid = Payment(box, key, "/api/v1/up/ok/theirs")
    theirs = paid.send(**both)
    assert (mine.status, theirs.status) == (200, 200)
    linked(box, key, me.token)
    again = box.request("POST", "/api/v1/up/ok/mine", key=me.token, body=b"{}", headers=both)
    assert again.headers["Idempotent-Replayed"] == "true" and again.body == mine.body
    assert paid.send().body == theirs.body


def test_a_call_that_is_mended_after_a_merge_is_served_once(box: Box, upstream: Upstream) -> None:
    key, me = EvmKey(), person(box)
    payment = Payment(box, key, "/api/v1/up/mends-late/after-the-merge")
    assert payment.send().status == 502
    linked(box, key, me.token)
    assert account_of(box, me.token)["credits"] == 3
    served = payment.send()
    assert served.status == 200 and account_of(box, me.token)["credits"] == 0
    again = payment.send()
    assert (again.status, again.body) == (200, served.body)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert len(upstream.hits("/mends-late/after-the-merge")) == 2


def test_keys_of_a_merged_account_are_revoked(box: Box) -> None:
    key, me = SolanaKey(), person(box)
    top_up(box, key)
    made = box.cli("keys", "add", key.wallet, "--name", "of the operator")
    api_key = made.stdout.strip()
    assert box.sms(api_key).status == 200
    linked(box, key, me.token)
    assert told(box.sms(api_key)) == (401, "invalid_api_key")
    assert account_of(box, me.token)["credits"] == 19


def test_an_account_with_a_call_in_flight_is_not_merged(box: Box, upstream: Upstream) -> None:
    key, me = EvmKey(), person(box)
    top_up(box, key)
    running = Background(lambda: signed_call(box, key, "/api/v1/up/gated/flight"))
    until(lambda: upstream.hits("/gated/flight"))
    body = message_of(box, key)
    try:
        refused = box.post(WALLETS, me.token, body)
        assert told(refused) == (409, "conflict") and "in flight" in refused.json()["message"]
        assert of_wallet(box, key) != me.account and account_of(box, me.token)["credits"] == 0
        assert box.post("/api/v1/session-tokens", value=message_of(box, EvmKey())).status == 201
    finally:
        upstream.gate("flight").let()
    assert running.result().status == 200
    assert box.post(WALLETS, me.token, body).status == 201
    assert account_of(box, me.token)["credits"] == 17


def test_a_suspended_or_closed_account_is_not_merged(box: Box) -> None:
    for verb, words in (("suspend", ("--reason", "unpaid")), ("close", ())):
        key, me = SolanaKey(), person(box)
        top_up(box, key)
        assert box.cli("accounts", verb, key.wallet, *words).exit_code == 0
        answer = link(box, key, me.token)
        assert told(answer) == (403, "account_suspended"), verb
        assert answer.json()["reason"] == ("unpaid" if words else "closed")
        assert told(box.post("/api/v1/session-tokens", value=message_of(box, key))) == (
            403, "account_suspended",
        )  # fmt: skip
        assert account_of(box, me.token)["credits"] == 0 and listed(box, me.token) == []


def test_a_payment_whose_end_comes_late_is_the_accounts_that_has_the_wallet_then(
    box: Box, facilitator: Facilitator
) -> None:
    key, me = EvmKey(), person(box)
    top_up(box, key)
    late = Payment(box, key, TOP_UP, b'{"credits": 50}')
    facilitator.vague = True
    try:
        assert told(late.send()) == (503, "payment_unconfirmed")
        linked(box, key, me.token)
        assert told(late.send()) == (503, "payment_unconfirmed")
    finally:
        facilitator.vague = False
    (payment,) = box.row(
        "SELECT id FROM payment WHERE wallet = :id AND status = 'unknown'", id=stored(key)
    )
    done = box.cli("payments", "reconcile", payment, "--settled", f"0x{'5e' * 32}")
    assert done.exit_code == 0, done.output
    assert account_of(box, me.token)["credits"] == 70
    answer = late.send()
    assert answer.json() == {"success": True, "creditsAdded": 50, "credits": 70}


def test_an_account_is_merged_once_it_is_known_how_its_payments_ended(
    box: Box, facilitator: Facilitator
) -> None:
    key, me = SolanaKey(), person(box)
    top_up(box, key)
    made = box.cli("keys", "add", key.wallet, "--name", "of the operator").stdout.strip()
    late = Payment(box, EvmKey(), TOP_UP, b'{"credits": 50}')
    facilitator.vague = True
    try:
        paid = late.send(Authorization=f"Bearer {made}")
        assert told(paid) == (503, "payment_unconfirmed")
    finally:
        facilitator.vague = False
    payment = paid.json()["payment"]
    body = message_of(box, key)
    refused = box.post(WALLETS, me.token, body)
    assert told(refused) == (409, "conflict") and "being settled" in refused.json()["message"]
    assert box.cli("payments", "reconcile", payment, "--refused").exit_code == 0
    assert box.post(WALLETS, me.token, body).status == 201
    # That money moved is a fact, and stands over what somebody concluded.
    done = box.cli("payments", "reconcile", payment, "--settled", f"0x{'5f' * 32}")
    assert done.exit_code == 0, done.output
    assert account_of(box, me.token)["credits"] == 70


def test_a_merged_account_says_where_its_credits_went_and_when_they_were_bought(box: Box) -> None:
    key, me = EvmKey(), person(box)
    assert box.get("/v1/account", me.token).json()["last_topup_at"] is None
    top_up(box, key)
    before = of_wallet(box, key)
    bought = box.row("SELECT last_topup_at FROM account WHERE id = :id", id=before)
    linked(box, key, me.token)
    notes = box.instance.db.rows(
        "SELECT account_id, note FROM entry WHERE kind = 'adjustment' AND account_id IN (:a, :b)",
        {"a": before, "b": me.account},
    )
    assert set(notes) == {(before, f"to {me.account}"), (me.account, f"from {key.wallet}")}
    shown = box.get("/v1/account", me.token).json()
    assert shown["last_topup_at"] == clock.rfc3339(bought[0])
    assert shown["wallet"] == key.address


def test_wallets_of_an_earlier_version_sign_after_the_upgrade(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[Key] = [EvmKey(), SolanaKey(), EvmKey()]
    with monkeypatch.context() as patches:
        know(patches, tmp_path / "steps", 4)  # the last step before wallets signed
        with Box(tmp_path / "i", toml) as box:
            for key in keys:
                top_up(box, key)
    with Box(tmp_path / "i", toml) as box:
        me = person(box)
        assert signed_call(box, keys[0]).headers["X-Credits-Remaining"] == "19"
        assert account_of(box, sign_in(box, keys[1]))["credits"] == 20
        linked(box, keys[2], me.token)
        assert account_of(box, me.token)["credits"] == 20


# WHO


def test_a_wallet_names_an_account_in_every_command(box: Box) -> None:
    key = EvmKey()
    top_up(box, key)
    who, account = key.wallet.lower(), of_wallet(box, key)

    def run(*words: str, code: int = 0) -> str:
        done = box.cli(*words)
        assert done.exit_code == code, done.output
        return str(done.output).strip()

    people = (("suspend",), ("resume",), ("operator",), ("sign-out",), ("reset-link",), ("close",))
    for (verb,) in people:
        assert "nobody owns it yet" in run("users", verb, who, code=1), verb
    assert "nobody owns it yet" in run("tokens", "mint", who, code=1)
    run("credits", "grant", who, "5")
    run("credits", "adjust", key.wallet, "-3", "--note", "a slip")
    assert run("credits", "balance", who) == "22"
    api_key = run("keys", "add", who, "--name", "its key")
    assert box.sms(api_key).status == 200
    assert account is not None and account in run("keys", "list", key.wallet)
    assert who.split(":")[1] in run("payments", "list", who).lower()
    assert "credits.grant" in run("audit", who)
    run("accounts", "suspend", who, "--reason", "why")
    assert told(signed_call(box, key)) == (403, "account_suspended")
    run("accounts", "resume", who)
    sign_in(box, key)
    assert account_of(box, run("tokens", "mint", who))["account"] == account
    run("users", "suspend", who, "--reason", "why")
    assert told(signed_call(box, key)) == (403, "account_suspended")
    run("users", "resume", key.wallet)
    run("users", "operator", who)
    run("users", "operator", who, "--remove")
    sign_in(box, key)
    assert run("users", "sign-out", who) == "1 sign-ins ended"
    assert "no e-mail" in run("users", "reset-link", who, code=1)
    assert f"{key.wallet} {account}" in run("users", "list")
    run("users", "close", who)
    assert "There is no account" in run("credits", "balance", who, code=1)
    assert run("credits", "balance", str(account)) == "21"


def test_the_operator_finds_an_account_by_its_wallet(box: Box) -> None:
    from browser import Browser

    key, chief = SolanaKey(), person(box)
    account = account_of(box, sign_in(box, key))["account"]
    box.run("UPDATE user SET is_operator = 1 WHERE id = :id", id=chief.id)
    boss = SolanaKey()
    linked(box, boss, chief.token)
    browser = Browser(box)
    assert browser.submit("/login", "/login/wallet", **message_of(box, boss)).status == 303
    found = browser.get(f"/admin?q={key.wallet}")
    found = (
        found if account.encode() in found.body else browser.get(f"/admin/accounts?q={key.wallet}")
    )
    assert account.encode() in found.body


# At once, on every worker


@pytest.fixture(scope="module")
def farebox(toml: str, start_farebox: StartFarebox) -> Farebox:
    return start_farebox(toml)


def message_there(farebox: Farebox, key: Key) -> dict[str, str]:
    told = farebox.post("/api/v1/wallets/challenge", None, {"wallet": key.wallet}).json()
    return {"message": told["message"], "signature": key.sign_text(told["message"])}


def sign_in_there(farebox: Farebox, key: Key) -> str:
    answer = farebox.post("/api/v1/session-tokens", None, message_there(farebox, key))
    assert answer.status == 201, answer.body
    token: str = answer.json()["token"]
    return token


def read_there(farebox: Farebox, key: Key) -> Answer:
    headers = signed(key, "GET", f"{farebox.url}/api/v1/account")
    return farebox.request("GET", "/api/v1/account", headers=headers)


def test_a_message_sent_twenty_times_at_once_signs_in_once(farebox: Farebox) -> None:
    for key in (SolanaKey(), EvmKey()):
        body = message_there(farebox, key)
        answers = at_once(
            20, lambda _, body=body: farebox.post("/api/v1/session-tokens", None, body)
        )
        assert sorted(answer.status for answer in answers) == [201] + [401] * 19
        assert {answer.code for answer in answers} == {None, "invalid_signature"}


def test_one_new_wallet_that_signs_many_messages_at_once_becomes_one_person(
    farebox: Farebox,
) -> None:
    key = EvmKey()
    bodies = [message_there(farebox, key) for _ in range(12)]
    answers = at_once(12, lambda n: farebox.post("/api/v1/session-tokens", None, bodies[n]))
    assert {answer.status for answer in answers} == {201}
    found = [farebox.get("/api/v1/account", answer.json()["token"]).json() for answer in answers]
    assert {each["account"] for each in found} == {found[0]["account"]}
    assert {each["credits"] for each in found} == {SIGNUP_CREDITS}


def test_many_link_one_payers_wallet_at_once_and_one_gets_it(farebox: Farebox) -> None:
    tokens = [sign_in_there(farebox, SolanaKey()) for _ in range(6)]
    for _ in range(3):
        key = EvmKey()
        raw = b'{"credits": 20}'
        asked = farebox.request("POST", TOP_UP, body=raw)
        header = payer(key).header(decode(asked.headers["PAYMENT-REQUIRED"]))
        paid = farebox.request("POST", TOP_UP, body=raw, headers={"PAYMENT-SIGNATURE": header})
        assert paid.status == 200, paid.body
        bodies = [message_there(farebox, key) for _ in range(12)]
        before = [farebox.standing(token)[0] for token in tokens]
        answers = at_once(
            12, lambda n, bodies=bodies: farebox.post(WALLETS, tokens[n % 6], bodies[n])
        )
        by_person = sorted(sorted((answers[n].status, answers[n + 6].status)) for n in range(6))
        assert by_person == [[200, 201]] + [[409, 409]] * 5
        after = [farebox.standing(token)[0] for token in tokens]
        assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0] * 5 + [20]


def test_an_unlinked_wallet_is_out_on_every_worker_at_once(farebox: Farebox) -> None:
    key, other = SolanaKey(), EvmKey()
    token = sign_in_there(farebox, key)
    mine = sign_in_there(farebox, key)
    farebox.set_up("credits", "grant", key.wallet, "100")
    assert farebox.post(WALLETS, mine, message_there(farebox, other)).status == 201
    with Everywhere(farebox) as everywhere:
        assert everywhere.say(token) == {Said(200, None)}
        assert all(each.status == 200 for each in at_once(8, lambda _: read_there(farebox, key)))
        gone = farebox.request("DELETE", f"{WALLETS}/{key.wallet}", key=mine)
        assert gone.status == 204
        assert everywhere.say(token) == {Said(401, "invalid_token")}
        answers = at_once(8, lambda _: read_there(farebox, key))
        assert {(each.status, each.code) for each in answers} == {(401, "invalid_signature")}
    assert read_there(farebox, other).status == 200


# Whatever comes in whatever order


class World:
    """What should be true of three wallets and those who have them, told beside a `Box`."""

    def __init__(self, box: Box, random: Random) -> None:
        self.box, self.random = box, random
        self.keys: list[Key] = [EvmKey(), SolanaKey(), EvmKey()]
        self.owner: list[str | None] = [None] * 3  # the account of each
        self.credits: dict[str, int] = {}
        self.people: dict[str, str] = {}  # a token of whoever owns each account that has one
        self.has_password: set[str] = set()
        self.seen: set[tuple[str, int]] = set()
        for has_password in (True, False):
            who = person(box, 10)
            self.credits[who.account], self.people[who.account] = 10, who.token
            if has_password:
                with_password(box, who)
                self.has_password.add(who.account)

    def step(self) -> None:
        verb = self.random.choice(
            ["pay", "sign_in", "link", "link", "unlink", "unlink", "call", "close"]
        )
        if verb == "close" and self.random.random() < 0.6:
            return
        expected, answer = getattr(self, verb)(self.random.randrange(3))
        assert answer == expected, (verb, answer, expected)
        self.seen.add((verb, expected))
        self.check()

    def someone(self) -> str:
        return self.random.choice(sorted(self.people))

    def pay(self, n: int) -> tuple[int, int]:
        answer = top_up(self.box, self.keys[n], 20)
        if self.owner[n] is None:
            self.owner[n] = account = str(of_wallet(self.box, self.keys[n]))
            assert account not in self.credits
            self.credits[account] = 0
        self.credits[str(self.owner[n])] += 20
        return 200, answer.status

    def sign_in(self, n: int) -> tuple[int, int]:
        key = self.keys[n]
        answer = self.box.post("/api/v1/session-tokens", value=message_of(self.box, key))
        token = answer.json()["token"]
        account = account_of(self.box, token)["account"]
        if self.owner[n] is None:
            assert account not in self.credits
            self.owner[n], self.credits[account] = account, SIGNUP_CREDITS
        assert account == self.owner[n]
        self.people[account] = token
        return 201, answer.status

    def link(self, n: int) -> tuple[int, int]:
        who, owner = self.someone(), self.owner[n]
        answer = link(self.box, self.keys[n], self.people[who])
        if owner == who:
            return 200, answer.status
        if owner in self.people:
            return 409, answer.status
        if owner is not None:  # only paid with so far
            self.credits[who] += self.credits[owner]
            self.credits[owner] = 0
        self.owner[n] = who
        return 201, answer.status

    def unlink(self, n: int) -> tuple[int, int]:
        who = self.owner[n] if self.owner[n] in self.people else self.someone()
        assert who is not None
        token = self.fresh(who)
        answer = unlink(self.box, self.keys[n].wallet, token)
        if self.owner[n] != who:
            return 404, answer.status
        if who not in self.has_password and self.owner.count(who) == 1:
            return 409, answer.status
        self.owner[n] = None
        self.people[who] = token
        return 204, answer.status

    def call(self, n: int) -> tuple[int, int]:
        answer, owner = signed_call(self.box, self.keys[n]), self.owner[n]
        if owner is None:
            return 401, answer.status
        if not self.credits[owner]:
            return 402, answer.status
        self.credits[owner] -= 1
        return 200, answer.status

    def close(self, n: int) -> tuple[int, int]:
        who = self.someone()
        if len(self.people) > 1:
            now = clock.now_ms()
            self.box.write(lambda tx: users.close(tx, users.of_who(tx, who), now, COMMAND_LINE))
            del self.people[who]
            self.owner = [None if each == who else each for each in self.owner]
        return 0, 0

    def fresh(self, account: str) -> str:
        """Another token of theirs, which no wallet has signed for."""
        found = self.box.cli("tokens", "mint", account)
        assert found.exit_code == 0, found.output
        return str(found.stdout).strip()

    def check(self) -> None:
        assert [of_wallet(self.box, key) for key in self.keys] == self.owner
        for account, credits in self.credits.items():
            assert self.box.standing(account) == (credits, 0)
        for account, token in self.people.items():
            wallets = {self.keys[n].wallet for n in range(3) if self.owner[n] == account}
            answer = self.box.get(WALLETS, token)
            if answer.status == 401:  # ended with the wallet that had signed it in
                self.people[account] = token = self.fresh(account)
                answer = self.box.get(WALLETS, token)
            assert {each["id"] for each in answer.json()["data"]} == wallets


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_the_books_add_up_and_each_wallet_has_one_account(box: Box, seed: int) -> None:
    world = World(box, Random(seed))
    for _ in range(30):
        world.step()
    assert box.faults() == []
    assert len(world.seen) >= 8, world.seen


def test_the_audit_log_says_who_linked_and_merged(box: Box) -> None:
    key, me = EvmKey(), person(box)
    top_up(box, key)
    before = of_wallet(box, key)
    linked(box, key, me.token)
    found = box.instance.db.rows(
        "SELECT actor, action, subject FROM audit WHERE account_id = :mine"
        " AND action IN ('account.merged', 'wallet.linked')",
        {"mine": me.account},
    )
    assert set(found) == {
        (me.id, "account.merged", before), (me.id, "wallet.linked", stored(key)),
    }  # fmt: skip
