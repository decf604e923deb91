"""What models ask for and what they cost, in words; and whether the one is less than the other."""

from decimal import Decimal, localcontext
from typing import NamedTuple

from core.tariff import Model

_PLACES = 60


def asked(model: Model) -> str:
    """A model's price in words."""
    section = model.section
    credits = section.credits_per_request
    words = [f"{credits:,} credit{'' if credits == 1 else 's'} a request"]
    if model.output_rate:
        covered = section.included_output_tokens
        beyond = f" beyond {covered:,}" if covered else ""
        words.append(f"{section.credits_per_1k_tokens} per 1,000 output tokens{beyond}")
    if model.input_rate:
        words.append(f"{section.credits_per_1k_input_tokens} per 1,000 input tokens")
    return ", ".join(words)


def costs(model: Model) -> str | None:
    """What a model costs the operator, in words, as far as the config says."""
    section = model.section
    rates = ((section.cost_usd_per_1m_input, "in"), (section.cost_usd_per_1m_output, "out"))
    known = [f"${rate} per million tokens {way}" for rate, way in rates if rate is not None]
    return ", ".join(known) or None


class Working(NamedTuple):
    """How the price of some tokens comes about, in exact credits."""

    request: int
    beyond: int  # output tokens that the request does not cover
    output: Decimal
    input: Decimal
    exact: Decimal
    price: int  # the same, rounded up


def working(model: Model, output_tokens: int, input_tokens: int) -> Working:
    """How the price of some tokens comes about, at the rates of now."""
    section = model.section
    beyond = max(0, output_tokens - section.included_output_tokens)
    with localcontext(prec=_PLACES):
        output = (beyond * Decimal(section.credits_per_1k_tokens)).scaleb(-3)
        sent = (input_tokens * Decimal(section.credits_per_1k_input_tokens)).scaleb(-3)
        exact = section.credits_per_request + output + sent
        output, sent, exact = output.normalize(), sent.normalize(), exact.normalize()
    price = model.price(output_tokens, input_tokens)
    return Working(section.credits_per_request, beyond, output, sent, exact, price)


class Loss(NamedTuple):
    """A call that costs more than it brings, in dollars."""

    output_tokens: int
    input_tokens: int
    cost: Decimal
    earned: Decimal


def loss(model: Model, usd_per_credit: Decimal) -> Loss | None:
    """A call that costs the operator more than it brings, if the config makes one possible: the
    smallest, the longest answer that the request covers, the longest of all, and that to the
    longest question. What a credit is worth is what it brings."""
    section = model.section
    most, window = section.max_output_tokens, section.context_window or 0
    covered = min(section.included_output_tokens, most)
    longest = max(1, window - most)
    for output, sent in ((1, 1), (covered, 1), (most, 1), (most, longest), (0, max(1, window))):
        cost = Decimal(model.cost(output, sent) or 0)
        earned = usd_per_credit * model.price(output, sent)
        if cost > earned:
            return Loss(output, sent, cost.normalize(), earned)
    return None
