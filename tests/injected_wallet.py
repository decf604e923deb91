"""Wallets in a browser, as an extension has them, whose keys are in this process.

A wallet does what its person would have it do: `refuse` a method with an error, change its account
or its network, or be put right in the middle (`before`). What it was asked is in `asked`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from screen import Screen
from signers import EvmKey, Key, SolanaKey

SCRIPT = Path(__file__).with_suffix(".js")
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E"
    "%3Ccircle cx='4' cy='4' r='4' fill='teal'/%3E%3C/svg%3E"
)
MAINNET = "solana:mainnet"
_numbers = count(1)


class WalletError(Exception):
    """What a wallet answers instead, with the code that EIP-1193 has for it."""

    def __init__(self, code: int | str | None, message: str) -> None:
        super().__init__(message)
        self.told = {"code": code, "message": message}


REFUSED = WalletError(4001, "User rejected the request.")


@dataclass
class Injected:
    """One wallet. `kind` is how it is found: `announced` (EIP-6963), `window` (window.ethereum) or
    `standard` (the Wallet Standard)."""

    key: Key
    name: object = "Test Wallet"
    kind: str = ""
    icon: object = ICON
    chain: object = 1  # the network an Ethereum wallet is on
    knows: set[int] = field(default_factory=lambda: {1, 8453})
    chains: list[str] = field(default_factory=lambda: [MAINNET])
    signs: bool = True  # whether one of Solana has the feature
    is_late: bool = False  # it comes when `Screen.page` calls arrive<number>()
    accounts: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    typed: list[dict[str, Any]] = field(default_factory=list)
    refuse: dict[str, WalletError] = field(default_factory=dict)
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)  # in place of its own
    number: int = field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        self.kind = self.kind or ("announced" if isinstance(self.key, EvmKey) else "standard")
        self.accounts = self.accounts or [self.key.address]

    @property
    def short(self) -> str:
        return f"{self.key.address[:6]}…{self.key.address[-4:]}"

    def described(self) -> dict[str, object]:
        """What the page's script must know of it."""
        return {
            "number": self.number, "kind": self.kind, "name": self.name, "icon": self.icon,
            "chains": self.chains, "signs": self.signs, "isLate": self.is_late,
        }  # fmt: skip

    def answer(self, method: str, params: Any) -> dict[str, Any]:
        self.asked.append(method)
        if method in self.before:
            self.before[method]()
        if method in self.refuse:
            return {"error": self.refuse[method].told}
        if method in self.answers:
            return {"result": self.answers[method]}
        try:
            return {"result": self._done(method, params)}
        except WalletError as error:
            return {"error": error.told}

    def _done(self, method: str, params: Any) -> Any:
        if method in ("eth_requestAccounts", "eth_accounts", "connect"):
            return self.accounts
        if method == "eth_chainId":
            return hex(self.chain) if isinstance(self.chain, int) else self.chain
        if method == "wallet_switchEthereumChain":
            wanted = int(params[0]["chainId"], 16)
            if wanted not in self.knows:
                raise WalletError(4902, "Unrecognized chain ID.")
            self.chain = wanted
            return None
        if method == "signMessage":
            address, message = params
            assert isinstance(self.key, SolanaKey) and address == self.key.address
            return [list(self.key.sign(bytes(message))), message, self.accounts]
        assert isinstance(self.key, EvmKey)
        if method == "personal_sign":
            text, address = params
            assert address == self.key.address
            return f"0x{self.key.sign(bytes.fromhex(text.removeprefix('0x'))).hex()}"
        if method == "eth_signTypedData_v4":
            address, text = params
            typed = json.loads(text)
            assert address == self.key.address
            assert typed["domain"]["chainId"] == self.chain, "a wallet signs for no other network"
            self.typed.append(typed)
            signed = self.key.account.sign_typed_data(full_message=typed)
            return f"0x{signed.signature.hex().removeprefix('0x')}"
        raise WalletError(4200, f"{method} is not supported.")


def inject(screen: Screen, *wallets: Injected) -> None:
    """Every page of this browser has these wallets from now on; once for a browser."""
    by_number = {wallet.number: wallet for wallet in wallets}

    def ask(number: int, method: str, params: Any) -> dict[str, Any]:
        return by_number[number].answer(method, params)

    screen.context.expose_function("askWallet", ask)
    described = json.dumps([wallet.described() for wallet in wallets])
    screen.context.add_init_script(f"window.injectedWallets = {described};")
    screen.context.add_init_script(path=SCRIPT)
