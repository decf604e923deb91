"""Every form there is, taken from the routes themselves, so that none can be forgotten: where it
goes, with the id of a real thing for each parameter, and fields that would do something."""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING, Any

from browser import PASSWORD
from inprocess import Box, CheapSecret, Payer
from people import Person

from core import clock, keys, ledger, links, members, sessions, tokens, users, vouchers, wallets
from core.audit import Actor
from core.keys import Terms
from core.sessions import Origin
from core.signed import messages

if TYPE_CHECKING:
    from signers import SolanaKey

ANOTHER_PASSWORD = "another-long-enough-pass-phrase"
# They change nothing in the database even for who may: what they do is elsewhere, or only shown.
ONLY_SHOWN = {"/admin/health", "/dashboard/account", "/forgot"}
_numbers = count(1)
_CHOICE = re.compile(r"<any\(([a-z, ]+)\):\w+>")


def rules(box: Box, method: str = "POST") -> list[str]:
    """The paths that answer people and take a method, with their parameters in brackets."""
    found = set()
    for rule in box.app.url_map.iter_rules():
        if method not in (rule.methods or ()) or rule.rule.startswith(("/api/", "/v1/", "/static")):
            continue
        choice = _CHOICE.search(rule.rule)
        words = choice[1].split(", ") if choice else [""]
        found |= {_CHOICE.sub(word, rule.rule) for word in words}
    return sorted(found)


def filled(box: Box, rule: str, whose: Person) -> tuple[str, dict[str, str]]:
    """A rule's path with fresh things of that person's account, and the fields of all forms."""
    made = _Things(box, rule, whose)
    fields = {
        "account": whose.account, "next": "/dashboard", "name": "changed", "credits": "5",
        "count": "1", "note": "a note", "reason": "a reason", "role": "owner", "expires": "",
        "credit_limit": "7", "credit_period": "day", "rate_limit": "9", "grace_seconds": "0",
        "email": f"new{next(_numbers)}@example.com", "password": ANOTHER_PASSWORD,
        "current": PASSWORD, "transaction": f"0x{'5e' * 32}",
    }  # fmt: skip
    if rule == "/login":
        fields |= {"email": whose.email, "password": PASSWORD}
    if rule.endswith("/redeem"):
        fields["code"] = made.voucher()[1]
    if rule.endswith("/refund"):
        fields["request_id"] = made.called
    if rule.endswith("/session-token/revoke"):
        fields["token_id"] = made.token_id()
    if rule.endswith("/unlink"):
        fields |= made.identity()
    if rule in ("/setup", "/reset", "/invite"):
        fields["token"] = made.link(rule[1:])
    path = re.sub(r"<(?:\w+:)?(\w+)>", lambda found: str(getattr(made, found[1])), rule)
    if rule.endswith("/wallets/unlink"):  # whose page must know which, too
        made.linked()
        fields["wallet"] = made.linked().wallet
        path += f"?wallet={fields['wallet']}"
    if rule in ("/login/wallet", "/dashboard/settings/wallets"):
        fields |= made.signed_message(is_linked=rule == "/login/wallet")
    return path, fields


class _Things:
    """Fresh things for the parameters of one rule."""

    def __init__(self, box: Box, rule: str, whose: Person) -> None:
        self._box = box
        self._rule = rule
        self._whose = whose
        self._now = clock.now_ms()
        self._by = Actor(whose.id)
        self._payer: Payer | None = None
        self.name = "none"  # of an OpenID provider

    def _write(self, work: Any) -> Any:
        return self._box.write(work)

    @property
    def key_id(self) -> str:
        secret, now, whose = CheapSecret("fare"), self._now, self._whose
        terms = Terms(f"key {next(_numbers)}")
        made: str = self._write(
            lambda tx: keys.add(tx, whose.account, whose.id, terms, secret, now, self._by)
        )
        if self._rule.endswith("/resume"):
            self._write(lambda tx: keys.suspend(tx, made, None, now, self._by))
        return made

    @property
    def member_id(self) -> str:
        email, terms = f"guest{next(_numbers)}@example.com", members.Terms("member", None, None)
        member, _, _ = self._write(
            lambda tx: members.invite(tx, self._whose.account, email, terms, self._now, self._by)
        )
        found: str = member.id
        return found

    @property
    def session_id(self) -> str:
        secret = tokens.new_secret()
        started = self._write(
            lambda tx: sessions.start(tx, self._whose.id, Origin("password"), self._now, secret)
        )
        found: str = started.id
        return found

    @property
    def payer(self) -> Payer:
        if self._payer is None:
            self._payer = self._box.payer()
        return self._payer

    @property
    def account_id(self) -> str:
        """Somebody else's: operators are for all accounts."""
        account, by = self.payer.account, Actor("operator", None, True)
        if self._rule.endswith("/resume"):
            self._write(lambda tx: ledger.suspend_account(tx, account, None, self._now, by))
        return account

    @property
    def request_id(self) -> str:
        """Of a call of the account."""
        self._box.grant(self._whose.account, 10)
        key, _ = self._box.key(self._whose.account)
        answer = self._box.get("/api/v1/echo", key)
        assert answer.status == 200, answer.body
        return answer.request_id

    @property
    def called(self) -> str:
        answer = self._box.get("/api/v1/echo", self.payer.key)
        assert answer.status == 200, answer.body
        return answer.request_id

    def voucher(self) -> tuple[str, str]:
        """The id and the code of a fresh one."""
        (code,) = self._write(lambda tx: vouchers.make(tx, 5, 1, None, self._now, self._by))
        with self._box.instance.db.reading() as tx:
            return vouchers.page(tx, None, 1)[0].id, code

    @property
    def voucher_id(self) -> str:
        return self.voucher()[0]

    @property
    def payment_id(self) -> str:
        """Of a payment whose end nobody knows, by a wallet nobody has seen."""
        number, made = next(_numbers), tokens.new_id("pay")
        self._box.run(
            "INSERT INTO payment (id, number, key, network, asset, wallet, wallet_name, pay_to,"
            " amount, credits, purpose, method, path, fingerprint, print, answer_key, status,"
            " reason, proof, incarnation, looks, next_look_at, created_at)"
            " SELECT :id, COALESCE(MAX(number), 0) + 1, :id, 'eip155:8453', '0xasset', :wallet,"
            " :wallet, '0xpayee', 50000, 5, 'topup', 'POST', '/api/v1/credits/top-up', :print,"
            " :print, :id, 'unknown', 'no answer', '{}', 'nobody', 1, :later, :now FROM payment",
            id=made, wallet=f"eip155:0x{number:040x}", print=made.encode(), now=self._now,
            later=self._now + clock.DAY_MS,
        )  # fmt: skip
        return made

    def token_id(self) -> str:
        """Of a session token that nobody has ended."""
        token_id = tokens.new_id("tok")
        self._box.run(
            "INSERT INTO session_token (id, session_id, user_id, account_id, expires_at)"
            " VALUES (:id, :session, :user, :account, :end)",
            id=token_id, session=self.session_id, user=self._whose.id,
            account=self._whose.account, end=self._now + clock.DAY_MS,
        )  # fmt: skip
        return token_id

    def identity(self) -> dict[str, str]:
        issuer, subject = "https://elsewhere.example.com/", f"subject {next(_numbers)}"

        def work(tx: Any) -> None:
            user = users.get(tx, self._whose.id)
            users.link_identity(tx, user, issuer, subject, self._now, self._by)

        self._write(work)
        return {"issuer": issuer, "subject": subject}

    def linked(self) -> SolanaKey:
        """The key of a wallet of the person."""
        from signers import SolanaKey  # what few tests have a use for

        key, account = SolanaKey(), self._whose.account
        wallet = wallets.Wallet.of("solana", key.address)
        self._write(lambda tx: wallets.add(tx, wallet, account, self._now))
        return key

    def signed_message(self, *, is_linked: bool) -> dict[str, str]:
        """Of a wallet of the person, or of one that is nobody's yet."""
        key = self.linked()
        wallet = wallets.Wallet.of("solana", key.address)
        if not is_linked:
            self._write(lambda tx: wallets.remove(tx, wallet))
        text = messages.challenge(self._box.settings, wallet, self._now).message
        return {"message": text, "signature": key.sign_text(text)}

    def link(self, purpose: str) -> str:
        """The token of a one-time link; an invitation is to somebody else's account."""
        by, now, user_id = self._by, self._now, None
        if purpose == "invite":
            to, terms = self.payer.account, members.Terms("member", None, None)
            email = f"guest{next(_numbers)}@example.com"
            _, token, _ = self._write(lambda tx: members.invite(tx, to, email, terms, now, by))
            return str(token)
        if purpose == "reset":
            user_id = self._whose.id
        account = self._whose.account
        if purpose == "setup":
            account = self._write(lambda tx: ledger.open_account(tx, now))
        return str(self._write(lambda tx: links.make(tx, purpose, account, now, user_id=user_id)))
