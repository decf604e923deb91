"""What the operator's pages share: who may see them, amounts, places in lists."""

import re

from flask import Blueprint, request
from flask_login import current_user

from blueprints import pages
from blueprints.pages import not_operator, whole
from blueprints.rendering import instance
from blueprints.visitors import visitor
from core import errors
from core.payments import records

PER_PAGE = 50
DAYS = 30
_NEWEST = (10**15, "")


def section(name: str) -> Blueprint:
    """Pages under /admin, for operators only."""
    blueprint = Blueprint(name, __name__, url_prefix="/admin")
    blueprint.before_request(pages.before)
    blueprint.before_request(_operators_only)
    blueprint.context_processor(_in_the_menu)
    return blueprint


def _operators_only() -> None:
    if current_user.is_authenticated and not visitor().user.is_operator:
        raise not_operator()


def _in_the_menu() -> dict[str, int]:
    """What stands out on every one of these pages."""
    with instance().db.reading() as tx:
        return {"unconfirmed": records.unconfirmed(tx)}


def amount(least: int) -> int:
    """The credits a form asks for. Raises `validation_error`."""
    credits = whole("credits", least)
    if credits is None:
        raise errors.invalid_body("How many credits?", "credits")
    return credits


# Places in lists that are ordered by time


def place() -> tuple[int, str]:
    text = request.args.get("before")
    if text is None:
        return _NEWEST
    found = re.fullmatch(r"([0-9]{1,15})\.([a-z]+_[0-9a-z]{1,40})", text, re.ASCII)
    if found is None:
        raise errors.invalid_body("That is not a place in this list.", "before")
    return int(found[1]), found[2]


def after(created_at: int, row_id: str) -> str:
    return f"{created_at}.{row_id}"
