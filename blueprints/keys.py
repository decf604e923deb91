"""An account's API keys, for the people who may manage them. A key cannot manage itself."""

import msgspec
from flask import Blueprint, Response

from blueprints.api import act, manager, managing, named, page, timestamp, window
from blueprints.rendering import instance, json_response
from core import clock, keys
from core.audit import Actor
from core.keys import Key, NewSecret, Terms
from core.session_tokens import Bearer
from models import Tx

blueprint = Blueprint("keys", __name__, url_prefix="/api/v1/keys")


class _NewKey(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    scopes: list[str] | None = None
    expires_at: str | None = None
    credit_limit: int | None = None
    credit_period: str | None = None
    rate_limit: int | None = None


class _Changes(msgspec.Struct, forbid_unknown_fields=True):
    """What a PATCH names; what it leaves out stays."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    scopes: list[str] | msgspec.UnsetType | None = msgspec.UNSET
    expires_at: str | msgspec.UnsetType | None = msgspec.UNSET
    credit_limit: int | msgspec.UnsetType | None = msgspec.UNSET
    credit_period: str | msgspec.UnsetType | None = msgspec.UNSET
    rate_limit: int | msgspec.UnsetType | None = msgspec.UNSET


class _Rotation(msgspec.Struct, forbid_unknown_fields=True):
    grace_seconds: int = 0


class _Suspension(msgspec.Struct, forbid_unknown_fields=True):
    reason: str | None = None


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """A body that says nothing."""


@blueprint.get("")
def every() -> Response:
    """The account's keys, the newest first; a member's own."""
    principal = manager()
    limit, before = window()
    bearer, now = principal.bearer, clock.now_ms()
    assert bearer is not None  # `manager` let nobody else in
    whose = None if bearer.is_owner else bearer.user_id
    with instance().db.reading() as tx:
        found = keys.newest(tx, bearer.account_id, whose, before, limit + 1)
    return page([(key.number, key.to_json(now)) for key in found], limit)


@blueprint.post("")
def create() -> Response:
    principal, wish = managing(_NewKey)
    expires_at = timestamp(wish.expires_at, "expires_at")
    terms = Terms(
        wish.name, wish.scopes, expires_at, wish.credit_limit, wish.credit_period, wish.rate_limit
    )
    terms.check(clock.now_ms())  # before the hash, which takes its time
    secret = NewSecret(instance().settings.instance.key_prefix)

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> Key:
        account_id, user_id = bearer.account_id, bearer.user_id
        return keys.get(tx, keys.add(tx, account_id, user_id, terms, secret, now, by))

    return _shown(act(principal, work), 201, secret)


@blueprint.get("/<key_id>")
def one(key_id: str) -> Response:
    principal = manager()
    assert principal.bearer is not None  # `manager` let nobody else in
    with instance().db.reading() as tx:
        return _shown(keys.owned(tx, key_id, principal.bearer))


@blueprint.patch("/<key_id>")
def change(key_id: str) -> Response:
    """New terms. A limit of the same period goes on with its count."""
    principal, changes = managing(_Changes)
    wanted = named(changes)
    if "expires_at" in wanted:
        wanted["expires_at"] = timestamp(wanted["expires_at"], "expires_at")

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> Key:
        key = keys.owned(tx, key_id, bearer)
        keys.change(tx, key, wanted, now, by)
        return keys.get(tx, key_id)

    return _shown(act(principal, work))


@blueprint.delete("/<key_id>")
def revoke(key_id: str) -> Response:
    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> None:
        keys.revoke(tx, keys.owned(tx, key_id, bearer).id, now, by)

    act(manager(), work)
    return Response(status=204)


@blueprint.post("/<key_id>/rotate")
def rotate(key_id: str) -> Response:
    """A new secret; the old one works for `grace_seconds`."""
    principal, wish = managing(_Rotation)
    keys.check_grace(wish.grace_seconds * 1000)
    assert principal.bearer is not None  # `managing` let nobody else in
    with instance().db.reading() as tx:
        keys.owned(tx, key_id, principal.bearer)  # before the hash, which takes its time
    secret = NewSecret(instance().settings.instance.key_prefix)

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> Key:
        key = keys.owned(tx, key_id, bearer)
        keys.rotate(tx, key.id, secret, wish.grace_seconds * 1000, now, by)
        return keys.get(tx, key_id)

    return _shown(act(principal, work), 200, secret)


@blueprint.post("/<key_id>/suspend")
def suspend(key_id: str) -> Response:
    principal, wish = managing(_Suspension)
    keys.check_reason(wish.reason)

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> Key:
        keys.suspend(tx, keys.owned(tx, key_id, bearer).id, wish.reason, now, by)
        return keys.get(tx, key_id)

    return _shown(act(principal, work))


@blueprint.post("/<key_id>/resume")
def resume(key_id: str) -> Response:
    principal, _ = managing(_Nothing)

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> Key:
        key = keys.owned(tx, key_id, bearer)
        keys.resume(tx, key.id, now, by, is_owner=bearer.is_owner)
        return keys.get(tx, key_id)

    return _shown(act(principal, work))


def _shown(key: Key, status: int = 200, secret: NewSecret | None = None) -> Response:
    """A key as it is shown; with its secret only here and now, when it is new."""
    shown = key.to_json(clock.now_ms())
    if secret is not None:
        shown = {"id": shown.pop("id"), "name": shown.pop("name"), "key": secret.token} | shown
    return json_response(shown, status)
