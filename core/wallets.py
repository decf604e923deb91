"""Wallets, and whose they are. A wallet is `namespace:address` and belongs to one account."""

from typing import NamedTuple

from core import ledger
from models import Tx


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
    def address(self) -> str:
        return self.name.partition(":")[2]


class Owner(NamedTuple):
    """The account a wallet belongs to."""

    account_id: str
    status: str
    reason: str | None


def parse(text: str) -> Wallet | None:
    """The wallet that a text such as `eip155:0x…` names, if it can be one."""
    namespace, _, address = text.partition(":")
    return Wallet.of(namespace, address) if namespace in ("eip155", "solana") and address else None


def owner_of(tx: Tx, wallet: Wallet) -> Owner | None:
    """Whose a wallet is, if it was seen before."""
    row = tx.row(
        "SELECT a.id, a.status, a.status_reason FROM wallet w JOIN account a ON a.id = w.account_id"
        " WHERE w.id = :id",
        {"id": wallet.id},
    )
    return None if row is None else Owner(*row)


def take_in(tx: Tx, wallet: Wallet, now: int) -> str:
    """The account of a wallet, opened if it has none yet; its id."""
    owner = owner_of(tx, wallet)
    if owner is not None:
        return owner.account_id
    account_id = ledger.open_account(tx, now)
    tx.run(
        "INSERT INTO wallet (id, name, account_id, created_at) VALUES (:id, :name, :account, :now)",
        {"id": wallet.id, "name": wallet.name, "account": account_id, "now": now},
    )
    return account_id


def of_account(tx: Tx, account_id: str) -> list[Wallet]:
    """The wallets of an account, the first linked first."""
    rows = tx.rows(
        "SELECT id, name FROM wallet WHERE account_id = :account ORDER BY created_at, id",
        {"account": account_id},
    )
    return [Wallet(*row) for row in rows]
