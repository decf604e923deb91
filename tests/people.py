"""People around one account of a `Box`: who owns it, who else does, a member, and a stranger.

Each holds a session token, got once as the command line gives it, so that a module's tests can
share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
from inprocess import Box, CheapSecret
from server import Answer

from core import clock, members, users
from core.audit import COMMAND_LINE, Actor

_numbers = count(1)

# Enough routes to see whether a key works, and no rate limit that tests would run into.
CONFIG = """
[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/echo"
methods = ["GET", "POST"]
upstream = "sandbox"
credits = 3

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
scope = "sms:send"
credits = 1
per = "sms_segment"
cost_usd = "0.0079"

[limits]
requests_per_minute = 1000000
"""


@dataclass(frozen=True)
class Person:
    """A user, and a session token of theirs for one account."""

    email: str
    id: str
    account: str  # the one the token spends
    token: str
    member_id: str

    @property
    def name(self) -> str:
        return self.email.partition("@")[0]


@dataclass(frozen=True)
class House:
    """One account's owner (whose account it is), second owner and member; and a stranger, who
    owns an account of their own."""

    owner: Person
    second: Person
    member: Person
    stranger: Person

    def __getitem__(self, name: str) -> Person:
        found: Person = getattr(self, name)
        return found

    @property
    def account(self) -> str:
        return self.owner.account


def person(box: Box, credits: int = 0, *, operator: bool = False) -> Person:
    """A new user with a token for their own account."""
    email, now = f"person{next(_numbers)}@example.com", clock.now_ms()
    user = box.write(lambda tx: users.add(tx, email, None, operator, now, COMMAND_LINE))
    if credits:
        box.grant(user.account_id, credits)
    (member_id,) = box.row("SELECT id FROM membership WHERE user_id = :id", id=user.id)
    return Person(email, user.id, user.account_id, minted(box, email), member_id)


def minted(box: Box, who: str) -> str:
    """A fresh session token from the command line."""
    done = box.cli("tokens", "mint", who)
    assert done.exit_code == 0, done.output
    token: str = done.output.strip()
    return token


def token_for(box: Box, who: Person, account: str) -> str:
    """A token of the same sign-in for an account the person is a member of."""
    answer = box.post("/api/v1/session-tokens", who.token, {"account": account})
    assert answer.status == 201, answer.body
    token: str = answer.json()["token"]
    return token


def invited(box: Box, by: Person, email: str, **terms: Any) -> tuple[dict[str, Any], str]:
    """A fresh invitation as it was answered, and the token of its link."""
    answer = box.post("/api/v1/members", by.token, {"email": email, **terms})
    assert answer.status == 201, answer.body
    shown: dict[str, Any] = answer.json()
    return shown, urlsplit(shown["invite_url"]).query.removeprefix("token=")


def joined(box: Box, by: Person, who: Person | None = None, **terms: Any) -> Person:
    """A person (a new one, if none is given) who has followed an invitation, with a token for the
    account they have joined."""
    who = person(box) if who is None else replace(who, token=minted(box, who.email))
    shown, link = invited(box, by, who.email, **terms)
    now = clock.now_ms()
    box.write(lambda tx: members.join(tx, link, who.id, now, Actor(who.id)))
    token = token_for(box, who, by.account)
    return Person(who.email, who.id, by.account, token, shown["id"])


def house(box: Box, credits: int = 100) -> House:
    owner = person(box, credits)
    second, member = joined(box, owner, role="owner"), joined(box, owner)
    return House(owner, second, member, person(box))


def told(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


def audited(box: Box, *wanted: str) -> list[tuple[Any, ...]]:
    """These columns of the whole audit log, the oldest first."""
    with box.instance.db.reading() as tx:
        return tx.rows(f"SELECT {', '.join(wanted)} FROM audit ORDER BY number")


def pages(box: Box, path: str, token: str, limit: int) -> Iterator[list[dict[str, Any]]]:
    """All pages of a list, checked for shape."""
    cursor, sign = "", "&" if "?" in path else "?"
    while True:
        answer = box.get(f"{path}{sign}limit={limit}{cursor}", token)
        assert answer.status == 200, answer.body
        page = answer.json()
        assert list(page) == ["data", "has_more", "next_cursor"]
        assert page["has_more"] is (page["next_cursor"] is not None)
        assert len(page["data"]) <= limit
        yield page["data"]
        if not page["has_more"]:
            return
        cursor = f"&cursor={page['next_cursor']}"


def cheaply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys made over HTTP get a hash that costs nothing, as those of `Box.key` have."""
    monkeypatch.setattr("blueprints.keys.NewSecret", CheapSecret)
