"""A look at an instance from inside: what works, what does not, what costs more than it brings."""

import socket
from collections.abc import Iterator
from typing import NamedTuple

import apsw

from config import Settings
from core import clock, ledger, limits, rates, upstream
from core.adapters.sms import TWILIO_URL
from core.errors import Refusal
from core.instance import Instance
from core.payments import facilitator

_PATIENCE_SECONDS = 5


class Finding(NamedTuple):
    """`verdict` is `ok`, `warn` or `bad`."""

    verdict: str
    what: str


def examine(instance: Instance) -> Iterator[Finding]:
    """One finding a line: config, database, books, upstreams, who vouches for people, prices."""
    settings = instance.settings
    routes = len(instance.catalog.routes)
    yield Finding("ok" if routes else "warn", f"config: {settings.folder}, {routes} routes")
    yield from _database(instance)
    for name, section in settings.upstreams.items():
        if section.kind == "sandbox":
            yield Finding("ok", f"upstream {name}: sandbox, answers by itself")
        else:
            url = section.base_url or TWILIO_URL
            problem = _reach(url)
            yield Finding("bad" if problem else "ok", f"upstream {name}: {problem or 'reachable'}")
    yield from _payments(settings)
    yield from _people(settings)
    used = {route.upstream for route in settings.routes}
    used |= {name for model in settings.models for name in (model.upstream, model.fallback) if name}
    for name in sorted(set(settings.upstreams) - used):
        yield Finding("warn", f"upstream {name}: no route uses it")
    for route in instance.catalog.routes:
        earned = settings.usd_per_credit * route.credits
        if route.cost_usd is not None and route.cost_usd > earned:
            yield Finding(
                "warn", f"price {route.path}: costs ${route.cost_usd:f}, brings ${earned:f}"
            )
    yield from _models(instance)


def _models(instance: Instance) -> Iterator[Finding]:
    """Models that nothing serves, and those whose calls cost more than they bring."""
    for section in instance.settings.models:
        if section.id not in instance.catalog.models:
            yield Finding("warn", f"model {section.id}: no route serves it")
    for model in instance.catalog.models.values():
        loss = rates.loss(model, instance.settings.usd_per_credit)
        if loss is not None:
            yield Finding(
                "warn",
                f"price {model.id}: {loss.input_tokens} tokens in and {loss.output_tokens} out"
                f" cost ${loss.cost:f}, bring ${loss.earned:f}",
            )


def _payments(settings: Settings) -> Iterator[Finding]:
    """Whether somebody settles payments on each network, and whether its node answers."""
    if settings.payments is None:
        return
    from core.payments import chain  # needs packages that are there only with [x402]

    for network in settings.payments.networks.values():
        name = f"facilitator of {network.id}"
        try:
            found = facilitator.supported(network)
        except Refusal as refusal:
            yield Finding("bad", f"{name}: {refusal.message}")
        else:
            told = "settles payments" if found.settles else "does not settle payments there"
            yield Finding("ok" if found.settles else "bad", f"{name}: {told}")
        if network.rpc is None:
            yield Finding(
                "warn",
                f"rpc of {network.id}: none, so a settlement whose end is not heard stays"
                " unconfirmed until the facilitator tells",
            )
            continue
        problem = chain.problem(network)
        yield Finding("bad" if problem else "ok", f"rpc of {network.id}: {problem or 'reachable'}")


def _people(settings: Settings) -> Iterator[Finding]:
    """Whether those who vouch for people, and the mail server, can be reached."""
    for issuer in settings.issuers:
        problem = None if issuer.jwks_url is None else _reach(issuer.jwks_url)
        told = "its key is here" if issuer.jwks_url is None else "reachable"
        yield Finding("bad" if problem else "ok", f"issuer {issuer.issuer}: {problem or told}")
    for name, provider in settings.oidc.items():
        problem = _reach(provider.server_metadata_url)
        yield Finding("bad" if problem else "ok", f"oidc {name}: {problem or 'reachable'}")
    if settings.smtp is not None:
        try:
            with socket.create_connection(
                (settings.smtp.host, settings.smtp.port), _PATIENCE_SECONDS
            ):
                yield Finding("ok", f"smtp {settings.smtp.host}: reachable")
        except OSError as error:
            yield Finding("bad", f"smtp {settings.smtp.host}: {error}")


def _reach(url: str) -> str | None:
    return upstream.reach(url, _PATIENCE_SECONDS)


def _database(instance: Instance) -> Iterator[Finding]:
    if instance.trouble is not None:
        yield Finding("bad", f"database: {instance.trouble}")
        return
    try:
        instance.db.write(lambda tx: limits.prune(tx, clock.now_ms()))
        with instance.db.snapshot() as tx:
            check = tx.rows("PRAGMA quick_check(1)")[0][0]
            totals, faults = ledger.verify(tx)
    except Refusal as refusal:
        yield Finding("bad", f"database: {refusal.message}")
        return
    version = apsw.sqlite_lib_version()
    sound = check == "ok"
    yield Finding("ok" if sound else "bad", f"database: SQLite {version}, check {check}")
    yield Finding(
        "bad" if faults else "ok",
        faults[0] if faults else f"books: {totals.entries} entries add up",
    )
