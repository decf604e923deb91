"""What the pages of a signed-in person share: whose account they look at, acting for it, and how
numbers and times are written."""

import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

from flask import Flask, Response, g, request, session
from flask_login import current_user
from markupsafe import Markup

from blueprints.rendering import instance, page
from blueprints.visitors import CHOICE, Visitor, check_csrf, visitor
from core import access, clock, errors, ledger, members, sessions, tokens, users, wallets
from core.audit import Actor
from core.errors import Refusal
from core.ledger import Standing
from core.payments import records
from core.sessions import Seat
from core.signed import messages
from models import Tx

T = TypeVar("T")

_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+", re.ASCII)

KINDS = {  # of entries, in people's words
    "grant": "Grant",
    "signup": "Welcome credits",
    "topup": "Top-up",
    "voucher": "Voucher",
    "capture": "Charge",
    "refund": "Refund",
    "adjustment": "Adjustment",
}
PAYMENTS = {  # how they ended, likewise
    "settling": "being settled",
    "unknown": "not confirmed yet",
    "settled": "settled",
    "refused": "refused",
}
_NETWORKS = {  # by their CAIP-2 names
    "eip155:1": "Ethereum",
    "eip155:10": "OP Mainnet",
    "eip155:137": "Polygon",
    "eip155:8453": "Base",
    "eip155:42161": "Arbitrum One",
    "eip155:43114": "Avalanche",
    "eip155:43113": "Avalanche Fuji",
    "eip155:84532": "Base Sepolia",
    "eip155:11155111": "Ethereum Sepolia",
    "solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp": "Solana",
    "solana:EtWTRABZaYq6iMfeYKouRu166VU2xqa1": "Solana Devnet",
}


class Account(NamedTuple):
    """An account a person may look at, and what they call it."""

    id: str
    name: str
    role: str
    standing: Standing


def register(app: Flask) -> None:
    """Give templates their words for numbers and times."""
    app.jinja_env.globals["new_id"] = tokens.new_id
    app.jinja_env.filters.update(
        usdc=usdc, network=network, person=person, way_in=way_in,
        number=number, counted=counted, plural=plural, when=when, dollars=dollars,
        day_field=day_field, worth=lambda credits: instance().worth(credits),
    )  # fmt: skip


def before() -> None:
    """What every request to a page goes through: a form is ours, and loops are bounded."""
    check_csrf()
    if current_user.is_authenticated:
        access.count_reading(instance(), current_user.user)


def seat() -> Seat:
    """The person in the account they look at: the one their form names, or the one they chose, or
    their own. Raises `not_found` for a form of another's account."""
    if "seat" not in g:
        me, named = visitor(), request.form.get(CHOICE)
        with instance().db.reading() as tx:
            found = _seat(tx, me, named or session.get(CHOICE) or me.user.account_id)
            if found is None and named is None:  # the membership ended
                found = _seat(tx, me, me.user.account_id)
        if found is None:
            raise errors.not_found()
        g.seat = found
    result: Seat = g.seat
    return result


def choose(account_id: str) -> None:
    """Look at that account from now on. Raises `not_found` for one the person is no member of."""
    with instance().db.reading() as tx:
        if _seat(tx, visitor(), account_id) is None:
            raise errors.not_found()
    session[CHOICE] = account_id


def act(work: Callable[[Tx, Seat, Actor, int], T]) -> T:
    """Do something for the account in one durable transaction, unless the person may not any more.
    Raises `invalid_token` for who was signed out meanwhile, `account_suspended`."""
    me, account_id, now = visitor(), seat().account_id, clock.now_ms()
    by = me.actor

    def transaction(tx: Tx) -> T:
        current = _seat(tx, me, account_id)
        if current is None:
            raise _gone()
        access.require_active(current)
        return work(tx, current, by, now)

    return instance().db.write(transaction, durable=True)


def operate(work: Callable[[Tx, Actor, int], T]) -> T:
    """Do something for the whole instance, in the same way. Raises `forbidden` for who does not run
    it."""
    me, now = visitor(), clock.now_ms()
    by = me.actor._replace(is_operator=True)
    seat()  # what is made can then be shown

    def transaction(tx: Tx) -> T:
        current = _seat(tx, me, me.user.account_id)
        if current is None:
            raise _gone()
        if not current.is_operator:
            raise not_operator()
        return work(tx, by, now)

    return instance().db.write(transaction, durable=True)


def _gone() -> Refusal:
    return Refusal("invalid_token", "You were signed out, or left this account, a moment ago.")


def not_operator() -> Refusal:
    return Refusal("forbidden", "Only the operator of this instance may do that.")


def show(
    template: str, status: int = 200, problem: Refusal | None = None, **values: Any
) -> Response:
    """A page for who is signed in. `problem` is what was wrong with the form it answers, which is
    shown again as it was typed."""
    if problem is not None and problem.code == "invalid_token":
        raise _gone()  # who was signed out meanwhile is shown nothing any more
    if problem is not None and problem.code == "forbidden" and template.startswith("admin/"):
        raise problem  # nor is who was an operator until then
    me, here = visitor(), seat()
    with instance().db.reading() as tx:
        accounts = accounts_of(tx, me.user)
    account = next((found for found in accounts if found.id == here.account_id), None)
    if account is None:  # the membership ended a moment ago
        raise _gone()
    answer = page(
        template, status if problem is None else problem.kind.status,
        me=me.user, seat=here, accounts=accounts,
        account=account, base=instance().settings.public_url, problem=problem,
        typed=request.form if problem is not None else {}, **values,
    )  # fmt: skip
    if problem is not None:
        answer.headers.update(problem.headers)
    return answer


def accounts_of(tx: Tx, user: users.User) -> list[Account]:
    """The accounts a person is a member of, their own first."""
    found = []
    for member in members.accounts_of(tx, user.id):
        owner = users.owner_of(tx, member.account_id)
        name = "Your account"
        if member.account_id != user.account_id:
            name = f"{users.name_of(tx, owner.id)}’s account" if owner else member.account_id
        standing = ledger.standing(tx, member.account_id)
        found.append(Account(member.account_id, name, member.role, standing))
    return sorted(found, key=lambda account: account.id != user.account_id)


def names_of(tx: Tx, user_ids: set[str]) -> dict[str, str]:
    """What to call people, those who have left included."""
    return {user_id: users.name_of(tx, user_id) for user_id in user_ids}


def person(user_id: str) -> str:
    """What to call somebody of whom only the id is at hand."""
    with instance().db.reading() as tx:
        return users.name_of(tx, user_id)


def way_in(method: str) -> str:
    """How somebody signed in."""
    wallet = wallets.parse(method.removeprefix("wallet:"))
    return method if wallet is None else f"wallet {messages.named(wallet).short}"


def payments_of(tx: Tx, entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The payments that entries of an account came from, by their ids."""
    bought = records.by_ids(tx, (e["reference"] for e in entries if e["kind"] == "topup"))
    return {payment_id: payment.told() for payment_id, payment in bought.items()}


# Words


def number(value: int) -> str:
    """A whole number as people read it."""
    return f"{value:,}".replace("-", "−")


def usdc(units: int | str) -> str:
    """Millionths of a dollar as dollars, with at least the two places of a cent."""
    dollars = Decimal(units).scaleb(-6).normalize()
    exponent = dollars.as_tuple().exponent
    assert isinstance(exponent, int)  # a finite number's is
    return format(dollars.quantize(Decimal("0.01")) if exponent > -2 else dollars, ",f")


def network(name: str) -> str:
    """What people call a network; its CAIP-2 name, if they have no other for it."""
    return _NETWORKS.get(name, name)


def counted(value: int, thing: str) -> str:
    """A number of things."""
    return f"{number(value)} {plural(value, thing)}"


def plural(value: int, thing: str) -> str:
    """What so many of a thing are called."""
    return thing if value == 1 else f"{thing}s"


def dollars(amount: Decimal) -> str:
    """Dollars to the hundredth of a cent, with at least the two places of a cent."""
    rounded = f"{amount:z,.4f}"
    return rounded[:-2] if rounded.endswith("00") else rounded


def when(at_ms: int | str | None) -> Markup | str:
    """A time as people read it, in UTC; a dash for none."""
    if at_ms is None:
        return "–"
    stamp = at_ms if isinstance(at_ms, str) else clock.rfc3339(at_ms)
    text = stamp[:16].replace("T", " ")
    return Markup('<time datetime="{}">{} UTC</time>').format(stamp, text)


def day_name(day: int) -> str:
    """A day since the epoch as a date."""
    return clock.rfc3339(day * clock.DAY_MS)[:10]


def day_field(text: str) -> str:
    """The type of the field of a day: one with a calendar would not show what is none."""
    try:
        date.fromisoformat(text or "1970-01-01")
    except ValueError:
        return "text"
    return "date" if len(text) in (0, len("1970-01-01")) else "text"


# Fields of forms and queries. An empty one counts as left out.


def field(name: str) -> str | None:
    return request.form.get(name, "").strip() or None


def whole(name: str, least: int = 0) -> int | None:
    """A whole number of a form. Raises `validation_error`."""
    text = (field(name) or "").replace("−", "-")  # as `number` writes it
    if not text:
        return None
    if _THOUSANDS.fullmatch(text):  # likewise
        text = text.replace(",", "")
    if not re.fullmatch(r"[+-]?[0-9]{1,16}", text, re.ASCII) or int(text) < least:
        bounds = f" from {least} up" if least >= 0 else ""
        raise errors.invalid_body(f"“{text}” is not a whole number{bounds}.", name)
    return int(text)


def once(kind: str) -> str:
    """The id that a form carries, so that it makes its thing once however often it is sent."""
    text = field("once") or ""
    return text if re.fullmatch(rf"{kind}_[0-9a-f]{{24}}", text) else tokens.new_id(kind)


def required(name: str, label: str) -> str:
    """A text of a form. Raises `validation_error`."""
    text = field(name)
    if text is None:
        raise errors.invalid_body(f"{label} is missing.", name)
    return text


def cursor(name: str = "before") -> int | None:
    """The number of the row that the one before ended with. Raises `validation_error`."""
    text = request.args.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII):
        raise errors.invalid_body("That is not a place in this list.", name)
    return int(text)


def month_of(text: str | None) -> date:
    """The first day of a month like 2026-11; of this one for None. Raises `validation_error`."""
    wanted = text or clock.rfc3339(clock.now_ms())[:7]
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}", wanted, re.ASCII) or wanted < "1970":
            raise ValueError(wanted)
        return date.fromisoformat(f"{wanted}-01")
    except ValueError:
        raise errors.invalid_body("A month looks like 2026-11.", "month") from None


def _seat(tx: Tx, who: Visitor, account_id: str) -> Seat | None:
    return sessions.seat(tx, who.session.id, account_id, clock.now_ms())
