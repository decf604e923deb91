"""The operator's pages of vouchers."""

from flask import Response, flash, redirect, request
from flask_login import login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints.admin import PER_PAGE, amount, section
from blueprints.pages import cursor, field, names_of, once, operate, show, whole
from blueprints.rendering import instance
from core import vouchers
from core.errors import Refusal

blueprint = section("admin_vouchers")


@blueprint.route("/vouchers", methods=["GET", "POST"])
@login_required
def all_vouchers() -> Response:
    """The vouchers there are; those just made show their codes, only now."""
    codes: list[str] = []
    problem, before = None, cursor()

    if request.method == "POST":
        try:
            codes = _make_vouchers()
        except Refusal as refusal:
            problem = refusal
    with instance().db.reading() as tx:
        found = vouchers.page(tx, before, PER_PAGE + 1)
        names = names_of(tx, {voucher.created_by for voucher in found})
    shown = found[:PER_PAGE]
    return show(
        "admin/vouchers.html", problem=problem, codes=codes, vouchers=shown, names=names,
        older=shown[-1].number if len(found) > len(shown) else None,
    )  # fmt: skip


def _make_vouchers() -> list[str]:
    credits, count, note = amount(least=1), whole("count", least=1) or 1, field("note")
    first_id = once("vch")
    return operate(lambda tx, by, now: vouchers.make(tx, credits, count, note, now, by, first_id))


@blueprint.route("/vouchers/<voucher_id>/cancel", methods=["GET", "POST"])
@login_required
def cancel_voucher(voucher_id: str) -> BaseResponse:
    """Ask first, then make a code worthless."""
    if request.method != "POST":
        return show("admin/cancel_voucher.html", voucher_id=voucher_id)
    operate(lambda tx, by, now: vouchers.cancel(tx, voucher_id, now, by))
    flash("The voucher is worth nothing any more.")
    return redirect("/admin/vouchers", 303)
