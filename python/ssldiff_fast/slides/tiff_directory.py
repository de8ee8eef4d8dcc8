# SPDX-License-Identifier: Apache-2.0
"""Image file directories of a BigTIFF whose tiles are already in the file.

Tiles of all levels are appended as they become ready and the directories follow at the end. That
is plain TIFF, needs no second copy of the pixels on disk and can go on after an interruption; no
library writes directories for tiles that it did not write itself, so these few tags are ours.
The pixels are encoded by imagecodecs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from fractions import Fraction

HEADER_BYTES = 16
# struct letters of the TIFF types used here, by type number.
_ASCII, _SHORT, _LONG, _RATIONAL, _LONG8 = 2, 3, 4, 5, 16
_LETTER = {_SHORT: "H", _LONG: "I", _RATIONAL: "I", _LONG8: "Q"}

COMPRESSION = {"jpeg": 7, "deflate": 8}
_RGB, _YCBCR = 2, 6
_CENTIMETER = 3


@dataclass
class TiledLevel:
    """One pyramid level: its geometry, and where its tiles lie in the file, row-major."""

    width: int
    height: int
    mpp: float
    offsets: list[int] = field(default_factory=list)
    byte_counts: list[int] = field(default_factory=list)


def file_header(first_directory: int) -> bytes:
    """The 16 bytes at the start of a little-endian BigTIFF."""
    return struct.pack("<2sHHHQ", b"II", 43, 8, 0, first_directory)


def directory(
    level: TiledLevel,
    *,
    codec: str,
    tile: int,
    description: str | None,
    software: str,
    position: int,
    last: bool,
) -> bytes:
    """The bytes of one directory and its values, to be written at `position`."""
    jpeg = codec == "jpeg"
    resolution = Fraction(10_000 / level.mpp).limit_denominator(10_000)  # 32-bit numerators
    rational = (resolution.numerator, resolution.denominator)
    tags: list[tuple[int, int, tuple[int, ...] | bytes]] = [
        # 1 is "a reduced version of another image": what makes OpenSlide and others see a level.
        (254, _LONG, (0 if description is not None else 1,)),
        (256, _LONG, (level.width,)),
        (257, _LONG, (level.height,)),
        (258, _SHORT, (8, 8, 8)),
        (259, _SHORT, (COMPRESSION[codec],)),
        (262, _SHORT, (_YCBCR if jpeg else _RGB,)),
        (277, _SHORT, (3,)),
        (282, _RATIONAL, rational),
        (283, _RATIONAL, rational),
        (284, _SHORT, (1,)),
        (296, _SHORT, (_CENTIMETER,)),
        (305, _ASCII, software.encode("ascii") + b"\0"),
        (322, _SHORT, (tile,)),
        (323, _SHORT, (tile,)),
        (324, _LONG8, tuple(level.offsets)),
        (325, _LONG8, tuple(level.byte_counts)),
    ]
    if description is not None:
        tags.append((270, _ASCII, description.encode("ascii") + b"\0"))
    if jpeg:
        tags.append((530, _SHORT, (1, 1)))  # 4:4:4
        tags.append((532, _RATIONAL, (0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1)))
    return _pack(sorted(tags), position, last)


def _pack(tags: list[tuple[int, int, tuple[int, ...] | bytes]], position: int, last: bool) -> bytes:
    head = struct.pack("<Q", len(tags))
    values_at = position + 8 + 20 * len(tags) + 8
    values = b""
    for code, kind, value in tags:
        if isinstance(value, bytes):
            data, count = value, len(value)
        else:
            data = struct.pack(f"<{len(value)}{_LETTER[kind]}", *value)
            count = len(value) // (2 if kind == _RATIONAL else 1)
        if len(data) <= 8:
            inline = data.ljust(8, b"\0")
        else:
            inline = struct.pack("<Q", values_at + len(values))
            values += data + b"\0" * (-len(data) % 8)
        head += struct.pack("<HHQ", code, kind, count) + inline
    following = 0 if last else values_at + len(values)
    return head + struct.pack("<Q", following) + values
