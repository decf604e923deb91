"""The documentation this instance serves about itself, made from the code it describes."""

from flask import Blueprint, render_template

from core.errors import KINDS

blueprint = Blueprint("docs", __name__)


@blueprint.get("/docs/errors")
def errors() -> str:
    """Every error code, each with an anchor of its own: error bodies link here."""
    return render_template("docs/errors.html", kinds=KINDS)
