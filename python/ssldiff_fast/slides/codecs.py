# SPDX-License-Identifier: Apache-2.0
"""Codecs of tiles: imagecodecs encodes, this says what each is called and who cannot read it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from .raster import Rows

DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class Codec:
    """How tiles are encoded.

    Attributes:
        name: as the user gives it.
        library: the name of imagecodecs' object that says whether it was built in.
        encode: (pixels uint8 [h, w, bands], quality) -> bytes.
        bytes_per_px: of a level-0 pixel with all levels, for the estimate of the space needed;
            measured on H&E and rounded up.
        lossy: whether it has a quality.
        tiff: its number in a TIFF's Compression tag, or None.
        warning: who cannot read a TIFF with it.
        bands: numbers of bands that it takes.
    """

    name: str
    library: str
    encode: Callable[[Rows, int], bytes]
    bytes_per_px: float
    lossy: bool = False
    tiff: int | None = None
    warning: str = ""
    bands: tuple[int, ...] = (3, 4)


def encode_jpeg(pixels: Rows, quality: int) -> bytes:
    """4:4:4: histology's colours do not survive subsampling."""
    import imagecodecs

    return bytes(
        imagecodecs.jpeg8_encode(
            pixels, level=quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="444"
        )
    )


def _deflate(pixels: Rows, quality: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.deflate_encode(pixels.tobytes(), level=6))


def _lzw(pixels: Rows, quality: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.lzw_encode(pixels.tobytes()))


def _zstd(pixels: Rows, quality: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.zstd_encode(pixels.tobytes(), level=9))


def _webp(pixels: Rows, quality: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.webp_encode(pixels, level=quality, lossless=False))


def _jpeg2000(pixels: Rows, quality: int) -> bytes:
    import imagecodecs

    return bytes(
        imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", mct=True, reversible=True)
    )


def _jpegxl(pixels: Rows, quality: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpegxl_encode(pixels, lossless=True, effort=3, numthreads=1))


def _png(pixels: Rows, quality: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.png_encode(pixels, level=6))


_OTHERS = "OpenSlide, QuPath and cuCIM cannot read it, and one such level fails the whole file"

TIFF_CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("jpeg", "JPEG8", encode_jpeg, 0.9, lossy=True, tiff=7, bands=(3,)),
        Codec("deflate", "DEFLATE", _deflate, 3.7, tiff=8),
        Codec("lzw", "LZW", _lzw, 4.8, tiff=5),
        Codec(
            "zstd",
            "ZSTD",
            _zstd,
            3.7,
            tiff=50000,
            warning="some builds of libvips show black without an error, and cuCIM fails",
        ),
        Codec("webp", "WEBP", _webp, 0.9, lossy=True, tiff=50001, warning=_OTHERS, bands=(3,)),
        Codec("jpeg2000", "JPEG2K", _jpeg2000, 2.6, tiff=34712, warning=_OTHERS),
        Codec("jpegxl", "JPEGXL", _jpegxl, 2.6, tiff=50002, warning=_OTHERS),
    )
}
# What every reader of TIFFs reads.
EVERYWHERE = tuple(name for name, codec in TIFF_CODECS.items() if not codec.warning)
DZI_CODECS: Mapping[str, Codec] = {
    "jpeg": TIFF_CODECS["jpeg"],
    "png": Codec("png", "PNG", _png, 2.9, bands=(3,)),
}


def choose(
    codecs: Mapping[str, Codec], name: str, quality: int | None, bands: int
) -> tuple[Codec, int]:
    """The codec and its quality, checked; warns where common readers cannot read it.

    Raises:
        ValueError: an unknown codec, a quality out of range or of a lossless codec, or a number of
            bands that it does not take.
        RuntimeError: this build of imagecodecs is without it.
    """
    import imagecodecs

    check_codec(name, codecs)
    codec = codecs[name]
    if quality is not None and not codec.lossy:
        raise ValueError(
            f"quality is {quality}, but the codec {name} is lossless: leave quality out"
        )
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}, expected 1 to 100")
    if bands not in codec.bands:
        raise ValueError(f"the codec {name} has 3 bands, not {bands}: choose deflate")
    if not getattr(getattr(imagecodecs, codec.library, None), "available", False):
        raise RuntimeError(
            f"the codec {name} is not in this build of imagecodecs {imagecodecs.__version__}: "
            "choose jpeg or deflate, or install imagecodecs from PyPI"
        )
    if codec.warning:
        warnings.warn(f"codec {name}: {codec.warning}", UserWarning, stacklevel=2)
    return codec, DEFAULT_QUALITY if quality is None else int(quality)


def check_codec(name: str, known: Collection[str]) -> None:
    """Raises ValueError unless the codec is among those of a format."""
    if name not in known:
        raise ValueError(f"codec {name!r} is unknown, expected one of {sorted(known)}")
