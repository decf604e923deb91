"""Sign each request to a Farebox with a wallet's key, in place of an API key (RFC 9421).

wallet = SolanaWallet(os.environ["WALLET_KEY"])  # pip install pynacl
wallet = EthereumWallet(os.environ["WALLET_KEY"])  # pip install eth-account
requests.post(url, json=body, auth=WalletAuth(wallet))
httpx.Client(auth=WalletAuth(wallet))
token = session_token("https://farebox.example.com", wallet)
"""

import base64
import hashlib
import json
import secrets
import time
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class SolanaWallet:
    """A key as wallets export it (base58 of 64 bytes), or as id.json has it (a list of them)."""

    def __init__(self, secret):
        from nacl.signing import SigningKey

        if isinstance(secret, str) and secret.lstrip().startswith("["):
            secret = json.loads(secret)
        if isinstance(secret, str):
            number = sum(_BASE58.index(c) * 58**i for i, c in enumerate(secret.strip()[::-1]))
            secret = number.to_bytes(64, "big")
        self._key = SigningKey(bytes(secret)[:32])
        public, text = bytes(self._key.verify_key), ""
        number = int.from_bytes(public, "big")
        while number:
            text, number = _BASE58[number % 58] + text, number // 58
        self.id = "solana:" + "1" * (32 - len(public.lstrip(b"\0"))) + text

    def sign(self, message):
        return self._key.sign(message).signature


class EthereumWallet:
    """A private key in hexadecimal."""

    def __init__(self, secret):
        from eth_account import Account

        self._account = Account.from_key(secret)
        self.id = f"eip155:{self._account.address}"

    def sign(self, message):
        from eth_account.messages import encode_defunct

        return bytes(self._account.sign_message(encode_defunct(message)).signature)


class WalletAuth:
    """`auth=` of requests and httpx. `origin`: FAREBOX_PUBLIC_URL, if it is not where one asks."""

    def __init__(self, wallet, origin=None):
        self.wallet, self.origin = wallet, origin

    def __call__(self, request):
        url = urlsplit(str(request.url))
        path = getattr(request, "path_url", "") or request.url.raw_path.decode()  # as it is sent
        target = (self.origin or f"{url.scheme}://{url.netloc}") + path
        body = request.content if hasattr(request, "content") else request.body or b""
        body = body.encode() if isinstance(body, str) else bytes(body)
        covered = {"@method": request.method, "@target-uri": target}
        if body:
            digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
            request.headers["Content-Digest"] = covered["content-digest"] = f"sha-256=:{digest}:"
        names = " ".join(f'"{name}"' for name in covered)
        once = f'created={int(time.time())};nonce="{secrets.token_urlsafe(18)}"'
        terms = f'({names});{once};keyid="{self.wallet.id}";tag="farebox"'
        base = "".join(f'"{name}": {value}\n' for name, value in covered.items())
        signature = self.wallet.sign(f'{base}"@signature-params": {terms}'.encode())
        request.headers["Signature-Input"] = f"farebox={terms}"
        request.headers["Signature"] = f"farebox=:{base64.b64encode(signature).decode()}:"
        request.headers.pop("Authorization", None)  # an SDK's, which would count instead
        return request


def session_token(base_url, wallet, origin=None):
    """Sign in: a session token, for an hour. `origin` as above."""
    message = _post(base_url, "/api/v1/wallets/challenge", wallet=wallet.id)["message"]
    if not message.startswith(f"{urlsplit(origin or base_url).netloc} wants you to sign in"):
        raise ValueError("that message signs in somewhere else")
    signed = wallet.sign(message.encode())
    is_evm = wallet.id.startswith("eip155:")
    text = f"0x{signed.hex()}" if is_evm else base64.b64encode(signed).decode()
    return _post(base_url, "/api/v1/session-tokens", message=message, signature=text)["token"]


def _post(base_url, path, **value):
    url, type_ = base_url.rstrip("/") + path, {"Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps(value).encode(), type_), timeout=30) as answer:
        return json.load(answer)
