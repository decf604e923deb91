"""What is not given away when somebody tries, or something is slow, forgotten, or breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles import Exchange
from evm_chain import EvmChain
from inprocess import Background, Box, Clock
from payers import EvmWallet, SolanaWallet, decode
from server import Answer
from settler import BASE, SOLANA, Settler, section
from test_payment_checks import NODE, SMS, TEXT, asked, pay, route

from config.eip55 import checksummed
from core import clock

PAYEE = EvmWallet()
SOLANA_PAYEE = SolanaWallet(NODE)


class Moody(Settler):
    """Says of a settlement what it is told to: `said`, with `status`; or hangs where it `hangs`."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, Any] | None = None
        self.status = 200
        self.supports = True
        self.let_go = threading.Event()
        self.let_go.set()

    def respond(self, exchange: Exchange) -> None:
        if exchange.hit.path.endswith("/supported"):
            self.let_go.wait(20)
            if not self.supports:
                exchange.json(503, {})
                return
        if exchange.hit.path.endswith("/settle") and self.said is not None:
            with self._lock:
                self.told.append({})
            exchange.json(self.status, self.said)
            return
        super().respond(exchange)


@pytest.fixture
def settler() -> Iterator[Moody]:
    with Moody() as server:
        yield server
        server.let_go.set()


def config(settler: Settler, limits: str = "", **more: str) -> str:
    pay_to = {BASE: PAYEE.address, SOLANA: SOLANA_PAYEE.address}
    upstream = '[upstreams.sandbox]\nkind = "sandbox"\n'
    return f"{upstream}{route(SMS)}[limits]\n{limits}\n{section(settler, pay_to, **more)}"


def test_a_facilitator_that_hangs_holds_up_one_quote_and_not_all(
    settler: Moody, tmp_path: Path
) -> None:
    settler.let_go.clear()
    with Box(tmp_path / "instance", config(settler)) as box:
        began = time.monotonic()
        waiting = [Background(lambda: box.post(SMS, value=TEXT)) for _ in range(8)]
        answers: list[Answer] = []
        while len(answers) < 7:
            done = [each for each in waiting if each.done]
            answers = [each.result() for each in done]
            assert time.monotonic() - began < 4, "they wait for one another"
            time.sleep(0.02)
        ways = [decode(answer.headers["PAYMENT-REQUIRED"])["accepts"] for answer in answers]
        assert all([way["network"] for way in each] == [BASE] for each in ways)
        settler.let_go.set()
        for each in waiting:
            assert each.result().status == 402
        assert settler.asked == 1


def test_who_pays_the_fees_is_asked_after_what_is_known_of_a_payment(
    settler: Moody, tmp_path: Path
) -> None:
    folder, toml = tmp_path / "instance", config(settler)
    with Box(folder, toml) as box:
        header = SolanaWallet(NODE).header(asked(box, SMS))
        settler.said, settler.status = {"success": False, "errorReason": "settlement_pending"}, 200
        assert pay(box, header).code == "payment_unconfirmed"
    settler.supports = False
    with Box(folder, toml) as box:  # which knows no fee payer any more
        answer = pay(box, header)
        assert (answer.status, answer.code) == (503, "payment_unconfirmed")
        assert "PAYMENT-REQUIRED" not in answer.headers


def test_a_bearers_payments_that_come_to_nothing_are_limited_too(
    settler: Moody, tmp_path: Path
) -> None:
    settler.said = {"success": False, "errorReason": "insufficient_funds"}
    with Box(tmp_path / "instance", config(settler, "failed_auth_per_minute = 3")) as box:
        key, challenge = box.payer(0).key, asked(box, SMS)
        for _ in range(3):  # a minute may end in the midst of one round, not of two
            minute, before = clock.now_ms() // clock.MINUTE_MS, settler.settles
            answers = [
                pay(box, EvmWallet().header(challenge), Authorization=f"Bearer {key}")
                for _ in range(6)
            ]
            if minute == clock.now_ms() // clock.MINUTE_MS:
                break
        assert [answer.code for answer in answers] == ["payment_invalid"] * 3 + ["rate_limited"] * 3
        assert settler.settles - before == 3


def test_nobody_uses_up_a_wallets_rate_with_what_it_paid_others(
    settler: Moody, tmp_path: Path
) -> None:
    with Box(tmp_path / "instance", config(settler)) as box:
        wallet, challenge = EvmWallet(), asked(box, SMS)
        assert pay(box, wallet.header(challenge)).status == 200  # and has an account
        left = [pay(box, wallet.header(challenge)).headers["X-RateLimit-Remaining"]]
        for stale in ({"to": EvmWallet().address}, {"validBefore": "1700000000"}):
            header = wallet.header(challenge, signed=stale)
            answer = box.request(
                "POST", SMS, value=TEXT, headers={"PAYMENT-SIGNATURE": header}, client="192.0.2.7"
            )
            assert answer.code == "payment_invalid"
        left.append(pay(box, wallet.header(challenge)).headers["X-RateLimit-Remaining"])
        assert int(left[0]) - int(left[1]) in (1, 1 - 600 + int(left[0]))  # or a new minute


def test_what_breaks_here_after_a_payment_says_where_the_credits_are(
    settler: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Box(tmp_path / "instance", config(settler)) as box:
        header = EvmWallet().header(asked(box, SMS))
        with monkeypatch.context() as patch:
            patch.setattr(box.instance, "send", lambda *_: 1 / 0)
            broken = pay(box, header)
        assert (broken.status, broken.code) == (500, "internal_error")
        assert broken.json()["credited"] == 1 and broken.headers["X-Credits-Credited"] == "1"
        assert decode(broken.headers["PAYMENT-RESPONSE"])["success"] is True
        served = pay(box, header)
        assert served.status == 200 and settler.settles == 1


@pytest.mark.parametrize("transaction", [None, ""])
def test_a_refusal_without_a_transaction_is_one(
    settler: Moody, tmp_path: Path, transaction: str | None
) -> None:
    settler.said = {
        "success": False, "errorReason": "insufficient_funds", "transaction": transaction,
        "network": None,
    }  # fmt: skip
    with Box(tmp_path / "instance", config(settler)) as box:
        header = EvmWallet().header(asked(box, SMS))
        answer = pay(box, header)
        assert (answer.code, answer.json()["reason"]) == ("payment_invalid", "insufficient_funds")
        settler.said = None
        assert pay(box, header).status == 200


def test_an_address_is_told_as_clients_take_it(settler: Moody, tmp_path: Path) -> None:
    small = PAYEE.address.lower()
    toml = config(settler).replace(PAYEE.address, small)
    with Box(tmp_path / "instance", toml) as box:
        (way,) = (each for each in asked(box, SMS)["accepts"] if each["network"] == BASE)
        assert way["payTo"] == PAYEE.address == checksummed(small)
        assert pay(box, EvmWallet().header(asked(box, SMS))).status == 200


def test_an_authorization_that_was_used_long_ago_is_refused_at_once(
    settler: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settler.said = {"success": False, "errorReason": "invalid_exact_evm_nonce_already_used"}
    with EvmChain() as evm:
        rpc = f'{{ "{BASE}" = "{evm.url}" }}'
        with Box(tmp_path / "instance", config(settler, rpc=rpc)) as box:
            wallet, challenge = EvmWallet(), asked(box, SMS)
            evm.mint(wallet.address, 10_000)
            later = str(int(time.time()) + 30_000)
            sent = wallet.payment(challenge, signed={"validBefore": later})
            evm.submit(sent["payload"]["authorization"], sent["payload"]["signature"])
            evm.mine(2_100)  # more than is searched at once
            now = Clock(monkeypatch, clock.rfc3339(clock.now_ms()))
            now.forward(seconds=3 * 3600)
            header = wallet.header(challenge, signed=sent["payload"]["authorization"])
            answer = pay(box, header)
            assert (answer.status, answer.code) == (402, "payment_invalid")
            assert answer.json()["reason"] == "the_network_refused_it"
            assert evm.calls["eth_getLogs"] == 1, "nobody looks through years of blocks"
