"""Payments as people see them: the operator's list, what is not confirmed yet, the ledger, how to
buy credits, and the page that says what a call costs. Programs to paste are run."""

from __future__ import annotations

import builtins
import html
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from doubles import Exchange, Server
from html_pages import Page, Visit, account_of, cheaply, newcomer, run, user_of, visitor
from inprocess import Box
from people import CONFIG, audited
from rpc_server import need
from screen import NARROW, WIDE, OpenScreen, look
from server import ROOT, Answer, free_port, until
from werkzeug.serving import make_server

need("eth_account", "solders", "x402")

from payers import EvmWallet, decode  # noqa: E402

from blueprints import admin_payments  # noqa: E402
from core import clock, examples, tokens  # noqa: E402
from core.payments import records  # noqa: E402

BASE = "eip155:8453"
SOLANA = "solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp"
PAY_TO = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
TOP_UP, ECHO, SMS = "/api/v1/credits/top-up", "/api/v1/echo", "/api/v1/sms/send"
# A call of two and a half dollars, which the official client pays only when it is told to.
ROUTES = CONFIG.replace("credits = 3\n", "credits = 250\nx402 = true\n").replace(
    'scope = "sms:send"\n', 'scope = "sms:send"\nx402 = true\n'
)
TRANSACTION = "0x" + "ab" * 32


class Bank(Server):
    """A facilitator that says of every payment what `says` is; `held` lets it wait first."""

    def __init__(self) -> None:
        super().__init__()
        self.says = "settled"
        self.held = threading.Event()
        self.held.set()

    def respond(self, exchange: Exchange) -> None:
        if exchange.hit.path.endswith("/supported"):
            kinds = [{"x402Version": 2, "scheme": "exact", "network": BASE}]
            exchange.json(200, {"kinds": kinds, "extensions": [], "signers": {}})
            return
        says = self.says
        self.held.wait(20)
        if says == "lost":
            exchange.close()
        elif says == "settled":
            made = f"0x{tokens.digest(exchange.hit.body).hex()}"
            exchange.json(200, {"success": True, "transaction": made, "network": BASE})
        else:
            exchange.json(200, {"success": False, "errorReason": says, "transaction": "",
                                "network": BASE})  # fmt: skip


class Place(Box):
    """A `Box` that is served on a port too, for programs and for a browser with a screen."""

    def __init__(self, folder: Path, config: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(folder, config, FAREBOX_PUBLIC_URL=self.url)
        self._server = make_server("127.0.0.1", self.port, self.app, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()
        super().__exit__(*error)


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        yield patch


@pytest.fixture(scope="module")
def the_bank() -> Iterator[Bank]:
    with Bank() as bank:
        yield bank


@pytest.fixture
def bank(the_bank: Bank) -> Iterator[Bank]:
    the_bank.says = "settled"
    yield the_bank
    the_bank.held.set()


def config(bank: Bank) -> str:
    return ROUTES + (
        f'\n[x402]\nfacilitator_url = "{bank.url}"\npay_to = {{ "{BASE}" = "{PAY_TO}" }}\n'
    )


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, the_bank: Bank) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("payments") / "i", config(the_bank)) as box:
        yield box


@pytest.fixture(scope="module")
def boss(box: Place) -> Visit:
    return visitor(box, "--operator")


def pay(
    box: Box, wallet: EvmWallet, credits: int = 20, key: str | None = None, **signed: Any
) -> Answer:
    """The answer to a top-up that this wallet pays."""
    asked = box.post(TOP_UP, key, {"credits": credits})
    header = wallet.header(decode(asked.headers["PAYMENT-REQUIRED"]), signed=signed)
    return box.post(TOP_UP, key, {"credits": credits}, PAYMENT_SIGNATURE=header)


def name_of(wallet: EvmWallet) -> str:
    return f"eip155:{wallet.address}"


def lost(box: Box, bank: Bank, wallet: EvmWallet, **signed: Any) -> str:
    """The id of a payment of 20 credits whose end nobody heard."""
    bank.says = "lost"
    answer = pay(box, wallet, **signed)
    assert (answer.status, answer.code) == (503, "payment_unconfirmed"), answer.body
    bank.says = "settled"
    found: str = answer.json()["payment"]
    return found


def credits_of(box: Box, wallet: EvmWallet) -> int:
    """What the wallet's account has; nothing where it has none."""
    found = box.instance.db.row(
        "SELECT a.balance FROM wallet w JOIN account a ON a.id = w.account_id WHERE w.id = :w",
        {"w": name_of(wallet).lower()},
    )
    return 0 if found is None else int(found[0])


def last_audited(box: Box) -> tuple[Any, ...]:
    return audited(box, "action", "actor", "account_id", "subject", "detail")[-1]


# What was paid.


def test_a_payment_is_listed_with_its_wallet_its_use_and_its_account(
    box: Place, bank: Bank, boss: Visit
) -> None:
    wallet = EvmWallet()
    assert pay(box, wallet, 1250).status == 200
    page = boss.open(f"/admin/payments?who={wallet.address}")
    (row,) = page.items()
    for words in ("12.50 USDC settled", name_of(wallet), "top-up · Base", "1,250 credits"):
        assert words in row.text
    shown = boss.open(row.all("a")[0].get("href"))
    facts = shown.facts()
    assert shown.h1 == "12.50 USDC settled"
    assert "The money moved, and 1,250 credits were entered for acct_" in shown.text
    (payment_id, transaction, account) = box.row(
        "SELECT id, transaction_id, account_id FROM payment WHERE wallet = :w",
        w=name_of(wallet).lower(),
    )
    assert (facts["Payment"], facts["Transaction"]) == (payment_id, transaction)
    assert facts["From"] == f"{name_of(wallet)} {account}" and facts["To"] == PAY_TO
    assert facts["Network"] == f"Base {BASE}" and "12,500,000 of its smallest" in facts["Token"]
    assert "It was settled" not in boss.open(f"/admin/payments/{payment_id}").buttons()
    told = dict(
        line.split(None, 1) for line in box.cli("payments", "show", payment_id).output.splitlines()
    )
    for name in ("wallet", "network", "asset", "pay_to", "account_id", "transaction_id",
                 "incarnation"):  # fmt: skip
        assert told[name].strip() in shown.text, name


def test_a_call_that_was_paid_names_its_route(box: Place, bank: Bank, boss: Visit) -> None:
    wallet, asked = EvmWallet(), box.get(ECHO)
    header = wallet.header(decode(asked.headers["PAYMENT-REQUIRED"]))
    assert box.get(ECHO, PAYMENT_SIGNATURE=header).status == 200
    page = boss.open(f"/admin/payments?who={name_of(wallet)}")
    assert "2.50 USDC settled" in page.text and f"GET {ECHO} · Base" in page.text
    (call,) = box.row("SELECT call_id FROM payment WHERE wallet = :w", w=name_of(wallet).lower())
    shown = boss.press(boss.open(page.items()[0].all("a")[0].get("href")).link(
        "All payments of this wallet"), "Search")  # fmt: skip
    assert len(shown.items()) == 1 and f"GET {ECHO}" in shown.text
    assert call in boss.open(page.items()[0].all("a")[0].get("href")).facts()["For"]


def test_a_wallet_owns_its_account_and_is_found_by_any_spelling(
    box: Place, bank: Bank, boss: Visit
) -> None:
    wallet = EvmWallet()
    pay(box, wallet, 20)
    for text in (name_of(wallet), wallet.address.lower(), wallet.address.upper(),
                 wallet.address[4:20]):  # fmt: skip
        (row,) = boss.press("/admin", "Search", q=text).items()
        assert row.all("strong")[0].text == name_of(wallet)
    page = boss.open(row.all("a")[0].get("href"))
    assert page.h1 == f"{name_of(wallet)} active" and "a wallet that pays" in page.text
    ((_, what, amount, _),) = page.table("When")
    (transaction,) = box.row(
        "SELECT transaction_id FROM payment WHERE wallet = :w", w=name_of(wallet).lower()
    )
    assert what == (
        f"Top-up of 0.20 USDC on Base {name_of(wallet)} transaction {transaction} the payment"
    )
    assert amount == "+20" and boss.open(page.link("the payment")).h1 == "0.20 USDC settled"
    (payments,) = {link.get("href") for link in page.root.all("a") if link.name == "Its payments"
                   and "who=eip155" in link.get("href")}  # fmt: skip
    assert len(boss.open(payments).items()) == 1
    assert "eip155" not in boss.press("/admin", "Search", q="user").text


def test_an_accounts_people_see_what_was_paid_for_them(box: Place, bank: Bank, boss: Visit) -> None:
    me, wallet = visitor(box), EvmWallet()
    key = box.key(account_of(box, me.email))[0]
    assert pay(box, wallet, 20, key).json()["credits"] == 20
    pay(box, wallet, 30, key)
    for path in ("/dashboard/billing", "/dashboard/billing/ledger"):
        page = me.open(path)
        rows = page.table("When")
        assert [row[2:] for row in rows] == [["+30", "50"], ["+20", "20"]]
        assert f"Top-up of 0.30 USDC on Base {name_of(wallet)} transaction 0x" in rows[0][1]
        assert not page.has_link("the payment")
    found = boss.open(f"/admin/payments?who={me.email}")
    assert [item.all("strong")[0].text for item in found.items()] == ["0.30 USDC", "0.20 USDC"]
    own = box.key(account_of(box, boss.email))[0]
    pay(box, wallet, 40, own)
    assert boss.open(boss.open("/dashboard/billing").link("the payment")).h1 == "0.40 USDC settled"


def test_payments_are_narrowed_by_status_and_by_whose_they_are(
    box: Place, bank: Bank, boss: Visit
) -> None:
    mine, other = EvmWallet(), EvmWallet()
    pay(box, mine, 11)
    payment_id = lost(box, bank, mine)
    bank.says = "insufficient_funds"
    assert pay(box, mine, 12).status == 402
    bank.says = "settled"
    pay(box, other, 13)

    def found(**query: str) -> list[str]:
        page = boss.press("/admin/payments", "Search", typed=query)
        return [item.all("strong")[0].text for item in page.items()]

    who = name_of(mine)
    assert found(who=who) == ["0.12 USDC", "0.20 USDC", "0.11 USDC"]
    assert found(who=who.lower(), status="settled") == ["0.11 USDC"]
    assert found(who=mine.address, status="unknown") == ["0.20 USDC"]
    assert found(who=mine.address, status="refused") == ["0.12 USDC"]
    assert found(who=mine.address, status="settling") == []
    assert found(who=name_of(other)) == ["0.13 USDC"]
    assert boss.press("/admin/payments", "Search", who=payment_id).h1.startswith("0.20 USDC not")
    for nobody in ("nobody@example.com", "acct_none", "eip155:", name_of(EvmWallet())):
        page = boss.press("/admin/payments", "Search", who=nobody)
        assert (
            page.items() == []
            and page.field("Wallet, e-mail, account or payment").get("value") == nobody
        )
    assert "is no such status" not in boss.open("/admin/payments").text
    assert "no such status" in boss.open("/admin/payments?status=paid", 400).text


def test_a_long_list_comes_in_pages(box: Place, boss: Visit) -> None:
    account, now = account_of(box, newcomer(box)), clock.now_ms()

    def work(tx: Any) -> None:
        for number in range(51):
            tx.run(
                "INSERT INTO payment (id, number, key, network, asset, wallet, wallet_name, pay_to,"
                " amount, credits, purpose, method, path, fingerprint, print, account_id,"
                " answer_key, status, incarnation, created_at)"
                " SELECT :id, COALESCE(MAX(number), 0) + 1, :id, :network, 'x', 'w', 'w', 'p',"
                " :amount, 1, 'call', 'GET', '/x', x'', x'', :account, :id, 'refused', 'i', :now"
                " FROM payment",
                {"id": tokens.new_id("pay"), "network": BASE, "amount": 10_000 * (number + 1),
                 "account": account, "now": now},
            )  # fmt: skip

    box.write(work)
    page = boss.open(f"/admin/payments?who={account}&status=refused")
    assert len(page.items()) == 50 and "0.51 USDC" in page.items()[0].text
    older = boss.open(page.link("Older"))
    assert [item.all("strong")[0].text for item in older.items()] == ["0.01 USDC"]
    assert not older.has_link("Older")


# What is not confirmed yet.


def test_what_is_not_confirmed_stands_out_everywhere(box: Place, bank: Bank, boss: Visit) -> None:
    before = _count(boss.open("/admin"))
    payment_id = lost(box, bank, EvmWallet())
    for path in ("/admin", "/admin/payments", "/admin/health", "/admin/audit"):
        assert _count(boss.open(path)) == before + 1
    words = f"{before + 1} payment{'s are' if before else ' is'} not confirmed yet"
    for path in ("/admin/payments", "/admin/health"):
        page = boss.open(path)
        assert page.notices()[0].startswith(words)
        there = boss.open(page.link("Look at them" if before else "Look at it"))
        assert payment_id in there.answer.body.decode() and len(there.items()) == before + 1
    page = boss.open(f"/admin/payments/{payment_id}")
    assert page.h1 == "0.20 USDC not confirmed yet"
    assert "its payer is told not to pay again" in page.notices()[0]
    assert {"Look again now", "It was settled", "It was not"} <= set(page.buttons())
    assert "a wallet" not in page.text


def _count(page: Page) -> int:
    (tab,) = [link for link in page.root.all("a") if link.get("href") == "/admin/payments"
              and link.name.startswith("Payments")]  # fmt: skip
    words = tab.name.removeprefix("Payments").split()
    assert not words or words[1:] == ["not", "confirmed", "yet"]
    return int(words[0]) if words else 0


def test_what_was_signed_is_on_no_page(box: Place, bank: Bank, boss: Visit) -> None:
    payment_id = lost(box, bank, EvmWallet())
    (proof, key) = box.row("SELECT proof, key FROM payment WHERE id = :id", id=payment_id)
    signed = json.loads(proof)["signed"]
    secrets = [signed["signature"], signed["authorization"]["nonce"], key]
    for path in ("", f"/{payment_id}", f"/{payment_id}/settled", f"/{payment_id}/refused"):
        text = boss.open(f"/admin/payments{path}").answer.body.decode().lower()
        assert [secret for secret in secrets if secret.lower() in text] == []


def test_the_operator_has_it_looked_for_now(box: Place, bank: Bank, boss: Visit) -> None:
    wallet = EvmWallet()
    payment_id = lost(box, bank, wallet)
    at = f"/admin/payments/{payment_id}"
    bank.says = "lost"
    page = boss.press(at, "Look again now")
    assert page.done()[0].startswith("It is not confirmed yet: ") and credits_of(box, wallet) == 0
    assert last_audited(box)[:4] == ("payment.look", user_of(box, boss.email), None, payment_id)
    bank.says = "settled"
    page = boss.press(page, "Look again now")
    assert page.done() == ["It is settled."] and page.h1 == "0.20 USDC settled"
    assert credits_of(box, wallet) == 20
    account = page.link(page.facts()["From"].split()[1])
    assert boss.open(account).h1.startswith(name_of(wallet))


def test_a_page_does_not_wait_as_long_as_a_network_may_take(
    box: Place, bank: Bank, boss: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_payments, "_PATIENCE_SECONDS", 0.05)
    wallet = EvmWallet()
    payment_id = lost(box, bank, wallet)
    settles, at = len(bank.hits("/settle")), f"/admin/payments/{payment_id}"
    bank.held.clear()
    for _ in range(3):  # who presses again starts no second look
        page = boss.press(at, "Look again now")
        assert page.done()[0].startswith("The look goes on")
    bank.wait_for(settles + 1, "/settle")
    bank.held.set()
    until(lambda: credits_of(box, wallet) == 20, 10, "the look that went on enters the credits")
    assert len(bank.hits("/settle")) == settles + 1
    until(lambda: not admin_payments._looking.locked(), 10, "the look is over")
    assert boss.open(at).h1 == "0.20 USDC settled"


def test_the_operator_says_that_it_was_settled(box: Place, bank: Bank, boss: Visit) -> None:
    wallet = EvmWallet()
    payment_id = lost(box, bank, wallet)
    asked = boss.press(f"/admin/payments/{payment_id}", "It was settled")
    assert asked.h1 == "Say that it was settled?" and name_of(wallet) in asked.text
    for wrong in ("", "0x12", TRANSACTION[2:], "5" * 88, TRANSACTION + "0"):
        page = boss.press(asked, "It was settled", status=400, transaction=wrong)
        assert page.alert() and page.field("Transaction").get("value") == wrong
        assert credits_of(box, wallet) == 0
    page = boss.press(asked, "It was settled", transaction=TRANSACTION)
    assert page.done() == ["The credits are entered."] and page.h1 == "0.20 USDC settled"
    assert page.facts()["Transaction"] == TRANSACTION and credits_of(box, wallet) == 20
    action, actor, account, subject, detail = last_audited(box)
    assert (action, actor) == ("payment.settled", user_of(box, boss.email))
    assert (subject, json.loads(detail)) == (payment_id, {"transaction": TRANSACTION})
    assert box.row("SELECT account_id FROM payment WHERE id = :id", id=payment_id) == (account,)
    again = boss.press(asked, "It was settled", status=409, transaction=TRANSACTION)
    assert again.alert() == "The payment is settled." and credits_of(box, wallet) == 20
    shown = boss.open(f"/admin/payments/{payment_id}/refused")
    assert "There is nothing to say: the payment is settled." in shown.text
    assert "It was not" not in shown.buttons()


def test_the_operator_says_that_it_was_not_and_the_payer_pays_anew(
    box: Place, bank: Bank, boss: Visit
) -> None:
    wallet = EvmWallet()
    payment_id = lost(box, bank, wallet)
    asked = boss.press(f"/admin/payments/{payment_id}", "It was not")
    assert "It can still be settled until" in asked.notices()[0]
    page = boss.press(asked, "It was not")
    assert page.h1 == "0.20 USDC refused" and "the operator says so" in page.text
    assert last_audited(box)[:4] == ("payment.refused", user_of(box, boss.email), None, payment_id)
    assert credits_of(box, wallet) == 0 and pay(box, wallet).status == 200
    assert credits_of(box, wallet) == 20


def test_pages_tell_of_payments_where_none_are_taken_any_more(tmp_path: Path, bank: Bank) -> None:
    with Box(tmp_path / "i", config(bank)) as box:
        payment_id = lost(box, bank, EvmWallet())
    (tmp_path / "i" / "farebox.toml").write_text(CONFIG)
    with Box(tmp_path / "i") as box:
        boss = visitor(box, "--operator")
        page = boss.open(f"/admin/payments/{payment_id}")
        assert "Look again now" not in page.buttons() and "It was settled" in page.buttons()
        for path in ("/admin/payments", "/admin/health", "/admin/payments/pay_none"):
            boss.open(path, 404 if path.endswith("none") else 200)
        assert "1 payment is not confirmed yet" in boss.open("/admin/health").text
        answer = boss.browser.post(
            f"/admin/payments/{payment_id}/look", {"csrf_token": boss.browser.csrf()}
        )
        assert "nobody can be asked" in Page(boss.browser.follow(answer)).done()[0]
        assert "wallet" not in boss.open("/dashboard/billing").text


def test_an_instance_without_payments_says_how_to_take_some(tmp_path: Path) -> None:
    with Box(tmp_path / "i", CONFIG) as box:
        boss = visitor(box, "--operator")
        assert (
            "None yet. Where farebox.toml has a section [x402]" in boss.open("/admin/payments").text
        )
        assert "Payments" not in boss.open("/admin/health").headings()
        assert "confirmed" not in boss.open("/admin").text


def test_health_asks_the_facilitator_when_it_is_told_to(
    box: Place, bank: Bank, boss: Visit
) -> None:
    assert "settles payments" not in boss.open("/admin/health").text
    page = boss.press("/admin/health", "Check now")
    assert "Base" in page.text and "the facilitator settles payments there" in page.text


def test_what_is_undecided_is_found_by_its_index(box: Place) -> None:
    """It is looked for every few seconds, and payments are kept for ever."""
    plans = []

    class Spy:
        def __init__(self, tx: Any) -> None:
            self._tx = tx

        def __getattr__(self, name: str) -> Any:
            def ask(sql: str, params: dict[str, Any] | None = None) -> Any:
                plan = self._tx.rows(f"EXPLAIN QUERY PLAN {sql}", params or {})
                plans.append(" ".join(str(row[3]) for row in plan))
                return getattr(self._tx, name)(sql, params or {})

            return ask

    def work(tx: Any) -> None:
        records.settling(Spy(tx))  # type: ignore[arg-type]
        records.due(Spy(tx), 0, 5)  # type: ignore[arg-type]
        records.make_due(Spy(tx), None, clock.now_ms())  # type: ignore[arg-type]
        records.unconfirmed(Spy(tx))  # type: ignore[arg-type]

    box.write(work)
    assert len(plans) == 4 and all("payment_undecided" in plan for plan in plans), plans


# How one pays.


def run_program(
    text: str, wallet_key: str, monkeypatch: pytest.MonkeyPatch, **environment: str
) -> list[str]:
    """What a pasted program prints."""
    printed: list[str] = []
    for name, value in {"WALLET_KEY": wallet_key, **environment}.items():
        monkeypatch.setitem(os.environ, name, value)

    def say(*words: object) -> None:
        printed.append(" ".join(map(str, words)))

    scope = {"__builtins__": vars(builtins) | {"print": say}}
    # In a thread of its own, because the one of the tests may have a browser's event loop.
    with ThreadPoolExecutor(1) as aside:
        aside.submit(exec, compile(text, "program.py", "exec"), scope).result(60)
    return printed


def test_billing_says_how_a_program_buys_credits(
    box: Place, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, wallet = visitor(box), EvmWallet()
    key = box.key(account_of(box, me.email))[0]
    page = me.open("/dashboard/billing")
    assert "10 to 100,000 at a time, at 0.01 USDC each, on Base." in page.text
    status, told = run(box, page.taken("buying-asks"), key)
    assert (status, told["error"]) == (402, "payment_required")
    assert told["accepts"][0]["amount"] == "1000000"
    assert page.taken("buying-needs") == "pip install 'x402[requests,evm]'"
    printed = run_program(
        page.taken("buying-pays"), wallet.account.key.hex(), monkeypatch, FAREBOX_API_KEY=key
    )
    assert printed == ['200 {"success": true, "creditsAdded": 100, "credits": 100}\n']
    assert "Wallet" not in " ".join(page.buttons())  # no button does nothing


def test_a_browser_is_told_what_a_call_costs_and_a_program_that_pays(
    box: Place, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f'{ECHO}?q="a"&b=<b>%27'
    answer = box.get(target, Accept="text/html,*/*;q=0.8")
    page = Page(answer)
    assert (page.status, page.h1) == (402, "This costs 2.50 USDC")
    assert page.tiles() == {"On Base": f"2.50 USDC to {PAY_TO}"}
    assert "It costs 250 credits." in page.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-store"
    assert decode(answer.headers["PAYMENT-REQUIRED"])["accepts"][0]["amount"] == "2500000"
    links = [node.get(name) for node in page.root.walk() for name in ("href", "src")]
    assert [link for link in links if link and not link.startswith(("/", "#"))] == []
    wallet = EvmWallet()
    printed = run_program(page.taken("pay-program"), wallet.account.key.hex(), monkeypatch)
    assert printed[0].startswith("200 {") and credits_of(box, wallet) == 0
    assert json.loads(printed[0][4:])["query"] == {"q": ['"a"'], "b": ["<b>'"]}
    key = box.payer(1000).key
    status, _ = run(box, page.taken("credits-curl"), key)
    assert status == 200


@pytest.mark.parametrize("path", [SMS, TOP_UP])
def test_a_post_is_paid_by_the_program_of_its_page(
    box: Place, bank: Bank, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    answer = box.post(path, None, {"to": "+18148835337", "message": "hi"} if path == SMS else {},
                      Accept="text/html")  # fmt: skip
    page = Page(answer)
    assert page.h1 == ("This costs 0.01 USDC" if path == SMS else "This costs 1.00 USDC")
    printed = run_program(page.taken("pay-program"), EvmWallet().account.key.hex(), monkeypatch)
    assert printed[0].startswith('200 {"success": true'), printed


def test_who_sends_a_bad_payment_reads_why(box: Place, bank: Bank) -> None:
    asked = decode(box.get(ECHO).headers["PAYMENT-REQUIRED"])
    header = EvmWallet().header(asked, signed={"value": "1"})
    page = Page(box.get(ECHO, Accept="text/html", PAYMENT_SIGNATURE=header))
    assert page.h1 == "This payment was not taken" and "wrong_amount" in page.alert()
    assert "pay-program" in page.answer.body.decode()


def test_who_runs_out_of_credits_reads_what_else_pays(box: Place, bank: Bank) -> None:
    answer = box.get(ECHO, box.payer(1).key, Accept="text/html")
    page = Page(answer)
    assert (page.status, page.h1) == (402, "This costs 2.50 USDC")
    assert page.alert() == html.unescape(page.alert()) and "credits" in page.alert()


def test_programs_get_json_where_browsers_get_a_page(box: Place, bank: Bank) -> None:
    for accept in ("*/*", "application/json", "application/json, text/html;q=0.9", ""):
        answer = box.get(ECHO, Accept=accept)
        assert answer.headers["Content-Type"] == "application/json", accept
        assert answer.json()["error"] == "payment_required"


@pytest.mark.parametrize("number", [0, 1, 2], ids=["requests", "httpx", "top-up"])
def test_the_programs_of_the_document_pay(
    box: Place, bank: Bank, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    text = (ROOT / "docs" / "x402.md").read_text("utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(programs) == 3
    program = programs[number].replace("http://127.0.0.1:8402", box.url)
    key = box.key(account_of(box, newcomer(box)))[0]
    (printed,) = run_program(
        program, EvmWallet().account.key.hex(), monkeypatch, FAREBOX_API_KEY=key
    )
    assert printed.startswith('200 {"success": true'), printed
    if number == 2:
        assert printed.strip() in program  # the document says what comes


def test_the_offer_of_the_document_is_the_one_that_is_made(box: Place, bank: Bank) -> None:
    text = (ROOT / "docs" / "x402.md").read_text("utf-8")
    (curl,) = re.findall(r"^    (curl .*)$", text, re.M)
    done = subprocess.run(
        ["bash", "-c", curl.replace("http://127.0.0.1:8402", box.url)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.stdout.startswith("HTTP/1.1 402 ")
    told = json.loads(done.stdout.partition("\n\n")[2])
    shown = text.partition("HTTP/1.1 402")[2].partition("\n\nThe header")[0]
    assert set(re.findall(r'"(\w+)": ', shown)) == set(re.findall(r'"(\w+)": ', json.dumps(told)))
    assert told["accepts"][0]["amount"] == "10000" and '"amount": "10000"' in shown


def test_a_program_for_solana_imports_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from solders.keypair import Keypair

    text = examples.paying("http://127.0.0.1:1/x", "PUT", {"a": 1}, SOLANA, 5_000_001)
    assert examples.paying_install(SOLANA) == "pip install 'x402[requests,svm]'"
    assert '"max_amount_per_payment": "$6"' in text
    assert 'session.request("PUT", "http://127.0.0.1:1/x", json={"a": 1})' in text
    begin, _, _ = text.partition("with x402_requests")
    assert run_program(begin, str(Keypair()), monkeypatch) == []


def test_the_pasted_curl_is_one_a_shell_can_run(box: Place, bank: Bank) -> None:
    page = Page(box.get(f"{ECHO}?it%27s=1&x=$HOME", Accept="text/html"))
    text, key = page.taken("credits-curl"), box.payer(1000).key
    done = subprocess.run(
        ["bash", "-c", text], env={**os.environ, "FAREBOX_API_KEY": key}, capture_output=True,
        text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout)["query"] == {
        "it's": ["1"],
        "x": ["$HOME"],
    }


def test_settings_list_the_wallets_of_an_account(box: Place, bank: Bank) -> None:
    me, wallet = visitor(box), EvmWallet()
    assert "None yet." in me.open("/dashboard/settings").section("Wallets").text
    pay(box, wallet)
    box.run(
        "UPDATE wallet SET account_id = :account WHERE id = :id",
        account=account_of(box, me.email), id=name_of(wallet).lower(),
    )  # fmt: skip
    section = me.open("/dashboard/settings").section("Wallets")
    assert name_of(wallet) in section.text and len(section.all("button")) == 1


# How it looks.


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"width": WIDE}, id="desktop, light"),
        pytest.param({"width": NARROW, "scheme": "dark"}, id="phone, dark"),
    ],
)
def test_every_page_of_payments_can_be_read_and_reached_by_anybody(
    box: Place, bank: Bank, boss: Visit, open_screen: OpenScreen, kind: dict[str, object]
) -> None:
    wallet = EvmWallet()
    pay(box, wallet)
    payment_id = lost(box, bank, wallet)
    (account,) = box.row("SELECT account_id FROM wallet WHERE id = :w", w=name_of(wallet).lower())
    screen = open_screen(box, **kind)
    look(screen, ECHO, 402)
    page = screen.sign_in(boss.email)
    at = f"/admin/payments/{payment_id}"
    paths = ["/admin/payments", at]
    if screen.width == NARROW:
        paths += [f"{at}/settled", f"/admin/accounts/{account}", "/dashboard/billing/ledger"]
    for path in paths:
        look(screen, path)
    screen.open("/dashboard/billing")
    page.locator("#buying > summary").click()
    assert screen.sticking_out() == [] and screen.violations() == []
    screen.open(at)
    screen.tab_to("text=Look again now")
    with screen.leads():
        page.keyboard.press("Enter")
    assert page.locator(".done").all_inner_texts() == ["It is settled."]
