"""A form that is sent twice (a double click, a reload of its answer) does its thing once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from html_pages import Page, Visit, account_of, cheaply, newcomer, visitor
from inprocess import Box
from people import CONFIG
from server import Answer


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        yield


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(Path(tmp_path_factory.mktemp("once")) / "instance", CONFIG) as box:
        yield box


@pytest.fixture(scope="module")
def boss(box: Box) -> Visit:
    return visitor(box, "--operator")


def at_once(*sends: object) -> list[Answer]:
    """What all of them answer, sent at the same time."""
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda s=send: answers.append(s())) for send in sends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def sent(page: Page, button: str, **typed: str) -> tuple[str, dict[str, str]]:
    """Where the form of a button goes, and what it sends."""
    (found,) = [node for node in page.root.all("button") if node.name == button]
    form = found.around("form")
    return form.get("action").partition("#")[0], dict(form.sends()) | typed


def twice(who: Visit, page: Page, button: str, **typed: str) -> list[Answer]:
    """The answers to one form, as it was shown, sent two times at once and then a third."""
    path, fields = sent(page, button, **typed)
    first = at_once(*[lambda: who.browser.post(path, fields)] * 2)
    return sorted([*first, who.browser.post(path, fields)], key=lambda answer: answer.status)


@pytest.mark.parametrize(("verb", "moved"), [("grant", 70), ("adjust", -7)])
def test_credits_move_once(box: Box, boss: Visit, verb: str, moved: int) -> None:
    person = visitor(box)
    account = account_of(box, person.email)
    box.grant(account, 50)
    page = boss.open(f"/admin/accounts/{account}/{verb}")
    answers = twice(boss, page, verb.capitalize(), credits=str(moved), note="once")
    assert [answer.status for answer in answers] == [303, 409, 409]
    assert Page(answers[1]).alert() == "This form was sent before, and did what it says then."
    assert box.standing(account) == (50 + moved, 0)
    assert box.row(
        "SELECT COUNT(*) FROM audit WHERE account_id = :a AND action LIKE 'credits.%'", a=account
    ) == (1,)
    again = boss.open(f"/admin/accounts/{account}/{verb}")  # another form is another one
    assert boss.press(again, verb.capitalize(), credits=str(moved), note="again").done()
    assert box.standing(account) == (50 + 2 * moved, 0)


def test_vouchers_are_made_once(box: Box, boss: Visit) -> None:
    page = boss.open("/admin/vouchers")
    before = box.row("SELECT COUNT(*) FROM voucher")[0]
    answers = twice(boss, page, "Make vouchers", credits="5", count="3")
    assert [answer.status for answer in answers] == [200, 409, 409]
    assert len(Page(answers[0]).taken("codes").split()) == 3
    assert "made before" in Page(answers[2]).alert()
    assert box.row("SELECT COUNT(*) FROM voucher")[0] == before + 3


@pytest.mark.parametrize(
    ("button", "typed"), [("Quick: Cursor / agent key", {}), ("Create key", {"name": "robot"})]
)
def test_a_key_is_made_once(box: Box, button: str, typed: dict[str, str]) -> None:
    person = visitor(box)
    answers = twice(person, person.open("/dashboard/billing"), button, **typed)
    assert [answer.status for answer in answers] == [200, 409, 409]
    assert "made a moment ago" in Page(answers[1]).alert()
    account = account_of(box, person.email)
    assert box.row("SELECT COUNT(*) FROM api_key WHERE account_id = :a", a=account) == (1,)


@pytest.mark.parametrize("verb", ["rotate", "regenerate"])
def test_a_rotation_that_is_sent_twice_keeps_the_grace_and_the_secret(box: Box, verb: str) -> None:
    person = visitor(box)
    account = account_of(box, person.email)
    box.grant(account, 50)
    page = person.press("/dashboard/billing", "Quick: Cursor / agent key")
    old = page.taken("secret")
    (key_id,) = box.row("SELECT id FROM api_key WHERE account_id = :a", a=account)
    shown = person.open(f"/dashboard/billing/keys/{key_id}/{verb}")
    answers = twice(person, shown, verb.capitalize())
    assert [answer.status for answer in answers] == [200, 409, 409]
    assert "rotated a moment ago" in Page(answers[1]).alert()
    new = Page(answers[0]).taken("secret")
    statuses = [box.get("/api/v1/echo", key).status for key in (old, new)]
    assert statuses == [200 if verb == "rotate" else 401, 200]


def test_a_form_that_names_another_accounts_thing_makes_nothing_of_it(box: Box) -> None:
    mine, theirs = visitor(box), visitor(box)
    theirs.press("/dashboard/billing", "Quick: Cursor / agent key")
    (key_id,) = box.row(
        "SELECT id FROM api_key WHERE account_id = :a", a=account_of(box, theirs.email)
    )
    path, fields = sent(mine.open("/dashboard/billing"), "Quick: Cursor / agent key")
    assert mine.browser.post(path, fields | {"once": key_id}).status == 409
    for odd in ("key_", "acct_" + "0" * 24, "key_" + "G" * 24, "' OR 1=1", ""):
        assert mine.browser.post(path, fields | {"once": odd}).status == 200


@pytest.mark.parametrize("typed", ["10,00", "1,5", "1,,000", ",100", "100,", "1 000", "1.000"])
def test_a_comma_that_is_none_of_thousands_is_refused(box: Box, boss: Visit, typed: str) -> None:
    email = newcomer(box)
    page = boss.open(f"/admin/accounts/{account_of(box, email)}/grant")
    page = boss.press(page, "Grant", credits=typed, status=400)
    assert page.alert() == f"“{typed}” is not a whole number from 1 up."


@pytest.mark.parametrize(("typed", "credits"), [("1,000", 1000), ("1,234,567", 1234567)])
def test_thousands_may_be_written_as_they_are_shown(
    box: Box, boss: Visit, typed: str, credits: int
) -> None:
    account = account_of(box, newcomer(box))
    boss.press(f"/admin/accounts/{account}/grant", "Grant", credits=typed)
    assert box.standing(account) == (credits, 0)


def test_what_was_refunded_was_not_earned(box: Box, boss: Visit) -> None:
    person = visitor(box)
    account = account_of(box, person.email)
    box.grant(account, 50)
    key, _ = box.key(account)

    def earned() -> str:
        (row,) = [
            line
            for line in boss.open("/admin/prices").main.all("tr")
            if "/api/v1/echo" in line.text
        ]
        return next(cell.text for cell in row.all("td") if cell.get("data-label") == "Earned")

    before = earned().split(" cr")[0].split()[-1]
    answer = box.get("/api/v1/echo", key)
    boss.press(f"/admin/accounts/{account}/refund", "Refund", request_id=answer.request_id)
    after = earned()
    assert after.split(" cr")[0].split()[-1] == before and "3 refunded" in after


def test_who_joins_lands_in_what_they_joined(box: Box) -> None:
    owner, guest = visitor(box), visitor(box)
    box.grant(account_of(box, owner.email), 77)
    page = owner.press("/dashboard/settings", "Invite", email=guest.email)
    link = page.taken("invite")
    page = guest.press(link, "Join")
    assert page.done() == [f"You have joined {owner.email}’s account."]
    assert page.tiles()["Balance"].startswith("77")
