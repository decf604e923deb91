"""Every error a client can meet, on one screen.

A rule that refuses raises `Refusal`; the code decides status and type, so that the same mistake
never has two faces. `about` is what `/docs/errors` says of the code.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """What a code always means: its HTTP status, its type and whether a retry can mend it."""

    status: int
    type: str
    retry: bool
    about: str


_REQUEST, _AUTH, _PAYMENT = "invalid_request_error", "authentication_error", "payment_error"
_PERMISSION, _RATE, _API = "permission_error", "rate_limit_error", "api_error"

KINDS: dict[str, Kind] = {
    "validation_error": Kind(400, _REQUEST, False, "The body, a field (named in `param`) or the Authorization header is malformed. Correct it and send again."),
    "invalid_host": Kind(400, _REQUEST, False, "The Host header names a host this instance does not serve. The operator lists hosts under `[instance] hosts`."),
    "missing_api_key": Kind(401, _AUTH, False, "No credential was sent. Add `Authorization: Bearer <your key>`."),
    "invalid_api_key": Kind(401, _AUTH, False, "The key is unknown, mistyped, revoked or expired; the answer is the same for all of them on purpose."),
    "invalid_token": Kind(401, _AUTH, False, "The session token is bad, expired, signed out or revoked."),
    "invalid_signature": Kind(401, _AUTH, False, "The wallet's signature, of a request or of a message to sign in, does not fit, is too old, was used before, or is of a wallet nobody has linked. The message says which; sign anew."),
    "insufficient_credits": Kind(402, _PAYMENT, False, "The account has fewer credits available than the call would set aside: see `credits` and `required`. Nothing was charged and nothing was sent upstream."),
    "payment_required": Kind(402, _PAYMENT, False, "The call can be paid on the spot: `accepts` says what, in which token, on which networks. Sign one of them and send the request again with `PAYMENT-SIGNATURE`; or use an API key. Nothing was charged."),
    "payment_invalid": Kind(402, _PAYMENT, False, "The payment was refused, and no money moved: `reason` says why, `accepts` what would be taken."),
    "key_suspended": Kind(403, _PERMISSION, False, "The key is suspended; `reason` says why. Its owner or the operator can resume it."),
    "account_suspended": Kind(403, _PERMISSION, False, "The account is suspended; `reason` says why. Ask the operator."),
    "session_required": Kind(403, _PERMISSION, False, "An API key or a signed request can spend and read; managing the account takes a session token."),
    "signup_closed": Kind(403, _PERMISSION, False, "This instance does not know you, and does not take in new people by itself. Ask the operator, or an account's owner for an invitation."),
    "csrf_failed": Kind(403, _PERMISSION, False, "The form did not come from a page of this instance in this browser, or is too old. Load the page again."),
    "forbidden": Kind(403, _PERMISSION, False, "The change is not yours to make: it takes an owner of the account or, where the operator suspended something, the operator."),
    "missing_scope": Kind(403, _PERMISSION, False, "The key may not call this route; `required` names the scope it lacks."),
    "credit_limit_reached": Kind(403, _PERMISSION, False, "The spending limit of the key, or of the member whose key or token it is, is used up: see `limit`, `period` and `resets_at`."),
    "not_found": Kind(404, _REQUEST, False, "There is nothing here, or it belongs to another account."),
    "model_not_found": Kind(404, _REQUEST, False, "There is no model of that name here; `GET /v1/models` lists those you may call."),
    "method_not_allowed": Kind(405, _REQUEST, False, "The path exists, the method does not; the `Allow` header lists those that do."),
    "body_too_large": Kind(413, _REQUEST, False, "The request body is larger than this route accepts."),
    "unsupported_media_type": Kind(415, _REQUEST, False, "The Content-Type is not one this route reads, or the body has a Content-Encoding, which is never accepted."),
    "idempotency_in_progress": Kind(409, _REQUEST, True, "The first call with this Idempotency-Key is still running. Try again after `Retry-After` seconds."),
    "idempotency_replay_unavailable": Kind(409, _REQUEST, False, "The first call with this Idempotency-Key succeeded and was charged, but its answer was too large, or cut, and so was not kept. This repeat was not charged."),
    "payment_in_progress": Kind(409, _PAYMENT, True, "A request with this very payment is being served. Try again after `Retry-After` seconds with the same payment."),
    "payment_already_used": Kind(409, _PAYMENT, False, "This payment was spent on another request, or its answer is not kept any more. Nothing was charged now."),
    "wallet_linked": Kind(409, _REQUEST, False, "The wallet belongs to another account. Sign in with it, and unlink it there first."),
    "conflict": Kind(409, _REQUEST, False, "The change contradicts the present state."),
    "idempotency_key_reused": Kind(422, _REQUEST, False, "This Idempotency-Key was used with another request. Use a new key for a new request."),
    "rate_limited": Kind(429, _RATE, True, "Too many requests in this minute, or too many calls at once. Try again after `Retry-After` seconds."),
    "internal_error": Kind(500, _API, True, "Our fault; nothing was charged. The request id finds it in the operator's log."),
    "provider_error": Kind(502, _API, True, "The upstream failed or could not be reached. What was set aside is back (`refunded`); nothing was charged."),
    "storage_unavailable": Kind(503, _API, True, "The database could not answer just now. Nothing was charged."),
    "overloaded": Kind(503, _API, True, "Too much is being done at this moment, such as verifying keys for the first time. Try again after `Retry-After` seconds."),
    "facilitator_unavailable": Kind(503, _API, True, "Whoever settles payments here could not be reached. The payment was not sent; send it again after `Retry-After` seconds."),
    "payment_unconfirmed": Kind(503, _API, True, "Whether the payment was settled is not known yet; it is being found out. Do not pay again: send the same request with the same payment after `Retry-After` seconds."),
    "provider_timeout": Kind(504, _API, True, "The upstream did not answer in time. What was set aside is back (`refunded`); nothing was charged."),
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Refusal(Exception):
    """An error for the client: a code of `KINDS`, a sentence, and the fields the contract adds."""

    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return KINDS[self.code]

    def all_headers(self) -> dict[str, str]:
        """The headers of the answer: those every refusal of this kind has, and its own."""
        headers = {}
        if self.kind.status == 401:
            headers["WWW-Authenticate"] = "Bearer"  # RFC 6750, section 3
        if not self.kind.retry:
            headers["x-should-retry"] = "false"
        return headers | self.headers

    def body(self, dialect: str, request_id: str, docs_url: str) -> dict[str, Any]:
        """The JSON body in one of the two dialects, `flat` or `object`."""
        if dialect == "object":
            error = {
                "code": self.code,
                "message": self.message,
                "type": self.kind.type,
                "param": self.param,
                "docs": f"{docs_url}#{self.code}",
            }
            return {"error": error, "request_id": request_id, **self.fields}
        body = {"success": False, "error": self.code, "message": self.message}
        if self.param is not None:
            body["param"] = self.param
        return body | {"request_id": request_id, **self.fields}


def dialect_of(path: str) -> str:
    """The dialect a path speaks unless its route says otherwise: `object` under `/v1/`."""
    return "object" if path.startswith("/v1/") else "flat"


def invalid_body(message: str, param: str | None = None) -> Refusal:
    return Refusal("validation_error", message, param=param)


def invalid_api_key() -> Refusal:
    """One answer for every way a key can be wrong, so that it tells a stranger nothing."""
    return Refusal("invalid_api_key", "This API key is not valid.")


def invalid_token() -> Refusal:
    """One answer for every way a session token can be wrong."""
    return Refusal("invalid_token", "This session token is not valid.")


def invalid_signature(message: str) -> Refusal:
    return Refusal("invalid_signature", message)


def not_found() -> Refusal:
    return Refusal("not_found", "There is nothing here.")


def model_not_found(model_id: str) -> Refusal:
    named = model_id if len(model_id) <= 200 else f"{model_id[:200]}…"
    return Refusal("model_not_found", f"There is no model {named!r} here.", param="model")


def method_not_allowed(allowed: Iterable[str]) -> Refusal:
    allow = ", ".join(sorted(allowed))
    return Refusal("method_not_allowed", f"Use one of: {allow}.", headers={"Allow": allow})


def insufficient_credits(available: int, required: int) -> Refusal:
    return Refusal(
        "insufficient_credits",
        f"This call needs {required} credits and {available} are available.",
        fields={"credits": available, "required": required},
    )


def rate_limited(message: str, retry_after_seconds: int) -> Refusal:
    return Refusal("rate_limited", message, headers={"Retry-After": str(retry_after_seconds)})


def storage_unavailable() -> Refusal:
    message = "The database cannot answer just now. Nothing was charged."
    return Refusal("storage_unavailable", message, headers={"Retry-After": "1"})


def provider_error(message: str) -> Refusal:
    return Refusal("provider_error", message, fields={"refunded": True})


def provider_timeout() -> Refusal:
    message = "The upstream did not answer in time. Nothing was charged."
    return Refusal("provider_timeout", message, fields={"refunded": True})
