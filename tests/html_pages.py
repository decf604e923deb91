"""Pages read as a person reads them: by headings, buttons, tables and the words beside numbers.

A page that is not well formed, or whose labels lead nowhere, fails as soon as it is read.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import count
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from browser import PASSWORD, Browser
from inprocess import _CHEAP, Box, CheapSecret
from server import Answer

from core import clock, ledger, members, passwords, tokens
from core.audit import Actor
from core.ledger import Guard, NewCall

_VOID = {"br", "input", "link", "meta", "rect", "img", "hr"}
_BLOCKS = {
    "br", "p", "li", "td", "th", "tr", "h1", "h2", "h3", "dt", "dd", "option", "span", "code",
    "small", "button", "a", "figcaption", "summary", "label", "form",
}  # fmt: skip
_numbers = count(1)


class Node:
    """An element."""

    def __init__(self, tag: str, attributes: dict[str, str], parent: Node | None) -> None:
        self.tag = tag
        self.attributes = attributes
        self.parent = parent
        self.children: list[Node | str] = []

    def get(self, name: str, otherwise: str = "") -> str:
        return self.attributes.get(name, otherwise)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, *tags: str, **attributes: str) -> list[Node]:
        """The elements in it with one of these tags and these attributes."""
        return [
            node
            for node in self.walk()
            if node.tag in tags
            and all(node.get(name.rstrip("_")) == value for name, value in attributes.items())
        ]

    def one(self, *tags: str, **attributes: str) -> Node:
        (found,) = self.all(*tags, **attributes)
        return found

    def around(self, tag: str) -> Node:
        """The nearest element of that tag it stands in."""
        node: Node | None = self
        while node is not None and node.tag != tag:
            node = node.parent
        assert node is not None, tag
        return node

    @property
    def raw(self) -> str:
        """Its text exactly, as a script that copies it reads it."""
        return "".join(c if isinstance(c, str) else c.raw for c in self.children)

    @property
    def text(self) -> str:
        """Its words, with single spaces between them."""
        return " ".join(self._pieces().split()).replace(" .", ".").replace(" ,", ",")

    def _pieces(self) -> str:
        inside = "".join(c if isinstance(c, str) else c._pieces() for c in self.children)
        return f" {inside} " if self.tag in ("br", "p", "li", "td", "dt", "dd", "h3") else inside

    @property
    def name(self) -> str:
        """What a screen reader calls it."""
        return self.get("aria-label") or self.text

    @property
    def is_checked(self) -> bool:
        return "checked" in self.attributes

    def sends(self) -> list[tuple[str, str]]:
        """What a form would send as it stands."""
        found = []
        for node in self.all("input", "select"):
            if node.tag == "select":
                options = node.all("option")
                chosen = [option for option in options if "selected" in option.attributes]
                assert len(chosen) <= 1, f"{node.get('name')} has several chosen"
                first = [*chosen, *options][0]
                found.append((node.get("name"), first.get("value", first.text)))
            elif node.get("name") and (node.get("type") != "checkbox" or node.is_checked):
                found.append((node.get("name"), node.get("value")))
        return found

    def fields(self) -> dict[str, str]:
        """The same by name."""
        return dict(self.sends())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.at = Node("#document", {}, None)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attributes}, self.at)
        assert len(node.attributes) == len(attributes), f"an attribute twice on {tag}"
        self.at.children.append(node)
        if tag not in _VOID:
            self.at = node

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag and self.at.parent is not None, f"</{tag}> ends {self.at.tag}"
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


class Page:
    """A page of the dashboard as it was answered."""

    def __init__(self, answer: Answer) -> None:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8", answer.body
        self.answer = answer
        self.status = answer.status
        reader = _Reader()
        reader.feed(answer.body.decode())
        reader.close()
        assert reader.at is reader.root, f"{reader.at.tag} has no end"
        self.root = reader.root
        self._check()

    def _check(self) -> None:
        """What holds for every page."""
        ids = [node.get("id") for node in self.root.walk() if node.get("id")]
        assert len(ids) == len(set(ids)), ids
        for node in self.root.walk():
            for name in ("for", "aria-labelledby", "aria-describedby"):
                assert set((node.get(name) or "").split()) <= set(ids), node.attributes
            if node.tag in ("button", "a"):
                assert node.name, node.attributes
            is_seen = node.get("type") != "hidden" and "hidden" not in node.attributes
            if node.tag in ("input", "select") and is_seen and node.get("type") != "checkbox":
                label = self.root.all("label", for_=node.get("id"))
                assert len(label) == 1 or node.get("aria-label"), node.attributes
            if node.get("type") == "password":
                assert not node.get("value"), "a password is shown again"
            if node.tag == "form" and node.get("method") == "post":
                assert node.all("input", name="csrf_token"), node.get("action")
        assert len(self.root.all("h1")) == 1
        assert self.root.one("title").text.endswith(" · Farebox")

    @property
    def main(self) -> Node:
        return self.root.one("main")

    @property
    def text(self) -> str:
        return self.main.text

    @property
    def h1(self) -> str:
        return self.main.one("h1").text

    def headings(self, *tags: str) -> list[str]:
        return [node.text for node in self.main.all(*(tags or ("h1", "h2", "h3")))]

    def section(self, heading: str) -> Node:
        """The section under a heading of exactly that name."""
        (found,) = [node for node in self.main.all("h2") if node.text == heading]
        return found.around("section")

    def buttons(self, inside: Node | None = None) -> list[str]:
        """The names of the buttons that can be pressed, without scripts too."""
        nodes = (inside or self.root).all("button")
        return [node.name for node in nodes if "hidden" not in node.attributes]

    def alert(self) -> str:
        """What went wrong, as it is told."""
        return self.main.one("p", role="alert").text

    def notices(self) -> list[str]:
        return [node.text for node in self.main.all("p") if "notice" in node.get("class").split()]

    def done(self) -> list[str]:
        """What was just done, as it is told."""
        return [node.text for node in self.main.all("p", class_="done")]

    def tiles(self) -> dict[str, str]:
        return {
            tile.one("dt").text: tile.one("dd").text
            for tile in self.main.all("div")
            if "tile" in tile.get("class").split()
        }

    def facts(self) -> dict[str, str]:
        """The rows of tables that have a heading each."""
        return {
            row.all("th")[0].text: " ".join(cell.text for cell in row.all("td")).strip()
            for row in self.main.all("tr")
            if row.all("th", scope="row")
        }

    def table(self, first: str) -> list[list[str]]:
        """The rows of the table whose first column has that heading."""
        for table in self.main.all("table"):
            heads = [node.text for node in table.all("th", scope="col")]
            if heads[:1] == [first]:
                return [
                    [cell.text for cell in row.all("th", "td")]
                    for row in table.one("tbody").all("tr")
                ]
        raise AssertionError(f"no table of {first}")

    def items(self, inside: Node | None = None) -> list[Node]:
        """The rows of lists."""
        lists = (inside or self.main).all("ul", class_="rows")
        return [item for found in lists for item in found.all("li")]

    def item(self, words: str, inside: Node | None = None) -> Node:
        """The one row of a list that has these words."""
        (found,) = [item for item in self.items(inside) if words in item.text]
        return found

    def bars(self) -> list[str]:
        """The words of a picture's bars."""
        return [node.text for node in self.main.all("span", class_="tip")]

    def taken(self, name: str) -> str:
        """The text that stands beside a *Copy* button."""
        found = self.main.one("code", id=name)
        (button,) = self.main.all("button", **{"data-copy": name})
        assert (button.text, "hidden" in button.attributes) == ("Copy", True)
        return found.raw

    def link(self, name: str) -> str:
        (found,) = {node.get("href") for node in self.root.all("a") if node.name == name}
        return found

    def has_link(self, name: str) -> bool:
        return any(node.name == name for node in self.root.all("a"))

    def field(self, name: str) -> Node:
        """The field under a label."""
        (label,) = [node for node in self.main.all("label") if node.text == name]
        return self.main.one("input", "select", id=label.get("for"))


class Visit:
    """A person at a browser, who presses what is on pages."""

    def __init__(self, box: Box, email: str, browser: Browser) -> None:
        self.box = box
        self.email = email
        self.browser = browser

    @classmethod
    def sign_in(cls, box: Box, email: str, password: str = PASSWORD) -> Self:
        made = Browser(box, client=_address())
        answer = made.sign_in(email, password)
        assert answer.status == 303, answer.body
        return cls(box, email, made)

    def open(self, path: str, status: int = 200) -> Page:
        answer = self.browser.follow(self.browser.get(path))
        assert answer.status == status, (path, answer.status, answer.body.decode())
        return Page(answer)

    def press(
        self, page: Page | str, button: str, /, inside: Node | None = None, status: int = 200,
        typed: dict[str, Any] | None = None, **fields: Any,
    ) -> Page:  # fmt: skip
        """The page that pressing a button leads to, once fields were filled in. A list ticks
        several boxes; None leaves a box out."""
        shown = self.open(page) if isinstance(page, str) else page
        (found,) = [
            node
            for node in (inside or shown.root).all("button")
            if node.name == button and "hidden" not in node.attributes
        ]
        form = found.around("form")
        wanted = fields | (typed or {})
        known = {node.get("name") for node in form.all("input", "select")}
        assert set(wanted) <= known, (wanted, known)
        sent = [(name, value) for name, value in form.sends() if name not in wanted]
        for name, value in wanted.items():
            values = value if isinstance(value, list) else [] if value is None else [value]
            sent += [(name, str(each)) for each in values]
        action = form.get("action").partition("#")[0]
        if form.get("method") == "get":
            query = f"?{urlencode(sent)}" if sent else ""
            return self.open(f"{action}{query}", status)
        answer = self.browser.follow(
            self.browser.request(
                "POST", action, {"Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(sent).encode(),
            )
        )  # fmt: skip
        assert answer.status == status, (answer.status, answer.body.decode())
        return Page(answer)

    def sheet(self, path: str, status: int = 200) -> list[dict[str, str]]:
        """The rows of a CSV, by the names of its columns."""
        answer = self.browser.get(path)
        assert answer.status == status, answer.body
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
        text = answer.body.decode()
        assert text.count("\n") == text.count("\r\n")
        return list(csv.DictReader(io.StringIO(text, newline="")))

    def api(self, path: str, account: str | None = None) -> list[dict[str, Any]]:
        """All rows of a list of the API, as a script of this person would read them."""
        token, rows, cursor = self.browser.token(account), [], ""
        while True:
            answer = self.box.get(f"{path}?limit=100{cursor}", token)
            assert answer.status == 200, answer.body
            rows += answer.json()["data"]
            if not answer.json()["has_more"]:
                return rows
            cursor = f"&cursor={answer.json()['next_cursor']}"

    def crawl(self, start: str, most: int = 12) -> set[str]:
        """Every page that links and GET forms lead to from there; each must be there. Of those
        that differ by their query alone, some."""
        waiting, seen, alike = [start], set(), Counter[str]()
        while waiting:
            path = waiting.pop()
            plain = path.partition("#")[0]
            if plain in seen or plain.startswith(("/static/", "/oidc/", "/docs")):
                continue
            seen.add(plain)
            alike[urlsplit(plain).path] += 1
            if alike[urlsplit(plain).path] > most:
                continue
            answer = self.browser.follow(self.browser.get(plain))
            assert answer.status == 200, (plain, answer.status)
            if answer.headers["Content-Type"].startswith("text/csv"):
                continue
            page = Page(answer)
            found = [node.get("href") for node in page.root.all("a")]
            for form in page.root.all("form", method="get"):
                found.append(f"{form.get('action')}?{urlencode(form.sends())}".rstrip("?"))
            for target in found:
                if target.startswith("#"):
                    assert page.root.all(*_EVERY, id=target[1:]), (plain, target)
                else:
                    assert target.startswith("/"), (plain, target)
                    waiting.append(target)
        return seen


_EVERY = ("main", "section", "h1", "h2", "div", "p")


def _address() -> str:
    number = next(_numbers)
    return f"10.2.{number // 250}.{number % 250 + 1}"


def cheaply(patch: pytest.MonkeyPatch) -> None:
    """Keys and passwords get hashes that cost nothing to make or verify."""
    patch.setattr(passwords, "HASHER", _CHEAP)
    patch.setattr(passwords, "_NOBODYS", _CHEAP.hash("nobody's"))
    patch.setattr("blueprints.keys.NewSecret", CheapSecret)
    patch.setattr("blueprints.billing.NewSecret", CheapSecret)


def newcomer(box: Box, *options: str, credits: int = 0, password: str | None = PASSWORD) -> str:
    """The e-mail of a new user."""
    email = f"user{next(_numbers)}@example.com"
    stdin = None
    if password is not None:
        options, stdin = (*options, "--password-stdin"), f"{password}\n"
    done = box.cli("users", "add", email, *options, stdin=stdin)
    assert done.exit_code == 0, done.output
    if credits:
        box.grant(account_of(box, email), credits)
    return email


def visitor(box: Box, *options: str, credits: int = 0) -> Visit:
    """A new user who is signed in."""
    return Visit.sign_in(box, newcomer(box, *options, credits=credits))


def account_of(box: Box, email: str) -> str:
    found: str = box.row("SELECT account_id FROM user WHERE email = :e", e=email)[0]
    return found


def user_of(box: Box, email: str) -> str:
    found: str = box.row("SELECT id FROM user WHERE email = :e", e=email)[0]
    return found


def join(box: Box, account: str, owner: str, guest: str, **terms: Any) -> str:
    """Make a user a member of an account; the membership's id."""
    now, by = clock.now_ms(), Actor(user_of(box, owner))
    wanted = members.Terms(
        terms.get("role", "member"), terms.get("credit_limit"), terms.get("credit_period")
    )

    def work(tx: Any) -> str:
        member, token, _ = members.invite(tx, account, guest, wanted, now, by)
        members.join(tx, token, user_of(box, guest), now, Actor(user_of(box, guest)))
        return member.id

    return box.write(work)


def begin(box: Box, account: str, route: str, credits: int, **more: Any) -> str:
    """A call that is in flight; its id."""
    call_id, now = tokens.new_id("req"), more.pop("at", None) or clock.now_ms()
    call = NewCall(
        call_id, more.pop("request_id", call_id), account, more.pop("payer", "api_key"),
        more.pop("key_id", None), more.pop("user_id", None), route, "POST", 1, credits,
        more.pop("held", credits), box.instance.incarnation(), now,
    )  # fmt: skip
    assert not more
    held = box.write(lambda tx: ledger.hold(tx, call, Guard("TRUE", {}), 10**6))
    assert held is not None
    return call_id


def run(box: Box, curl: str, key: str = "") -> tuple[int, Any]:
    """Run a pasted curl as a shell would, against this box."""
    words = shlex.split(curl.replace("\\\n", "").replace("$FAREBOX_API_KEY", key))
    assert words[:2] == ["curl", "-sS"]
    url, method, headers, body = words[2], "GET", {}, None
    options = iter(words[3:])
    for option in options:
        if option == "-H":
            name, _, value = next(options).partition(": ")
            headers[name] = value
        elif option == "-d":
            body, method = next(options).encode(), "POST"
        else:
            raise AssertionError(option)
    assert url.startswith(box.settings.public_url + "/")
    answer = box.request(
        method, url.removeprefix(box.settings.public_url), headers=headers, body=body
    )
    return answer.status, json.loads(answer.body)


def number(text: str) -> int:
    """A number as pages write it."""
    return int(text.split()[0].replace(",", "").replace("−", "-"))


def query_of(path: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(path).query, keep_blank_values=True))
