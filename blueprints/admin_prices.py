"""The operator's page of prices: what is asked, what it costs, what was left."""

from decimal import Decimal
from typing import NamedTuple

from flask import Response
from flask_login import login_required

from blueprints import pictures
from blueprints.admin import DAYS, section
from blueprints.pages import show
from blueprints.rendering import instance
from config import ModelSection
from core import clock, daily, ledger, rates
from core.daily import Sold
from core.rates import Loss
from core.tariff import Model

blueprint = section("admin_prices")


class Margin(NamedTuple):
    """What something brought, and what it cost in dollars."""

    total: Sold
    refunded: int  # credits given back
    margin: Decimal  # dollars


class Priced(NamedTuple):
    """A model: what it asks for and costs, in words, and a call that costs more than it brings."""

    section: ModelSection
    asked: str
    costs: str | None
    loss: Loss | None


@blueprint.get("/prices")
@login_required
def prices() -> Response:
    """What is asked for each route and model, what it costs, and what was left of it."""
    catalog, usd = instance().catalog, instance().settings.usd_per_credit
    since = pictures.today() - DAYS + 1
    with instance().db.snapshot() as tx:
        sold, refunds = daily.sold(tx, since), ledger.refunded(tx, since * clock.DAY_MS)
    called = [*sold, *refunds]

    def margin(part: int, name: str) -> Margin:
        """Of a route (part 0 of what was called) or of a model (part 1)."""
        total = daily.together(each for key, each in sold.items() if key[part] == name)
        refunded = sum(credits for key, credits in refunds.items() if key[part] == name)
        return Margin(total, refunded, usd * (total.captured - refunded) - total.cost_usd)

    paths = dict.fromkeys([route.path for route in catalog.routes] + [key[0] for key in called])
    ids = dict.fromkeys([*catalog.models, *(key[1] for key in called if key[1])])
    return show(
        "admin/prices.html", usd=usd,
        routes=[(p, [r for r in catalog.routes if r.path == p], margin(0, p)) for p in paths],
        models=[(i, _priced(catalog.models.get(i), usd), margin(1, i)) for i in ids],
    )  # fmt: skip


def _priced(model: Model | None, usd: Decimal) -> Priced | None:
    if model is None:
        return None
    return Priced(model.section, rates.asked(model), rates.costs(model), rates.loss(model, usd))
