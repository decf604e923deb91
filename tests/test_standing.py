"""What ends, holds or counts for one person, and leaves the others alone."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import PASSWORD, Browser
from inprocess import Box, Clock
from issuer import Issuer
from people import CONFIG, house, invited, joined, minted, person, token_for, told

from core import clock, issuers, users
from core.audit import COMMAND_LINE

TWENTY = CONFIG.replace("requests_per_minute = 1000000", "requests_per_minute = 20")
PRIVY = """
[[issuers]]
issuer = "privy.io"
audience = "farebox-test-app"
pem_file = "privy.pem"
signup = true

[oidc.home]
server_metadata_url = "https://home.example.com/.well-known/openid-configuration"
client_id = "x"
client_secret = "a-secret-of-the-tests"
"""


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def box(tmp_path: Path, issuer: Issuer) -> Iterator[Box]:
    folder = tmp_path / "i"
    folder.mkdir()
    (folder / "privy.pem").write_text(issuer.pem)
    with Box(folder, CONFIG + PRIVY) as box:
        yield box


def claims(token: str) -> dict[str, str]:
    part = token.split(".")[1]
    found: dict[str, str] = json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def signed_up(box: Box, email: str) -> Browser:
    """A person with a password, at their browser."""
    assert box.cli("users", "add", email, "--password-stdin", stdin=PASSWORD).exit_code == 0
    me = Browser(box)
    assert me.sign_in(email).status == 303
    return me


def test_a_member_does_not_resume_what_an_owner_has_suspended(box: Box) -> None:
    home = house(box)
    made = box.post("/api/v1/keys", home.member.token, {"name": "mine"}).json()
    path = f"/api/v1/keys/{made['id']}"
    for suspender, resumer, expected in (
        (home.owner, home.member, 403),
        (home.owner, home.second, 200),
        (home.second, home.owner, 200),
        (home.member, home.member, 200),
        (home.member, home.owner, 200),
    ):
        assert box.post(f"{path}/suspend", suspender.token).status == 200
        answer = box.post(f"{path}/resume", resumer.token)
        assert answer.status == expected, (suspender, resumer, answer.body)
        if expected == 403:
            assert told(answer) == (403, "forbidden")
            assert told(box.get("/api/v1/echo", made["key"])) == (403, "key_suspended")
            assert box.post(f"{path}/resume", home.owner.token).status == 200
        assert box.get("/api/v1/echo", made["key"]).status == 200


def test_one_persons_loop_leaves_the_others_their_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Box(tmp_path / "i", TWENTY) as box:
        Clock(monkeypatch, "2027-03-17T12:00:30Z")
        owner = person(box, 100)
        member = joined(box, owner)
        asked = [box.get("/api/v1/account", member.token).status for _ in range(30)]
        assert asked.count(429) >= 10 and asked[-1] == 429
        assert box.get("/api/v1/account", owner.token).status == 200
        removed = box.request("DELETE", f"/api/v1/members/{member.member_id}", key=owner.token)
        assert removed.status == 204
        assert told(box.get("/api/v1/account", member.token)) == (401, "invalid_token")


def test_tokens_for_scripts_sign_no_browser_out(box: Box) -> None:
    me = signed_up(box, "ann@example.com")
    first = minted(box, "ann@example.com")
    for _ in range(50):
        last = minted(box, "ann@example.com")
    assert me.get("/dashboard").status == 200
    assert told(box.get("/api/v1/account", first)) == (401, "invalid_token")
    assert box.get("/api/v1/account", last).status == 200


def test_an_outside_token_is_traded_for_one_session(box: Box, issuer: Issuer) -> None:
    outside = issuer.token("did:privy:trader")
    traded = [box.post("/api/v1/session-tokens", outside).json()["token"] for _ in range(3)]
    assert len({claims(token)["sid"] for token in traded}) == 1
    assert len({claims(token)["jti"] for token in traded}) == 3
    assert box.cli("tokens", "deny", "--sub", "did:privy:trader").exit_code == 0
    for token in [outside, *traded]:
        assert told(box.get("/api/v1/account", token)) == (401, "invalid_token")


def test_denying_a_person_ends_what_their_ended_tokens_were_traded_for(
    box: Box, issuer: Issuer
) -> None:
    outside = issuer.token("did:privy:old")
    traded = box.post("/api/v1/session-tokens", outside).json()["token"]
    box.run("UPDATE session_token SET ended_at = 1 WHERE session_id IS NULL")
    assert box.get("/api/v1/account", traded).status == 200
    assert box.cli("tokens", "deny", "--sub", "did:privy:old").exit_code == 0
    assert told(box.get("/api/v1/account", traded)) == (401, "invalid_token")


def test_an_identity_that_is_unlinked_opens_nothing_any_more(box: Box, issuer: Issuer) -> None:
    me, now = signed_up(box, "bea@example.com"), clock.now_ms()
    with box.instance.db.reading() as tx:
        user = users.of_who(tx, "bea@example.com")
    box.write(
        lambda tx: users.link_identity(tx, user, "privy.io", "did:privy:bea", now, COMMAND_LINE)
    )
    outside = issuer.token("did:privy:bea")
    assert box.get("/api/v1/account", outside).json()["account"] == user.account_id
    elsewhere = Browser(box)
    assert elsewhere.sign_in("bea@example.com").status == 303
    box.run(
        "UPDATE session SET method = 'oidc:home'"
        " WHERE id = (SELECT id FROM session ORDER BY rowid DESC LIMIT 1)"
    )
    fields = {"csrf_token": me.csrf(), "issuer": "privy.io", "subject": "did:privy:bea"}
    assert me.post("/dashboard/settings/identities/unlink", fields).status == 303
    assert told(box.get("/api/v1/account", outside)) == (401, "invalid_token")
    assert me.get("/dashboard").status == 200
    assert elsewhere.get("/dashboard").status == 303


def test_the_last_way_in_is_one_that_leads_in(box: Box) -> None:
    """A wallet provider's identity is none: there is no button for it."""
    me, now = signed_up(box, "cy@example.com"), clock.now_ms()
    with box.instance.db.reading() as tx:
        user = users.of_who(tx, "cy@example.com")
    home = "https://home.example.com/"
    for issuer, subject in (("privy.io", "did:privy:cy"), (home, "cy")):
        box.write(
            lambda tx, i=issuer, s=subject: users.link_identity(tx, user, i, s, now, COMMAND_LINE)
        )
    box.run("UPDATE user SET password_hash = NULL WHERE id = :id", id=user.id)
    fields = {"csrf_token": me.csrf(), "issuer": home, "subject": "cy"}
    assert me.post("/dashboard/settings/identities/unlink", fields).status == 409
    fields |= {"issuer": "privy.io", "subject": "did:privy:cy"}
    assert me.post("/dashboard/settings/identities/unlink", fields).status == 303
    with box.instance.db.reading() as tx:
        assert users.identities_of(tx, user.id) == [(home, "cy")]


def test_a_name_of_privys_is_privys(box: Box) -> None:
    now = clock.now_ms()
    found = [
        box.write(
            lambda tx, i=issuer: users.first_seen(
                tx, i, "did:privy:dee", None, 0, now, COMMAND_LINE
            )
        )
        for issuer in ("https://choose-your-name.example.com", "privy.io")
    ]
    assert box.cli("credits", "grant", "did:privy:dee", "7").exit_code == 0
    assert [box.standing(user.account_id)[0] for user in found] == [0, 7]


def test_a_new_password_ends_the_outside_tokens_too(box: Box, issuer: Issuer) -> None:
    signed_up(box, "eve@example.com")
    now = clock.now_ms()
    with box.instance.db.reading() as tx:
        user = users.of_who(tx, "eve@example.com")
    box.write(
        lambda tx: users.link_identity(tx, user, "privy.io", "did:privy:eve", now, COMMAND_LINE)
    )
    outside = issuer.token("did:privy:eve")
    assert box.get("/api/v1/account", outside).status == 200
    link = box.cli("users", "reset-link", "eve@example.com").stdout.strip()
    assert Browser(box).submit(link, password="another-long-pass-phrase").status == 303
    assert told(box.get("/api/v1/account", outside)) == (401, "invalid_token")


def test_links_are_tried_in_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging a password takes a while, and a link lets anybody have it done."""
    limited = CONFIG.replace("[limits]", "[limits]\nfailed_auth_per_minute = 5")
    with Box(tmp_path / "i", limited) as box:
        Clock(monkeypatch, "2027-03-17T12:00:30Z")
        owner = person(box)
        _, token = invited(box, owner, "fay@example.com")
        me = Browser(box)
        link = f"/invite?token={quote(token)}"
        typed = {"email": "fay@example.com", "password": "short"}
        pages = [me.submit(link, **typed) for _ in range(7)]
        assert [page.status for page in pages] == [400] * 5 + [429] * 2
        assert pages[-1].headers["Retry-After"] == "30"
        other = Browser(box, client="192.0.2.7")
        assert other.submit(link, **typed | {"password": PASSWORD}).status == 303


def test_a_person_whose_token_is_denied_costs_no_write(box: Box, issuer: Issuer) -> None:
    token = issuer.token("did:privy:gus")
    box.write(lambda tx: issuers.deny(tx, [], clock.now_ms(), COMMAND_LINE, sub="did:privy:gus"))
    before = box.row("SELECT COUNT(*) FROM session_token")
    for _ in range(3):
        assert told(box.get("/api/v1/account", token)) == (401, "invalid_token")
    assert box.row("SELECT COUNT(*) FROM session_token") == before


def test_a_members_token_is_for_the_account_it_was_made_for(box: Box) -> None:
    home = house(box)
    own = token_for(box, home.member, claims_of_own(box, home.member.email))
    assert box.get("/api/v1/account", own).json()["account"] != home.account
    assert box.get("/api/v1/account", home.member.token).json()["account"] == home.account


def claims_of_own(box: Box, email: str) -> str:
    with box.instance.db.reading() as tx:
        return users.of_who(tx, email).account_id
