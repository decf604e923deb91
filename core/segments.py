"""How many parts an SMS is sent in (3GPP TS 23.038 alphabet, TS 23.040 concatenation)."""

# The GSM 7-bit default alphabet without ESC, and its extension table, whose characters take two
# septets each.
_BASIC = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?"
    "¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
_EXTENDED = frozenset("^{}\\[~]|€\f")

# One message alone, and each part of several: 7 septets or 3 UCS-2 units go to the header.
_GSM_ALONE, _GSM_PART = 160, 153
_UCS2_ALONE, _UCS2_PART = 70, 67


def count(message: str) -> int:
    """The number of segments of a message. No character is ever split between two."""
    if all(character in _BASIC or character in _EXTENDED for character in message):
        widths = [2 if character in _EXTENDED else 1 for character in message]
        alone, part = _GSM_ALONE, _GSM_PART
    else:
        widths = [2 if ord(character) > 0xFFFF else 1 for character in message]
        alone, part = _UCS2_ALONE, _UCS2_PART
    if sum(widths) <= alone:
        return 1
    segments, room = 1, part
    for width in widths:
        if width > room:
            segments, room = segments + 1, part
        room -= width
    return segments
