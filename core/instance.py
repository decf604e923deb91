"""What one process of a running instance keeps in hand."""

import math
import threading
from collections import deque
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cached_property
from typing import TYPE_CHECKING

import apsw

from config import Settings, UpstreamSection
from core import sandbox
from core.catalog import Catalog
from core.incarnation import Incarnation
from core.issuers import Issuers
from core.keys import Verifier
from core.signing import SigningKeys
from core.upstream import Outbound, Reply, Wires
from models import Database, SchemaTooNew, Tx

if TYPE_CHECKING:
    from core.payments.desk import Desk


class Instance:
    """Settings, database, routes and connections. Made in each process, after any fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.db = Database(settings.database_path)
        self.catalog = Catalog(settings)
        self.hosts = settings.hosts
        self.trouble: str | None = None  # why the database cannot be used
        self.verifier = Verifier()
        # Endings that the database could not take when they happened; `upkeep` tries again.
        self.unsettled: deque[Callable[[Tx], object]] = deque()
        self.signing_keys = SigningKeys(settings.folder)
        self._wires = Wires()
        self.issuers = Issuers(settings, self.db, self._wires)
        self.desk = self._desk()
        self._first_hold = threading.Lock()
        self.streams_end_at = math.inf  # on the monotonic clock; sooner when the process is to stop

    def _desk(self) -> "Desk | None":
        """Where payments are taken; None, and none of what that needs loaded, without [x402]."""
        if self.settings.payments is None:
            return None
        from core.payments.desk import Desk

        return Desk(self.settings, self.db, self.unsettled.append)

    def migrate(self) -> None:
        """Bring the database up to date; what is in the way is kept as `trouble`, because `restore`
        and `doctor` are needed most when it cannot be opened."""
        try:
            self.db.migrate()
        except (SchemaTooNew, apsw.Error, OSError) as error:
            self.trouble = f"the database cannot be used: {error}"

    def incarnation(self) -> str:
        """The name of this process on its holds; taken at its first."""
        with self._first_hold:
            return self._incarnation.id

    @cached_property
    def _incarnation(self) -> Incarnation:
        return Incarnation(self.settings.incarnations)

    def worth(self, credits: int) -> str:
        """The exact worth of so many credits in dollars, with at least the two places of a cent."""
        with localcontext(prec=60):  # the default of 28 digits could round the largest balances
            dollars = self.settings.usd_per_credit * credits
            exponent = dollars.as_tuple().exponent
            assert isinstance(exponent, int)  # a finite number's is
            return format(dollars.quantize(Decimal("0.01")) if exponent > -2 else dollars, "f")

    def send(self, upstream: UpstreamSection, request: Outbound) -> Reply:
        """The upstream's answer, from the network or the sandbox.

        Raises `provider_error` or `provider_timeout`.
        """
        if upstream.kind == "sandbox":
            return sandbox.send(request)
        return self._wires.send(request)
