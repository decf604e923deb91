"""Writers that wait together share one commit, carried out in the thread of the first of them. What
they do there is their own all the same, whoever leads."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest
from argon2.exceptions import VerificationError
from browser import PASSWORD, Browser
from flask import Flask, has_request_context, request
from forms import ANOTHER_PASSWORD, ONLY_SHOWN, filled, rules
from inprocess import _CHEAP, Box, CheapSecret, Clock
from people import CONFIG, cheaply, house, person
from server import Answer

from core import clock, members, passwords, sessions, tokens, users
from core.audit import COMMAND_LINE
from models import Database, Tx

LEADERS_PASSWORD = "the-leader's-long-pass-phrase"
AS_TYPED = [PASSWORD, ANOTHER_PASSWORD, LEADERS_PASSWORD]
LIMITS = "requests_per_minute = 1000000\nfailed_auth_per_minute = 1000000"
MORE = """
[instance]
signup = "open"
signup_credits = 3

[smtp]
url = "smtp://127.0.0.1:9"
from = "farebox@example.com"
"""
NEVER = -1  # held at no write
Meanwhile = Callable[[Tx], object] | None
whose: ContextVar[str] = ContextVar("whose")


class Queue:
    """Holds writes back until they stand in line as a test wants them: the first of them leads."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self._db = db
        self._write = db.write
        monkeypatch.setattr(db, "write", self._held)

    def _held(self, work: Callable[[Tx], Any], durable: bool = False) -> Any:
        visit = threading.current_thread()
        if isinstance(visit, Visit):
            visit.comes_to_a_write(durable)
        return self._write(work, durable=durable)

    def together(self, *visits: Visit, meanwhile: Callable[[Tx], object] | None = None) -> None:
        """Have all visits come to the writes they are held at, and those share one commit."""
        for visit in visits:
            visit.start()
            visit.at_the_write.wait(30)
        if meanwhile is not None:
            self._write(meanwhile)
        is_busy, go_on = threading.Event(), threading.Event()

        def occupy(tx: Tx) -> None:
            is_busy.set()
            assert go_on.wait(30)

        slow = threading.Thread(target=self._write, args=(occupy,), daemon=True)
        slow.start()
        assert is_busy.wait(30)
        for number, visit in enumerate(visits, start=1):
            visit.go_on.set()
            deadline = time.monotonic() + 30
            while len(self._db._queue) < number and visit.is_alive():
                assert time.monotonic() < deadline, "a write does not come"
                time.sleep(0.0002)
        go_on.set()
        for thread in (slow, *visits):
            thread.join(30)
            assert not thread.is_alive(), "it waits for ever"


class Visit(threading.Thread):
    """Something that writes, in a thread of its own, held at the write of that number."""

    def __init__(self, does: Callable[[], Any], held_at: int = 0) -> None:
        super().__init__(daemon=True)
        self.writes: list[bool] = []  # whether each was durable
        self.at_the_write, self.go_on = threading.Event(), threading.Event()
        self.answer: Any = None
        self._does = does
        self._held_at = held_at

    def run(self) -> None:
        try:
            self.answer = self._does()
        except BaseException as error:  # what a thread raised is part of the result
            self.answer = error
        self.at_the_write.set()  # one that never came to it holds nobody up

    def comes_to_a_write(self, durable: bool) -> None:
        if len(self.writes) == self._held_at:
            self.at_the_write.set()
            assert self.go_on.wait(30)
        self.writes.append(durable)

    @property
    def acts_at(self) -> int:
        """The write that does what was asked: those before it only count."""
        return self.writes.index(True) if True in self.writes else len(self.writes) - 1


# The database.


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "farebox.db")
    made.migrate()
    yield made
    made.close()


@dataclass
class Seen:
    """A job's name in its own context, and who ran it."""

    names: list[str | None]
    threads: list[int | None]


def named(db: Database, name: str | None, work: Callable[[Tx], object] = id) -> Visit:
    """A thread with a name in its context, whose job tells what it found there each time it ran."""
    seen = Seen([], [])

    def job(tx: Tx) -> Seen:
        seen.names.append(whose.get(None))
        seen.threads.append(threading.current_thread().ident)
        work(tx)
        return seen

    def does() -> tuple[Seen, str | None]:
        if name is not None:
            whose.set(name)
        return db.write(job, durable=name == "durable"), whose.get(None)

    return Visit(does)


@pytest.mark.parametrize("leads", ["the leader", None])
def test_each_job_runs_in_the_context_of_who_asked(
    db: Database, monkeypatch: pytest.MonkeyPatch, leads: str | None
) -> None:
    """Also when the leader has none: a paid call, upkeep."""

    def leave(tx: Tx) -> None:
        whose.set("left behind")

    names = [leads, "second", None, "durable", "last"]
    visits = [named(db, name, leave) for name in names]
    Queue(db, monkeypatch).together(*visits)
    for name, visit in zip(names, visits, strict=True):
        seen, left = visit.answer
        assert seen.names == [name]
        assert seen.threads == [visits[0].ident], "another led: this test shows nothing"
        assert left == name, "a job changed the context of who asked, or of who led"


def test_each_runs_in_its_own_context_again_when_the_batch_is_undone(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tx: Tx) -> None:
        tx.run("UPDATE account SET last_call = last_call + 1000")
        raise ValueError(f"that of {whose.get(None)}")

    names = ["first", "second", None, "failing", "last"]
    works = [id, id, id, fail, id]
    visits = [named(db, name, work) for name, work in zip(names, works, strict=True)]
    Queue(db, monkeypatch).together(*visits)
    assert db.row("SELECT max(last_call) FROM account") == (0,)
    for name, visit in zip(names, visits, strict=True):
        if name == "failing":
            assert isinstance(visit.answer, ValueError)
            continue
        seen, left = visit.answer
        runs = 1 if name == "last" else 2  # the last did not come to run with the others
        assert seen.names[0] == name
        assert len(seen.names) == runs
        assert seen.threads == [visits[0].ident] * runs
        assert left == name


@pytest.mark.parametrize("leads", ["a request", "none"])
def test_a_job_has_the_request_of_who_asked_or_none(
    db: Database, monkeypatch: pytest.MonkeyPatch, leads: str
) -> None:
    app = Flask("test")

    def word(tx: Tx) -> str | None:
        return request.form["word"] if has_request_context() else None

    def asked(text: str) -> Visit:
        def does() -> str | None:
            with app.test_request_context(method="POST", data={"word": text}):
                return db.write(word)

        return Visit(does)

    def unasked() -> Visit:
        return Visit(lambda: db.write(word))

    made = [("led", asked("led")), (None, unasked()), ("own", asked("own"))]
    made.insert(0, ("first", asked("first")) if leads == "a request" else (None, unasked()))
    Queue(db, monkeypatch).together(*(visit for _, visit in made))
    assert [visit.answer for _, visit in made] == [expected for expected, _ in made]


# The pages.


class Form(NamedTuple):
    """A form about to be sent, from a browser of that state."""

    rule: str
    path: str
    fields: dict[str, str]
    browser: str  # the name of its state, in `Stage.cookies`


class Outcome(NamedTuple):
    """What a visit came to, for who made it."""

    answer: tuple[Any, ...]  # with what the next page tells
    who: list[str]  # is signed in at that browser afterwards


class Alone(NamedTuple):
    """What a visit comes to with nobody else there."""

    outcome: Outcome
    changes: Counter[tuple[Any, ...]]
    writes: int
    acts_at: int  # the number of the write that does what was asked


class Stage:
    """An instance with people and their things, put back to the same state before each scene, so
    that what two scenes come to can be compared to the letter."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.house = house(box)
        self.owner, self.member = self.house.owner, self.house.member
        self.stranger, self.operator = self.house.stranger, person(box, operator=True)
        self.people = {
            "owner": self.owner, "member": self.member, "stranger": self.stranger,
            "operator": self.operator, "other operator": person(box, operator=True),
            "other": person(box), "second": self.house.second, "nobody": None, "nobody else": None,
        }  # fmt: skip
        self._not_here = {"nobody": person(box), "nobody else": person(box)}
        cheap = _CHEAP.hash(PASSWORD)
        box.run("UPDATE user SET password_hash = :cheap WHERE email IS NOT NULL", cheap=cheap)
        self.cookies: dict[str, dict[str, str]] = {}
        self.csrf: dict[str, str] = {}
        for name, who in self.people.items():
            me = self.browser(name, {})
            if who is not None:
                assert me.sign_in(who.email).status == 303
            self.csrf[name] = me.csrf("/login" if who is None else "/dashboard")
            self.cookies[name] = me.cookies
        self.rules = rules(box)
        self.forms = {
            (rule, name): self._form(rule, name)
            for rule in self.rules
            for pair in senders(rule)
            for name in pair
        }
        self._alone: dict[str, Alone] = {}
        self._saved = apsw.Connection(":memory:")
        self._live = apsw.Connection(str(box.settings.database_path))
        self._copy(self._live, self._saved)
        self.before = self.rows()
        places = [self.address(name) for name in self.people]
        said = repr([self.before, list(self.forms.values()), self.cookies, places])
        self._known = set(_WORD.findall(said))
        rows = (row for some in self.before.values() for row in some)
        self._known_bytes = {value for row in rows for value in row if isinstance(value, bytes)}

    def close(self) -> None:
        self._live.close()
        self._saved.close()

    def address(self, name: str) -> str:
        return f"10.7.0.{list(self.people).index(name) + 1}"

    def browser(self, name: str, cookies: dict[str, str] | None = None) -> Browser:
        """Each is somewhere else."""
        made = Browser(self.box, f"Browser of {name}", client=self.address(name))
        made.cookies = dict(self.cookies[name] if cookies is None else cookies)
        return made

    def _form(self, rule: str, name: str) -> Form:
        whose = self.people[name] or self._not_here[name]
        path, fields = filled(self.box, rule, whose)
        if rule == "/forgot":
            fields["email"] = whose.email
        if name in ("other operator", "nobody else", "other") or (
            name == "stranger" and rule.startswith("/dashboard")
        ):
            fields |= {
                "credits": "11", "count": "3", "note": "the leader's note", "name": "the leader's",
                "reason": "the leader's reason", "role": "member", "credit_limit": "8",
                "rate_limit": "10", "grace_seconds": "3600",
            }  # fmt: skip
            if rule != "/login":
                fields["password"] = LEADERS_PASSWORD
        return Form(rule, path, fields | {"csrf_token": self.csrf[name]}, name)

    def sent_by(self, rule: str, whose: str, name: str) -> Form:
        """A form about one person's things, sent by another."""
        form = self.forms[rule, whose]
        return form._replace(browser=name, fields=form.fields | {"csrf_token": self.csrf[name]})

    @staticmethod
    def _copy(source: apsw.Connection, target: apsw.Connection) -> None:
        with target.backup("main", source, "main") as backup:
            backup.step(-1)

    def rows(self) -> dict[str, Counter[tuple[Any, ...]]]:
        """All there are, but for their place in the order of all."""
        with self.box.instance.db.snapshot() as tx:
            return {
                table: Counter(tx.rows(f"SELECT {columns} FROM {table}"))
                for table, columns in tx.rows(
                    "SELECT m.name, group_concat(c.name) FROM sqlite_master m,"
                    " pragma_table_info(m.name) c WHERE m.type = 'table' AND c.name <> 'number'"
                    " GROUP BY m.name"
                )
            }

    def plain(self, value: Any) -> Any:
        """A value without what is drawn by lot each time."""
        if isinstance(value, bytes):
            return value if value in self._known_bytes else "bytes"
        if isinstance(value, str) and value.startswith("$argon2"):
            return next((f"hash of {text}" for text in AS_TYPED if _fits(value, text)), "hash")
        if isinstance(value, str):
            return _WORD.sub(lambda found: self._plain_word(found[0]), value)
        return value

    def _plain_word(self, word: str) -> str:
        drawn = len(word) >= 8 and re.search("[0-9A-Z]", word) and word not in self._known
        return "…" if drawn else word

    def changes(self) -> Counter[tuple[Any, ...]]:
        """What is not as it was: each row that is gone, and each that has come."""
        after, found = self.rows(), Counter[tuple[Any, ...]]()
        for table, rows in after.items():
            for sign, some in (("-", self.before[table] - rows), ("+", rows - self.before[table])):
                for row, times in some.items():
                    found[table, sign, *map(self.plain, row)] += times
        return found

    # Scenes.

    def visit(self, form: Form | None, held_at: int = 0) -> tuple[Visit, Browser | None]:
        """Somebody sends a form; none is a thread without any request."""
        if form is None:
            return Visit(lambda: self.box.instance.db.write(lambda tx: None), held_at), None
        me = self.browser(form.browser)
        if form.fields:
            return Visit(lambda: me.post(form.path, form.fields), held_at), me
        return Visit(lambda: me.get(form.path), held_at), me

    def scene(
        self, queue: Queue, *visits: tuple[Form | None, int], meanwhile: Meanwhile = None,
    ) -> tuple[list[Outcome], Counter[tuple[Any, ...]], list[Visit]]:  # fmt: skip
        """Several visits whose writes of these numbers share a commit, led by the first's: what
        each came to, and what changed."""
        self._copy(self._saved, self._live)
        made = [self.visit(form, held_at) for form, held_at in visits]
        queue.together(*(visit for visit, _ in made), meanwhile=meanwhile)
        changes = self.changes()
        outcomes = [self._outcome(visit.answer, me) for visit, me in made]
        return outcomes, changes, [visit for visit, _ in made]

    def alone(self, queue: Queue, form: Form | None) -> Alone:
        """Found out once for each."""
        known = repr(form)
        if known not in self._alone:
            (outcome,), changes, (visit,) = self.scene(queue, (form, NEVER))
            self._alone[known] = Alone(outcome, changes, len(visit.writes), visit.acts_at)
        return self._alone[known]

    def _outcome(self, answer: Any, me: Browser | None) -> Outcome:
        if me is None:
            return Outcome((answer,), [])
        if not isinstance(answer, Answer):
            raise answer
        text, location = answer.body.decode(), answer.headers.get("Location")
        told = re.findall(r'role="(?:alert|status)">(.*?)<', text)
        shown = me.get("/").body.decode()
        told += re.findall(r'role="(?:alert|status)">(.*?)<', shown)
        who = re.findall(r'class="who">([^<]+)<', shown)
        heading = re.findall("<h1>(.*?)</h1>", text)
        seen = (answer.status, location, *heading, *told)
        return Outcome(tuple(map(self.plain, seen)), who)


_WORD = re.compile(r"[\w@.-]+")


def _fits(hashed: str, text: str) -> bool:
    try:
        return _CHEAP.verify(hashed, text)
    except VerificationError:
        return False


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    config = CONFIG.replace("requests_per_minute = 1000000", LIMITS) + MORE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "HASHER", _CHEAP)
        patch.setattr(passwords, "_NOBODYS", _CHEAP.hash("nobody's"))
        patch.setattr("blueprints.billing.NewSecret", CheapSecret)
        patch.setattr("core.mail.send_later", lambda *letter: None)
        cheaply(patch)
        # So that what is drawn by lot can be told from words.
        by_lot = tokens.random_text
        patch.setattr(tokens, "random_text", lambda n, *some: "7" + by_lot(n - 1, *some))
        Clock(patch, "2027-03-17T12:00:00Z")
        with Box(tmp_path_factory.mktemp("instance"), config) as box:
            made = Stage(box)
            yield made
            made.close()


@pytest.fixture
def queue(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(stage.box.instance.db, monkeypatch)


def looking(name: str) -> Form:
    """Somebody browses."""
    return Form("", "/dashboard", {}, name)


def same_as_alone(
    stage: Stage, queue: Queue, form: Form, looks: str, rival: Form | None,
    meanwhile: Meanwhile = None,
) -> tuple[int, set[str]]:  # fmt: skip
    """Check that a form does behind each leader what it does alone: its status, and the tables that
    are not as they were. The leaders: somebody who `looks`, a thread without any request, and a
    `rival` who sends a form. `meanwhile` happens just before the form's write that acts."""
    outcome, changes, writes, acts_at = stage.alone(queue, form)
    places = range(writes)
    if meanwhile is not None:
        places = range(acts_at, acts_at + 1)
        (outcome,), changes, _ = stage.scene(queue, (form, acts_at), meanwhile=meanwhile)
    leaders = [(looking(looks), 0, place) for place in places]
    if places:
        leaders.append((None, 0, acts_at))
    if rival is not None and places:
        leaders.append((rival, stage.alone(queue, rival).acts_at, acts_at))
    for leader, leads_at, place in leaders:
        ahead = stage.alone(queue, leader)
        outcomes, found, _ = stage.scene(
            queue, (leader, leads_at), (form, place), meanwhile=meanwhile
        )
        assert outcomes == [ahead.outcome, outcome], (form, leader, place)
        assert found == ahead.changes + changes, (form, leader, place)
    return outcome.answer[0], {table for table, *_ in changes}


def senders(rule: str) -> list[tuple[str, str]]:
    """Who sends a form, and who one like it with other values just before."""
    if rule.startswith("/admin"):
        return [("operator", "other operator")]
    if rule.startswith("/dashboard"):
        return [("owner", "stranger")]
    return [("nobody", "nobody else"), ("stranger", "other")]


SECTIONS = {
    "the operator's": "/admin/", "billing": "/dashboard/billing/",
    "settings": "/dashboard/(?!billing/)", "signing in and out": "/(?!admin/|dashboard/)",
}  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_a_form_does_behind_any_leader_what_it_does_alone(
    stage: Stage, queue: Queue, section: str
) -> None:
    tried = [rule for rule in stage.rules if re.match(SECTIONS[section], rule)]
    assert len(tried) >= 6
    for rule in tried:
        for who, rival in senders(rule):
            looks = "stranger" if who == "operator" else "operator"
            form, like_it = stage.forms[rule, who], stage.forms[rule, rival]
            status, tables = same_as_alone(stage, queue, form, looks, like_it)
            assert status in (200, 303), (rule, status)
            if rule not in ONLY_SHOWN and (rule, who) != ("/logout", "nobody"):
                assert tables - {"rate_window"}, f"{rule} did nothing: this test shows nothing"


# Who may not, may not behind somebody who may.

OWNERS_ONLY = re.compile("<key_id>|<member_id>|/members$|/wallets")


def test_a_member_stays_refused_behind_the_owner(stage: Stage, queue: Queue) -> None:
    for rule in stage.rules:
        if rule.startswith("/dashboard"):
            form, is_refused = stage.sent_by(rule, "owner", "member"), OWNERS_ONLY.search(rule)
            rival = stage.forms[rule, "stranger" if rule.endswith("/remove") else "owner"]
            its = rival if is_refused else None  # else the second of them has nothing left to do
            status, tables = same_as_alone(stage, queue, form, "owner", its)
            assert (status == 403) is bool(is_refused), (rule, status)
            assert tables <= {"rate_window"} or not is_refused, (rule, tables)


def test_who_is_no_operator_stays_refused_behind_one(stage: Stage, queue: Queue) -> None:
    for rule in stage.rules:
        if rule.startswith("/admin"):
            form, its = stage.sent_by(rule, "operator", "stranger"), stage.forms[rule, "operator"]
            told = same_as_alone(stage, queue, form, "operator", its)
            assert told == (403, {"rate_window"}), rule


def test_who_was_an_operator_stays_refused_behind_one(stage: Stage, queue: Queue) -> None:
    def demote(tx: Tx) -> None:
        user = users.get(tx, stage.operator.id)
        users.set_operator(tx, user, False, clock.now_ms(), COMMAND_LINE)

    for rule in stage.rules:
        if rule.startswith("/admin") and rule != "/admin/health":
            form, rival = stage.forms[rule, "operator"], stage.forms[rule, "other operator"]
            status, tables = same_as_alone(stage, queue, form, "other operator", rival, demote)
            assert (status, tables) == (403, {"rate_window", "user", "audit"}), rule


def test_who_was_an_owner_stays_refused_behind_one(stage: Stage, queue: Queue) -> None:
    def demote(tx: Tx) -> None:
        member = members.get(tx, stage.house.second.member_id, stage.house.account)
        terms = members.Terms("member", None, None)
        members.change(tx, member, terms, clock.now_ms(), COMMAND_LINE)

    for rule in stage.rules:
        if rule.startswith("/dashboard") and OWNERS_ONLY.search(rule):
            form, rival = stage.sent_by(rule, "owner", "second"), stage.forms[rule, "stranger"]
            status, tables = same_as_alone(stage, queue, form, "owner", rival, demote)
            assert (status, tables) == (403, {"rate_window", "membership", "audit"}), rule


# They only end what is one's own, or choose.
HARMLESS = ("/sessions/<session_id>/end", "/end-all", "/session-token/revoke", "/account")


def test_who_was_signed_out_stays_so_behind_another(stage: Stage, queue: Queue) -> None:
    def sign_out(tx: Tx) -> None:
        sessions.end_all(tx, stage.owner.id, clock.now_ms(), COMMAND_LINE)

    for rule in stage.rules:
        if rule.startswith("/dashboard") and not rule.endswith(HARMLESS):
            form, rival = stage.forms[rule, "owner"], stage.forms[rule, "stranger"]
            status, tables = same_as_alone(stage, queue, form, "second", rival, sign_out)
            assert status == 401, (rule, status)
            assert tables <= {"rate_window", "session", "session_token", "audit"}, rule


# In so many words.


def led(
    stage: Stage, queue: Queue, leader: tuple[str, str], follower: tuple[str, str]
) -> list[Outcome]:
    """Two forms whose transactions share a commit."""
    both = [stage.forms[leader], stage.forms[follower]]
    return stage.scene(queue, *((form, stage.alone(queue, form).acts_at) for form in both))[0]


def test_each_grant_goes_where_it_was_asked(stage: Stage, queue: Queue) -> None:
    rule, expected = "/admin/accounts/<account_id>/grant", []
    led(stage, queue, (rule, "other operator"), (rule, "operator"))
    for name, credits in (("other operator", 11), ("operator", 5)):
        form, note = stage.forms[rule, name], "a note" if credits == 5 else "the leader's note"
        account = form.path.split("/")[3]
        with stage.box.instance.db.reading() as tx:
            entries = tx.rows(
                "SELECT amount, note FROM entry WHERE account_id = :id ORDER BY number DESC",
                {"id": account},
            )
        assert entries[0] == (credits, note)
        assert len(entries) == 2  # the first was there before
        expected.append((stage.people[name].id, stage.address(name), account))
    audited = stage.box.instance.db.rows(
        "SELECT actor, address, account_id FROM audit ORDER BY number DESC LIMIT 2"
    )
    assert audited[::-1] == expected


def test_a_new_password_is_ones_own(stage: Stage, queue: Queue) -> None:
    rule = "/dashboard/settings/password"
    outcomes = led(stage, queue, (rule, "stranger"), (rule, "owner"))
    assert [outcome.who for outcome in outcomes] == [[stage.stranger.email], [stage.owner.email]]
    for who, password in ((stage.stranger, LEADERS_PASSWORD), (stage.owner, ANOTHER_PASSWORD)):
        (hashed,) = stage.box.row("SELECT password_hash FROM user WHERE id = :id", id=who.id)
        assert _fits(hashed, password)


def test_one_signs_oneself_out(stage: Stage, queue: Queue) -> None:
    signed_out = stage.forms["/logout", "stranger"]
    (first, second), _, _ = stage.scene(queue, (looking("operator"), 0), (signed_out, 0))
    assert first.who == [stage.operator.email]
    assert second.who == []


@pytest.mark.parametrize(("verb", "table"), [("accounts", "account"), ("keys", "api_key")])
def test_reasons_are_ones_own(stage: Stage, queue: Queue, verb: str, table: str) -> None:
    rule = f"/admin/{verb}/<{verb[:-1]}_id>/suspend"
    led(stage, queue, (rule, "other operator"), (rule, "operator"))
    for name, reason in (("other operator", "the leader's reason"), ("operator", "a reason")):
        (thing,) = re.findall(r"(?:acct|key)_\w+", stage.forms[rule, name].path)
        found = stage.box.row(f"SELECT status_reason FROM {table} WHERE id = :id", id=thing)
        assert found == (reason,)


def test_vouchers_are_as_each_asked(stage: Stage, queue: Queue) -> None:
    rule = "/admin/vouchers"
    led(stage, queue, (rule, "other operator"), (rule, "operator"))
    made = stage.box.instance.db.rows(
        "SELECT credits, note, created_by FROM voucher ORDER BY number DESC LIMIT 4"
    )
    others, mine = stage.people["other operator"].id, stage.operator.id
    assert made[::-1] == [(11, "the leader's note", others)] * 3 + [(5, "a note", mine)]
