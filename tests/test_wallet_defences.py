"""What wallets do not give away when somebody tries, or two things happen at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles import Exchange, Upstream
from inprocess import Background, Box, Payer
from payers import EvmWallet, decode
from server import Answer
from settler import BASE, Settler, section
from signers import EvmKey, Key, SolanaKey, signed

from core import clock, wallets

HERE = "http://127.0.0.1:8402"
PAYEE = EvmWallet()
TOP_UP, SMS, GET = "/api/v1/credits/top-up", "/api/v1/sms/send", "/api/v1/far/empty"
TEXT = {"to": "+18148835337", "message": "hi"}


class Slow(Settler):
    """Says how a settlement ended when it is let go, or hangs up instead."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs_up = False
        self.asked_to = threading.Event()
        self.let_go = threading.Event()

    def respond(self, exchange: Exchange) -> None:
        if exchange.hit.path.endswith("/settle"):
            self.asked_to.set()
            if self.hangs_up:
                exchange.close()
                return
            self.let_go.wait(20)
        super().respond(exchange)


@pytest.fixture
def settler() -> Iterator[Slow]:
    with Slow() as server:
        yield server
        server.let_go.set()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture
def box(tmp_path: Path, settler: Slow, upstream: Upstream) -> Iterator[Box]:
    routes = "".join(
        f'[[routes]]\npath = "{path}"\nmethods = ["{method}"]\nupstream = "{name}"\n{more}'
        for path, method, name, more in (
            (SMS, "POST", "sandbox", 'adapter = "sms"\nper = "sms_segment"\ncredits = 10\n'),
            ("/api/v1/far/*", "GET", "far", 'upstream_path = "/*"\ncredits = 10\n'),
        )
    )
    toml = (
        '[instance]\nsignup = "closed"\n[upstreams.sandbox]\nkind = "sandbox"\n'
        f'[upstreams.far]\nkind = "http"\nbase_url = "{upstream.url}"\n{routes}'
        f"[limits]\nfailed_auth_per_minute = 5\n{section(settler, {BASE: PAYEE.address})}"
    )
    with Box(tmp_path / "instance", toml) as found:
        yield found


def message(box: Box, key: Key) -> dict[str, str]:
    """A message that the wallet has signed."""
    text = box.post("/api/v1/wallets/challenge", None, {"wallet": key.wallet}).json()["message"]
    return {"message": text, "signature": key.sign_text(text)}


def token_of(box: Box, payer: Payer) -> str:
    return str(box.cli("tokens", "mint", payer.email).output.strip())


def payers_account(box: Box, key: Key) -> str:
    """The account that a payment opens for a wallet."""
    wallet = wallets.parse(key.wallet)
    assert wallet is not None
    return box.write(lambda tx: wallets.take_in(tx, wallet, clock.now_ms()))


def payment(box: Box, key: EvmKey, method: str, path: str, body: Any) -> str:
    asked = box.request(method, path, value=body)
    return EvmWallet(key.account.key.hex()).header(decode(asked.headers["PAYMENT-REQUIRED"]))


def send(box: Box, key: EvmKey, path: str, value: dict[str, Any], **more: str) -> Answer:
    """A request that its wallet has signed; with what is to pay for it, if that is needed."""
    body = json.dumps(value).encode()
    headers = signed(key, "POST", HERE + path, body) | {"Content-Type": "application/json"}
    return box.request("POST", path, body=body, headers=headers | more)


PURPOSES = [(TOP_UP, {"credits": 20}, 20), (SMS, TEXT, 0)]


@pytest.mark.parametrize(("path", "value", "left"), PURPOSES, ids=["top-up", "call"])
def test_an_account_is_not_merged_while_a_payment_for_it_is_being_settled(
    box: Box, settler: Slow, path: str, value: dict[str, Any], left: int
) -> None:
    key, person = EvmKey(), box.payer(0)
    token, account = token_of(box, person), payers_account(box, key)
    shown = payment(box, key, "POST", path, value)
    paying = Background(lambda: send(box, key, path, value, **{"PAYMENT-SIGNATURE": shown}))
    assert settler.asked_to.wait(10)
    answer = box.post("/api/v1/wallets", token, message(box, key))
    assert (answer.status, answer.code) == (409, "conflict")
    settler.let_go.set()
    assert paying.result().status == 200
    assert box.standing(account) == (left, 0)
    assert box.post("/api/v1/wallets", token, message(box, key)).status == 201
    assert (box.standing(account), box.standing(person)) == ((0, 0), (left, 0))


@pytest.mark.parametrize(("path", "value", "left"), PURPOSES, ids=["top-up", "call"])
def test_a_payment_that_turns_out_settled_after_a_merge_is_the_new_owners(
    box: Box, settler: Slow, path: str, value: dict[str, Any], left: int
) -> None:
    key, person = EvmKey(), box.payer(0)
    token, account = token_of(box, person), payers_account(box, key)
    settler.hangs_up = True
    shown = payment(box, key, "POST", path, value)
    more = {"PAYMENT-SIGNATURE": shown, "Idempotency-Key": "once"}
    assert send(box, key, path, value, **more).code == "payment_unconfirmed"
    (payment_id, credits) = box.row("SELECT id, credits FROM payment")
    assert box.post("/api/v1/wallets", token, message(box, key)).code == "conflict"
    assert box.cli("payments", "reconcile", payment_id, "--refused").exit_code == 0
    assert box.post("/api/v1/wallets", token, message(box, key)).status == 201
    told = box.cli("payments", "reconcile", payment_id, "--settled", f"0x{'ab' * 32}")
    assert told.exit_code == 0, told.output
    assert (box.standing(account), box.standing(person)) == ((0, 0), (credits, 0))
    again = send(box, key, path, value, **(more if path == TOP_UP else {}))
    assert again.status == 200, again.body  # the top-up's answer; the call on what was credited
    assert box.standing(person) == (left, 0)


def test_a_failed_payment_that_is_shown_again_opens_no_credits_but_its_own(
    box: Box, settler: Slow, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the chain can show it: the rest of the account is not for them."""
    settler.let_go.set()
    key = EvmKey()
    failing, fine = "/api/v1/far/redirect/302", GET
    shown = {"PAYMENT-SIGNATURE": payment(box, key, "GET", failing, None)}
    first = box.request("GET", failing, headers=shown)
    assert (first.status, first.json()["credited"]) == (502, 10)
    again = box.request("GET", failing, headers=shown)
    assert (again.status, again.json()["credited"]) == (502, 10)  # its credits are there: tried
    spent = box.request("GET", fine, headers=signed(key, "GET", HERE + fine))
    assert (spent.status, spent.headers["X-Credits-Remaining"]) == (204, "0")
    (account,) = box.row("SELECT account_id FROM wallet")
    box.grant(account, 100)
    hits = len(upstream.hits())
    again = box.request("GET", failing, headers=shown)
    assert (again.status, again.code) == (409, "payment_already_used")
    assert (len(upstream.hits()), box.standing(account)) == (hits, (100, 0))


@pytest.mark.parametrize("signature", ["é==", "é", "==", "A" * 85 + "B==", "", "1" * 87, "0x"])
@pytest.mark.parametrize("key", [SolanaKey(), EvmKey()], ids=["solana", "eip155"])
def test_a_signature_that_is_none_is_refused_and_nothing_else(
    box: Box, key: Key, signature: str
) -> None:
    told = message(box, key) | {"signature": signature}
    for path, token in (
        ("/api/v1/session-tokens", None),
        ("/api/v1/wallets", token_of(box, box.payer(0))),
    ):
        answer = box.post(path, token, told)
        assert (answer.status, answer.code) == (401, "invalid_signature")


def test_whoever_is_not_let_in_disturbs_no_commit_of_others(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal inside a shared transaction has everybody's part of it done again."""
    stranger, suspended = SolanaKey(), SolanaKey()
    account = payers_account(box, suspended)
    used, told = message(box, stranger), message(box, suspended)
    assert box.cli("accounts", "suspend", account).exit_code == 0
    writes: list[object] = []
    write = box.instance.db.write
    monkeypatch.setattr(
        box.instance.db, "write", lambda *a, **k: (writes.append(a), write(*a, **k))[1]
    )
    for sent, code in ((used, "signup_closed"), (told, "account_suspended")):
        assert box.post("/api/v1/session-tokens", None, sent).code == code
    assert writes == []


def test_one_wallets_sign_ins_are_counted_and_so_are_one_networks(box: Box) -> None:
    keys = [SolanaKey(), SolanaKey()]
    for key in keys:
        payers_account(box, key)
    for _ in range(3):  # a minute may end in the midst of one round, not of two
        minute = clock.now_ms() // clock.MINUTE_MS
        codes = [
            box.post("/api/v1/session-tokens", None, message(box, key)).status
            for key in keys
            for _ in range(6)
        ]
        if minute == clock.now_ms() // clock.MINUTE_MS:
            break
    assert codes == [*[201] * 5, 429] * 2


def test_who_is_not_let_in_any_more_is_told_so_and_not_of_a_used_signature(box: Box) -> None:
    key = EvmKey()
    account = payers_account(box, key)
    headers = signed(key, "GET", f"{HERE}/v1/account")
    assert box.request("GET", "/v1/account", headers=headers).status == 200
    assert box.cli("accounts", "suspend", account).exit_code == 0
    assert box.request("GET", "/v1/account", headers=headers).code == "account_suspended"


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("https://Farebox.Example", "https://farebox.example"),
        ("https://farebox.example:443", "https://farebox.example"),
        ("http://[::1]:8402/sub", "http://[::1]:8402"),
        ("http://farebox.example:8402", "http://farebox.example:8402"),
    ],
)
def test_an_address_is_signed_as_every_client_writes_it(
    tmp_path: Path, address: str, origin: str
) -> None:
    host = origin.partition("://")[2]
    with Box(tmp_path / "instance", FAREBOX_PUBLIC_URL=address) as box:
        key = EvmKey()
        payers_account(box, key)
        text = message(box, key)["message"]
        assert text.startswith(f"{host} wants you to sign in with your Ethereum account:\n")
        headers = signed(key, "GET", f"{origin}/v1/account") | {"Host": host}
        assert box.request("GET", "/v1/account", headers=headers).status == 200


def test_a_request_that_comes_too_soon_uses_no_nonce_and_leaves_none(tmp_path: Path) -> None:
    toml = (
        '[upstreams.sandbox]\nkind = "sandbox"\n[[routes]]\nmethods = ["POST"]\nadapter = "sms"\n'
        f'path = "{SMS}"\nupstream = "sandbox"\ncredits = 1\n[limits]\nrequests_per_minute = 2\n'
    )
    with Box(tmp_path / "instance", toml) as box:
        key = EvmKey()
        box.grant(payers_account(box, key), 100)
        body = json.dumps(TEXT).encode()
        sent = [signed(key, "POST", HERE + SMS, body) for _ in range(12)]
        json_body = {"Content-Type": "application/json"}
        answers = [box.request("POST", SMS, body=body, headers=each | json_body) for each in sent]
        served = [answer.status == 200 for answer in answers]
        assert {answer.code for answer in answers if answer.status != 200} == {"rate_limited"}
        assert box.row("SELECT COUNT(*) FROM used_nonce") == (sum(served),)
        late = answers[served.index(False)]
        assert int(late.headers["Retry-After"]) <= 60
