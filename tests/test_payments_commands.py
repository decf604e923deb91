"""What an operator asks and says of payments; doctor, backups, and databases from before them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import evm_chain
import pytest
from doubles import Exchange, Server, Upstream
from evm_chain import EvmChain
from payers import EvmWallet, SolanaWallet
from settler import Settler
from shop import PRICE, TOP_UP, TOP_UP_BODY, UNITS, Sale, Shop, config
from solana_node import SolanaNode
from test_migrations import Old, know, look
from test_reconciler import World, orphan, unknown

import models
from core import backup, ledger
from core.payments import chain, desk, facilitator

REAL = models.MIGRATIONS
NOWHERE = "http://127.0.0.1:9"
FIELDS = (
    "id", "network", "asset", "wallet", "pay_to", "amount", "credits", "purpose", "method", "path",
    "account_id", "call_id", "status", "reason", "transaction_id", "expires_at", "incarnation",
    "looks", "next_look_at", "created_at", "decided_at",
)  # fmt: skip


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(facilitator, "settle", made.settle)
    monkeypatch.setattr(chain, "look", made.look)
    monkeypatch.setattr(desk, "_CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr(desk, "_CONFIRM_EVERY_SECONDS", 0.0)
    return made


def toml(upstream: Upstream) -> str:
    return config(
        upstream,
        NOWHERE,
        {evm_chain.NETWORK: PAY_TO},
        {evm_chain.NETWORK: f"{NOWHERE}/secret-path"},
    )


PAY_TO = EvmWallet().address


@pytest.fixture
def shop(tmp_path: Path, upstream: Upstream) -> Iterator[Shop]:
    with Shop(tmp_path / "shop", toml(upstream), upstream) as made:
        yield made


def lines(shop: Shop, *words: str, code: int = 0) -> list[str]:
    """What a command prints."""
    done = shop.cli(*words)
    assert done.exit_code == code, done.output
    found: list[str] = done.output.splitlines()
    return found


def name(wallet: EvmWallet | SolanaWallet) -> str:
    return f"{wallet.network.partition(':')[0]}:{wallet.address}"


def paid(shop: Shop, wallet: EvmWallet | None = None, *where: Any) -> Sale:
    sale = Sale(shop, wallet or EvmWallet(), *where)
    assert sale.send().status == 200
    return sale


# list, show


def test_payments_are_listed_the_last_first(shop: Shop, world: World) -> None:
    assert lines(shop, "payments", "list") == []
    wallet = EvmWallet()
    settled = paid(shop, wallet)
    open_ = unknown(shop, world)
    world.says, world.moves = "refused", False
    refused = Sale(shop, EvmWallet())
    refused.send()
    listed = lines(shop, "payments", "list")
    assert [line.split()[0] for line in listed] == [
        sale.record.id for sale in (refused, open_, settled)
    ]
    last = listed[-1].split()
    assert last[2:] == [
        "settled", str(PRICE), name(wallet), evm_chain.NETWORK, settled.record.transaction_id,
    ]  # fmt: skip
    assert last[1].endswith("Z") and len(listed[1].split()) == 6  # no transaction
    for sale, status in ((settled, "settled"), (open_, "unknown"), (refused, "refused")):
        (line,) = lines(shop, "payments", "list", "--status", status)
        assert line.split()[0] == sale.record.id
    assert lines(shop, "payments", "list", "--status", "settling") == []
    assert shop.cli("payments", "list", "--status", "lost").exit_code == 2


def test_payments_of_somebody_are_listed_by_any_of_their_names(shop: Shop, world: World) -> None:
    wallet, payer = EvmWallet(), shop.payer(0)
    own, others = paid(shop, wallet), paid(shop)
    bearers = Sale(shop, wallet)
    assert bearers.send(Authorization=f"Bearer {payer.key}").status == 200
    account = str(own.shop.payments(wallet)[-1].account_id)
    assert account != payer.account
    for who in (name(wallet), name(wallet).lower(), account):
        (line,) = lines(shop, "payments", "list", who)
        assert line.startswith(shop.payments(wallet)[-1].id)
    for who in (payer.email, payer.account):
        (line,) = lines(shop, "payments", "list", who, "--status", "settled")
        assert line.startswith(shop.payments(wallet)[0].id)
    assert len(lines(shop, "payments", "list")) == 3 and others.record.account_id != account
    for who in (name(EvmWallet()), "acct_none", "nobody@example.com", "solana:none"):
        (line,) = lines(shop, "payments", "list", who, code=1)
        assert line.startswith("Error: ")


def test_very_many_payments_are_listed_to_the_last(shop: Shop, world: World) -> None:
    sale = paid(shop)
    record = sale.record
    columns = ", ".join(record._fields)
    copied = columns.replace("number", "number + n").replace("key", "key || n", 1)
    copied = copied.replace("id,", "id || n,", 1).replace("answer_key || n", "answer_key")
    copied = copied.replace("status", "'refused'").replace("account_id", "NULL")
    shop.run(
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 1200)"
        f" INSERT INTO payment ({columns}) SELECT {copied} FROM payment, c"
    )
    listed = lines(shop, "payments", "list")
    assert len(listed) == len(set(listed)) == 1201 and listed[-1].split()[0] == record.id
    assert len(lines(shop, "payments", "list", "--status", "refused")) == 1200
    shop.run("DELETE FROM payment WHERE status = 'refused'")


def test_one_payment_is_shown_with_all_that_is_known_of_it(shop: Shop, world: World) -> None:
    sale = paid(shop)
    shown = dict(line.split(None, 1) for line in lines(shop, "payments", "show", sale.record.id))
    assert tuple(sorted(shown)) == tuple(sorted(FIELDS))
    record = sale.record
    assert shown["wallet"] == name(sale.wallet) and shown["pay_to"] == PAY_TO
    assert (shown["amount"], shown["credits"]) == (str(UNITS), str(PRICE))
    assert (shown["status"], shown["reason"], shown["looks"]) == ("settled", "-", "0")
    assert (shown["method"], shown["path"], shown["purpose"]) == ("POST", sale.path, "call")
    assert shown["transaction_id"] == record.transaction_id
    assert shown["call_id"] == record.call_id and shown["account_id"] == record.account_id
    assert shown["decided_at"].endswith("Z") and shown["next_look_at"] == "-"
    open_ = unknown(shop, world)
    shown = dict(line.split(None, 1) for line in lines(shop, "payments", "show", open_.record.id))
    assert (shown["status"], shown["reason"]) == ("unknown", "as it was told")
    assert shown["next_look_at"].endswith("Z") and shown["account_id"] == "-"
    (line,) = lines(shop, "payments", "show", "pay_none", code=1)
    assert "pay_none" in line


def test_what_was_signed_is_never_printed_or_logged(
    shop: Shop, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    open_, settled = unknown(shop, world), paid(shop)
    world.sees = "silence"
    printed = "\n".join(
        shop.cli(*words).output
        for sale in (open_, settled)
        for words in (
            ("payments", "list"),
            ("payments", "show", sale.record.id),
            ("payments", "reconcile"),
            ("payments", "reconcile", sale.record.id),
            ("audit",),
            ("doctor",),
        )
    )
    assert open_.record.id in printed and settled.record.id in printed
    for sale in (open_, settled):
        for secret in (sale.signed["signature"][2:], sale.signed["authorization"]["nonce"][2:]):
            assert secret not in printed.replace(str(sale.record.transaction_id), "")
            assert secret not in caplog.text
    assert "secret-path" not in printed + caplog.text
    assert settled.record.proof is None and open_.record.proof is not None


# reconcile


def test_unknown_payments_are_found_out_now(shop: Shop, world: World) -> None:
    assert lines(shop, "payments", "reconcile") == []
    moved, open_, dead = unknown(shop, world, True), unknown(shop, world), unknown(shop, world)
    world.says, world.moves = "unknown", False
    world.dead.add(dead.signed["authorization"]["nonce"])
    found = lines(shop, "payments", "reconcile", code=1)
    assert found[-1] == "Error: 1 payments are still unknown"
    by_id = {line.split()[0]: line.split(None, 1)[1] for line in found[:-1]}
    assert by_id == {
        moved.record.id: f"settled {moved.record.transaction_id}",
        open_.record.id: "unknown as it was told",
        dead.record.id: "refused the network has not taken it, and will not",
    }
    world.be_well()
    (line,) = lines(shop, "payments", "reconcile")
    assert line.startswith(f"{open_.record.id} settled 0x")
    assert lines(shop, "payments", "reconcile") == []
    assert [shop.credits_of(sale.wallet) for sale in (moved, open_, dead)] == [PRICE, PRICE, None]


def test_one_payment_is_found_out_and_a_decided_one_is_told(shop: Shop, world: World) -> None:
    first, second = unknown(shop, world), unknown(shop, world)
    (line,) = lines(shop, "payments", "reconcile", first.record.id)
    assert line.startswith(f"{first.record.id} settled 0x")
    assert second.record.status == "unknown"
    told = lines(shop, "payments", "reconcile", first.record.id)
    assert told == [f"{first.record.id} settled {first.record.transaction_id}"]
    (line,) = lines(shop, "payments", "reconcile", "pay_none", code=1)
    assert line == "Error: There is no payment pay_none."
    orphan(shop, second.record.id, shop.instance.incarnation())
    told = lines(shop, "payments", "reconcile", second.record.id, code=1)
    assert told[0].startswith(f"{second.record.id} settling")
    orphan(shop, second.record.id)  # and now its worker is gone
    (line,) = lines(shop, "payments", "reconcile", second.record.id)
    assert line.startswith(f"{second.record.id} settled 0x")


def test_the_operator_says_how_a_payment_ended(shop: Shop, world: World) -> None:
    settled, refused = unknown(shop, world), unknown(shop, world)
    transaction = f"0x{'12' * 32}"
    told = lines(shop, "payments", "reconcile", settled.record.id, "--settled", transaction)
    assert told == [f"{settled.record.id} settled"]
    told = lines(shop, "payments", "reconcile", refused.record.id, "--refused")
    assert told == [f"{refused.record.id} refused"]
    assert world.asked == []
    assert (settled.record.status, settled.record.transaction_id) == ("settled", transaction)
    assert (refused.record.status, refused.record.reason) == ("refused", "the operator says so")
    assert shop.credits_of(settled.wallet) == PRICE and shop.credits_of(refused.wallet) is None
    noted = "\n".join(lines(shop, "audit"))
    for sale in (settled, refused):
        assert f"payment.{sale.record.status}" in noted and sale.record.id in noted
    assert transaction in noted
    for sale, option in (
        (settled, ("--settled", transaction)), (settled, ("--refused",)), (refused, ("--refused",)),
    ):  # fmt: skip
        (line,) = lines(shop, "payments", "reconcile", sale.record.id, *option, code=1)
        assert line == f"Error: The payment is {sale.record.status}."
    (line,) = lines(shop, "payments", "reconcile", "pay_none", "--refused", code=1)
    assert line == "Error: There is no payment pay_none."
    assert shop.deposits(settled.record.id) == 1
    # That it was refused was an opinion: the network showed otherwise.
    told = lines(shop, "payments", "reconcile", refused.record.id, "--settled", f"0x{'34' * 32}")
    assert told == [f"{refused.record.id} settled"]
    assert shop.deposits(refused.record.id) == 1 and shop.credits_of(refused.wallet) == PRICE
    assert refused.send().status == 200


HALF_WORDS: list[tuple[str, ...]] = [
    ("--refused",),
    ("--settled", "0x1"),
    ("PAYMENT", "--settled", "0x1", "--refused"),
    ("PAYMENT", "--settled", "", "--refused"),
    ("PAYMENT", "--settled", ""),
    ("PAYMENT", "--settled", "two words"),
    ("PAYMENT", "--settled", "x" * 129),
    ("PAYMENT", "--settled", "0x1\n"),
    ("PAYMENT", "--settled"),
    ("PAYMENT", "PAYMENT"),
]


def test_a_half_word_of_the_operator_is_none(shop: Shop, world: World) -> None:
    sale = unknown(shop, world)
    for words in HALF_WORDS:
        said = [sale.record.id if word == "PAYMENT" else word for word in words]
        assert shop.cli("payments", "reconcile", *said).exit_code == 2, words
    assert sale.record.status == "unknown" and world.asked == []


def test_without_the_section_nobody_can_be_asked_but_the_operator_can_say(
    tmp_path: Path, world: World, upstream: Upstream
) -> None:
    folder = tmp_path / "shop"
    with Shop(folder, toml(upstream), upstream) as shop:
        sale = unknown(shop, world)
    without = toml(upstream).partition("[x402]")[0].replace("x402 = true", "")
    with Shop(folder, without, upstream) as shop:
        sale.shop = shop
        (line,) = lines(shop, "payments", "reconcile", code=1)
        assert "[x402]" in line
        assert len(lines(shop, "payments", "list")) == 1
        lines(shop, "payments", "reconcile", sale.record.id, "--settled", "0x1")
        assert lines(shop, "credits", "balance", name(sale.wallet)) == [str(PRICE)]


# WHO


@pytest.mark.parametrize("written", [str, str.lower], ids=["as people write it", "in lower case"])
def test_a_wallet_names_its_account_in_every_command(
    shop: Shop, world: World, written: Any
) -> None:
    sale = paid(shop, None, TOP_UP, TOP_UP_BODY)
    account, who = str(sale.record.account_id), written(name(sale.wallet))
    assert lines(shop, "credits", "balance", who) == ["20"]
    lines(shop, "credits", "grant", who, "5")
    lines(shop, "credits", "adjust", who, "-3", "--note", "n")
    assert lines(shop, "credits", "balance", who) == ["22"]
    (key,) = lines(shop, "keys", "add", who, "--name", "robot")
    (listed,) = lines(shop, "keys", "list", who)
    assert account in listed and "robot" in listed
    answer = shop.get("/api/v1/account", key)
    assert (answer.json()["account"], answer.json()["credits"]) == (account, 22)
    (payment,) = lines(shop, "payments", "list", who)
    assert payment.startswith(sale.record.id)
    settles = len(world.asked)
    lines(shop, "accounts", "suspend", who, "--reason", "why")
    other = Sale(shop, sale.wallet)
    refused = other.send()
    assert (refused.status, refused.code) == (403, "account_suspended")
    assert len(world.asked) == settles
    lines(shop, "accounts", "resume", who)
    assert other.send().status == 200
    (line,) = lines(shop, "tokens", "mint", who, code=1)
    assert line.startswith("Error: ")  # a wallet's account has no person
    lines(shop, "accounts", "close", who)
    assert lines(shop, "credits", "balance", who) == ["22"]


def test_case_is_part_of_a_wallets_name_on_solana(shop: Shop) -> None:
    with SolanaNode() as node:
        wallet = SolanaWallet(node)
    shop.write(lambda tx: _open(tx, name(wallet)))
    assert lines(shop, "credits", "balance", name(wallet)) == ["0"]
    for other in (name(wallet).lower(), name(wallet).upper(), f"solana: {wallet.address}"):
        assert shop.cli("credits", "balance", other).exit_code == 1


def _open(tx: Any, wallet: str) -> None:
    account = ledger.open_account(tx, 0)
    tx.run(
        "INSERT INTO wallet (id, name, account_id, created_at) VALUES (:w, :w, :a, 0)",
        {"w": wallet, "a": account},
    )


# doctor


@pytest.fixture(scope="module")
def evm() -> Iterator[EvmChain]:
    with EvmChain() as node:
        yield node


class Nobody(Server):
    """Answers everything with the same."""

    status, body = 200, b"{}"

    def respond(self, exchange: Exchange) -> None:
        exchange.answer(self.status, self.body)


def told(tmp_path: Path, upstream: Upstream, url: str, rpc: str | None, code: int) -> list[str]:
    """What doctor says of payments."""
    rpcs = {} if rpc is None else {evm_chain.NETWORK: rpc}
    text = config(upstream, url, {evm_chain.NETWORK: PAY_TO}, rpcs)
    with Shop(tmp_path / "shop", text, upstream) as shop:
        found = lines(shop, "doctor", code=code)
    return [line for line in found if "facilitator" in line or "rpc" in line]


def test_doctor_asks_the_facilitator_and_the_node(
    tmp_path: Path, upstream: Upstream, evm: EvmChain
) -> None:
    with Settler() as settler:
        found = told(tmp_path, upstream, settler.url, f"{evm.url}/path-of-a-secret", 0)
    network = evm_chain.NETWORK
    assert found == [
        f"ok    facilitator of {network}: settles payments", f"ok    rpc of {network}: reachable",
    ]  # fmt: skip
    assert "eth_chainId" in evm.calls


def test_doctor_says_what_is_lost_without_a_node(tmp_path: Path, upstream: Upstream) -> None:
    with Settler() as settler:
        found = told(tmp_path, upstream, settler.url, None, 0)
    assert found[1].startswith("warn  rpc of eip155:8453: none") and "unconfirmed" in found[1]


@pytest.mark.parametrize("fault", ["down", "status", "text", "shape", "kinds", "other network"])
def test_doctor_says_what_is_wrong_with_a_facilitator(
    tmp_path: Path, upstream: Upstream, fault: str
) -> None:
    kind = {"x402Version": 2, "scheme": "exact", "network": "eip155:1"}
    with Nobody() as nobody, contextlib.ExitStack():
        url = NOWHERE if fault == "down" else nobody.url
        nobody.status = 503 if fault == "status" else 200
        nobody.body = {
            "text": b"<html>", "shape": b'{"kinds": {}}', "kinds": b'{"kinds": []}',
            "status": b'{"kinds": []}', "other network": json.dumps({"kinds": [kind]}).encode(),
        }.get(fault, b"")  # fmt: skip
        found = told(tmp_path, upstream, url, None, 1)
    assert found[0].startswith("bad   facilitator of eip155:8453: ")
    words = {"status": "503", "kinds": "does not settle", "other network": "does not settle",
             "text": "cannot be read", "shape": "cannot be read"}  # fmt: skip
    assert words.get(fault, "") in found[0]


@pytest.mark.parametrize("fault", ["down", "no node", "other network", "error"])
def test_doctor_says_what_is_wrong_with_a_node(
    tmp_path: Path, upstream: Upstream, fault: str
) -> None:
    with Settler() as settler, Nobody() as nobody:
        nobody.body = {
            "other network": b'{"result": "0x14a34"}', "error": b'{"error": {"message": "no"}}',
        }.get(fault, b"<html>")  # fmt: skip
        url = f"{NOWHERE if fault == 'down' else nobody.url}/path-of-a-secret"
        found = told(tmp_path, upstream, settler.url, url, 1)
    assert found[1].startswith("bad   rpc of eip155:8453: ")
    assert "secret" not in found[1]
    assert ("another network" in found[1]) == (fault == "other network")


def test_doctor_asks_a_node_of_solana_which_network_it_is_of(
    tmp_path: Path, upstream: Upstream
) -> None:
    devnet = "solana:EtWTRABZaYq6iMfeYKouRu166VU2xqa1"
    with Settler() as settler, SolanaNode() as node:
        payee = SolanaWallet(node).address
        text = config(
            upstream,
            settler.url,
            {node.network: payee, devnet: payee},
            {node.network: node.url, devnet: node.url},
        )
        with Shop(tmp_path / "shop", text, upstream) as shop:
            found = lines(shop, "doctor", code=1)
    assert f"ok    rpc of {node.network}: reachable" in found
    assert f"bad   rpc of {devnet}: it is a node of another network" in found


# Backups, and databases from before there were payments.


def test_payments_go_through_a_backup(tmp_path: Path, world: World, upstream: Upstream) -> None:
    with Shop(tmp_path / "shop", toml(upstream), upstream) as shop:
        settled, open_, flying = paid(shop), unknown(shop, world, True), unknown(shop, world)
        orphan(shop, flying.record.id, shop.instance.incarnation())
        backup.backup(shop.db, shop.settings, tmp_path / "saved.tar")
        served = settled.served
        late = paid(shop)
    assert backup.restore(tmp_path / "restored", tmp_path / "saved.tar") is None
    with Shop(tmp_path / "restored", "", upstream) as shop:
        sales = (settled, open_, flying)
        for sale in (*sales, late):
            sale.shop = shop
        assert shop.payments(late.wallet) == []
        before = [sale.record for sale in sales]
        assert [record.status for record in before] == ["settled", "unknown", "settling"]
        assert settled.send().headers["Idempotent-Replayed"] == "true"
        assert settled.served == served
        # Its worker is that of another folder, and there are no workers here.
        assert len(lines(shop, "payments", "reconcile")) == 2
        assert [sale.record.status for sale in sales] == ["settled"] * 3
        for sale in (open_, flying):
            assert sale.send().status == 200 and shop.credits_of(sale.wallet) == 0
        assert lines(shop, "ledger", "verify")[0].startswith("ok")


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Old]:
    """An instance folder from before payments, with something of everything in its database."""
    know(monkeypatch, tmp_path / "steps", 1)
    made = Old(tmp_path / "old")
    know(monkeypatch, tmp_path / "steps", 3)
    made.db.migrate()
    yield made
    made.close()


def test_a_database_from_before_payments_takes_them(
    third: Old, monkeypatch: pytest.MonkeyPatch, world: World, upstream: Upstream
) -> None:
    before = look(third.path)
    assert before.version == 3 and "payment" not in before.rows and before.rows["entry"]
    monkeypatch.setattr(models, "MIGRATIONS", REAL)
    third.db.migrate()
    after = look(third.path)
    assert after.version == models.latest_schema()
    assert (after.integrity, after.astray) == ("ok", [])
    assert before.rows.items() <= after.rows.items() and after.rows["payment"] == []
    assert after.rows["wallet"] == []
    assert set(before.schema) <= set(after.schema)
    with Shop(third.folder, toml(upstream), upstream) as shop:
        sale = paid(shop)
        assert shop.credits_of(sale.wallet) == 0
        held, key = Sale(shop, EvmWallet()), third.keys["key_s"].token
        assert held.send(Authorization=f"Bearer {key}").status == 200
        assert shop.payments(held.wallet) == []  # who has credits spends them


def test_a_backup_from_before_payments_is_sound(
    third: Old, tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with third.db.snapshot() as tx:
        assert ledger.verify(tx)[1] == []
    monkeypatch.setattr(models, "MIGRATIONS", REAL)
    third.db.migrate()
    (copy,) = third.folder.glob("farebox.db.before-0004")
    assert look(copy).version == 3


WRONG = {
    "settled for nobody": "UPDATE payment SET account_id = NULL",
    "a status nobody knows": "UPDATE payment SET status = 'lost'",
    "nothing": "UPDATE payment SET amount = 0",
    "no credits": "UPDATE payment SET credits = 0",
    "another purpose": "UPDATE payment SET purpose = 'gift'",
    "an account that is not there": "UPDATE payment SET account_id = 'acct_none'",
    "a wallet of no account": "UPDATE wallet SET account_id = 'acct_none'",
    "one key twice": "INSERT INTO payment SELECT 'pay_2', 2, key, network, asset, wallet,"
    " wallet_name, pay_to, amount, credits, purpose, method, path, fingerprint, print, account_id,"
    " answer_key, call_id, status, reason, transaction_id, proof, expires_at, incarnation, claim,"
    " looks, next_look_at, created_at, decided_at FROM payment",
}


def test_what_cannot_be_true_of_a_payment_cannot_be_written(shop: Shop, world: World) -> None:
    sale = paid(shop)
    record = sale.record
    for statement in WRONG.values():
        with pytest.raises(apsw.ConstraintError):
            shop.run(statement)
    assert sale.record == record


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE payment SET status = 'refused'",
        "UPDATE payment SET credits = credits + 1",
        "UPDATE payment SET account_id = 'acct_operator'",
        "DELETE FROM payment",
    ],
)
def test_the_books_do_not_add_up_when_a_payment_and_its_credits_differ(
    shop: Shop, world: World, change: str
) -> None:
    paid(shop)
    assert shop.faults() == []
    kept = shop.db.rows("SELECT * FROM payment")
    shop.run(change)
    assert shop.faults() and shop.cli("ledger", "verify").exit_code == 1
    shop.run("DELETE FROM payment")
    marks = ", ".join("?" * len(kept[0]))
    shop.write(lambda tx: tx.run(f"INSERT INTO payment VALUES ({marks})", kept[0]))
