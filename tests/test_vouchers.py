"""Vouchers: an operator makes codes, a person turns one into credits, once, and nobody guesses."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import StartFarebox
from inprocess import Box, Clock
from people import CONFIG, House, audited, house, person, told
from server import OPERATOR_KEY, Answer, Farebox

from core import clock, tokens, vouchers
from core.audit import COMMAND_LINE, Actor
from core.errors import Refusal
from core.vouchers import LARGEST, MOST_AT_ONCE, Voucher

PATH = "/api/v1/credits/redeem"
FORM = re.compile(r"FB(-[0-9A-HJKMNP-TV-Z]{5}){4}")
UNKNOWN_CODE = "FB-00000-00000-00000-00000"
NOBODY_WAITS = CONFIG + "failed_auth_per_minute = 1000000\n"
_clients = count(1)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """An instance on which one may guess for as long as one likes."""
    with Box(tmp_path_factory.mktemp("vouchers") / "i", NOBODY_WAITS) as box:
        yield box


@pytest.fixture(scope="module")
def home(box: Box) -> House:
    return house(box)


@pytest.fixture
def strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Box, Clock]]:
    """An instance on which it takes three attempts to be told to wait, and its clock."""
    clock = Clock(monkeypatch, "2027-03-01T12:00:15Z")
    with Box(tmp_path / "i", CONFIG + "failed_auth_per_minute = 3\n") as box:
        yield box, clock


def made(box: Box, credits: int = 10, count: int = 1, note: str | None = None) -> list[str]:
    now = clock.now_ms()
    return box.write(lambda tx: vouchers.make(tx, credits, count, note, now, COMMAND_LINE))


def code_of(box: Box, credits: int = 10) -> str:
    return made(box, credits)[0]


def redeem(box: Box, token: str | None, code: object, client: str = "127.0.0.1") -> Answer:
    return box.request("POST", PATH, key=token, value={"code": code}, client=client)


def listed(box: Box, limit: int = 10_000, before: int | None = None) -> list[Voucher]:
    with box.instance.db.reading() as tx:
        return vouchers.page(tx, before, limit)


def newest(box: Box) -> Voucher:
    return listed(box, 1)[0]


def somewhere() -> str:
    """A client's address that no other test uses."""
    number = next(_clients)
    return f"10.0.{number // 250}.{number % 250 + 1}"


def refusal(box: Box, work: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        box.write(work)
    return caught.value


def file_of(box: Box) -> bytes:
    """Every byte of the database, its log included."""
    return b"".join(path.read_bytes() for path in sorted(box.folder.glob("farebox.db*")))


# Making them.


def test_a_code_has_a_hundred_random_bits_of_letters_nobody_takes_for_another(box: Box) -> None:
    codes = made(box, count=MOST_AT_ONCE)
    assert len(set(codes)) == MOST_AT_ONCE == 1000
    assert all(FORM.fullmatch(code) for code in codes)
    # Each of the 32 characters at each of the 20 places: one that is left out has probability
    # (31/32)^1000, and there are 640.
    plain = [code.replace("-", "")[2:] for code in codes]
    assert {len({code[place] for code in plain}) for place in range(20)} == {32}


def test_only_digests_are_stored(box: Box) -> None:
    code = code_of(box)
    plain = code.replace("-", "")
    assert newest(box).status == "open"
    found = file_of(box)
    assert newest(box).id.encode() in found  # it is in there, then
    for form in (code, plain, plain[2:], code[3:], *code.split("-")[1:]):
        assert form.encode() not in found
    assert box.row("SELECT code_hash FROM voucher WHERE id = :id", id=newest(box).id) == (
        tokens.digest(plain.encode()),
    )


def test_a_voucher_is_as_it_was_asked_for(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, "2027-03-01T00:00:00Z")
    now, by = clock.now_ms(), Actor("user_ann", "192.0.2.1", True)
    before = newest(box).number if listed(box, 1) else 0
    codes = box.write(lambda tx: vouchers.make(tx, LARGEST, 3, "for the fair", now, by))
    third, second, first = listed(box, 3)
    assert [voucher.number for voucher in (first, second, third)] == [
        before + 1, before + 2, before + 3,
    ]  # fmt: skip
    for voucher in (first, second, third):
        assert re.fullmatch(r"vch_[0-9a-f]{24}", voucher.id)
        assert voucher._replace(id="", number=0) == Voucher(
            "", 0, LARGEST, "for the fair", now, "user_ann", None, None, None
        )
    (noted,) = audited(box, "action", "actor", "address", "account_id", "subject", "detail")[-1:]
    assert noted == (
        "voucher.made", "user_ann", "192.0.2.1", None, first.id,
        '{"credits": 1000000000000000, "count": 3, "note": "for the fair"}',
    )  # fmt: skip
    # Their order is that of the codes.
    payer = person(box)
    assert redeem(box, payer.token, codes[1]).status == 200
    assert [v.status for v in listed(box, 3)] == ["open", "redeemed", "open"]


@pytest.mark.parametrize(
    ("credits", "count", "note", "param"),
    [
        (0, 1, None, "credits"), (-1, 1, None, "credits"), (LARGEST + 1, 1, None, "credits"),
        (1, 0, None, "count"), (1, -1, None, "count"), (1, MOST_AT_ONCE + 1, None, "count"),
        (1, 1, "", "note"), (1, 1, "x" * 201, "note"), (1, 1, "two\nlines", "note"),
        (1, 1, "\ud800", "note"), (1, 1, "\x1b[31m", "note"),
    ],
)  # fmt: skip
def test_what_cannot_be_makes_none(
    box: Box, credits: int, count: int, note: str | None, param: str
) -> None:
    before, noted = listed(box), audited(box, "id")
    refused = refusal(
        box, lambda tx: vouchers.make(tx, credits, count, note, clock.now_ms(), COMMAND_LINE)
    )
    assert (refused.code, refused.param) == ("validation_error", param)
    assert (listed(box), audited(box, "id")) == (before, noted)


def test_the_longest_note_and_any_letters_are_kept(box: Box) -> None:
    made(box, note="ä" * 200)
    assert newest(box).note == "ä" * 200


def test_they_are_listed_newest_first_page_by_page(box: Box) -> None:
    made(box, count=7)
    everything = listed(box)
    numbers = [voucher.number for voucher in everything]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == len(numbers)
    pages, before = [], None
    while page := listed(box, 3, before):
        assert len(page) <= 3
        pages += page
        before = page[-1].number
    assert pages == everything


# Redeeming one.


def test_a_code_becomes_credits_of_the_tokens_account(box: Box) -> None:
    who = person(box, 50)
    code, now = code_of(box, 123), clock.now_ms()
    answer = redeem(box, who.token, code)
    assert answer.status == 200
    assert answer.json() == {"success": True, "creditsAdded": 123, "credits": 173}
    assert box.standing(who.account) == (173, 0)
    voucher = newest(box)
    assert (voucher.status, voucher.account_id) == ("redeemed", who.account)
    assert voucher.redeemed_at is not None and voucher.redeemed_at >= now
    entry = box.get("/api/v1/ledger", who.token).json()["data"][0]
    assert re.fullmatch(r"ent_[0-9a-f]{24}", entry.pop("id")) and entry.pop("created_at")
    assert entry == {
        "kind": "voucher", "amount": 123, "balance": 173, "reference": voucher.id, "note": None,
    }  # fmt: skip
    assert box.faults() == []


def test_credits_in_the_answer_are_those_that_can_be_spent(box: Box) -> None:
    who = person(box, 50)
    box.run("UPDATE account SET held = 20 WHERE id = :id", id=who.account)
    assert redeem(box, who.token, code_of(box, 5)).json()["credits"] == 35
    box.run("UPDATE account SET held = 0 WHERE id = :id", id=who.account)


@pytest.fixture(scope="module")
def with_doubles(box: Box) -> list[str]:
    """Codes with both a 0 and a 1 in them."""
    return [code for code in made(box, count=1000) if "0" in code and "1" in code]


@pytest.mark.parametrize(
    "typed",
    [
        lambda code: code,
        lambda code: code.lower(),
        lambda code: code.replace("-", ""),
        lambda code: code.replace("-", " "),
        lambda code: f"  {code}\r\n",
        lambda code: " ".join(code),
        lambda code: "-".join(code),
        lambda code: code.replace("-", "\u2013"),
        lambda code: code.replace("-", "\u00a0\u2011\u00a0"),
        lambda code: code.replace("-", "\u200b"),
        lambda code: code.replace("0", "O"),
        lambda code: code.replace("0", "o"),
        lambda code: code.replace("1", "I"),
        lambda code: code.replace("1", "i"),
        lambda code: code.replace("1", "L"),
        lambda code: code.replace("1", "l"),
        lambda code: code.lower().replace("1", "l").replace("0", "o").replace("-", " "),
    ],
)
def test_a_code_may_be_typed_as_people_type(
    box: Box, home: House, with_doubles: list[str], typed: Any
) -> None:
    code = with_doubles.pop()
    answer = redeem(box, home.owner.token, typed(code))
    assert told(answer) == (200, None)
    assert redeem(box, home.owner.token, code).status == 404


@pytest.mark.parametrize(
    "typed",
    [
        lambda code: code[3:],  # without what every code begins with
        lambda code: "BF" + code[2:],
        lambda code: code[:-1],
        lambda code: code + "0",
        lambda code: code + code,
        lambda code: code.replace("1", "U"),
        lambda code: code.replace("-", "_"),
        lambda code: code.replace("-", "/"),
        lambda code: code[:-1] + ("2" if code[-1] != "2" else "3"),
        lambda code: code[::-1],
        lambda code: f"'{code}'",
        lambda code: code.replace("1", "\u0661"),
    ],
)
def test_what_is_no_code_of_ours_finds_none(box: Box, with_doubles: list[str], typed: Any) -> None:
    who, code = person(box), with_doubles[-1]
    assert told(redeem(box, who.token, typed(code))) == (404, "not_found")
    assert box.standing(who.account) == (0, 0)
    assert redeem(box, who.token, code).status == 200
    with_doubles.pop()


def test_every_code_that_cannot_be_redeemed_is_refused_alike_to_the_byte(box: Box) -> None:
    who, other = person(box), person(box)
    spent, own, cancelled = made(box, count=3)
    assert redeem(box, other.token, spent).status == 200
    assert redeem(box, who.token, own).status == 200
    box.write(lambda tx: vouchers.cancel(tx, listed(box, 1)[0].id, clock.now_ms(), COMMAND_LINE))
    bad = [
        spent, own, cancelled, UNKNOWN_CODE, UNKNOWN_CODE[:-1], "", " ", "FB", "x" * 1000, "\x00",
        "\ud83d\ude00", "' OR 1=1 --", newest(box).id,
    ]  # fmt: skip
    faces = set()
    for code in bad:
        answer = redeem(box, who.token, code)
        assert told(answer) == (404, "not_found"), code
        body = answer.body.replace(answer.request_id.encode(), b"")
        same = {name for name in answer.headers if not name.startswith("X-R")}
        faces.add((body, frozenset((name, answer.headers[name]) for name in same)))
    assert len(faces) == 1
    assert answer.headers["x-should-retry"] == "false"
    assert box.standing(who.account) == (10, 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "code"), (b"{}", "code"), (b'{"code": 1}', "code"), (b'{"code": null}', "code"),
        (b'{"code": ["a"]}', "code"), (b'{"code": "a", "account": "b"}', "account"),
        (b'{"Code": "a"}', None), (b'["a"]', None), (b'"a"', None), (b"{", None),
        (b"code=a", None),
    ],
)  # fmt: skip
def test_a_body_of_another_shape_is_refused(
    box: Box, home: House, body: bytes, param: str | None
) -> None:
    answer = box.request(
        "POST", PATH, key=home.owner.token, body=body, headers={"Content-Type": "application/json"}
    )
    assert told(answer) == (400, "validation_error")
    if param is not None:
        assert answer.json()["param"] == param


def test_a_form_is_not_json(box: Box, home: House) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = box.request("POST", PATH, key=home.owner.token, body=b"code=a", headers=kind)
    assert told(answer) == (415, "unsupported_media_type")


# Who may.


@pytest.mark.parametrize("who", ["owner", "second", "member"])
def test_whoever_spends_an_account_may_add_to_it(box: Box, home: House, who: str) -> None:
    (before, _) = box.standing(home.account)
    assert redeem(box, home[who].token, code_of(box)).status == 200
    assert box.standing(home.account) == (before + 10, 0)
    assert newest(box).account_id == home.account
    (noted,) = audited(box, "action", "actor", "address", "account_id", "subject", "detail")[-1:]
    assert noted == (
        "voucher.redeemed", home[who].id, "127.0.0.1", home.account, newest(box).id,
        '{"credits": 10}',
    )  # fmt: skip


def test_it_takes_a_person(box: Box) -> None:
    payer, code = box.payer(7), code_of(box)
    for key, outcome in (
        (payer.key, (403, "session_required")),
        (OPERATOR_KEY, (403, "session_required")),
        (tokens.new_key("fare")[0], (401, "invalid_api_key")),
        ("eyJ.eyJ.x", (401, "invalid_token")),
        (None, (401, "missing_api_key")),
    ):
        assert told(redeem(box, key, code)) == outcome
    assert newest(box).status == "open" and box.standing(payer) == (7, 0)
    wrong = box.get(PATH, payer.key)
    assert told(wrong) == (405, "method_not_allowed") and "POST" in wrong.headers["Allow"]


def test_the_owners_of_an_account_read_what_it_redeemed_and_not_what_was_made(box: Box) -> None:
    who = person(box)
    assert redeem(box, who.token, code_of(box)).status == 200
    seen = [row["action"] for row in box.get("/api/v1/audit", who.token).json()["data"]]
    assert "voucher.redeemed" in seen
    assert "voucher.made" not in seen and "voucher.cancelled" not in seen


def still_open(box: Box, code: str) -> bool:
    """Whether a code still is; it is used up to see."""
    assert newest(box).status == "open"
    return redeem(box, person(box).token, code).status == 200


def test_a_suspended_account_redeems_nothing_and_the_code_stays_open(box: Box) -> None:
    who, code = person(box), code_of(box)
    box.suspend_account(who.account, "unpaid")
    answer = redeem(box, who.token, code)
    assert (*told(answer), answer.json()["reason"]) == (403, "account_suspended", "unpaid")
    assert box.standing(who.account) == (0, 0)
    assert still_open(box, code)


def test_a_closed_account_redeems_nothing_and_the_code_stays_open(box: Box) -> None:
    who, code = person(box), code_of(box)
    box.run("UPDATE account SET status = 'closed' WHERE id = :id", id=who.account)
    assert redeem(box, who.token, code).status in (401, 403)
    noted = len(audited(box, "id"))
    refused = refusal(
        box, lambda tx: vouchers.redeem(tx, code, who.account, clock.now_ms(), Actor(who.id))
    )
    assert (refused.code, box.standing(who.account)) == ("conflict", (0, 0))
    assert len(audited(box, "id")) == noted
    assert still_open(box, code)


def test_what_an_account_cannot_hold_leaves_the_code_open(box: Box) -> None:
    who, code = person(box, LARGEST), code_of(box, 1)
    assert told(redeem(box, who.token, code)) == (400, "validation_error")
    assert box.standing(who.account) == (LARGEST, 0)
    assert still_open(box, code)


def test_who_was_signed_out_a_moment_ago_redeems_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    who, code = person(box), code_of(box)
    real = vouchers.count_attempt

    def and_signs_out(*given: Any) -> Any:
        rate = real(*given)
        given[0].run("UPDATE session SET ended_at = 1 WHERE user_id = :id", {"id": who.id})
        given[0].run("UPDATE session_token SET ended_at = 1 WHERE user_id = :id", {"id": who.id})
        return rate

    monkeypatch.setattr(vouchers, "count_attempt", and_signs_out)
    assert told(redeem(box, who.token, code)) == (401, "invalid_token")
    monkeypatch.undo()
    assert still_open(box, code)


# Cancelling one.


def test_a_cancelled_code_is_worth_nothing(box: Box) -> None:
    who, code = person(box), code_of(box)
    now, voucher = clock.now_ms(), newest(box)
    box.write(lambda tx: vouchers.cancel(tx, voucher.id, now, Actor("user_op", "192.0.2.1", True)))
    assert newest(box) == voucher._replace(cancelled_at=now)
    assert newest(box).status == "cancelled"
    assert redeem(box, who.token, code).status == 404
    (noted,) = audited(box, "action", "actor", "account_id", "subject", "detail")[-1:]
    assert noted == ("voucher.cancelled", "user_op", None, voucher.id, None)


def test_what_is_not_open_cannot_be_cancelled(box: Box) -> None:
    def cancel(voucher_id: str) -> tuple[str, str]:
        found = refusal(box, lambda tx: vouchers.cancel(tx, voucher_id, 9, COMMAND_LINE))
        return found.code, found.message

    assert cancel("vch_0")[0] == "not_found"
    assert redeem(box, person(box).token, code_of(box)).status == 200
    assert cancel(newest(box).id) == ("conflict", "The voucher is redeemed.")
    code_of(box)
    box.write(lambda tx: vouchers.cancel(tx, newest(box).id, 8, COMMAND_LINE))
    assert cancel(newest(box).id) == ("conflict", "The voucher is cancelled.")
    assert newest(box).cancelled_at == 8


# Guessing.


def test_whoever_guesses_is_told_to_wait_whatever_they_try(strict: tuple[Box, Clock]) -> None:
    box, clock = strict
    who, code = person(box), code_of(box)
    for _ in range(3):
        assert told(redeem(box, who.token, UNKNOWN_CODE)) == (404, "not_found")
    for tried in (UNKNOWN_CODE, code, "", 7):
        answer = redeem(box, who.token, tried)
        assert told(answer) == (429, "rate_limited"), tried
        assert answer.headers["Retry-After"] == "45"
    assert newest(box).status == "open"
    clock.forward(seconds=45)
    assert redeem(box, who.token, code).status == 200
    assert box.standing(who.account) == (10, 0)


def test_successes_and_bad_bodies_are_attempts_too(strict: tuple[Box, Clock]) -> None:
    box, _ = strict
    who, codes = person(box), made(box, count=3)
    assert redeem(box, who.token, codes[0]).status == 200
    assert redeem(box, who.token, 5).status == 400
    assert redeem(box, who.token, codes[1]).status == 200
    assert redeem(box, who.token, codes[2]).status == 429


def test_an_account_is_counted_from_wherever_it_comes(strict: tuple[Box, Clock]) -> None:
    box, _ = strict
    home = house(box)
    people = [home.owner, home.second, home.member]
    for who in people:
        assert redeem(box, who.token, UNKNOWN_CODE, somewhere()).status == 404
    assert redeem(box, home.owner.token, UNKNOWN_CODE, somewhere()).status == 429
    assert redeem(box, home.stranger.token, UNKNOWN_CODE, somewhere()).status == 404


@pytest.mark.parametrize(
    "addresses",
    [
        ["192.0.2.7"] * 5,
        ["192.0.2.7", "::ffff:192.0.2.7", "192.0.2.7:1234", "192.0.2.7", "203.0.113.9"],
        ["2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::", "2001:db8::9", "2001:db8:0:1::1"],
    ],
)
def test_a_network_is_counted_whomever_it_signs_in(
    strict: tuple[Box, Clock], addresses: list[str]
) -> None:
    box, _ = strict
    outcomes = [redeem(box, person(box).token, UNKNOWN_CODE, at).status for at in addresses]
    elsewhere = 429 if addresses[4] == addresses[3] else 404
    assert outcomes == [404, 404, 404, 429, elsewhere]


def test_who_may_not_redeem_at_all_uses_up_no_attempt(strict: tuple[Box, Clock]) -> None:
    box, _ = strict
    who, payer = person(box), box.payer()
    for key in (None, payer.key, OPERATOR_KEY, "eyJ.x.y"):
        assert redeem(box, key, UNKNOWN_CODE).status in (401, 403)
    assert redeem(box, who.token, code_of(box)).status == 200


def test_what_is_left_is_the_lesser_of_the_two_counts(strict: tuple[Box, Clock]) -> None:
    box, clock = strict

    def left(client: str, account: str) -> tuple[int, bool, int]:
        rate = box.write(lambda tx: vouchers.count_attempt(tx, client, account, 3, clock.now))
        return rate.remaining, rate.exceeded, rate.reset_seconds

    assert left("192.0.2.1", "acct_a") == (2, False, 45)
    assert left("192.0.2.1", "acct_b") == (1, False, 45)
    assert left("192.0.2.2", "acct_b") == (1, False, 45)
    assert left("192.0.2.1", "acct_c") == (0, False, 45)  # the third is the last
    assert left("192.0.2.1", "acct_d") == (0, True, 45)
    assert left("192.0.2.3", "acct_d") == (1, False, 45)
    # One has just reached its last, the other is past it.
    for network, account in (("5", "acct_e"), ("5", "acct_f"), ("6", "acct_e"), ("7", "acct_e")):
        assert left(f"192.0.2.{network}", account)[1] is False
    assert left("192.0.2.5", "acct_e") == (0, True, 45)
    for network, account in (("8", "acct_g"), ("8", "acct_h"), ("8", "acct_i"), ("9", "acct_g")):
        assert left(f"192.0.2.{network}", account)[1] is False
    assert left("192.0.2.8", "acct_g") == (0, True, 45)


# The command line.


def test_codes_are_printed_alone_one_a_line(box: Box) -> None:
    done = box.cli("vouchers", "add", "25", "--count", "3", "--note", "for Ann")
    codes = done.output.splitlines()
    assert done.exit_code == 0 and len(codes) == 3
    assert all(FORM.fullmatch(code) for code in codes)
    assert {(v.credits, v.note, v.created_by) for v in listed(box, 3)} == {
        (25, "for Ann", "operator")
    }
    who = person(box)
    for code in codes:
        assert redeem(box, who.token, code).status == 200
    assert box.standing(who.account) == (75, 0)


def test_one_is_made_if_no_number_is_given(box: Box) -> None:
    before = newest(box).number
    done = box.cli("vouchers", "add", "1")
    assert FORM.fullmatch(done.output.strip())
    assert newest(box).number == before + 1 and newest(box).note is None


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        ([], 2), (["0"], 2), (["-1"], 2), (["1.5"], 2), (["1_0"], 2), ([str(LARGEST + 1)], 1),
        (["1", "--count", "0"], 2), (["1", "--count", "1001"], 1), (["1", "--count", "x"], 2),
        (["1", "--note", ""], 1), (["1", "--note", "a\nb"], 1), (["1", "--note", "x" * 201], 1),
    ],
)  # fmt: skip
def test_a_command_that_asks_for_what_cannot_be_prints_no_code(
    box: Box, words: list[str], exit_code: int
) -> None:
    before = listed(box)
    done = box.cli("vouchers", "add", *words)
    assert done.exit_code == exit_code and "FB-" not in done.output
    assert listed(box) == before


def test_all_are_listed_with_where_they_went(tmp_path: Path) -> None:
    with Box(tmp_path / "i", NOBODY_WAITS) as box:
        assert box.cli("vouchers", "list").output == ""
        who = person(box)
        (code,) = made(box, 5)
        assert redeem(box, who.token, code).status == 200
        made(box, 6, 1200 - 1000, "for the fair")
        made(box, 7, 1000)
        gone = newest(box).id
        assert box.cli("vouchers", "cancel", gone).output == ""
        done = box.cli("vouchers", "list")
        assert done.exit_code == 0
        lines = done.output.splitlines()
        assert len(lines) == len(set(lines)) == 1201
        assert [line.split()[0] for line in lines] == [voucher.id for voucher in listed(box)]
        assert lines[0] == f"{gone} 7 cancelled"
        assert lines[1] == f"{listed(box)[1].id} 7 open"
        assert lines[1000] == f"{listed(box)[1000].id} 6 open for the fair"
        assert lines[-1] == f"{listed(box)[-1].id} 5 redeemed {who.account}"


def test_a_cancel_that_cannot_be_says_why(box: Box) -> None:
    code = code_of(box)
    assert box.cli("vouchers", "cancel", newest(box).id).exit_code == 0
    for voucher_id, why in ((newest(box).id, "cancelled"), ("vch_x", "no voucher vch_x")):
        done = box.cli("vouchers", "cancel", voucher_id)
        assert done.exit_code == 1 and why in done.stderr
    assert redeem(box, person(box).token, code).status == 404


# Nothing shows a code.


def test_the_audit_log_never_holds_a_code(box: Box) -> None:
    who = person(box)
    code, gone = made(box, count=2, note="noted")
    box.write(lambda tx: vouchers.cancel(tx, newest(box).id, clock.now_ms(), COMMAND_LINE))
    for tried in (code, code, gone, UNKNOWN_CODE):
        redeem(box, who.token, tried)
    with box.instance.db.reading() as tx:
        log = repr(tx.rows("SELECT * FROM audit") + tx.rows("SELECT * FROM entry"))
        log += repr(tx.rows("SELECT * FROM rate_window"))
    assert log.count("voucher.cancelled") and log.count("voucher.redeemed")
    for found in (code, gone, UNKNOWN_CODE):
        for part in (found, found.replace("-", ""), *found.split("-")[1:]):
            if part != "00000":
                assert part not in log


# Races.


def test_a_code_is_cancelled_or_redeemed_never_both(box: Box) -> None:
    who = person(box)
    outcomes: Counter[tuple[int, bool]] = Counter()
    for _ in range(20):
        code = code_of(box)
        voucher_id, ready = newest(box).id, threading.Barrier(2)

        def cancels(voucher_id: str = voucher_id, ready: threading.Barrier = ready) -> bool:
            ready.wait()
            try:
                now = clock.now_ms()
                box.write(lambda tx: vouchers.cancel(tx, voucher_id, now, COMMAND_LINE))
            except Refusal as refused:
                assert refused.code == "conflict"
                return False
            return True

        with ThreadPoolExecutor(1) as pool:
            cancelled = pool.submit(cancels)
            ready.wait()
            status = redeem(box, who.token, code).status
            outcomes[status, cancelled.result()] += 1
    assert set(outcomes) <= {(200, False), (404, True)}
    assert box.standing(who.account) == (10 * outcomes[200, False], 0)


def test_the_database_itself_lets_no_voucher_be_two_things(box: Box) -> None:
    redeem(box, person(box).token, code_of(box))
    for damage in ("cancelled_at = 1", "account_id = NULL", "redeemed_at = NULL", "credits = 0"):
        with pytest.raises(apsw.ConstraintError):
            box.run(f"UPDATE voucher SET {damage} WHERE id = :id", id=newest(box).id)


@pytest.fixture(scope="module")
def served(start_farebox: StartFarebox) -> Farebox:
    return start_farebox(NOBODY_WAITS, workers=2)


def at_once(served: Farebox, sent: list[tuple[str, str]]) -> list[Answer]:
    """The answers to all these (token, code), sent in the same moment."""
    ready = threading.Barrier(len(sent))

    def one(token: str, code: str) -> Answer:
        ready.wait()
        return served.request("POST", PATH, key=token, value={"code": code})

    with ThreadPoolExecutor(len(sent)) as pool:
        return list(pool.map(lambda pair: one(*pair), sent))


def test_fifty_at_once_redeem_a_code_once(served: Farebox) -> None:
    people = [served.account(credits=0)[0] for _ in range(2)]
    minted = [served.set_up("tokens", "mint", email) for email in people]
    code = served.set_up("vouchers", "add", "1000")
    answers = at_once(served, [(minted[number % 2], code) for number in range(50)])
    assert Counter(answer.status for answer in answers) == {200: 1, 404: 49}
    balances = [int(served.set_up("credits", "balance", email)) for email in people]
    assert sorted(balances) == [0, 1000]
    (done,) = (answer.json() for answer in answers if answer.status == 200)
    assert done == {"success": True, "creditsAdded": 1000, "credits": 1000}
    served.books()


def test_codes_redeemed_beside_refused_ones_all_count(served: Farebox) -> None:
    email, _ = served.account(credits=0)
    token = served.set_up("tokens", "mint", email)
    codes = served.set_up("vouchers", "add", "3", "--count", "25").splitlines()
    sent = [(token, code) for good in codes for code in (good, UNKNOWN_CODE)]
    answers = at_once(served, sent)
    assert [answer.status for answer in answers] == [200, 404] * 25
    assert int(served.set_up("credits", "balance", email)) == 75
    assert sorted(a.json()["credits"] for a in answers[::2]) == list(range(3, 76, 3))
    served.books()


def test_the_log_never_holds_a_code(served: Farebox) -> None:
    email, key = served.account(credits=0)
    token = served.set_up("tokens", "mint", email)
    code = served.set_up("vouchers", "add", "4")
    for bearer, value in (
        (key, {"code": code}), (token, {"code": code, "more": 1}), (token, {"code": [code]}),
        (token, {"code": code}), (token, {"code": code}),
    ):  # fmt: skip
        answer = served.request("POST", PATH, key=bearer, value=value)
        assert code.encode() not in answer.body
    assert int(served.set_up("credits", "balance", email)) == 4
    log = served.log()
    assert all(part not in log for part in (code, code.replace("-", ""), *code.split("-")[1:]))
    assert code.split("-")[1] not in served.set_up("audit")
    assert code.split("-")[1] not in served.set_up("vouchers", "list")
