"""A person's browser without a screen: it keeps cookies, fills in forms, and follows no redirect
unless told to. It works with `server.Farebox` and with `inprocess.Box` alike."""

from __future__ import annotations

import html
import re
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlencode, urlsplit

from server import Answer, Farebox

if TYPE_CHECKING:
    from inprocess import Box

Site: TypeAlias = "Farebox | Box"

PASSWORD = "a-long-enough-pass-phrase"
_FIELD = re.compile(r"<input\b[^>]*>")
_ATTRIBUTE = re.compile(r'(\w[\w-]*)="([^"]*)"')


class Browser:
    """One browser with cookies of its own. Paths are of one site; a full URL loses its host."""

    def __init__(self, site: Site, agent: str = "TestBrowser/1.0", **options: Any) -> None:
        self._site = site
        self._agent = agent
        self._options = options  # passed on with every request, such as `client=`
        self.cookies: dict[str, str] = {}

    def request(
        self, method: str, target: str, headers: dict[str, str] | None = None, **options: Any
    ) -> Answer:
        """One request with this browser's cookies; those of the answer are kept."""
        parts = urlsplit(target)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        sent = {"User-Agent": self._agent, "Accept": "text/html,*/*;q=0.8"}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        answer = self._site.request(
            method, path, headers=sent | (headers or {}), **self._options, **options
        )
        for line in answer.headers.getlist("Set-Cookie"):
            for name, morsel in SimpleCookie(line).items():
                if morsel.value and morsel["max-age"] != "0":
                    self.cookies[name] = morsel.value
                else:
                    self.cookies.pop(name, None)
        return answer

    def get(self, target: str, **headers: str) -> Answer:
        made = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("GET", target, made)

    def follow(self, answer: Answer) -> Answer:
        """The page a redirect leads to, and so on."""
        for _ in range(10):
            if answer.status not in (302, 303):
                return answer
            answer = self.get(answer.headers["Location"])
        raise AssertionError("it redirects for ever")

    def post(self, target: str, fields: dict[str, str], **headers: str) -> Answer:
        """Post a form's fields as they are, with nothing added."""
        made = {name.replace("_", "-"): value for name, value in headers.items()}
        made["Content-Type"] = "application/x-www-form-urlencoded"
        return self.request("POST", target, made, body=urlencode(fields).encode())

    def submit(self, page: str, action: str | None = None, **fields: str) -> Answer:
        """Load a page and post its form, hidden fields included, with these filled in. `action` is
        where the form goes when that is not the page's own path."""
        shown = self.get(page)
        wanted = action or urlsplit(page).path
        return self.post(wanted, hidden(shown, wanted) | fields)

    def sign_in(self, email: str, password: str = PASSWORD) -> Answer:
        return self.submit("/login", email=email, password=password)

    def csrf(self, page: str = "/dashboard") -> str:
        """The form token of a page, as a script on it would read it."""
        return hidden(self.get(page), None)["csrf_token"]

    def token(self, account: str | None = None, page: str = "/dashboard") -> str:
        """A fresh session token, as a page's script gets it."""
        answer = self.request(
            "POST", "/api/v1/session-tokens", {"X-CSRF-Token": self.csrf(page)},
            value={} if account is None else {"account": account},
        )  # fmt: skip
        assert answer.status == 201, answer.body
        token: str = answer.json()["token"]
        return token


def hidden(page: Answer, action: str | None) -> dict[str, str]:
    """The hidden fields of the form that goes to `action`, or of the first form of a page."""
    text = page.body.decode()
    for attributes, inside in re.findall(r"<form\b([^>]*)>(.*?)</form>", text, re.S):
        if action is None or dict(_ATTRIBUTE.findall(attributes)).get("action") == action:
            found = {}
            for field in _FIELD.findall(inside):
                given = dict(_ATTRIBUTE.findall(field))
                if given.get("type") == "hidden":
                    found[given["name"]] = html.unescape(given.get("value", ""))
            return found
    raise AssertionError(f"no form to {action} on this page ({page.status}):\n{text}")
