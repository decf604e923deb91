"""What became of payments nobody heard the end of is found out by one at a time, and counts once.

The networks and the facilitator are a `World` here, put where the application asks them: each
payment has moved its money or has not, and what is said of it is what a test wants said.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import apsw
import evm_chain
import hypothesis.strategies as st
import pytest
from doubles import Upstream
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from inprocess import Background, Clock
from payers import EvmWallet, decode
from server import until
from shop import PRICE, TOP_UP, TOP_UP_BODY, Sale, Shop, config

import models
from config import Network
from core import access, clock, incarnation, tokens, upkeep
from core.audit import COMMAND_LINE
from core.errors import Refusal
from core.payments import chain, claims, desk, facilitator, reconciler, records
from core.payments.chain import Finding, Silent
from core.payments.facilitator import Verdict
from core.payments.records import Record

Outcome = Literal["settled", "refused", "unheard", "unknown"]
DEAD = tokens.new_id("inc")


class World:
    """Where money moves. `says` is what the facilitator answers, `moves` whether it settles first;
    `sees` is what the node makes of the truth."""

    def __init__(self) -> None:
        self.moved: dict[str, str] = {}  # transactions by nonce
        self.dead: set[str] = set()  # nonces that cannot be used any more
        self.asked: list[str] = []
        self.says: Outcome = "settled"
        self.moves = True
        self.sees: Literal["truth", "nothing", "silence"] = "truth"
        self.meanwhile: Callable[[], object] | None = None

    def settle(
        self, network: Network, signed: dict[str, Any], requirement: Any, resource: str,
        first: bool = False,
    ) -> Verdict:  # fmt: skip
        nonce = signed["authorization"]["nonce"]
        self.asked.append(nonce)
        if self.moves and nonce not in self.dead:
            self.move(nonce)
        if self.meanwhile is not None:
            self.meanwhile()
        if self.says == "settled" and nonce not in self.moved:
            return Verdict("unknown", None, "it could not be settled")
        transaction = self.moved.get(nonce) if self.says == "settled" else None
        return Verdict(self.says, transaction, "as it was told")

    def look(self, network: Network, record: Record) -> Finding:
        nonce = record.signed["authorization"]["nonce"]
        if self.sees == "silence":
            raise Silent("nobody is there")
        if self.sees == "nothing":
            return Finding("open")
        if nonce in self.moved:
            return Finding("settled", self.moved[nonce])
        return Finding("never" if nonce in self.dead else "open")

    def move(self, nonce: str) -> None:
        self.moved.setdefault(nonce, f"0x{nonce[2:][::-1]}")

    def be_well(self) -> None:
        self.says, self.moves, self.sees, self.meanwhile = "settled", True, "truth", None


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(facilitator, "settle", made.settle)
    monkeypatch.setattr(chain, "look", made.look)
    monkeypatch.setattr(desk, "_CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr(desk, "_CONFIRM_EVERY_SECONDS", 0.0)
    return made


PAY_TO = EvmWallet().address


def toml(upstream: Upstream, rpc: bool = True, pay_to: str = PAY_TO) -> str:
    nowhere = "http://127.0.0.1:9"
    nodes = {evm_chain.NETWORK: nowhere} if rpc else {}
    return config(upstream, nowhere, {evm_chain.NETWORK: pay_to}, nodes)


@pytest.fixture(scope="module")
def shops(
    tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream
) -> Iterator[dict[str, Shop]]:
    folder = tmp_path_factory.mktemp("shops")
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                Shop(folder / name, toml(upstream_server, name == "rpc"), upstream_server)
            )
            for name in ("rpc", "blind")
        }


@pytest.fixture
def shop(shops: dict[str, Shop]) -> Iterator[Shop]:
    found = shops["rpc"]
    yield found
    assert found.faults() == []
    # What a test left open is none of the next one's.
    found.run("UPDATE payment SET next_look_at = 9000000000000000 WHERE status = 'unknown'")


def unknown(shop: Shop, world: World, moved: bool = False, *where: Any) -> Sale:
    """A payment whose end nobody heard."""
    end = str(clock.now_ms() // 1000 + 60)
    sale = Sale(shop, EvmWallet(), *where, signed={"validBefore": end})
    world.says, world.moves, world.sees = "unknown", moved, "nothing"
    answer = sale.send()
    assert (answer.status, answer.code) == (503, "payment_unconfirmed")
    world.be_well()
    world.asked.clear()
    return sale


def nonce_of(sale: Sale) -> str:
    return str(sale.signed["authorization"]["nonce"])


def orphan(shop: Shop, payment_id: str, worker: str = DEAD) -> None:
    """The payment is as if its worker had been killed while it settled."""
    changed = shop.run(
        "UPDATE payment SET status = 'settling', incarnation = :worker, next_look_at = NULL,"
        " looks = 0, reason = NULL, transaction_id = NULL WHERE id = :id",
        id=payment_id,
        worker=worker,
    )
    assert changed == 1


# When it is looked for.


def test_it_is_looked_for_soon_and_then_ever_later(
    shop: Shop, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Clock(monkeypatch, "2030-01-01T00:00:00Z")
    sale = unknown(shop, world)
    world.says, world.moves, world.sees = "unknown", False, "silence"
    waited = []
    for looks in range(1, 13):
        record = sale.record
        assert record.looks == looks and record.next_look_at is not None
        waited.append((record.next_look_at - time.now) // 1000)
        time.forward(ms=record.next_look_at - time.now - 1)
        reconciler.reconcile(shop.instance)
        assert sale.record == record, "it is not due yet"
        time.forward(ms=1)
        reconciler.reconcile(shop.instance)
    assert waited == [2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600]
    assert world.asked == [], "where the node is silent nothing is tried"
    world.be_well()
    time.forward(seconds=600)
    reconciler.reconcile(shop.instance)
    assert sale.record.status == "unknown" and world.asked == [], "its time is over by our clock"
    world.move(nonce_of(sale))
    time.forward(seconds=600)
    reconciler.reconcile(shop.instance)
    assert sale.record.status == "settled" and sale.record.next_look_at is None
    time.forward(days=1)
    reconciler.reconcile(shop.instance)
    assert world.asked == [] and shop.deposits(sale.record.id) == 1


def test_a_round_takes_a_few_and_the_next_the_others(shop: Shop, world: World) -> None:
    sales = [unknown(shop, world, True) for _ in range(reconciler.AT_ONCE + 3)]
    shop.run("UPDATE payment SET next_look_at = 0 WHERE status = 'unknown'"
             " AND next_look_at < 9000000000000000")  # fmt: skip
    for left in (3, 0):
        reconciler.reconcile(shop.instance)
        assert sum(sale.record.status == "unknown" for sale in sales) == left
    assert [shop.credits_of(sale.wallet) for sale in sales] == [PRICE] * len(sales)


def test_twenty_who_look_at_once_ask_once(shop: Shop, world: World) -> None:
    sale = unknown(shop, world)
    payment_id = sale.record.id
    shop.run("UPDATE payment SET next_look_at = 0 WHERE id = :id", id=payment_id)
    go = threading.Barrier(20)
    found: list[Verdict | None] = []

    def look() -> None:
        go.wait(10)
        found.append(reconciler.look_for(shop.instance, payment_id))

    threads = [threading.Thread(target=look) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 20
    (verdict,) = [each for each in found if each is not None]
    assert verdict.outcome == "settled" and world.asked == [nonce_of(sale)]
    assert shop.deposits(payment_id) == 1 and shop.credits_of(sale.wallet) == PRICE


def test_a_payment_that_somebody_looks_for_is_left_to_them_until_they_seem_lost(
    shop: Shop, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Clock(monkeypatch, "2031-01-01T00:00:00Z")
    sale = unknown(shop, world, True)
    time.forward(seconds=10)
    now = time.now
    taken = shop.write(lambda tx: records.take(tx, sale.record.id, now, now + reconciler._LEASE_MS))
    assert taken is not None
    time.forward(seconds=179)
    reconciler.reconcile(shop.instance)
    assert sale.record.status == "unknown"
    time.forward(seconds=1)
    reconciler.reconcile(shop.instance)
    assert sale.record.status == "settled"
    # Whoever seemed lost comes back, with the same news or with older ones.
    assert reconciler.decide(shop.instance, taken, Verdict("settled", "0x1")) is False
    assert reconciler.decide(shop.instance, taken, Verdict("unknown", None, "late")) is False
    assert reconciler.decide(shop.instance, taken, Verdict("refused", None, "late")) is False
    assert sale.record.status == "settled" and sale.record.reason is None
    assert shop.deposits(sale.record.id) == 1 and shop.credits_of(sale.wallet) == PRICE


def test_one_that_cannot_be_looked_for_keeps_none_of_the_others(shop: Shop, world: World) -> None:
    broken, sound = unknown(shop, world, True), unknown(shop, world, True)
    shop.run("UPDATE payment SET proof = '{}' WHERE id = :id", id=broken.record.id)
    shop.run("UPDATE payment SET next_look_at = 0 WHERE id IN (:a, :b)",
             a=broken.record.id, b=sound.record.id)  # fmt: skip
    reconciler.reconcile(shop.instance)
    assert (broken.record.status, sound.record.status) == ("unknown", "settled")
    assert "our own fault" in str(broken.record.reason)


def test_a_database_in_trouble_loses_nothing_of_what_was_found_out(
    shop: Shop, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale = unknown(shop, world, True)
    real = models.Tx.run

    def full(tx: models.Tx, sql: str, params: Any = None) -> int:
        if sql.startswith("INSERT INTO entry"):
            raise apsw.FullError("database or disk is full")
        return real(tx, sql, params)

    with monkeypatch.context() as patch:
        patch.setattr(models.Tx, "run", full)
        with pytest.raises(Refusal):
            shop.look(sale.record.id)
    assert sale.record.status == "unknown" and shop.credits_of(sale.wallet) is None
    (verdict,) = shop.look(sale.record.id)
    assert verdict.outcome == "settled" and shop.credits_of(sale.wallet) == PRICE


# Whose worker is gone.


def test_what_a_dead_worker_was_settling_is_found_out(shop: Shop, world: World) -> None:
    moved, open_ = unknown(shop, world, True), unknown(shop, world)
    gone = unknown(shop, world, True, TOP_UP, TOP_UP_BODY)
    alive = unknown(shop, world, True)
    for sale in (moved, open_, gone):
        orphan(shop, sale.record.id)
    orphan(shop, alive.record.id, shop.instance.incarnation())
    assert reconciler.find_orphans(shop.instance) == 3
    assert [sale.record.status for sale in (moved, open_, gone, alive)] == [
        "unknown", "unknown", "unknown", "settling",
    ]  # fmt: skip
    assert moved.record.reason == "its worker is gone"
    for sale in (moved, open_, gone):
        (verdict,) = shop.look(sale.record.id)
        assert verdict.outcome == "settled" and shop.deposits(sale.record.id) == 1
    assert shop.look(alive.record.id) == []
    assert alive.send().code == "payment_in_progress"
    again = gone.send()
    assert (again.status, again.json()["creditsAdded"]) == (200, 20)
    for sale in (moved, open_):
        assert sale.send().status == sale.send().status == 200
        assert sale.served == 1 and shop.credits_of(sale.wallet) == 0
    orphan(shop, alive.record.id)


def test_the_key_of_a_payment_that_was_cut_down_is_free_again(shop: Shop, world: World) -> None:
    wallet = EvmWallet()
    first, second = (Sale(shop, wallet, TOP_UP, TOP_UP_BODY) for _ in range(2))
    held: list[Any] = []

    def meanwhile() -> None:
        world.meanwhile = None
        held.append(second.send(Idempotency_Key="cut"))

    world.meanwhile, world.says, world.sees = meanwhile, "unknown", "nothing"
    assert first.send(Idempotency_Key="cut").code == "payment_unconfirmed"
    assert (held[0].status, held[0].code) == (409, "idempotency_in_progress")
    world.be_well()
    orphan(shop, first.record.id)
    assert second.send(Idempotency_Key="cut").code == "idempotency_in_progress"
    reconciler.find_orphans(shop.instance)
    for again in (first, second):  # nobody pays a second time for what may be paid
        answer = again.send(Idempotency_Key="cut")
        assert answer.code == "payment_unconfirmed"
        assert answer.json()["payment"] == first.record.id
    assert len(shop.payments(wallet)) == 1
    shop.look(first.record.id)
    assert first.send(Idempotency_Key="cut").headers["Idempotent-Replayed"] == "true"
    assert second.send(Idempotency_Key="cut").headers["Idempotent-Replayed"] == "true"
    assert shop.credits_of(wallet) == 20 and len(shop.payments(wallet)) == 1


def test_no_second_payment_is_taken_under_a_key_whose_account_was_opened_a_moment_ago(
    shop: Shop, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wallet = EvmWallet()
    first, second = (Sale(shop, wallet, TOP_UP, TOP_UP_BODY) for _ in range(2))
    real = access.by_wallet
    whose = claims.Wallet.of("eip155", wallet.address)
    before = [real(shop.instance, whose, "127.0.0.1", True)]
    assert first.send(Idempotency_Key="moment").status == 200
    with monkeypatch.context() as patch:
        patch.setattr(access, "by_wallet", lambda *_: before[0])
        answer = second.send(Idempotency_Key="moment")
    assert answer.headers["Idempotent-Replayed"] == "true"
    assert second.send(Idempotency_Key="moment").headers["Idempotent-Replayed"] == "true"
    assert len(world.asked) == 1 and shop.credits_of(wallet) == 20


# Who is believed.


def test_without_a_node_the_facilitator_is_believed_when_it_says_yes_alone(
    shops: dict[str, Shop], world: World
) -> None:
    blind = shops["blind"]
    sale = unknown(blind, world, True)
    answers: tuple[Outcome, ...] = ("unknown", "refused", "unheard", "refused")
    for world.says in answers:
        (verdict,) = blind.look(sale.record.id)
        assert verdict.outcome == "unknown" and sale.record.status == "unknown"
        assert sale.send().code == "payment_unconfirmed"
    world.says = "settled"
    (verdict,) = blind.look(sale.record.id)
    assert verdict.outcome == "settled" and blind.credits_of(sale.wallet) == PRICE
    assert len(world.asked) == 5


def test_with_a_node_a_payment_is_over_when_the_network_says_so(shop: Shop, world: World) -> None:
    sale = unknown(shop, world)
    world.says, world.moves = "refused", False
    (verdict,) = shop.look(sale.record.id)
    assert verdict.outcome == "unknown", "that it is refused now does not tell what was before"
    world.dead.add(nonce_of(sale))
    (verdict,) = shop.look(sale.record.id)
    assert verdict.outcome == "refused" and sale.record.status == "refused"
    assert sale.record.proof is None and shop.credits_of(sale.wallet) is None


def test_a_network_that_left_the_config_is_looked_for_again_when_it_is_back(
    tmp_path: Path, world: World, upstream: Upstream
) -> None:
    folder = tmp_path / "shop"
    with Shop(folder, toml(upstream), upstream) as shop:
        sale = unknown(shop, world, True)
        payment_id, proof = sale.record.id, sale.record.proof
    others = {
        "another payee": toml(upstream, pay_to=EvmWallet().address),
        "another network": toml(upstream).replace(evm_chain.NETWORK, "eip155:84532"),
        "another token": toml(upstream)
        + f'asset = {{ "{evm_chain.NETWORK}" = "{EvmWallet().address}" }}\n',
    }
    for name, other in others.items():
        with Shop(folder, other, upstream) as shop:
            (verdict,) = shop.look(payment_id)
            assert verdict.outcome == "unknown" and "config" in verdict.reason, name
    assert world.asked == []
    without = toml(upstream).partition("[x402]")[0].replace("x402 = true", "")
    with Shop(folder, without, upstream) as shop:
        shop.write(lambda tx: reconciler.rule(tx, payment_id, Verdict("refused", None, "no"), 1,
                                              COMMAND_LINE))  # fmt: skip
        shop.run("UPDATE payment SET status = 'unknown', next_look_at = 0")
    with Shop(folder, toml(upstream), upstream) as shop:
        shop.run("UPDATE payment SET proof = :proof", proof=proof)
        (verdict,) = shop.look(payment_id)
        assert verdict.outcome == "settled"
        sale.shop = shop
        assert sale.send().status == 200


# The operator's word.


def test_the_operator_says_how_it_ended_and_the_books_say_that_they_did(
    shop: Shop, world: World
) -> None:
    settled, refused = unknown(shop, world, True), unknown(shop, world)
    for sale, verdict in (
        (settled, Verdict("settled", "0xseen")),
        (refused, Verdict("refused", None, "the operator says so")),
    ):
        reconciler.overrule(shop.instance, sale.record.id, verdict, COMMAND_LINE)
        action, account = shop.row(
            "SELECT action, account_id FROM audit WHERE subject = :id", id=sale.record.id
        )
        assert (action, account) == (f"payment.{verdict.outcome}", sale.record.account_id)
        assert sale.record.status == verdict.outcome and sale.record.proof is None
        with pytest.raises(Refusal) as error:
            reconciler.overrule(shop.instance, sale.record.id, verdict, COMMAND_LINE)
        assert error.value.code == "conflict"
    assert settled.record.transaction_id == "0xseen" and world.asked == []
    answer = settled.send()
    assert answer.status == 200
    assert decode(answer.headers["PAYMENT-RESPONSE"])["transaction"] == "0xseen"
    assert settled.served == 1 and shop.credits_of(settled.wallet) == 0
    # Refused by mistake: it can be shown again, and is then found on the network.
    world.move(nonce_of(refused))
    assert refused.send().status == 200
    assert shop.deposits(refused.record.id) == 1 and shop.credits_of(refused.wallet) == 0


def test_the_operator_decides_nothing_that_is_decided_or_on_its_way(
    shop: Shop, world: World
) -> None:
    verdict = Verdict("settled", "0x1")
    with pytest.raises(Refusal) as error:
        reconciler.overrule(shop.instance, "pay_none", verdict, COMMAND_LINE)
    assert error.value.code == "not_found"
    sale = Sale(shop, EvmWallet())
    found: list[str] = []

    def meanwhile() -> None:
        with pytest.raises(Refusal) as error:
            reconciler.overrule(shop.instance, sale.record.id, verdict, COMMAND_LINE)
        found.append(error.value.code)

    world.meanwhile = meanwhile
    assert sale.send().status == 200
    assert found == ["conflict"] and shop.deposits(sale.record.id) == 1


def test_what_the_operator_says_while_it_is_looked_for_counts_once(
    shop: Shop, world: World
) -> None:
    sale = unknown(shop, world)
    payment_id = sale.record.id

    def meanwhile() -> None:
        reconciler.overrule(shop.instance, payment_id, Verdict("settled", "0x1"), COMMAND_LINE)

    world.meanwhile = meanwhile
    shop.look(payment_id)
    assert shop.deposits(payment_id) == 1 and sale.record.transaction_id == "0x1"
    assert shop.credits_of(sale.wallet) == PRICE


def test_whoever_comes_late_says_nothing_of_a_claim_that_came_after(
    shop: Shop, world: World
) -> None:
    """Refused by the operator's mistake, shown again, and while it is settled anew somebody comes
    back who looked for it before."""
    for late in (
        Verdict("settled", "0xlate"),
        Verdict("refused", None, "late"),
        Verdict("unknown", None, "late"),
    ):
        sale = unknown(shop, world)
        before = sale.record
        refused = Verdict("refused", None, "the operator says so")
        reconciler.overrule(shop.instance, before.id, refused, COMMAND_LINE)

        def meanwhile(sale: Sale = sale, before: Record = before, late: Verdict = late) -> None:
            world.meanwhile = None
            assert reconciler.decide(shop.instance, before, late) is False
            assert sale.record.status == "settling" and sale.record.id == before.id

        world.meanwhile = meanwhile
        assert sale.send().status == 200
        assert world.meanwhile is None and sale.record.transaction_id != "0xlate"
        assert shop.deposits(before.id) == 1 and shop.credits_of(sale.wallet) == 0


def test_a_settlement_that_is_broken_off_in_its_midst_is_looked_for(
    shop: Shop, world: World
) -> None:
    def break_off() -> None:
        raise MemoryError

    sale = Sale(shop, EvmWallet())
    world.meanwhile = break_off
    answer = sale.send()
    assert (answer.status, answer.code) == (500, "internal_error")
    assert (sale.record.status, sale.record.reason) == ("unknown", "it was broken off")
    world.be_well()
    assert sale.send().code == "payment_unconfirmed"
    shop.look(sale.record.id)
    assert sale.send().status == 200 and shop.deposits(sale.record.id) == 1


def test_whoever_buries_a_dead_worker_late_lets_the_living_be(shop: Shop, world: World) -> None:
    sale = unknown(shop, world)
    orphan(shop, sale.record.id)
    stale = sale.record
    reconciler.find_orphans(shop.instance)
    refused = Verdict("refused", None, "the operator says so")
    reconciler.overrule(shop.instance, stale.id, refused, COMMAND_LINE)

    def meanwhile() -> None:
        world.meanwhile = None
        shop.write(lambda tx: records.lose_sight(tx, stale, None, "late", clock.now_ms()))
        assert sale.record.status == "settling"

    world.meanwhile = meanwhile
    assert sale.send().status == 200
    assert world.meanwhile is None and shop.deposits(stale.id) == 1


def test_a_worker_that_was_taken_for_dead_enters_what_it_settled(shop: Shop, world: World) -> None:
    for purpose in ((), (TOP_UP, TOP_UP_BODY)):
        sale = Sale(shop, EvmWallet(), *purpose)

        def meanwhile(sale: Sale = sale) -> None:
            world.meanwhile = None
            shop.run("UPDATE payment SET status = 'unknown', next_look_at = 9000000000000000"
                     " WHERE id = :id", id=sale.record.id)  # fmt: skip

        world.meanwhile = meanwhile
        assert sale.send().status == 200
        assert shop.deposits(sale.record.id) == 1 and sale.record.status == "settled"


# What is known for how long.


def test_what_was_refused_is_forgotten_after_a_week_and_nothing_else(
    shop: Shop, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Clock(monkeypatch, "2032-01-01T00:00:00Z")
    validity = {"validBefore": str(time.now // 1000 + 60)}
    refused, settled = (Sale(shop, EvmWallet(), signed=validity) for _ in range(2))
    world.says, world.moves = "refused", False
    assert refused.send().code == "payment_invalid"
    world.be_well()
    assert settled.send().status == 200
    open_ = Sale(shop, EvmWallet(), signed=validity)
    world.says, world.moves, world.sees = "unknown", False, "nothing"
    assert open_.send().code == "payment_unconfirmed"
    time.forward(days=7)
    upkeep.tidy(shop.instance)
    assert len(shop.payments(refused.wallet)) == 1
    time.forward(ms=1)
    upkeep.tidy(shop.instance)
    assert shop.payments(refused.wallet) == []
    time.forward(days=1000)
    upkeep.tidy(shop.instance)
    assert (settled.record.status, open_.record.status) == ("settled", "unknown")


def test_a_payment_can_be_tried_again_for_a_day_after_it_was_known_to_be_settled(
    shop: Shop, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Clock(monkeypatch, "2033-01-01T00:00:00Z")
    sales = [unknown(shop, world, True) for _ in range(2)]
    time.forward(days=3)
    for sale in sales:
        shop.look(sale.record.id)
    time.forward(days=1, ms=-1)
    assert sales[0].send().status == 200 and sales[0].served == 1
    time.forward(ms=1)
    answer = sales[1].send()
    assert (answer.status, answer.code) == (409, "payment_already_used")
    assert shop.credits_of(sales[1].wallet) == PRICE and sales[1].served == 0


# Shown again.


def test_a_payment_that_is_shown_again_gets_what_its_state_says(shop: Shop, world: World) -> None:
    other = "/api/v1/far/ok/another-request"
    sale = Sale(shop, EvmWallet())
    during: list[tuple[int, str | None, bool]] = []

    def shown_again() -> None:
        world.meanwhile = None
        for path in (None, other):
            answer = sale.send(path)
            during.append((answer.status, answer.code, "Retry-After" in answer.headers))

    used = (409, "payment_already_used", False)
    world.meanwhile, world.moves, world.says, world.sees = shown_again, False, "unknown", "nothing"
    assert sale.send().code == "payment_unconfirmed"
    assert during == [(409, "payment_in_progress", True), used]
    during.clear()
    shown_again()
    assert during == [(503, "payment_unconfirmed", True), used]
    during.clear()
    world.be_well()
    world.meanwhile = shown_again  # while it is looked for
    shop.look(sale.record.id)
    assert during == [(503, "payment_unconfirmed", True), used]
    assert world.asked.count(nonce_of(sale)) == 2 and sale.served == 0
    assert sale.send().status == 200
    during.clear()
    shown_again()
    assert during[0][0] == 200 and during[1] == used
    assert world.asked.count(nonce_of(sale)) == 2 and sale.served == 1
    refused = Sale(shop, EvmWallet())
    world.says, world.moves = "refused", False
    for path in (None, other, None):
        assert refused.send(path).code == "payment_invalid"
    assert world.asked.count(nonce_of(refused)) == 2  # not for what it was not made for
    assert refused.record.path == refused.path


def test_a_call_that_fails_can_be_tried_again_on_what_was_found_out(
    shop: Shop, world: World, upstream: Upstream
) -> None:
    sale = unknown(shop, world, True, "/api/v1/far/gated/slow")
    shop.look(sale.record.id)
    first = Background(sale.send)
    upstream.wait_for(1, "/gated/slow")
    again = sale.send()
    assert (again.status, again.code) == (409, "payment_in_progress")
    upstream.gate("slow").open()
    assert first.result().status == 200
    assert sale.send().headers["Idempotent-Replayed"] == "true"
    broken = unknown(shop, world, True, "/api/v1/far/status/500")
    shop.look(broken.record.id)
    for _ in range(3):
        answer = broken.send()
        assert (answer.status, answer.code) == (502, "provider_error")
        assert answer.json()["credited"] == PRICE
        assert shop.credits_of(broken.wallet) == PRICE
    assert shop.deposits(broken.record.id) == 1


def test_it_is_found_out_without_anybody_asking(shop: Shop, world: World) -> None:
    sale = unknown(shop, world, True)
    shop.run("UPDATE payment SET next_look_at = 0 WHERE id = :id", id=sale.record.id)
    rounds = upkeep.PaymentUpkeep(shop.instance)
    rounds.start()
    try:
        until(lambda: sale.record.status == "settled")
    finally:
        rounds.stop()


def test_dead_incarnations_are_dead(shop: Shop) -> None:
    folder = shop.settings.incarnations
    assert not incarnation.is_alive(folder, DEAD)
    assert incarnation.is_alive(folder, shop.instance.incarnation())


# Everything at once.


class Payments(RuleBasedStateMachine):
    """A handful of payments, shown, settled, forgotten, found again, in any order: what has moved
    is entered once, what has not is not, and each pays for its request once."""

    shop: Shop
    world: World

    @initialize()
    def begin(self) -> None:
        self.world.__init__()  # type: ignore[misc]
        where: list[tuple[Any, ...]] = [(), (), (TOP_UP, TOP_UP_BODY)]
        self.wallets = [EvmWallet() for _ in where]
        self.sales = [
            Sale(self.shop, wallet, *each) for wallet, each in zip(self.wallets, where, strict=True)
        ]
        self.shown: set[str] = set()
        self.answered: dict[str, bool] = {}

    sale = st.integers(0, 2)
    answer = st.sampled_from(["settled", "refused", "unheard", "unknown"])
    sight = st.sampled_from(["truth", "truth", "nothing", "silence"])

    def setup_world(self, says: Outcome, moves: bool, sees: Any) -> None:
        # A refusal, or a facilitator that did not listen, has moved nothing.
        self.world.says, self.world.sees = says, sees
        self.world.moves = moves and says in ("settled", "unknown")

    @rule(number=sale, says=answer, moves=st.booleans(), sees=sight, dies=st.booleans())
    def show(self, number: int, says: Outcome, moves: bool, sees: Any, dies: bool) -> None:
        sale = self.sales[number]
        nonce = nonce_of(sale)
        if nonce in self.world.moved and says in ("refused", "unheard"):
            says = "unknown"
        self.setup_world(says, moves, sees)
        asked = len(self.world.asked)
        answer = sale.send()
        self.shown.add(nonce)
        if nonce in self.world.moved:
            assert answer.code not in ("payment_invalid", "payment_required"), answer.body
            assert "PAYMENT-REQUIRED" not in answer.headers
        if answer.status == 200:
            assert nonce in self.world.moved
            replayed = "Idempotent-Replayed" in answer.headers
            assert replayed == self.answered.get(nonce, False) or sale.path == TOP_UP
            self.answered[nonce] = True
        unknown = answer.code == "payment_unconfirmed" and len(self.world.asked) > asked
        if dies and unknown:
            orphan(self.shop, sale.record.id)

    @rule(number=sale)
    def show_elsewhere(self, number: int) -> None:
        sale = self.sales[number]
        asked = len(self.world.asked)
        known = self.shop.payments(sale.wallet)
        if known and known[0].status != "refused":
            answer = sale.send("/api/v1/far/ok/elsewhere" if sale.path != TOP_UP else TOP_UP + "x")
            assert answer.code in ("payment_already_used", "not_found")
            assert len(self.world.asked) == asked

    @rule(number=sale)
    def somebody_else_settles(self, number: int) -> None:
        nonce = nonce_of(self.sales[number])
        if nonce in self.shown and nonce not in self.world.dead:
            self.world.move(nonce)

    @rule(number=sale)
    def time_runs_out(self, number: int) -> None:
        nonce = nonce_of(self.sales[number])
        if nonce not in self.world.moved:
            self.world.dead.add(nonce)

    @rule(says=answer, moves=st.booleans(), sees=sight)
    def reconcile(self, says: Outcome, moves: bool, sees: Any) -> None:
        self.setup_world(says, moves, sees)
        reconciler.find_orphans(self.shop.instance)
        for wallet in self.wallets:
            for record in self.shop.payments(wallet):
                self.shop.look(record.id)

    @invariant()
    def nothing_counts_twice(self) -> None:
        for sale in self.sales:
            for record in self.shop.payments(sale.wallet):
                entered = self.shop.deposits(record.id)
                assert entered == (record.status == "settled")
                if entered:
                    assert nonce_of(sale) in self.world.moved
                else:
                    assert self.shop.credits_of(sale.wallet) is None
            if sale.path != TOP_UP:
                assert sale.served == self.answered.get(nonce_of(sale), False)

    def teardown(self) -> None:
        self.world.be_well()
        self.world.moves = False
        reconciler.find_orphans(self.shop.instance)
        for sale in self.sales:
            for record in self.shop.payments(sale.wallet):
                self.shop.look(record.id)
            if nonce_of(sale) in self.world.moved:
                answer = sale.send()
                assert answer.status == 200, answer.body
                assert self.shop.deposits(sale.record.id) == 1
                left = 20 if sale.path == TOP_UP else 0
                assert self.shop.credits_of(sale.wallet) == left
            else:
                assert self.shop.credits_of(sale.wallet) is None
        assert self.shop.faults() == []


def test_no_order_of_events_loses_a_payment_or_counts_it_twice(
    shop: Shop, world: World, upstream: Upstream
) -> None:
    class Case(Payments):
        pass

    Case.shop, Case.world = shop, world
    Case.TestCase.settings = settings(
        max_examples=30,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    Case.TestCase("runTest").runTest()  # type: ignore[no-untyped-call]
