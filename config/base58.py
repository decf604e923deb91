"""Base58, in which Solana writes addresses and signatures: no two of its signs look alike."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}


def decode(text: str, length: int) -> bytes | None:
    """The `length` bytes that a text spells, or None. Every value has one spelling."""
    if len(text) > 2 * length:
        return None
    number = 0
    for letter in text:
        value = _VALUES.get(letter)
        if value is None:
            return None
        number = number * 58 + value
    zeros = len(text) - len(text.lstrip("1"))
    found = bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    return found if len(found) == length else None
