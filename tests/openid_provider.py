"""A certified OpenID provider, run by Node on loopback, and the browser of those who sign in there.

It signs real ID tokens, demands PKCE, and refuses what the specification tells it to refuse, so a
flow that passes here passes at the providers that people have.
"""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from http.cookiejar import CookieJar
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import Request

import pytest
import urllib3

FOLDER = Path(__file__).resolve().parent / "openid"
START_SECONDS = 20.0
END_SECONDS = 5.0
MOST_HOPS = 10

CLIENT_ID = "farebox-tests"
ES256_CLIENT_ID = "farebox-tests-es256"
POST_CLIENT_ID = "farebox-tests-post"
CLIENT_SECRET = "client-secret-of-the-tests-0123456789abcdef"

USERS: dict[str, dict[str, Any]] = {
    "alice": {"email": "alice@example.com", "email_verified": True},
    "bob": {"email": "bob@example.com", "email_verified": True},
    "mallory": {"email": "alice@example.com", "email_verified": False},
    "nobody": {},
}


def why_not() -> str | None:
    """What is missing to run the provider here; None when nothing is."""
    if shutil.which("node") is None:
        return "the OpenID provider of the tests needs Node 18 or later and npm"
    if not (FOLDER / "node_modules" / "oidc-provider").is_dir():
        return "the OpenID provider of the tests is not installed: `make test` does that by npm"
    return None


class OpenIdProvider:
    """The provider. `with OpenIdProvider() as provider:` starts and ends it.

    It has three clients with one secret: `client_id` (ID tokens by RS256, the secret by HTTP
    Basic), `es256_client_id` (ES256) and `post_client_id` (the secret in the form). `clients` are
    more, as client metadata in the specification's words. `users` are claims by `sub`, and the
    `sub` is the login; claims keep the types they are given.
    """

    client_id = CLIENT_ID
    es256_client_id = ES256_CLIENT_ID
    post_client_id = POST_CLIENT_ID
    client_secret = CLIENT_SECRET

    def __init__(
        self,
        users: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        redirect_uris: Sequence[str] = (),
        clients: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._users: dict[str, Any] = {
            sub: dict(claims) for sub, claims in (USERS if users is None else users).items()
        }
        self._redirect_uris = list(redirect_uris)
        ours = [
            {"client_id": CLIENT_ID},
            {"client_id": ES256_CLIENT_ID, "id_token_signed_response_alg": "ES256"},
            {"client_id": POST_CLIENT_ID, "token_endpoint_auth_method": "client_secret_post"},
        ]
        # A client must have a redirect URI from the start, though nobody listens on this one.
        common = {"client_secret": CLIENT_SECRET, "redirect_uris": ["http://127.0.0.1:1/unused"]}
        self._clients = [common | dict(client) for client in [*ours, *clients]]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self.port = 0  # Free until the first start, and the same ever after.
        self.issuer = ""

    # Its life.

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it listens. A second start has the same port and new keys."""
        assert self._process is None, "it runs already"
        node = shutil.which("node")
        assert node is not None, why_not()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # `stop` closes it
        self._process = subprocess.Popen(
            [node, "provider.mjs"],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        try:
            answer = self._tell(
                port=self.port,
                clients=self._clients,
                users=self._users,
                redirect_uris=self._redirect_uris,
            )
        except BaseException:
            self.stop()
            raise
        self.issuer = answer["issuer"]
        self.port = urlsplit(self.issuer).port or 0

    def stop(self) -> None:
        """End it, so that connections are refused. Sessions, grants and keys are forgotten."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _tell(self, **what: Any) -> dict[str, Any]:
        """One line to the provider, and its answer."""
        assert self._process is not None, "it does not run"
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # Then it died, which the answer shows.
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        line = self._process.stdout.readline() if ready else b""
        assert line, f"the OpenID provider did not answer:\n{self.errors()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def errors(self) -> str:
        """What it wrote to standard error since it started: its own faults, not refusals."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")

    # What an operator of the provider does.

    @property
    def metadata_url(self) -> str:
        return f"{self.issuer}/.well-known/openid-configuration"

    def allow_redirect(self, *uris: str) -> None:
        """Let every client send its users back to these exact URIs too."""
        self._redirect_uris += uris
        self._tell(redirect_uris=list(uris))

    def set_user(self, sub: str, **claims: Any) -> None:
        """Add the user, or replace all the claims: `set_user("eve", email="e@example.com")`."""
        self._users[sub] = claims
        self._tell(users={sub: claims})

    def remove_user(self, sub: str) -> None:
        """Nobody has that login any more; what was issued to it ends as well."""
        self._users.pop(sub, None)
        self._tell(users={sub: None})

    # What a browser does.

    def sign_in(self, authorize_url: str, login: str) -> str:
        """Sign in as `login`, with a fresh browser that was sent to `authorize_url`.

        Returns the callback URL that the provider sends the browser to, which is not followed. It
        holds `error` where the client asked wrongly and the provider says so to the client. Fails
        where the provider shows an error to the user instead.
        """
        return self._visit(authorize_url, {"login": login})

    def refuse(self, authorize_url: str) -> str:
        """As `sign_in`, but the user refuses; the callback URL holds `error=access_denied`."""
        return self._visit(authorize_url, {"refuse": "1"})

    def _visit(self, url: str, form: Mapping[str, str]) -> str:
        jar = CookieJar()
        with urllib3.PoolManager(retries=False, timeout=10) as pool:
            body: str | None = None
            for _ in range(MOST_HOPS):
                if not url.startswith(f"{self.issuer}/"):
                    return url
                # The standard library's jar knows which cookies a browser sends where.
                question = Request(url)
                jar.add_cookie_header(question)
                headers = dict(question.header_items())
                if body is not None:
                    headers["Content-Type"] = "application/x-www-form-urlencoded"
                answer = pool.request(
                    "GET" if body is None else "POST",
                    url,
                    body=body,
                    headers=headers,
                    redirect=False,
                )
                jar.extract_cookies(answer, question)  # type: ignore[arg-type]
                if answer.status in (302, 303):
                    url, body = urljoin(url, answer.headers["Location"]), None
                elif answer.status == 200 and body is None and b'name="login"' in answer.data:
                    body = urlencode(form)
                else:
                    break
        raise AssertionError(
            f"the OpenID provider showed {answer.status} at {url}: "
            f"{answer.data[:2000].decode('utf-8', 'replace')}\n{self.errors()}"
        )


# A function named as its fixture would hide it from the modules that import it and use it.
@pytest.fixture(scope="session", name="openid_provider")
def the_openid_provider() -> Iterator[OpenIdProvider]:
    """The one provider of the run; `allow_redirect` tells it of an instance."""
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    with OpenIdProvider() as provider:
        yield provider
