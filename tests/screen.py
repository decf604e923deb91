"""A person's browser with a screen: Debian's Chromium, driven by Playwright; and axe-core, to find
what shuts people out.

Every page a `Screen` shows is watched: whatever a person would find in the console or miss on the
page fails the test at its end, whether the test looked there or not.

    FAREBOX_LOOK=/tmp/look make test    keeps a picture of every page that `look` saw
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import pytest
from browser import PASSWORD

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response
    from server import Farebox

WIDE, NARROW = 1280, 390
NAMES = ("chromium", "chromium-browser", "google-chrome")  # of the program; Debian's is the first
AXE = Path(__file__).resolve().parent / "axe" / "node_modules" / "axe-core" / "axe.min.js"
MOST_STOPS = 500
MOST_INNER_STOPS = 8  # of one element; a date has one for each of its parts
# Chromium's line for an answer of 400 or more, which `Screen` hears of from the answer itself.
_STATUS_LINE = "Failed to load resource: the server responded with a status of"

OpenScreen: TypeAlias = "Callable[..., Screen]"


def program() -> str | None:
    """The path of the browser; None when there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def why_not() -> str | None:
    """What is missing to show pages here; None when nothing is."""
    if importlib.util.find_spec("playwright") is None:
        return "the tests on a screen need Playwright: `make test` installs it by pip"
    if program() is None:
        return "the tests on a screen need Chromium: `apt-get install chromium`"
    if not AXE.is_file():
        return "the tests on a screen need axe-core: `make test` installs it by npm"
    return None


class Screen:
    """One person's browser at one instance, and the page they look at.

    `width` is the window's; `scripts=False` has a browser without JavaScript; `scheme` is `light`
    or `dark`. The `page` is Playwright's, for all that this class does not offer.
    """

    def __init__(
        self,
        chromium: Browser,
        box: Farebox,
        *,
        width: int = WIDE,
        height: int = 800,
        scripts: bool = True,
        scheme: str = "light",
        **options: Any,
    ) -> None:
        self.box = box
        self.width = width
        self.height = height
        self.scripts = scripts
        self.scheme = scheme
        self.faults: list[str] = []
        self._twin: Page | None = None
        self._host = urlsplit(box.url).netloc
        self._expected: tuple[int, ...] = ()
        self._chromium = chromium
        self._options = {
            "base_url": box.url,
            "viewport": {"width": width, "height": height},
            "color_scheme": scheme,
            "reduced_motion": "reduce",
            "locale": "en-US",
            "timezone_id": "UTC",
        } | options
        self.context = chromium.new_context(**self._options, java_script_enabled=scripts)
        self.context.set_default_timeout(10_000)
        self.context.on("console", self._said)
        self.context.on("weberror", lambda error: self._fault(f"script: {error.error}"))
        self.context.on("request", self._asked)
        self.context.on("requestfailed", self._failed)
        self.context.on("response", self._answered)
        self.page: Page = self.context.new_page()

    # What it watches.

    def _fault(self, what: str) -> None:
        self.faults.append(f"{self.page.url}: {what}")

    def _said(self, message: ConsoleMessage) -> None:
        # A violation of the pages' policy is told here as well.
        if message.type in ("error", "warning") and not message.text.startswith(_STATUS_LINE):
            self._fault(f"console: {message.text}")

    def _asked(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob", "about") and url.netloc != self._host:
            self._fault(f"a request left the instance: {request.url}")

    def _failed(self, request: Request) -> None:
        # What a person leaves or downloads is broken off, which is no fault.
        if request.failure != "net::ERR_ABORTED":
            self._fault(f"{request.method} {request.url} failed: {request.failure}")

    def _answered(self, response: Response) -> None:
        if response.status >= 400 and response.status not in self._expected:
            self._fault(f"{response.request.method} {response.url} answered {response.status}")

    @contextlib.contextmanager
    def expecting(self, *statuses: int) -> Iterator[None]:
        """In this block answers with these statuses are no fault, of the document or of what its
        scripts ask for."""
        before, self._expected = self._expected, statuses
        try:
            yield
        finally:
            self._expected = before

    def close(self) -> None:
        """Shut the browser; fails when there was something wrong with what it showed."""
        if self._twin is not None:
            self._twin.context.close()
        self.context.close()
        assert not self.faults, "\n".join(self.faults)

    def leave(self) -> None:
        """As `close`, but somebody else will sit down here: nothing is left that the pages of this
        person stored, and none of them goes on."""
        self.page.mouse.move(0, 0)
        if self.scripts:
            self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        self.page.goto("about:blank")
        self.context.clear_cookies()
        self.context.clear_permissions()
        assert not self.faults, "\n".join(self.faults)

    def sit_down(self, width: int = WIDE, height: int = 800, scheme: str = "light") -> None:
        """Make the window of a browser that was left that wide and high, in that scheme."""
        self.width, self.height, self.scheme = width, height, scheme
        _shape(self, self.page)

    # What a person does.

    def open(self, path: str, status: int = 200) -> Page:
        """Load a page, which must answer with this status after any redirects."""
        with self.expecting(status):
            answer = self.page.goto(path, wait_until="load")
        assert answer is not None and answer.status == status, (path, answer and answer.status)
        return self.page

    @contextlib.contextmanager
    def leads(self, status: int = 200) -> Iterator[None]:
        """What is done in this block, such as pressing a button, loads a page with this status."""
        with self.expecting(status):
            with self.page.expect_navigation(wait_until="load") as went:
                yield
            answer = went.value
        assert answer is not None and answer.status == status, (
            self.page.url,
            answer and answer.status,
        )

    def press(self, name: str, status: int = 200) -> None:
        """Press the button of that name, which loads a page with this status."""
        with self.leads(status):
            self.page.get_by_role("button", name=name, exact=True).click()

    def sign_in(self, email: str, password: str = PASSWORD) -> Page:
        self.open("/login")
        self.page.get_by_label("Email").fill(email)
        self.page.get_by_label("Password").fill(password)
        self.press("Sign in")
        return self.page

    # What a person meets.

    def sticking_out(self) -> list[str]:
        """The elements that make the page wider than its window, as their tags; none is right."""
        found: list[str] = self.page.evaluate(
            """() => {
                const page = document.scrollingElement, wide = innerWidth;
                if (page.scrollWidth <= wide) return [];
                const out = [...document.body.querySelectorAll('*')].filter(
                    (each) => each.getBoundingClientRect().right > wide + 0.5);
                return [`${page.scrollWidth} px of ${wide}`,
                    ...out.map((each) => each.cloneNode(false).outerHTML.slice(0, 200))];
            }"""
        )
        return found

    def tab_to(self, selector: str) -> None:
        """Press Tab until the element of this selector has the focus, which it may have already."""
        wanted = self.page.locator(selector)
        for _ in range(MOST_STOPS):
            if wanted.evaluate("(each) => each === document.activeElement"):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not come to {selector}")

    def stops(self) -> list[str]:
        """The elements Tab goes through on this page, as their tags. Fails when one of them does
        not show that it has the focus, or when Tab never comes to an end."""
        self.page.evaluate(
            "() => { document.activeElement?.blur(); getSelection().removeAllRanges(); }"
        )
        found: list[str] = []
        # A page with scripts notes the stops itself while Tab is held down, and is asked now and
        # then: first when Tab must have come around.
        likely = self.page.evaluate(_NOTE_STOPS) + 1 if self.scripts else 1
        try:
            while len(found) < MOST_STOPS:
                for _ in range(likely):
                    self.page.keyboard.down("Tab")
                self.page.keyboard.up("Tab")
                stops = self.page.evaluate(_STOPS_NOTED if self.scripts else _FOCUSED)
                for at in stops:
                    if at["again"]:
                        return found
                    assert at["shown"], f"nothing shows the focus on {at['tag']}"
                    found.append(at["tag"])
                if not stops:  # Tab has left the page
                    return found
                likely = min(likely, MOST_INNER_STOPS)
        finally:
            if self.scripts:
                self.page.evaluate("() => removeEventListener('focusin', noteStop, true)")
        raise AssertionError(f"Tab goes on for ever: {found[-5:]}")

    def violations(self) -> list[str]:
        """What axe-core finds serious or critical on this page, each with the elements it means."""
        with self._where_scripts_run() as page:
            found = page.evaluate(_RUN_AXE)
            if found is None:  # nobody looked in this browser before
                page.context.add_init_script(f"window.loadAxe = () => {{{_axe()}}};")
                # Evaluated by the debugger, which the pages' policy on scripts does not concern.
                page.evaluate(f"() => {{ window.loadAxe = () => {{{_axe()}}}; }}")
                found = page.evaluate(_RUN_AXE)
        return [
            f"{each['id']} ({each['impact']}): {each['help']}\n"
            + "\n".join(
                f"    {node['html']}\n      {node['failureSummary']}" for node in each["nodes"]
            )
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    @contextlib.contextmanager
    def _where_scripts_run(self) -> Iterator[Page]:
        """The page, or where it has no scripts the same elements in a browser that has them."""
        if self.scripts:
            yield self.page
            return
        here, shown = self.page.url, re.sub(r"(?s)<script.*?</script>", "", self.page.content())
        shown = re.sub(r"<(/?)noscript\b", r"<\1div", shown)
        if self._twin is None:
            self._twin = self._chromium.new_context(**self._options).new_page()
        page = self._twin
        _shape(self, page)
        page.route(here, lambda route: route.fulfill(body=shown, content_type="text/html"))
        try:
            page.goto(here, wait_until="load")
            yield page
        finally:
            page.unroute_all()
            page.context.clear_cookies()

    def picture(self) -> None:
        """Keep a picture of the page in the folder that FAREBOX_LOOK names, if it does."""
        folder = os.environ.get("FAREBOX_LOOK")
        if folder:
            url = urlsplit(self.page.url)
            words = (
                re.sub(r"[^A-Za-z0-9]+", "-", f"{url.path} {url.query}").strip("-")[:80] or "home"
            )
            name = f"{words}.{self.width}.{self.scheme}{'' if self.scripts else '.plain'}.png"
            self.page.screenshot(path=Path(folder, name), full_page=True)


def _shape(screen: Screen, page: Page) -> None:
    page.set_viewport_size({"width": screen.width, "height": screen.height})
    page.emulate_media(color_scheme=screen.scheme)  # type: ignore[arg-type]  # one of its words


# Each stop is remembered on the element itself: two that look alike are two stops.
_STOP = """(at) => {
    const again = at.wasAStop === true, style = getComputedStyle(at);
    at.wasAStop = true;
    const shown = at.matches(':focus-visible') && (style.boxShadow !== 'none'
        || (style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0));
    return {again, shown, tag: at.cloneNode(false).outerHTML.slice(0, 200)};
}"""
_FOCUSED = f"""() => {{
    const at = document.activeElement;
    const none = !at || at === document.body || at === document.documentElement;
    return none ? [] : [({_STOP})(at)];
}}"""
_NOTE_STOPS = f"""() => {{
    const stop = {_STOP};
    window.stopsNoted = [];
    window.noteStop = (event) => stopsNoted.push(stop(event.target));
    addEventListener('focusin', noteStop, true);
    const stops = 'a[href], button, input, select, textarea, summary, [tabindex]';
    return [...document.querySelectorAll(stops)].filter((each) => each.checkVisibility()).length;
}}"""
_STOPS_NOTED = "() => stopsNoted.splice(0)"


# What else axe has to say about a page is long, and nobody reads it.
_RUN_AXE = """async () => {
    if (!window.loadAxe) return null;
    loadAxe();
    return (await axe.run(document, {resultTypes: ['violations']})).violations;
}"""


@functools.cache
def _axe() -> str:
    return AXE.read_text("utf-8")


def look(screen: Screen, path: str, status: int = 200) -> Page:
    """Open a page and see what any page owes anybody: nothing wider than the window, every stop of
    Tab visible, nothing serious or critical to axe-core."""
    page = screen.open(path, status)
    screen.picture()
    assert not (out := screen.sticking_out()), "\n".join(out)
    screen.stops()
    assert not (found := screen.violations()), "\n".join(found)
    return page


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The one browser of the run; each `Screen` has cookies of its own in it."""
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=program(), args=["--no-sandbox"]) as browser,
    ):
        yield browser


@pytest.fixture(scope="module")
def left_screens() -> Iterator[list[Screen]]:
    """Browsers that somebody left. A new one costs more than the pages most tests open in it."""
    left: list[Screen] = []
    yield left
    with contextlib.ExitStack() as stack:
        for screen in left:
            stack.callback(screen.close)


@pytest.fixture
def open_screen(chromium: Browser, left_screens: list[Screen]) -> Iterator[OpenScreen]:
    """`open_screen(box, width=NARROW, scheme="dark", …)`: a `Screen` that is judged at the end.

    It may be one that another test left, as `Screen.leave` leaves it. `fresh=True` is for a test
    that does to it what stays: a clock, listeners, a medium.
    """
    with contextlib.ExitStack() as stack:

        def leave(screen: Screen) -> None:
            try:
                screen.leave()
            except BaseException:
                screen.context.close()
                raise
            left_screens.append(screen)

        def opened(box: Farebox, *, fresh: bool = False, **options: Any) -> Screen:
            if fresh or not options.keys() <= {"width", "height", "scheme", "scripts"}:
                screen = Screen(chromium, box, **options)
                stack.callback(screen.close)
                return screen
            scripts = options.pop("scripts", True)
            for screen in left_screens:
                if (screen.box, screen.scripts) == (box, scripts):
                    left_screens.remove(screen)
                    break
            else:
                screen = Screen(chromium, box, scripts=scripts)
            stack.callback(leave, screen)
            screen.sit_down(**options)
            return screen

        yield opened
