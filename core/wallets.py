"""Wallets, and whose they are. A wallet is `namespace:address` and belongs to one account."""

import re
from typing import NamedTuple

from config import base58
from core import ledger
from core.ledger import Guard
from models import Tx

_EVM_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_KEY_BYTES = 32  # an address on Solana is an Ed25519 public key


class Wallet(NamedTuple):
    """A wallet by its address on a chain."""

    id: str  # the address of an eip155 wallet in lower case, because case means nothing there
    name: str  # as people write it

    @classmethod
    def of(cls, namespace: str, address: str) -> "Wallet":
        """The wallet with that address."""
        name = f"{namespace}:{address}"
        return cls(name.lower() if namespace == "eip155" else name, name)

    @property
    def namespace(self) -> str:
        return self.name.partition(":")[0]

    @property
    def address(self) -> str:
        return self.name.partition(":")[2]

    @property
    def short(self) -> str:
        """Enough of the address to tell it from one's others."""
        return f"{self.address[:6]}…{self.address[-4:]}"


class Owner(NamedTuple):
    """The account a wallet belongs to, and whose account that is, if anybody's yet."""

    account_id: str
    status: str
    reason: str | None
    user_id: str | None
    user_status: str | None
    user_reason: str | None
    credit_limit: int | None
    credit_period: str | None


class Linked(NamedTuple):
    """A wallet of an account."""

    wallet: Wallet
    created_at: int


def parse(text: str) -> Wallet | None:
    """The wallet that a text such as `eip155:0x…` names, if it can be one."""
    namespace, _, address = text.partition(":")
    if namespace == "eip155" and _EVM_ADDRESS.fullmatch(address):
        return Wallet.of(namespace, address)
    if namespace == "solana" and base58.decode(address, _KEY_BYTES) is not None:
        return Wallet.of(namespace, address)
    return None


def owner_of(tx: Tx, wallet: Wallet) -> Owner | None:
    """Whose a wallet is, if it was seen before."""
    row = tx.row(
        "SELECT a.id, a.status, a.status_reason, u.id, u.status, u.status_reason,"
        " m.credit_limit, m.credit_period"
        " FROM wallet w JOIN account a ON a.id = w.account_id"
        " LEFT JOIN user u ON u.account_id = a.id"
        " LEFT JOIN membership m ON m.account_id = a.id AND m.user_id = u.id"
        " WHERE w.id = :id",
        {"id": wallet.id},
    )
    return None if row is None else Owner(*row)


def add(tx: Tx, wallet: Wallet, account_id: str, now: int) -> None:
    """A wallet nobody has becomes the account's."""
    tx.run(
        "INSERT INTO wallet (id, name, account_id, created_at) VALUES (:id, :name, :account, :now)",
        {"id": wallet.id, "name": wallet.name, "account": account_id, "now": now},
    )


def take_in(tx: Tx, wallet: Wallet, now: int) -> str:
    """The account of a wallet, opened if it has none yet; its id."""
    owner = owner_of(tx, wallet)
    if owner is not None:
        return owner.account_id
    account_id = ledger.open_account(tx, now)
    add(tx, wallet, account_id, now)
    return account_id


def require_active(owner: Owner) -> None:
    """Raises `account_suspended`, for the account or for the person whose it is."""
    for status, reason in ((owner.status, owner.reason), (owner.user_status, owner.user_reason)):
        if status not in (None, "active"):
            raise ledger.account_suspended(reason)


def still_signs(wallet: Wallet, account_id: str) -> Guard:
    """What must hold when a wallet's credits are set aside: it is the account's, whose person, if
    there is one, is let in."""
    return Guard(
        "EXISTS (SELECT 1 FROM wallet WHERE id = :wallet_id AND account_id = :wallet_account)"
        " AND NOT EXISTS (SELECT 1 FROM user u WHERE u.account_id = :wallet_account"
        " AND u.status <> 'active')",
        {"wallet_id": wallet.id, "wallet_account": account_id},
    )


def of_account(tx: Tx, account_id: str) -> list[Linked]:
    """The wallets of an account, the first linked first."""
    rows = tx.rows(
        "SELECT id, name, created_at FROM wallet WHERE account_id = :account"
        " ORDER BY created_at, id",
        {"account": account_id},
    )
    return [Linked(Wallet(*row[:2]), row[2]) for row in rows]


def move(tx: Tx, account_id: str, to: str) -> None:
    """All wallets of an account become another's."""
    tx.run(
        "UPDATE wallet SET account_id = :to WHERE account_id = :account",
        {"account": account_id, "to": to},
    )


def remove(tx: Tx, wallet: Wallet) -> None:
    """The wallet is nobody's any more."""
    tx.run("DELETE FROM wallet WHERE id = :id", {"id": wallet.id})


def remove_all(tx: Tx, account_id: str) -> None:
    """The account has no wallet any more."""
    tx.run("DELETE FROM wallet WHERE account_id = :account", {"account": account_id})
