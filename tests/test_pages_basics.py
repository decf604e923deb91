"""What every page owes a person, seen in a browser: in two widths, light and dark, with scripts and
without, by keyboard alone; and that the browser of these tests notices what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from browser import PASSWORD
from conftest import StartFarebox
from screen import NARROW, WIDE, OpenScreen, Screen, look
from server import Farebox

EMAIL = "ana@example.com"
SETUP = "(the set-up link)"
# Pages for anybody, and the status of each.
PAGES = [
    ("/", 200),
    ("/login", 200),
    ("/forgot", 200),
    (SETUP, 200),
    ("/setup?token=used", 404),
    ("/docs/errors", 200),
    ("/no-such-page", 404),
]


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox) -> Farebox:
    """An instance that nobody has set up, but with a user who can sign in."""
    box = start_farebox(workers=1)
    box.set_up("users", "add", EMAIL, "--password-stdin", stdin=PASSWORD)
    return box


def setup_link(box: Farebox) -> str:
    found = re.search(r"/setup\?token=[\w-]+", box.log())
    assert found is not None, box.log()
    return found[0]


# Pages.


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(("path", "status"), PAGES)
def test_a_page_fits_its_window_and_can_be_read_and_reached_by_anybody(
    box: Farebox, open_screen: OpenScreen, path: str, status: int, width: int, scheme: str
) -> None:
    screen = open_screen(box, width=width, scheme=scheme)
    look(screen, setup_link(box) if path == SETUP else path, status)


@pytest.mark.parametrize(("path", "status"), PAGES)
def test_a_page_says_the_same_without_scripts(
    box: Farebox, open_screen: OpenScreen, path: str, status: int
) -> None:
    path = setup_link(box) if path == SETUP else path
    plain = open_screen(box, width=NARROW, scripts=False)
    look(plain, path, status)
    with_scripts = open_screen(box, width=NARROW).open(path, status)
    assert _told(plain.page.inner_text("main")) == _told(with_scripts.inner_text("main"))


def _told(text: str) -> str:
    """A page's words, whichever request it was, but for what it says of wallets."""
    text = re.sub(r"(Wallets need|Looking for wallets|No wallet was found).*", "", text)
    return re.sub(r"req_\w+", "req_", text)


def test_a_page_as_wide_as_a_small_phone_can_be_enlarged_to_four_times_its_size(
    box: Farebox, open_screen: OpenScreen
) -> None:
    # A window of 1280 at 400 % is one of 320 (WCAG 2.2, 1.4.10).
    screen = open_screen(box, width=320)
    for path, status in PAGES:
        screen.open(setup_link(box) if path == SETUP else path, status)
        assert screen.sticking_out() == []


# By keyboard.


@pytest.mark.parametrize("scripts", [True, False])
def test_a_person_signs_in_by_keyboard_alone(
    box: Farebox, open_screen: OpenScreen, scripts: bool
) -> None:
    screen = open_screen(box, scripts=scripts)
    page = screen.open("/login")
    keys = page.keyboard
    screen.tab_to('[name="email"]')
    keys.type(EMAIL)
    keys.press("Tab")
    keys.type(PASSWORD)
    with screen.leads():
        keys.press("Enter")
    assert urlsplit(page.url).path == "/dashboard"
    screen.tab_to("button:has-text('Sign out')")
    with screen.leads():
        keys.press("Enter")
    assert urlsplit(page.url).path == "/login"


def test_a_wrong_password_is_told_where_it_was_typed(box: Farebox, open_screen: OpenScreen) -> None:
    screen = open_screen(box)
    page = screen.open("/login")
    page.get_by_label("Email").fill(EMAIL)
    page.get_by_label("Password").fill("not this one at all")
    screen.press("Sign in", 401)
    assert page.get_by_role("alert").inner_text() == "E-mail or password is wrong."
    assert page.get_by_label("Email").input_value() == EMAIL
    assert screen.violations() == []


def test_each_screen_is_signed_in_for_itself(box: Farebox, open_screen: OpenScreen) -> None:
    ana, nobody = open_screen(box), open_screen(box)
    ana.sign_in(EMAIL)
    assert urlsplit(ana.page.url).path == "/dashboard"
    nobody.open("/dashboard")
    assert urlsplit(nobody.page.url).path == "/login"


# The browser of these tests: what it is for is to notice.


def add(tag: str, **attributes: str) -> Callable[[Screen], None]:
    """Puts an element of that kind onto the page and waits until it is loaded or is not."""

    def act(screen: Screen) -> None:
        screen.page.evaluate(
            """([tag, attributes]) => new Promise((done) => {
                const made = Object.assign(document.createElement(tag), attributes);
                made.onload = made.onerror = done;
                document.body.append(made);
                setTimeout(done, 500);
            })""",
            [tag, attributes],
        )

    return act


def say_an_error(screen: Screen) -> None:
    screen.page.evaluate("() => console.error('something is amiss')")


def throw(screen: Screen) -> None:
    screen.page.evaluate("() => { setTimeout(() => { throw new Error('thrown later'); }); }")
    screen.page.wait_for_timeout(100)


def ask_elsewhere(screen: Screen) -> None:
    screen.page.goto(screen.box.url.replace("127.0.0.1", "localhost"))


def be_refused(screen: Screen) -> None:
    screen.page.goto("/no-such-page")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (say_an_error, "something is amiss"),
        (throw, "thrown later"),
        (ask_elsewhere, "a request left the instance: http://localhost"),
        (be_refused, "/no-such-page answered 404"),
        (add("img", src="/static/none.png"), "/static/none.png answered 404"),
        (add("script", textContent="document.title = 'inline'"), "Content Security Policy"),
        (add("img", src="http://localhost:9/x.png"), "Content Security Policy"),
        (add("style", textContent="body { color: red }"), "Content Security Policy"),
    ],
    ids=lambda value: value.__name__ if callable(value) and value.__name__ != "act" else None,
)
def test_a_screen_fails_for(
    box: Farebox, chromium: object, fault: Callable[[Screen], None], told: str
) -> None:
    screen = Screen(chromium, box)
    screen.open("/login")
    fault(screen)
    with pytest.raises(AssertionError, match=re.escape(told)):
        screen.close()


def test_a_look_finds_what_is_too_wide_or_hard_to_read_or_does_not_show_its_focus(
    box: Farebox, open_screen: OpenScreen
) -> None:
    screen = open_screen(box, width=NARROW)
    page = screen.open("/login")
    assert screen.sticking_out() == [] and screen.violations() == []
    page.evaluate("() => { document.querySelector('h1').style.width = '600px'; }")
    assert any("<h1" in tag for tag in screen.sticking_out())
    page.evaluate("() => { document.querySelector('h1').style.color = '#eee'; }")
    (found,) = screen.violations()
    assert found.startswith("color-contrast (serious)") and "<h1" in found
    page.evaluate("() => { document.querySelector('button').style.outline = 'none'; }")
    with pytest.raises(AssertionError, match="nothing shows the focus on <button"):
        screen.stops()
