"""How we speak with OpenID providers: authlib's client on our own wires, and what it may believe.

OpenID Connect Core and Discovery 1.0. Loaded only where a provider is configured.
"""

import io
import threading
from base64 import b64encode
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_plus, urlsplit

import requests
from authlib.integrations.base_client import OAuth2Mixin, OAuthError, OpenIDMixin
from authlib.integrations.requests_client import OAuth2Session
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict

from config.sections import WELL_KNOWN, is_loopback
from core import clock, jose
from core.errors import Refusal
from core.upstream import Outbound, Wires

PATIENCE_SECONDS = 10.0  # for one answer, to its last byte
_LARGEST_ANSWER = 256 * 1024
_FRESH_SECONDS = 3600.0  # after which metadata and keys are asked for again
# Of a process's threads: a provider that hangs must leave the others to paid calls.
_AT_ONCE = 8
# None that a client's secret, or nobody, could have signed.
_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512",
    "EdDSA", "Ed25519",
)  # fmt: skip
_HEADERS = ("accept", "authorization", "content-type")  # authlib's own, of all that requests adds

Sign = Callable[[requests.PreparedRequest], requests.PreparedRequest]


class Transport(BaseAdapter):
    """requests over our wires: no redirects, and a bound on time and size."""

    _wires = Wires()
    _slots = threading.BoundedSemaphore(_AT_ONCE)

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """The answer, read whole. Raises requests' errors, and `overloaded`."""
        if not self._slots.acquire(blocking=False):
            raise Refusal(
                "overloaded", "Too many people are signing in at this moment.",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        try:
            status, headers, body = self._exchange(request)
        except Refusal as refusal:
            raise requests.ConnectionError(refusal.message) from refusal
        finally:
            self._slots.release()
        answer = requests.Response()
        answer.status_code, answer.headers = status, CaseInsensitiveDict(headers)
        answer.raw, answer.encoding = io.BytesIO(body), "utf-8"
        answer.url, answer.request = str(request.url), request
        return answer

    def _exchange(self, request: requests.PreparedRequest) -> tuple[int, dict[str, str], bytes]:
        headers = [
            (name, value if isinstance(value, str) else value.decode("latin-1"))
            for name, value in request.headers.items()
            if name.lower() in _HEADERS
        ]
        body = request.body if isinstance(request.body, bytes) else str(request.body or "").encode()
        reply = self._wires.send(
            Outbound(
                str(request.method), str(request.url), headers, body,
                PATIENCE_SECONDS, PATIENCE_SECONDS,
            )
        )  # fmt: skip
        try:
            content, whole = reply.read(_LARGEST_ANSWER)
        finally:
            reply.close()
        if not whole or 300 <= reply.status < 400:
            raise requests.ConnectionError(f"status {reply.status}, {len(content)} bytes")
        return reply.status, reply.headers, content

    def close(self) -> None:
        """Nothing: the wires are kept."""


class Session(OAuth2Session):  # type: ignore[misc]  # authlib comes without types
    """authlib's session on our transport, without proxies and netrc of the environment."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trust_env = False
        for scheme in ("https://", "http://"):
            self.mount(scheme, Transport())


class Client(OAuth2Mixin, OpenIDMixin):  # type: ignore[misc]
    """authlib's client, believing less of a provider, and nothing of it for ever."""

    client_cls = Session
    _fresh_until = 0.0

    def load_server_metadata(self) -> dict[str, Any]:
        """What the provider says of itself, as far as we use it. Raises whatever is wrong."""
        if clock.monotonic() >= self._fresh_until:
            url = self._server_metadata_url
            self.server_metadata = checked_metadata(self._fetched(url).json(), url)
            self._fresh_until = clock.monotonic() + _FRESH_SECONDS
        found: dict[str, Any] = self.server_metadata
        return found

    def fetch_jwk_set(self, force: bool = False) -> dict[str, Any]:
        """The provider's keys. What holds none that we can use is not kept."""
        metadata = self.load_server_metadata()
        if force or "jwks" not in metadata:
            keys = jose.keys_from_set(self._fetched(metadata["jwks_uri"]).text)
            if not keys:
                raise ValueError("its key set holds no key that can be used")
            metadata["jwks"] = {"keys": [key.as_dict(private=False) for key in keys.values()]}
        found: dict[str, Any] = metadata["jwks"]
        return found

    def fetch_access_token(self, **options: Any) -> dict[str, Any]:
        """The tokens for a code. A provider does not say how it wants a client's secret, only which
        ways it knows; whoever wants the other way refuses before it looks at the code."""
        ways = self.load_server_metadata()["token_endpoint_auth_methods_supported"]
        basic = {"auth": _basic(self.client_id, self.client_secret)}
        form = {
            "auth": _as_it_is, "client_id": self.client_id, "client_secret": self.client_secret
        }  # fmt: skip
        if "client_secret_basic" in ways:
            try:
                return self._tokens(basic | options)
            except OAuthError as error:
                if error.error != "invalid_client" or "client_secret_post" not in ways:
                    raise
        return self._tokens(form | options)

    def _tokens(self, options: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = super().fetch_access_token(**options)
        return found

    def _fetched(self, url: str) -> requests.Response:
        with self._get_session() as session:
            answer: requests.Response = session.request("GET", url, withhold_token=True)
        if answer.status_code != 200:
            raise ValueError(f"{url} answered {answer.status_code}")
        return answer


def checked_metadata(document: Any, url: str) -> dict[str, Any]:
    """What we use of a provider's metadata. The rest could be taken for settings of ours.

    Raises ValueError unless it is the provider we were told (Discovery 1.0, 4.3).
    """
    if not isinstance(document, dict):
        raise ValueError("its metadata is no object")
    issuer = document.get("issuer")
    if not isinstance(issuer, str) or issuer.rstrip("/") + WELL_KNOWN != url.partition("?")[0]:
        raise ValueError(f"its metadata is of another issuer, {issuer!r}")
    found: dict[str, Any] = {"issuer": issuer}
    for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
        address = document.get(name)
        if not isinstance(address, str) or not _is_as_safe_as(url, address):
            raise ValueError(f"its {name} is not to be used: {address!r}")
        found[name] = address
    listed = _words(document, "id_token_signing_alg_values_supported", "RS256")
    algorithms = [name for name in _ALGORITHMS if name in listed]
    if not algorithms:
        raise ValueError(f"it signs ID tokens by {listed!r} only")
    return found | {
        "id_token_signing_alg_values_supported": algorithms,
        "token_endpoint_auth_methods_supported": _words(
            document, "token_endpoint_auth_methods_supported", "client_secret_basic"
        ),
        "authorization_response_iss_parameter_supported": document.get(
            "authorization_response_iss_parameter_supported"
        ) is True,
    }  # fmt: skip


def _words(document: dict[str, Any], name: str, usual: str) -> list[Any]:
    """A list of the metadata; what the specification says it is when it is not there."""
    found = document.get(name, [usual])
    if not isinstance(found, list):
        raise ValueError(f"its {name} is no list")
    return found


def _is_as_safe_as(url: str, address: str) -> bool:
    """Nobody on the way reads what is sent there: plain http only on loopback, and only where the
    provider itself is."""
    parts = urlsplit(address)
    if parts.scheme == "http":
        return url.startswith("http://") and is_loopback(parts.hostname or "")
    return parts.scheme == "https"


def _basic(client_id: str, secret: str) -> Sign:
    """HTTP Basic with both parts form-encoded first (RFC 6749, 2.3.1), which authlib omits."""
    pair = b64encode(f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()).decode()

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Basic {pair}"
        return request

    return sign


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
