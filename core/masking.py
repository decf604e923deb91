"""Keeps secrets out of logs: the last thing that happens to a line before it is written."""

import logging
import re

from core import tokens

_SHORTEST_SECRET = 8  # a shorter value would blot out half of every line
_FORMS = re.compile(
    rf"{tokens.KEY_PATTERN}|eyJ[A-Za-z0-9_-]{{8,}}(?:\.[A-Za-z0-9_-]*){{1,4}}"
    r"|(?i:(?<=authorization: )\S+ \S+|(?<=payment-signature: )\S+)"
)


class MaskingFormatter(logging.Formatter):
    """Formats as usual, tracebacks included, then masks keys, tokens and the given secrets."""

    def __init__(self, fmt: str | None = None, secrets: list[str] | None = None) -> None:
        super().__init__(fmt)
        self._secrets = [secret for secret in secrets or [] if len(secret) >= _SHORTEST_SECRET]

    def format(self, record: logging.LogRecord) -> str:
        text = _FORMS.sub("[masked]", super().format(record))
        for secret in self._secrets:
            text = text.replace(secret, "[masked]")
        return text
