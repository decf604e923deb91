"""What calls of language models cost, in credits and to the operator. Exact; rounded up once."""

from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction

from config import ModelSection, UpstreamSection

_SCALE = 10**12  # a rate has at most twelve decimal places
_PER_TOKEN = 1000 * _SCALE  # rates are for 1,000 tokens
_PLACES = 60
_DEAREST_CALL = 10**18  # the database can still write it; no account has so much


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the config, with the upstreams that serve it: the first, then the fallback."""

    section: ModelSection
    upstreams: tuple[UpstreamSection, ...]
    output_rate: int  # credits for 1,000 tokens, times 10^12
    input_rate: int
    # The names of a limit that its upstream was seen to pass over: some know only `max_tokens`.
    passed_over: set[str] = field(default_factory=set, compare=False)

    @classmethod
    def of(cls, section: ModelSection, upstreams: tuple[UpstreamSection, ...]) -> "Model":
        """A model by its section of the config."""
        output_rate = int(Decimal(section.credits_per_1k_tokens) * _SCALE)
        input_rate = int(Decimal(section.credits_per_1k_input_tokens) * _SCALE)
        return cls(section, upstreams, output_rate, input_rate)

    @property
    def id(self) -> str:
        return self.section.id

    @property
    def upstream_id(self) -> str:
        """What the upstream calls it."""
        return self.section.upstream_model or self.section.id

    def price(self, output_tokens: int, input_tokens: int | Fraction) -> int:
        """Credits for so many tokens, of which an estimate of the input may have a part."""
        beyond = max(0, output_tokens - self.section.included_output_tokens)
        exact = beyond * self.output_rate + input_tokens * self.input_rate
        return min(self.section.credits_per_request - (-exact // _PER_TOKEN), _DEAREST_CALL)

    def affordable(self, credits: int, input_tokens: int | Fraction) -> int | None:
        """The most output tokens whose price is within `credits`, not negative; None when even the
        request is not. Without a bound where output beyond what is included is free."""
        left = (credits - self.section.credits_per_request) * _PER_TOKEN - (
            input_tokens * self.input_rate
        )
        if left < 0:
            return None
        if self.output_rate == 0:
            return 10**15
        return self.section.included_output_tokens + left // self.output_rate

    def cost(self, output_tokens: int, input_tokens: int) -> str | None:
        """What so many tokens cost the operator in dollars, as a decimal string, if it is known."""
        rates = (self.section.cost_usd_per_1m_output, self.section.cost_usd_per_1m_input)
        if rates == (None, None):
            return None
        with localcontext(prec=_PLACES):
            total = sum(
                (
                    Decimal(rate or 0) * count
                    for rate, count in zip(rates, (output_tokens, input_tokens), strict=True)
                ),
                Decimal(0),
            )
            return format(total.scaleb(-6), "f")
