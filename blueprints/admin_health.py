"""The operator's pages of what goes on: calls in flight, who did what, how upstreams do."""

from typing import NamedTuple

from flask import Response, request
from flask_login import login_required

from blueprints import pictures
from blueprints.admin import PER_PAGE, section
from blueprints.pages import cursor, names_of, show
from blueprints.rendering import instance
from config import Network
from core import audit, calls, clock, daily, oversight, upstream
from core.adapters.sms import TWILIO_URL
from core.daily import Sold
from core.errors import Refusal
from core.payments import facilitator

blueprint = section("admin_health")

_PATIENCE_SECONDS = 3


@blueprint.get("/calls")
@login_required
def in_flight() -> Response:
    with instance().db.reading() as tx:
        found = calls.open_now(tx, 200)
        totals = oversight.totals(tx)
    return show("admin/calls.html", calls=found, totals=totals, now=clock.now_ms())


@blueprint.get("/audit")
@login_required
def audited() -> Response:
    """Who did what, in one account or in all."""
    account_id = request.args.get("account") or None
    rows = audit.page(instance().db, account_id, cursor(), PER_PAGE + 1)
    shown = rows[:PER_PAGE]
    with instance().db.reading() as tx:
        people = {done["actor"] for _, done in shown if done["actor"].startswith("user_")}
        names = names_of(tx, people)
    return show(
        "admin/audit.html", rows=[done for _, done in shown], names=names, account_id=account_id,
        older=shown[-1][0] if len(rows) > len(shown) else None,
    )  # fmt: skip


@blueprint.route("/health", methods=["GET", "POST"])
@login_required
def health() -> Response:
    """How upstreams have done of late; asked for, whether they can be reached now."""
    found = instance()
    with found.db.reading() as tx:
        lately = daily.sold(tx, pictures.today() - 1)
    reached, settled_by = {}, {}
    networks = {} if found.settings.payments is None else found.settings.payments.networks
    if request.method == "POST":
        for name, section in found.settings.upstreams.items():
            url = section.base_url or (TWILIO_URL if section.kind == "twilio" else None)
            reached[name] = None if url is None else upstream.reach(url, _PATIENCE_SECONDS)
        settled_by = {name: _why_not_settled(network) for name, network in networks.items()}
    rows = [_served(name, lately) for name in found.settings.upstreams]
    return show("admin/health.html", rows=rows, reached=reached, networks=list(networks),
                settled_by=settled_by)  # fmt: skip


def _why_not_settled(network: Network) -> str | None:
    """Why nobody settles payments on a network just now; None when its facilitator says it does."""
    try:
        found = facilitator.supported(network)
    except Refusal as refusal:
        return refusal.message
    return None if found.settles else "the facilitator does not settle payments there"


class Served(NamedTuple):
    """What an upstream is there for, and how the calls that went to it first have ended."""

    name: str
    kind: str
    paths: list[str]
    models: list[str]
    stands_in: list[str]  # models whose first upstream is another
    total: Sold


def _served(name: str, lately: dict[tuple[str, str], Sold]) -> Served:
    catalog, settings = instance().catalog, instance().settings
    by_model = [route for route in catalog.routes if route.models]
    # A model goes to its own upstream, or to that of the route.
    firsts = {
        (route.path, section.id)
        for route in by_model
        for section in settings.models
        if name == (section.upstream or route.upstream_name)
    }
    plain = {route.path for route in catalog.routes if route.upstream_name == name}
    plain -= {route.path for route in by_model}
    ids = [section.id for section in settings.models]
    return Served(
        name,
        settings.upstreams[name].kind,
        [r.path for r in catalog.routes if r.path in plain | {path for path, _ in firsts}],
        [model_id for model_id in ids if any(model_id == found for _, found in firsts)],
        [section.id for section in settings.models if by_model and section.fallback == name],
        daily.together(each for key, each in lately.items() if key in firsts or key[0] in plain),
    )
