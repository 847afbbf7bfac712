"""Headers of MPEG audio frames, layers I to III (MP3): find frames, and tell whether a stream declares its length."""

from __future__ import annotations

import re
from typing import Final

#: Bytes that parse as this many consecutive frames of one kind are taken for MPEG audio.
_FRAMES: Final = 3
#: The sync word of a frame: eleven bits set, then a valid version and layer.
_SYNC: Final = re.compile(rb"\xff[\xe2-\xe7\xf2-\xff]")
#: Bit rates in kbit/s by (version, layer), for the indices 1 to 14 in the header; version 2 stands for 2.5 too.
_BIT_RATES: Final = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SAMPLE_RATES: Final = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}

#: What all frames of a stream share: version, layer, sample rate in Hz.
Kind = tuple[int, int, int]


def frame(header: bytes) -> tuple[int, Kind] | None:
    """The size in bytes and the kind of the frame with this 4-byte header; None if it is no frame of known size."""
    if len(header) < 4 or not _SYNC.match(header):
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bit_rate, sample_rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or layer == 4 or not 1 <= bit_rate <= 14 or sample_rate == 3:
        return None
    rate = _SAMPLE_RATES[version][sample_rate]
    bits = 1000 * _BIT_RATES[1 if version == 3 else 2, layer][bit_rate - 1]
    if layer == 1:
        return 4 * (12 * bits // rate + padding), (version, layer, rate)
    samples = 576 if layer == 3 and version != 3 else 1152
    return samples // 8 * bits // rate + padding, (version, layer, rate)


def begins(content: bytes, start: int = 0, ends: bool = False) -> bool:
    """Whether consecutive frames of one kind begin at ``start``: three, or two that end with the file.

    Args:
        content: a part of a file.
        start: where the first frame would begin.
        ends: whether the file ends with ``content``.
    """
    kind = None
    for number in range(_FRAMES):
        if number == _FRAMES - 1 and start == len(content):
            return ends
        found = frame(content[start : start + 4])
        if found is None or kind not in (None, found[1]):
            return False
        start, kind = start + found[0], found[1]
    return True


def find(content: bytes, ends: bool = False) -> int | None:
    """The position of the first frame for which :func:`begins` is true, or None."""
    return next((match.start() for match in _SYNC.finditer(content) if begins(content, match.start(), ends)), None)


def declares_frames(head: bytes) -> bool:
    """Whether the first few hundred bytes of a stream hold a Xing, Info or VBRI header with a frame count."""
    xing = re.search(rb"(?:Xing|Info)\x00\x00\x00(.)(.{4})", head, re.DOTALL)
    return bool(xing[1][0] & 1 and any(xing[2])) if xing else b"VBRI" in head
