# SPDX-License-Identifier: Apache-2.0
"""Image file directories of a BigTIFF whose tiles are already in the file, or will be.

Tiles of all levels are appended as they become ready and the directories follow at the end. That
is plain TIFF, needs no second copy of the pixels on disk and can go on after an interruption; no
library writes directories for tiles that it did not write itself (tifffile writes one level after
the other, GDAL and libvips want the whole image first), so these few tags are ours. The pixels are
encoded by imagecodecs; OME-XML comes from tifffile and geographic keys from GDAL.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 16
# TIFF's numbers of types, with their struct letters where one of these is enough.
_ASCII, _SHORT, _LONG, _RATIONAL, _DOUBLE, _LONG8, _IFD8 = 2, 3, 4, 5, 12, 16, 18
_LETTER = {_SHORT: "H", _LONG: "I", _DOUBLE: "d", _LONG8: "Q", _IFD8: "Q"}

_JPEG = 7
_RGB, _YCBCR = 2, 6
_CENTIMETER = 3


@dataclass(frozen=True)
class Tag:
    """One entry of a directory, its value as bytes."""

    code: int
    kind: int
    count: int
    data: bytes

    @classmethod
    def of(cls, code: int, kind: int, *values: float) -> Tag:
        return cls(code, kind, len(values), struct.pack(f"<{len(values)}{_LETTER[kind]}", *values))

    @classmethod
    def text(cls, code: int, text: str) -> Tag:
        data = text.encode("ascii") + b"\0"
        return cls(code, _ASCII, len(data), data)

    @classmethod
    def ratio(cls, code: int, *pairs: int) -> Tag:
        return cls(code, _RATIONAL, len(pairs) // 2, struct.pack(f"<{len(pairs)}I", *pairs))

    @classmethod
    def array(cls, code: int, values: NDArray[np.uint64]) -> Tag:
        return cls(code, _LONG8, len(values), values.astype("<u8").tobytes())


@dataclass
class TiledLevel:
    """One pyramid level: its geometry, and where its tiles lie in the file, row-major."""

    width: int
    height: int
    tile: int
    mpp: float | None
    compression: int
    bands: int
    reduced: bool  # a level, not the image itself
    offsets: NDArray[np.uint64]
    byte_counts: NDArray[np.uint64]
    more: Sequence[Tag] = field(default_factory=tuple)


def file_header(first_directory: int) -> bytes:
    """The 16 bytes at the start of a little-endian BigTIFF."""
    return struct.pack("<2sHHHQ", b"II", 43, 8, 0, first_directory)


def _tags(level: TiledLevel, software: str) -> list[Tag]:
    jpeg, bands = level.compression == _JPEG, level.bands
    tags = [
        # 1 is "a reduced version of another image": what makes OpenSlide and others see a level.
        Tag.of(254, _LONG, int(level.reduced)),
        Tag.of(256, _LONG, level.width),
        Tag.of(257, _LONG, level.height),
        Tag.of(258, _SHORT, *[8] * bands),
        Tag.of(259, _SHORT, level.compression),
        Tag.of(262, _SHORT, _YCBCR if jpeg else _RGB),
        Tag.of(277, _SHORT, bands),
        Tag.of(284, _SHORT, 1),
        Tag.text(305, software),
        Tag.of(322, _SHORT, level.tile),
        Tag.of(323, _SHORT, level.tile),
        Tag.array(324, level.offsets),
        Tag.array(325, level.byte_counts),
        *level.more,
    ]
    if level.mpp is not None:
        # Numerators have 32 bits.
        resolution = Fraction(10_000 / level.mpp).limit_denominator(10_000)
        pair = (resolution.numerator, resolution.denominator)
        tags += [Tag.ratio(282, *pair), Tag.ratio(283, *pair), Tag.of(296, _SHORT, _CENTIMETER)]
    if bands > 3:
        tags.append(Tag.of(338, _SHORT, *[0] * (bands - 3)))  # neither alpha nor colour
    if jpeg:
        tags.append(Tag.of(530, _SHORT, 1, 1))  # 4:4:4
        tags.append(Tag.ratio(532, 0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1))
    return sorted(tags, key=lambda tag: tag.code)


def directories(
    levels: Sequence[TiledLevel], *, software: str, position: int, chain: bool, tree: bool
) -> bytes:
    """All directories and their values, to be written at `position`, which must be even.

    Args:
        levels: the image and its levels.
        software: that made them.
        position: in the file, of the first directory.
        chain: levels follow the image in the main chain, as generic pyramids have them.
        tree: levels are SubIFDs of the image, as OME-TIFF has them.
    """
    pages = [_tags(level, software) for level in levels]
    if tree and len(pages) > 1:
        pages[0] = sorted([*pages[0], _children([0] * (len(pages) - 1))], key=lambda tag: tag.code)
    places = [position]
    for page in pages:
        places.append(places[-1] + _size(page))
    if tree and len(pages) > 1:
        children = _children(places[1:-1])
        pages[0] = [children if tag.code == children.code else tag for tag in pages[0]]
    packed = []
    for index, page in enumerate(pages):
        last = index + 1 == len(pages) or not chain
        packed.append(_pack(page, places[index], 0 if last else places[index + 1]))
    return b"".join(packed)


def _children(places: Sequence[int]) -> Tag:
    return Tag.of(330, _IFD8, *places)


def _size(tags: Sequence[Tag]) -> int:
    return 16 + 20 * len(tags) + sum(_padded(tag) for tag in tags)


def _padded(tag: Tag) -> int:
    """Bytes of a value that does not fit into its entry, to a multiple of 8."""
    return 0 if len(tag.data) <= 8 else -(-len(tag.data) // 8) * 8


def _pack(tags: Sequence[Tag], position: int, following: int) -> bytes:
    head, values = struct.pack("<Q", len(tags)), []
    values_at = position + 16 + 20 * len(tags)
    for tag in tags:
        inline = tag.data.ljust(8, b"\0")
        if _padded(tag):
            inline = struct.pack("<Q", values_at)
            values.append(tag.data.ljust(_padded(tag), b"\0"))
            values_at += _padded(tag)
        head += struct.pack("<HHQ", tag.code, tag.kind, tag.count) + inline
    return b"".join([head, struct.pack("<Q", following), *values])
