"""The only module that moves credits.

A paid call is a hold that is captured or voided exactly once; everything else is an entry. Guards
stand in WHERE and CHECK, never in a read followed by a write, so no race can pass them. Amounts are
whole credits. A function whose first argument is `tx` runs in the caller's transaction.
"""

from typing import Any, NamedTuple

from core import audit, clock, daily, errors, tokens
from core.audit import Actor
from core.daily import Ended
from models import Database, Tx

LARGEST_AMOUNT = 10**15
NO_LIMIT = 10**9  # of calls in flight
_ENTRY = "number, id, created_at, kind, amount, balance, reference, note"
OPERATOR_ACCOUNT = "acct_operator"


class Standing(NamedTuple):
    """An account at one moment, in credits."""

    balance: int
    held: int

    @property
    def available(self) -> int:
        return self.balance - self.held


class Guard(NamedTuple):
    """A condition on other tables that must still hold when credits are set aside.

    `sql` is a boolean expression over named parameters; the module that owns the table writes it.
    """

    sql: str
    params: dict[str, Any]


class NewCall(NamedTuple):
    """What is known of a call when its credits are set aside."""

    id: str
    request_id: str
    account_id: str
    payer: str
    key_id: str | None
    user_id: str | None
    route: str
    method: str
    units: int
    price: int  # credits the call would cost at most
    held: int  # credits set aside: the price, or 0 for the operator
    incarnation: str
    created_at: int
    idempotency_key: str | None = None
    credit_window_at: int | None = None
    member_window_at: int | None = None
    model: str | None = None  # as the caller named it


class Outcome(NamedTuple):
    """How a call ended, for its record."""

    upstream_status: int | None
    duration_ms: int | None
    units: int = 1
    price: int = 0
    estimated: bool = False
    cost_usd: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class Resolved(NamedTuple):
    """A hold that has just been resolved, and the account after it."""

    standing: Standing
    captured: int
    released: int
    call: Ended
    idempotency_key: str | None
    credit_window_at: int | None
    member_window_at: int | None


# Accounts


def open_account(tx: Tx, now: int) -> str:
    """A new, empty account; its id."""
    account_id = tokens.new_id("acct")
    tx.run(
        "INSERT INTO account (id, created_at) VALUES (:id, :now)", {"id": account_id, "now": now}
    )
    return account_id


def has_accounts(tx: Tx) -> bool:
    """Whether anybody but the operator key has an account."""
    query = "SELECT 1 FROM account WHERE id <> :id LIMIT 1"
    return tx.row(query, {"id": OPERATOR_ACCOUNT}) is not None


def standing(tx: Tx, account_id: str) -> Standing:
    """Balance and held of an account. Raises `not_found`."""
    row = tx.row("SELECT balance, held FROM account WHERE id = :id", {"id": account_id})
    if row is None:
        raise errors.not_found()
    return Standing(*row)


def has_called(tx: Tx, account_id: str) -> bool:
    """Whether an account has ever made a call that was let through."""
    row = tx.row("SELECT last_call FROM account WHERE id = :id", {"id": account_id})
    return row is not None and row[0] > 0


def status_of(tx: Tx, account_id: str) -> str:
    """`active`, `suspended` or `closed`. Raises `not_found`."""
    row = tx.row("SELECT status FROM account WHERE id = :id", {"id": account_id})
    if row is None:
        raise errors.not_found()
    return str(row[0])


def last_topup_at(tx: Tx, account_id: str) -> int | None:
    """When credits were last bought for an account."""
    row = tx.row("SELECT last_topup_at FROM account WHERE id = :id", {"id": account_id})
    return None if row is None else row[0]


# Holds


def hold(tx: Tx, call: NewCall, guard: Guard, most_calls: int) -> Standing | None:
    """Set `call.held` credits aside and record the call as in flight, or do nothing.

    None means refused: the account is not active, lacks the credits, already has `most_calls` in
    flight, or the guard no longer holds; `why_not_held` says which.
    """
    row = tx.row(
        "UPDATE account SET held = held + :n, open_calls = open_calls + 1,"
        " last_call = last_call + 1"
        " WHERE id = :account AND status = 'active' AND balance - held >= :n"
        f" AND open_calls < :most_calls AND {guard.sql}"
        " RETURNING balance, held, last_call",
        guard.params | {"n": call.held, "account": call.account_id, "most_calls": most_calls},
    )
    if row is None:
        return None
    balance, held, number = row
    tx.run(
        "INSERT INTO call (id, request_id, account_id, number, payer, key_id, user_id, route,"
        " method, model, units, price, held, created_at, incarnation, idempotency_key,"
        " credit_window_at, member_window_at)"
        " VALUES (:id, :request_id, :account, :number, :payer, :key_id, :user_id, :route, :method,"
        " :model, :units, :price, :held, :now, :incarnation, :idempotency_key, :credit_window_at,"
        " :member_window_at)",
        {
            "id": call.id,
            "request_id": call.request_id,
            "account": call.account_id,
            "number": number,
            "payer": call.payer,
            "key_id": call.key_id,
            "user_id": call.user_id,
            "route": call.route,
            "method": call.method,
            "model": call.model,
            "units": call.units,
            "price": call.price,
            "held": call.held,
            "now": call.created_at,
            "incarnation": call.incarnation,
            "idempotency_key": call.idempotency_key,
            "credit_window_at": call.credit_window_at,
            "member_window_at": call.member_window_at,
        },
    )
    return Standing(balance, held)


def why_not_held(tx: Tx, account_id: str, credits: int, most_calls: int) -> errors.Refusal | None:
    """The reason the account itself refused a hold in this transaction, or None if it did not."""
    row = tx.row(
        "SELECT status, status_reason, balance, held, open_calls FROM account WHERE id = :id",
        {"id": account_id},
    )
    if row is None:
        return errors.not_found()
    status, reason, balance, held, open_calls = row
    if status != "active":
        return account_suspended(reason)
    if open_calls >= most_calls:
        return errors.rate_limited("This account has too many calls in flight.", 1)
    if balance - held < credits:
        return errors.insufficient_credits(balance - held, credits)
    return None


def account_suspended(reason: str | None) -> errors.Refusal:
    return errors.Refusal(
        "account_suspended", "This account is suspended.", fields={"reason": reason}
    )


def suspend_account(tx: Tx, account_id: str, reason: str | None, now: int, by: Actor) -> None:
    """Stop an account's calls until it is resumed. Raises `not_found`, `conflict`."""
    _change_status(tx, account_id, ("active", "suspended"), "suspended", reason)
    audit.note(tx, by, "account.suspended", now, account_id, account_id, reason=reason)


def resume_account(tx: Tx, account_id: str, now: int, by: Actor) -> None:
    """Let a suspended account spend again. Raises `not_found`, `conflict`."""
    _change_status(tx, account_id, ("suspended",), "active", None)
    audit.note(tx, by, "account.resumed", now, account_id, account_id)


def close_account(tx: Tx, account_id: str, now: int, by: Actor) -> None:
    """End an account for good. Its balance stays in the books, and moves no more but for what is
    in flight. Raises `not_found`, `conflict`."""
    _change_status(tx, account_id, ("active", "suspended"), "closed", "closed")
    audit.note(tx, by, "account.closed", now, account_id, account_id)


def _change_status(
    tx: Tx, account_id: str, before: tuple[str, ...], status: str, reason: str | None
) -> None:
    now_is = status_of(tx, account_id)
    if now_is not in before or account_id == OPERATOR_ACCOUNT:
        raise errors.Refusal("conflict", f"The account is {now_is}.")
    tx.run(
        "UPDATE account SET status = :status, status_reason = :reason"
        " WHERE id = :id AND status = :before",
        {"id": account_id, "status": status, "reason": reason, "before": now_is},
    )


_ENDED = (
    " RETURNING held, idempotency_key, credit_window_at, member_window_at, account_id, key_id,"
    " user_id, route, model, number, created_at"
)


def capture(tx: Tx, call_id: str, credits: int, outcome: Outcome, now: int) -> Resolved | None:
    """Turn a hold into a charge of `credits`, never above it, and release the rest.

    None when the hold was resolved already: the first ending stands.
    """
    row = tx.row(
        "UPDATE call SET status = 'captured',"
        " captured = CASE WHEN held < :credits THEN held ELSE :credits END, units = :units,"
        " price = :price, upstream_status = :upstream_status, duration_ms = :duration_ms,"
        " estimated = :estimated, cost_usd = :cost_usd, input_tokens = :input_tokens,"
        " output_tokens = :output_tokens"
        f" WHERE id = :id AND status = 'held'{_ENDED}",
        {
            "id": call_id,
            "credits": credits,
            "units": outcome.units,
            "price": outcome.price,
            "upstream_status": outcome.upstream_status,
            "duration_ms": outcome.duration_ms,
            "estimated": int(outcome.estimated),
            "cost_usd": outcome.cost_usd,
            "input_tokens": outcome.input_tokens,
            "output_tokens": outcome.output_tokens,
        },
    )
    if row is None:
        return None
    held, *promises = row[:4]
    call, captured = Ended(*row[4:]), min(held, credits)
    account = tx.row(
        "UPDATE account SET balance = balance - :captured, held = held - :held,"
        " open_calls = open_calls - 1, "
        " last_entry = last_entry + CASE WHEN :captured > 0 THEN 1 ELSE 0 END"
        " WHERE id = :account RETURNING balance, held, last_entry",
        {"account": call.account_id, "captured": captured, "held": held},
    )
    assert account is not None  # a call's account is never deleted
    balance, still_held, number = account
    if captured > 0:
        _enter(
            tx, call.account_id, number, "capture", -captured, balance, call_id, None, now,
            call.key_id,
        )  # fmt: skip
    daily.add_call(tx, call, captured, False, outcome.cost_usd)
    return Resolved(Standing(balance, still_held), captured, held - captured, call, *promises)


def void(tx: Tx, call_id: str, outcome: Outcome) -> Resolved | None:
    """Give a hold back whole. None when it was resolved already: the first ending stands."""
    row = tx.row(
        "UPDATE call SET status = 'voided', upstream_status = :upstream_status,"
        f" duration_ms = :duration_ms WHERE id = :id AND status = 'held'{_ENDED}",
        {
            "id": call_id,
            "upstream_status": outcome.upstream_status,
            "duration_ms": outcome.duration_ms,
        },
    )
    if row is None:
        return None
    held, *promises = row[:4]
    call = Ended(*row[4:])
    account = tx.row(
        "UPDATE account SET held = held - :held, open_calls = open_calls - 1"
        " WHERE id = :account RETURNING balance, held",
        {"account": call.account_id, "held": held},
    )
    assert account is not None  # a call's account is never deleted
    daily.add_call(tx, call, 0, True, None)
    return Resolved(Standing(*account), 0, held, call, *promises)


# Entries


def add_credits(
    tx: Tx, account_id: str, kind: str, credits: int, reference: str, note: str | None, now: int,
    key_id: str | None = None,
) -> Standing | None:  # fmt: skip
    """Move the balance by a `grant`, `signup`, `topup`, `voucher`, `refund` or `adjustment` of
    `credits`, signed.

    None when `reference` was used for this kind already: a replay moves nothing. Raises
    `validation_error` for zero or too much, `insufficient_credits` when a negative amount is not
    available, `not_found` for an unknown account.
    """
    if credits == 0 or abs(credits) > LARGEST_AMOUNT:
        raise errors.invalid_body(
            f"An amount is a whole number of credits, not zero, at most {LARGEST_AMOUNT}.", "amount"
        )
    known = tx.row(
        "SELECT 1 FROM entry WHERE kind = :kind AND reference = :reference",
        {"kind": kind, "reference": reference},
    )
    if known is not None:
        return None
    row = tx.row(
        "UPDATE account SET balance = balance + :n, last_entry = last_entry + 1,"
        " last_topup_at = CASE WHEN :bought THEN :now ELSE last_topup_at END"
        " WHERE id = :account AND balance + :n >= held AND balance + :n <= :largest"
        # Who has paid has paid, even if the account was closed meanwhile.
        " AND (status <> 'closed' OR :bought)"
        " RETURNING balance, held, last_entry",
        {
            "account": account_id, "n": credits, "largest": LARGEST_AMOUNT, "now": now,
            "bought": kind == "topup",
        },
    )  # fmt: skip
    if row is None:
        now_standing = standing(tx, account_id)
        if status_of(tx, account_id) == "closed":
            raise errors.Refusal("conflict", "The account is closed.")
        if credits < 0:
            raise errors.insufficient_credits(now_standing.available, -credits)
        raise errors.invalid_body(
            f"A balance holds at most {LARGEST_AMOUNT} credits.", param="amount"
        )
    balance, held, number = row
    _enter(tx, account_id, number, kind, credits, balance, reference, note, now, key_id)
    return Standing(balance, held)


def merge(tx: Tx, account_id: str, into: str, name: str, now: int, by: Actor) -> None:
    """Move all credits of an account, which people know by that name, into another, and end it.

    Raises `conflict` while it has calls in flight, whose credits could come back to it, and
    `account_suspended`.
    """
    row = tx.row(
        "SELECT status, status_reason, balance, open_calls, last_topup_at FROM account"
        " WHERE id = :id",
        {"id": account_id},
    )
    assert row is not None  # somebody's wallet has it
    status, reason, balance, open_calls, topped_up_at = row
    if status != "active":
        raise account_suspended(reason)
    if open_calls:
        raise errors.Refusal(
            "conflict", "The account of this wallet has calls in flight. Try again in a moment."
        )
    if balance:
        for each, amount, note in (
            (account_id, -balance, f"to {into}"),
            (into, balance, f"from {name}"),
        ):
            reference = f"merged:{account_id}:{each}"
            moved = add_credits(tx, each, "adjustment", amount, reference, note, now)
            assert moved is not None  # an account is merged once
    if topped_up_at is not None:
        tx.run(
            "UPDATE account SET last_topup_at = MAX(COALESCE(last_topup_at, 0), :at)"
            " WHERE id = :id",
            {"id": into, "at": topped_up_at},
        )
    close_account(tx, account_id, now, by)
    audit.note(tx, by, "account.merged", now, into, account_id, credits=balance)


def refund(tx: Tx, call_id: str, note: str | None, now: int) -> tuple[int, Standing]:
    """Give a captured call's credits back, once; the amount and the account after it.

    Raises `not_found`, or `conflict` when nothing was captured or it was refunded before.
    """
    call = tx.row("SELECT account_id, captured, key_id FROM call WHERE id = :id", {"id": call_id})
    if call is None:
        raise errors.not_found()
    account_id, captured, key_id = call
    if captured == 0:
        raise errors.Refusal("conflict", "Nothing was captured for this call.")
    after = add_credits(tx, account_id, "refund", captured, call_id, note, now, key_id)
    if after is None:
        raise errors.Refusal("conflict", "This call was refunded before.")
    return captured, after


def _enter(
    tx: Tx, account_id: str, number: int, kind: str, amount: int, balance: int,
    reference: str, note: str | None, now: int, key_id: str | None = None,
) -> None:  # fmt: skip
    tx.run(
        "INSERT INTO entry (id, account_id, number, kind, amount, balance, reference, note, key_id,"
        " created_at) VALUES (:id, :account, :number, :kind, :amount, :balance, :reference, :note,"
        " :key_id, :now)",
        {
            "id": tokens.new_id("ent"),
            "account": account_id,
            "number": number,
            "kind": kind,
            "amount": amount,
            "balance": balance,
            "reference": reference,
            "note": note,
            "key_id": key_id,
            "now": now,
        },
    )
    daily.add_entry(tx, account_id, kind, amount, number, now)


def entries(
    db: Database, account_id: str, key_id: str | None, before: int | None, limit: int
) -> list[tuple[int, dict[str, Any]]]:
    """An account's entries, newest first, each with its number; of one key only, if given."""
    condition = "key_id = :key_id AND account_id = :account" if key_id else "account_id = :account"
    rows = db.rows(
        f"SELECT {_ENTRY} FROM entry"
        f" WHERE {condition} AND number < :before ORDER BY number DESC LIMIT :limit",
        {
            "account": account_id,
            "key_id": key_id,
            "before": LARGEST_AMOUNT if before is None else before,
            "limit": limit,
        },
    )
    return [(row[0], _entry_to_json(row)) for row in rows]


def entries_about(tx: Tx, call_id: str) -> list[dict[str, Any]]:
    """The entries a call has left: its capture, and a refund if there was one."""
    rows = tx.rows(
        f"SELECT {_ENTRY} FROM entry WHERE kind IN ('capture', 'refund') AND reference = :call",
        {"call": call_id},
    )
    return [_entry_to_json(row) for row in rows]


def entries_aside(
    tx: Tx, account_id: str, first: int, last: int, most: int
) -> list[dict[str, Any]]:
    """An account's entries between two numbers in order, captures aside; as many as `most`."""
    rows = tx.rows(
        f"SELECT {_ENTRY} FROM entry WHERE account_id = :account AND kind <> 'capture'"
        " AND number >= :first AND number <= :last ORDER BY number LIMIT :most",
        {"account": account_id, "first": first, "last": last, "most": most},
    )
    return [_entry_to_json(row) for row in rows]


def _entry_to_json(row: tuple[Any, ...]) -> dict[str, Any]:
    _, entry_id, created_at, kind, amount, balance, reference, note = row
    return {
        "id": entry_id,
        "created_at": clock.rfc3339(created_at),
        "kind": kind,
        "amount": amount,
        "balance": balance,
        "reference": reference,
        "note": note,
    }


def refunded(tx: Tx, since: int) -> dict[tuple[str, str], int]:
    """The credits that were refunded since then, by the call's route and model ('' for none), over
    all accounts."""
    rows = tx.rows(
        "SELECT c.route, COALESCE(c.model, ''), SUM(e.amount)"
        " FROM entry e JOIN call c ON c.id = e.reference"
        " WHERE e.kind = 'refund' AND e.created_at >= :since GROUP BY 1, 2",
        {"since": since},
    )
    return {(route, model): credits for route, model, credits in rows}


# Proof


class Totals(NamedTuple):
    """What `verify` counted."""

    accounts: int
    entries: int
    calls: int
    balance: int
    held: int


def verify(tx: Tx) -> tuple[Totals, list[str]]:
    """Recompute every account from its entries and open holds; the totals and all that is wrong."""
    faults = [
        f"{account}: balance {balance} but its entries add up to {entered}"
        for account, balance, entered in tx.rows(
            "SELECT a.id, a.balance, COALESCE(e.total, 0) FROM account a LEFT JOIN"
            " (SELECT account_id, SUM(amount) AS total FROM entry GROUP BY account_id) e"
            " ON e.account_id = a.id WHERE a.balance <> COALESCE(e.total, 0)"
        )
    ]
    faults += [
        f"{account}: {held} held in {open_calls} calls but its open calls hold {real} in {count}"
        for account, held, open_calls, real, count in tx.rows(
            "SELECT a.id, a.held, a.open_calls, COALESCE(c.total, 0), COALESCE(c.n, 0)"
            " FROM account a LEFT JOIN (SELECT account_id, SUM(held) AS total, COUNT(*) AS n"
            " FROM call WHERE status = 'held' GROUP BY account_id) c ON c.account_id = a.id"
            " WHERE a.held <> COALESCE(c.total, 0) OR a.open_calls <> COALESCE(c.n, 0)"
        )
    ]
    faults += [
        f"{call}: captured {captured} but entered {entered}"
        for call, captured, entered in tx.rows(
            "SELECT c.id, c.captured, COALESCE(-e.amount, 0) FROM call c LEFT JOIN entry e"
            " ON e.kind = 'capture' AND e.reference = c.id"
            " WHERE c.captured <> COALESCE(-e.amount, 0)"
            " OR (c.status <> 'captured' AND c.captured <> 0)"
        )
    ]
    faults += [
        f"{entry}: balance {balance} does not follow from the entry before it"
        for entry, balance in tx.rows(
            "SELECT id, balance FROM (SELECT id, balance, amount, number,"
            " LAG(balance, 1, 0) OVER (PARTITION BY account_id ORDER BY number) AS previous,"
            " LAG(number, 1, 0) OVER (PARTITION BY account_id ORDER BY number) AS before"
            " FROM entry) t WHERE balance <> previous + amount OR number <> before + 1"
        )
    ]
    faults += [
        f"{entry}: a {kind} of {amount} without such a call"
        for entry, kind, amount in tx.rows(
            "SELECT e.id, e.kind, e.amount FROM entry e LEFT JOIN call c"
            " ON c.id = e.reference AND c.account_id = e.account_id"
            " WHERE (e.kind = 'capture' AND e.amount <> -COALESCE(c.captured, 0))"
            " OR (e.kind = 'refund' AND e.amount <> COALESCE(c.captured, 0))"
        )
    ]
    faults += [
        f"{account}: {table} {count} of {last} are there"
        for table, number in (("entry", "last_entry"), ("call", "last_call"))
        for account, count, last in tx.rows(
            f"SELECT a.id, COALESCE(t.n, 0), a.{number} FROM account a LEFT JOIN"
            f" (SELECT account_id, COUNT(*) AS n FROM {table} GROUP BY account_id) t"
            f" ON t.account_id = a.id WHERE a.{number} <> COALESCE(t.n, 0)"
        )
    ]
    faults += [
        f"{account}: the account of an entry or a call is not there"
        for (account,) in tx.rows(
            "SELECT account_id FROM"
            " (SELECT account_id FROM entry UNION SELECT account_id FROM call) t"
            " WHERE NOT EXISTS (SELECT 1 FROM account WHERE id = t.account_id)"
        )
    ]
    faults += _payment_faults(tx)
    faults += daily.faults(tx)
    counts = tx.row(
        "SELECT (SELECT COUNT(*) FROM account), (SELECT COUNT(*) FROM entry),"
        " (SELECT COUNT(*) FROM call), (SELECT COALESCE(SUM(balance), 0) FROM account),"
        " (SELECT COALESCE(SUM(held), 0) FROM account)"
    )
    assert counts is not None  # an aggregate always answers
    return Totals(*counts), faults


def _payment_faults(tx: Tx) -> list[str]:
    """Settled payments and top-ups that are not each other's. A backup of an earlier version has
    no payments."""
    if not tx.row("SELECT 1 FROM sqlite_master WHERE name = 'payment'"):
        return []
    wrong = [
        f"{payment}: settled for {credits} credits but entered {entered}"
        for payment, credits, entered in tx.rows(
            "SELECT p.id, p.credits, COALESCE(e.amount, 0) FROM payment p LEFT JOIN entry e"
            " ON e.kind = 'topup' AND e.reference = p.id AND e.account_id = p.account_id"
            " WHERE p.status = 'settled' AND p.credits <> COALESCE(e.amount, 0)"
        )
    ]
    return wrong + [
        f"{entry}: a top-up without a settled payment"
        for (entry,) in tx.rows(
            "SELECT e.id FROM entry e LEFT JOIN payment p ON p.id = e.reference"
            " AND p.status = 'settled' WHERE e.kind = 'topup' AND p.id IS NULL"
        )
    ]
