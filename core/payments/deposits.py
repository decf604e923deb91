"""A settled payment becomes credits: once, whoever learns of it and how often."""

import json
import logging

from core import idempotency, ledger, wallets
from core.idempotency import Stored
from core.ledger import Standing
from core.payments import claims, records
from core.payments.records import Record
from core.wallets import Wallet
from models import Tx

log = logging.getLogger("farebox.payments")


def deposit(tx: Tx, record: Record, now: int) -> tuple[str, bool]:
    """Enter a settled payment's credits: the account, and whether it was now. What a top-up is
    answered is kept with it, so whoever did not hear it can ask again."""
    known = records.get(tx, record.id)
    if known.status == "settled" or known.claim != record.claim:
        if known.status != "settled":
            log.error("payment %s was settled for a claim that is no more", record.id)
        return known.account_id or "", False
    # What was claimed may be for another account by now.
    record = known._replace(transaction_id=record.transaction_id)
    wallet = Wallet(record.wallet, record.wallet_name)
    account_id = record.account_id or wallets.take_in(tx, wallet, now)
    claims.let_go(tx, record)
    records.settle(tx, record, account_id, now)
    note = f"{record.wallet_name} on {record.network}"
    after = ledger.add_credits(tx, account_id, "topup", record.credits, record.id, note, now)
    if record.purpose == "topup":
        assert after is not None  # it was not settled before, so nothing refers to it yet
        _keep(tx, record, account_id, topup_answer(record, after), now)
    return account_id, True


def _keep(tx: Tx, record: Record, account_id: str, answer: Stored, now: int) -> None:
    """Keep a top-up's answer under the caller's key; under the payment's own when the caller has
    used it for something else meanwhile, because this payment was believed to be refused."""
    key, print_ = record.answer_key, record.print
    if idempotency.find(tx, account_id, key, print_, now) is not None:
        key = records.own_key(record.id)
        records.use(tx, record.id, None, key)
    idempotency.claim(tx, account_id, key, print_, record.id, now)
    idempotency.keep(tx, account_id, key, record.id, answer)


def topup_answer(record: Record, after: Standing) -> Stored:
    """What a top-up is answered."""
    told = {"success": True, "creditsAdded": record.credits, "credits": after.available}
    headers = [("Content-Type", "application/json")]
    return Stored(200, headers, json.dumps(told).encode() + b"\n")
