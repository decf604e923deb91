"""Who is calling, and may they: two questions, asked in that order.

A door answers None (not mine) or raises (mine, and bad). Whatever comes out of `identify` is what
is charged, so there is no credential the meter does not see.
"""

import hmac
import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

from core import clock, errors, keys, limits, tokens
from core.instance import Instance
from core.keys import Key
from core.ledger import OPERATOR_ACCOUNT, Guard, account_suspended
from core.limits import CreditLimit, Rate
from models import Tx

log = logging.getLogger("farebox.access")

LONGEST_CREDENTIAL = 8192
_ALWAYS = Guard("TRUE", {})
_VISIBLE = re.compile(r"[\x20-\x2b\x2d-\x7e]*")  # no comma: two headers arrive joined by one


class Principal(NamedTuple):
    """Whoever a credential stands for, and the terms under which it may spend."""

    payer: str  # `api_key` or `operator`
    account_id: str
    rate_subject: str
    rate_limit: int | None  # requests a minute; None for the operator
    guard: Guard  # what must still hold when credits are set aside
    key: Key | None = None
    scopes: list[str] | None = None
    limit: CreditLimit | None = None

    @property
    def key_id(self) -> str | None:
        return None if self.key is None else self.key.id

    @property
    def user_id(self) -> str | None:
        return None if self.key is None else self.key.user_id

    @property
    def pays(self) -> bool:
        """False for the operator, whose calls are served and recorded but debit nobody."""
        return self.payer != "operator"


def identify(instance: Instance, headers: Mapping[str, str], client: str) -> Principal:
    """The principal of a request, by its headers (lower-case names) and the client's address.

    Raises `validation_error` for a malformed credential, then 401, then 403 for a suspended one.
    """
    token = bearer(headers.get("authorization"))
    if token is None:
        raise errors.Refusal(
            "missing_api_key", "Send your API key as `Authorization: Bearer <key>`."
        )
    operator_key = instance.settings.operator_key
    if operator_key and hmac.compare_digest(token.encode(), operator_key.encode()):
        log.info("the operator key was used from %s", client)
        return Principal("operator", OPERATOR_ACCOUNT, "operator", None, _ALWAYS)
    if token.startswith("eyJ"):
        raise errors.Refusal("invalid_token", "This session token is not valid.")
    return _by_key(instance, token, client)


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
        _verify(instance, token, stored, f"auth:{client}:{lookup}", now)
    if status == "suspended":
        raise errors.Refusal(
            "key_suspended", "This API key is suspended.", fields={"reason": key.status_reason}
        )
    if key.account_status != "active":
        raise account_suspended(key.account_reason)
    default = instance.settings.limits.requests_per_minute
    return Principal(
        "api_key",
        key.account_id,
        key.id,
        default if key.rate_limit is None else key.rate_limit,
        keys.still_valid(key, stored, now),
        key,
        key.scopes,
        key.limit,
    )


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


def authorize(principal: Principal, scope: str | None) -> None:
    """Raises `missing_scope` when a key's scopes leave this route out.

    Scopes of None mean every paid route, an empty list none. A route without a scope of its own
    is open only to keys that are not restricted.
    """
    if principal.scopes is None or (scope is not None and scope in principal.scopes):
        return
    required = scope or "*"
    raise errors.Refusal(
        "missing_scope", f"This key lacks the scope {required}.", fields={"required": required}
    )


def read(
    instance: Instance, headers: Mapping[str, str], client: str
) -> tuple[Principal, Rate | None]:
    """The principal of a free request, counted in a minute of its own beside the paid calls'.

    So a key that has used its minute up can still ask what it has left, and a loop that only asks
    is bounded too. Raises as `identify` does, and `rate_limited`.
    """
    principal = identify(instance, headers, client)
    if principal.rate_limit is None:
        return principal, None
    subject, limit, now = f"read:{principal.rate_subject}", principal.rate_limit, clock.now_ms()

    def work(tx: Tx) -> Rate:
        if principal.key is not None:
            keys.note_use(tx, principal.key, now)
        return limits.spend_rate(tx, subject, limit, now)

    rate = instance.db.write(work)
    if rate.exceeded:
        refusal = rate.refusal()
        refusal.headers.update(rate.headers())
        raise refusal
    return principal, rate
