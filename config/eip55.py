"""Ethereum addresses with the capitals that guard against typing errors (EIP-55)."""

import re


def checksummed(address: str) -> str:
    """An address as people write it."""
    from Crypto.Hash import keccak  # not loaded where no wallet is

    plain = address[2:].lower()
    digest = keccak.new(digest_bits=256, data=plain.encode()).hexdigest()
    return "0x" + "".join(
        letter.upper() if int(guard, 16) >= 8 else letter
        for letter, guard in zip(plain, digest, strict=False)
    )


def is_mistyped(address: str) -> bool:
    """Whether an address has capitals and small letters, and they are not the ones it must have."""
    letters = re.sub(r"[0-9]", "", address[2:])
    return letters not in (letters.lower(), letters.upper()) and address != checksummed(address)
