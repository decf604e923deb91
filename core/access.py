"""Who is calling, and may they: two questions, asked in that order.

A door answers None (not mine) or raises (mine, and bad). Whatever comes out of `identify` is what
is charged, so there is no credential the meter does not see.
"""

import hmac
import re
from collections.abc import Mapping
from typing import NamedTuple

from core import (
    audit,
    clock,
    errors,
    issuers,
    jose,
    keys,
    limits,
    members,
    scopes,
    session_tokens,
    tokens,
    wallets,
)
from core.adapters import Inbound
from core.audit import Actor
from core.catalog import Route
from core.instance import Instance
from core.issuers import Outsider
from core.keys import Key
from core.ledger import OPERATOR_ACCOUNT, Guard, account_suspended
from core.limits import CreditLimit, Rate
from core.session_tokens import Bearer
from core.sessions import Seat
from core.signed import nonces
from core.signed import requests as signed_requests
from core.signed.nonces import Nonce
from core.users import User
from core.wallets import Wallet
from models import Tx

LONGEST_CREDENTIAL = 8192
_ALWAYS = Guard("TRUE", {})
_VISIBLE = re.compile(r"[\x20-\x2b\x2d-\x7e]*")  # no comma: two headers arrive joined by one


class Principal(NamedTuple):
    """Whoever a credential stands for, and the terms under which it may spend."""

    payer: str  # `api_key`, `session`, `wallet`, `x402` or `operator`
    account_id: str  # nothing for a wallet that has not paid yet
    user_id: str | None
    rate_subject: str
    rate_limit: int | None  # requests a minute; None for the operator
    guard: Guard  # what must still hold when credits are set aside
    key: Key | None = None
    bearer: Bearer | None = None
    scopes: list[str] | None = None
    limit: CreditLimit | None = None  # the key's
    member_limit: CreditLimit | None = None  # the person's, over all their keys and tokens
    wallet: Wallet | None = None  # that has signed the request
    nonce: Nonce | None = None  # of a signed request, used up by whoever serves it

    @property
    def key_id(self) -> str | None:
        return None if self.key is None else self.key.id

    @property
    def pays(self) -> bool:
        """False for the operator, whose calls are served and recorded but debit nobody."""
        return self.payer != "operator"


def identify(instance: Instance, inbound: Inbound, client: str) -> Principal:
    """The principal of a request that came from that address.

    Raises `validation_error` for a malformed credential, then 401, then 403 for a suspended one.
    """
    token = bearer(inbound.headers.get("authorization"))
    if token is None and signed_requests.is_signed(inbound.headers):
        return _by_signature(instance, inbound)
    if token is None:
        raise errors.Refusal(
            "missing_api_key", "Send your API key as `Authorization: Bearer <key>`."
        )
    operator_key = instance.settings.operator_key
    if operator_key and hmac.compare_digest(token.encode(), operator_key.encode()):
        by, now = Actor("operator_key", client, True), clock.now_ms()
        instance.db.write(lambda tx: audit.note(tx, by, "operator_key.used", now))
        return Principal("operator", OPERATOR_ACCOUNT, None, "operator", None, _ALWAYS)
    if token.startswith("eyJ"):
        return _by_session_token(instance, token, client)
    return _by_key(instance, token, client)


def is_stranger(headers: Mapping[str, str]) -> bool:
    """Whether a request says nothing of who sends it, so that it can only be paid on the spot.

    Raises as `bearer` does: a Bearer that is bad never falls through to another way to pay.
    """
    return bearer(headers.get("authorization")) is None and not signed_requests.is_signed(headers)


def by_wallet(instance: Instance, wallet: Wallet, client: str, is_fresh: bool) -> Principal:
    """The principal of a payment that its wallet has signed. It spends what it pays, no more.

    Counted under the wallet's account; but under the client's network as long as there is none,
    because anybody can make wallets, and when the payment is not a fresh one, because those of
    others lie on the chain for all to show. Raises `account_suspended`.
    """
    with instance.db.reading() as tx:
        owner = wallets.owner_of(tx, wallet)
    if owner is not None:
        wallets.require_active(owner)
    account_id = "" if owner is None else owner.account_id
    subject = account_id if is_fresh and account_id else f"payer:{limits.network_of(client)}"
    default = instance.settings.limits.requests_per_minute
    return Principal("x402", account_id, None, subject, default, _ALWAYS)


def bearer(header: str | None) -> str | None:
    """The token of a Bearer Authorization header; None when there is no such header.

    Raises `validation_error` for a header no client sends on purpose (RFC 6750, RFC 9110 11.6.2).
    """
    if header is None:
        return None
    if len(header) > LONGEST_CREDENTIAL or not _VISIBLE.fullmatch(header):
        raise errors.invalid_body("The Authorization header is malformed.", "authorization")
    scheme, _, token = header.partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else None


def _by_key(instance: Instance, token: str, client: str) -> Principal:
    """The principal of an API key. Cheap checks first; the hash last, and seldom."""
    lookup = tokens.key_lookup(token)
    if lookup is None:
        raise errors.invalid_api_key()
    now = clock.now_ms()
    with instance.db.reading() as tx:
        found = keys.by_lookup(tx, lookup, now)
    if found is None:
        raise errors.invalid_api_key()
    key, stored = found
    status = key.status_at(now)
    if status in ("revoked", "expired"):
        raise errors.invalid_api_key()
    if not instance.verifier.remembers(token, stored):
        _verify(instance, token, stored, f"auth:{limits.network_of(client)}:{lookup}", now)
    if status == "suspended" or key.user_status == "suspended":
        reason = key.status_reason if status == "suspended" else key.user_reason
        raise errors.Refusal(
            "key_suspended", "This API key is suspended.", fields={"reason": reason}
        )
    if key.account_status != "active":
        raise account_suspended(key.account_reason)
    default = instance.settings.limits.requests_per_minute
    return Principal(
        "api_key",
        key.account_id,
        key.user_id,
        key.id,
        default if key.rate_limit is None else key.rate_limit,
        keys.still_valid(key, stored, now),
        key,
        scopes=key.scopes,
        limit=key.limit,
        member_limit=members.credit_limit(
            key.account_id, key.user_id, key.member_limit, key.member_period
        ),
    )


def _by_signature(instance: Instance, inbound: Inbound) -> Principal:
    """The principal of a request that its wallet has signed. Who signs learns whether the wallet is
    known here; nobody else does."""
    now = clock.now_ms()
    signed = signed_requests.read(inbound, instance.settings.origin, now)
    with instance.db.reading() as tx:
        owner = wallets.owner_of(tx, signed.wallet)
        is_used = nonces.is_used(tx, signed.nonce)
    if owner is None:
        raise errors.invalid_signature("This wallet is not known here. Sign in with it first.")
    wallets.require_active(owner)
    if is_used:
        raise _nonce_used()
    return Principal(
        "wallet",
        owner.account_id,
        owner.user_id,
        owner.account_id,
        instance.settings.limits.requests_per_minute,
        wallets.still_signs(signed.wallet, owner.account_id),
        member_limit=members.credit_limit(
            owner.account_id, owner.user_id, owner.credit_limit, owner.credit_period
        ),
        wallet=signed.wallet,
        nonce=signed.nonce,
    )


def _nonce_used() -> errors.Refusal:
    return errors.invalid_signature("This signature was used before. Sign each request anew.")


def _by_session_token(instance: Instance, token: str, client: str) -> Principal:
    """The principal of a session token, ours or an outside issuer's. What it says of itself is
    checked first; then the database says whether it, and all it hangs on, still stands."""
    parsed, now = jose.parse(token), clock.now_ms()
    issuer = instance.settings.public_url
    if parsed.claims.get("iss") == issuer:
        token_id = session_tokens.check(parsed, instance.signing_keys, issuer, now)
        bearer = _bearer(instance, token_id, now)
    else:
        outsider = instance.issuers.check(parsed, now)
        token_id = outsider.token_id
        bearer = _bearer(instance, token_id, now) or _take_in(instance, outsider, now, client)
    if bearer is None:
        raise errors.invalid_token()
    require_active(bearer)
    return Principal(
        "session",
        bearer.account_id,
        bearer.user_id,
        bearer.account_id,
        instance.settings.limits.requests_per_minute,
        session_tokens.still_valid(token_id, now),
        bearer=bearer,
        member_limit=members.credit_limit(
            bearer.account_id, bearer.user_id, bearer.credit_limit, bearer.credit_period
        ),
    )


def _bearer(instance: Instance, token_id: str, now: int) -> Bearer | None:
    with instance.db.reading() as tx:
        return session_tokens.find(tx, token_id, now)


def _take_in(instance: Instance, outsider: Outsider, now: int, client: str) -> Bearer | None:
    """Who holds an outside token that is seen for the first time, unless it has ended."""
    section = instance.settings.instance
    is_open, credits = section.signup == "open", section.signup_credits

    def work(tx: Tx) -> None:
        issuers.take_in(tx, outsider, is_open, credits, now, client)

    instance.db.write(work, durable=True)
    return _bearer(instance, outsider.token_id, now)


def _verify(instance: Instance, token: str, stored: str, guesser: str, now: int) -> None:
    """Check a secret against its hash. Throttled by client address and key together, so that
    nobody can lock a key out from elsewhere."""
    most = instance.settings.limits.failed_auth_per_minute
    rate = limits.look_at_rate(instance.db, guesser, most, now)
    if rate.exceeded:
        raise errors.rate_limited("Too many failed attempts with this key.", rate.reset_seconds)
    if not instance.verifier.verify(token, stored):
        instance.db.write(lambda tx: limits.spend_rate(tx, guesser, most, now))
        raise errors.invalid_api_key()


def authorize(principal: Principal, route: Route) -> None:
    """Raises `missing_scope` when a key's scopes leave this route out."""
    if not scopes.allow_route(principal.scopes, route):
        raise _missing_scope(route.scope or "*")


def authorize_model(principal: Principal, model_id: str) -> None:
    """Raises `missing_scope` when a key's scopes leave this model out."""
    if not scopes.allow_model(principal.scopes, model_id):
        raise _missing_scope(f"{scopes.MODEL}{model_id}")


def _missing_scope(required: str) -> errors.Refusal:
    return errors.Refusal(
        "missing_scope", f"This key lacks the scope {required}.", fields={"required": required}
    )


def read(
    instance: Instance, inbound: Inbound, client: str, manages: bool = False
) -> tuple[Principal, Rate | None]:
    """The principal of a free request, counted in a minute of its own beside the paid calls'.

    So a key that has used its minute up can still ask what it has left, and a loop that only asks
    is bounded too. Raises as `identify` does, `session_required` for whoever is no person when the
    request `manages` something, and `rate_limited`.
    """
    principal = identify(instance, inbound, client)
    if manages and principal.bearer is None:
        raise errors.Refusal("session_required", "This takes a session token.")
    if principal.rate_limit is None:
        return principal, None
    subject = principal.rate_subject
    if principal.bearer is not None:  # one person's loop leaves the others their say
        subject = members.limit_subject(principal.account_id, principal.bearer.user_id)
    return principal, _count(instance, subject, principal)


def count_reading(instance: Instance, user: User) -> None:
    """As `read`, for somebody whose sign-in cookie says who they are. Raises `rate_limited`."""
    subject = members.limit_subject(user.account_id, user.id)
    limit = instance.settings.limits.requests_per_minute
    _count(instance, subject, Principal("session", user.account_id, user.id, "", limit, _ALWAYS))


def _count(instance: Instance, subject: str, principal: Principal) -> Rate | None:
    now = clock.now_ms()
    rate, refusal = instance.db.write(lambda tx: arrive(tx, principal, f"read:{subject}", now))
    if refusal is not None:
        refusal.headers.update({} if rate is None else rate.headers())
        raise refusal
    return rate


def arrive(
    tx: Tx, principal: Principal, subject: str, now: int
) -> tuple[Rate | None, errors.Refusal | None]:
    """Count an attempt under that subject, and use up what may be used once: the state of the rate,
    and why the attempt goes no further. That is returned, so that the attempt stays counted.

    A nonce is used up in the transaction that decides about its request, and not by a request that
    comes too soon: nothing was done for it, and nobody fills the database that way. It need not be
    on the disk by then: what it pays for is captured in a later transaction that is.
    """
    rate = None
    if principal.rate_limit is not None:
        rate = limits.spend_rate(tx, subject, principal.rate_limit, now)
        if rate.exceeded:
            return rate, rate.refusal()
    if principal.nonce is not None and not nonces.use(tx, principal.nonce):
        return rate, _nonce_used()
    if principal.key is not None:
        keys.note_use(tx, principal.key, now)
    return rate, None


def reassert(tx: Tx, principal: Principal) -> Bearer:
    """Who acts, asked again in the transaction that acts: whoever was signed out, removed or
    demoted since the request came in changes nothing any more. Raises `invalid_token`."""
    assert principal.bearer is not None  # `read` let nobody else manage
    found = session_tokens.find(tx, principal.bearer.token_id, clock.now_ms())
    if found is None:
        raise errors.invalid_token()
    require_active(found)
    return found


def require_active(who: Bearer | Seat) -> None:
    """Raises `account_suspended`, for the person or for the account."""
    for status, reason in (
        (who.user_status, who.user_reason),
        (who.account_status, who.account_reason),
    ):
        if status != "active":
            raise account_suspended(reason)
