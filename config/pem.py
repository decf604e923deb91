"""PEM files of the instance folder: the public keys that issuers sign with."""

import os
import re
from pathlib import Path

from config.checks import fail
from config.sections import IssuerSection

_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # P-256, P-384 and P-521
_SHORTEST_RSA_BITS = 2048
_WANTED = "expected one public key: EC P-256, P-384 or P-521, RSA or Ed25519"


def read_public_keys(folder: Path, issuers: list[IssuerSection]) -> dict[str, str]:
    """The PEM text of each issuer that has a file, by its `iss`. Raises ConfigError."""
    return {
        section.issuer: _read_public_key(f"$.issuers[{number}].pem_file", folder / section.pem_file)
        for number, section in enumerate(issuers)
        if section.pem_file is not None
    }


def _read_public_key(at: str, path: Path) -> str:
    if not os.path.isfile(path):
        fail(at, f"{path.name}: not found; expected a PEM file in the instance folder")
    try:
        text = path.read_text("ascii")
    except OSError as error:
        fail(at, f"{path.name}: cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        fail(at, f"{path.name}: not PEM; {_WANTED}")
    _check_labels(at, path, re.findall(r"-----BEGIN ([^-\n]*)-----", text))
    _check_key(at, path, text)
    return text


def _check_labels(at: str, path: Path, labels: list[str]) -> None:
    if any("PRIVATE KEY" in label for label in labels):
        fail(at, f"{path.name}: holds a private key, which is the issuer's alone; {_WANTED}")
    if any("CERTIFICATE" in label for label in labels):
        fail(at, f"{path.name}: holds a certificate; {_WANTED} (openssl x509 -pubkey -noout)")
    if labels not in (["PUBLIC KEY"], ["RSA PUBLIC KEY"]):
        fail(at, f"{path.name}: {_WANTED}, in PEM form (-----BEGIN PUBLIC KEY-----)")


def _check_key(at: str, path: Path, text: str) -> None:
    # Only those who configured a key pay for loading this.
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        fail(at, f"{path.name}: cannot be understood; {_WANTED}")
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _SHORTEST_RSA_BITS:
            fail(
                at,
                f"{path.name}: RSA of {key.key_size} bits; expected at least {_SHORTEST_RSA_BITS}",
            )
    elif isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name not in _CURVES:
            fail(at, f"{path.name}: EC {key.curve.name}; {_WANTED}")
    elif not isinstance(key, ed25519.Ed25519PublicKey):
        fail(at, f"{path.name}: a key of another kind; {_WANTED}")
