"""A settled payment becomes credits: once, whoever learns of it and how often."""

import json

from core import idempotency, ledger, wallets
from core.idempotency import Stored
from core.ledger import Standing
from core.payments import claims, records
from core.payments.records import Record
from core.wallets import Wallet
from models import Tx


def deposit(tx: Tx, record: Record, now: int) -> tuple[str, bool]:
    """Enter a settled payment's credits: the account, and whether it was now. What a top-up is
    answered is kept with it, so whoever did not hear it can ask again."""
    wallet = Wallet(record.wallet, record.wallet_name)
    account_id = record.account_id or wallets.take_in(tx, wallet, now)
    claims.let_go(tx, record)
    if not records.settle(tx, record, account_id, now):
        return account_id, False
    note = f"{record.wallet_name} on {record.network}"
    after = ledger.add_credits(tx, account_id, "topup", record.credits, record.id, note, now)
    if record.purpose == "topup":
        assert after is not None  # it was not settled before, so nothing refers to it yet
        print_, key = record.print, record.answer_key
        idempotency.claim(tx, account_id, key, print_, record.id, now)
        idempotency.keep(tx, account_id, key, record.id, topup_answer(record, after))
    return account_id, True


def topup_answer(record: Record, after: Standing) -> Stored:
    """What a top-up is answered."""
    told = {"success": True, "creditsAdded": record.credits, "credits": after.available}
    headers = [("Content-Type", "application/json")]
    return Stored(200, headers, json.dumps(told).encode() + b"\n")
