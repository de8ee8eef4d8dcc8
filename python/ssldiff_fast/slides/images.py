# SPDX-License-Identifier: Apache-2.0
"""Plain images (PNG, JPEG, TIFF without a pyramid, arrays) as slides of one level."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .slide import MPP_ANISOTROPY, MPP_RANGE, RGB, Slide, check_mpp, hash_file, on_white

# Plain images are held in memory: 3 GiB.
IMAGE_PX = 2**30


class ImageSlide(Slide):
    """An image in memory, with the mpp that the caller gives."""

    def __init__(
        self,
        pixels: RGB,  # [H, W, 3]
        mpp: float,
        path: Path | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        self._pixels = np.ascontiguousarray(_check_pixels(pixels))
        self.path = path
        self.mpp = check_mpp(mpp, str(self))
        self.size_px = (self._pixels.shape[1], self._pixels.shape[0])
        self.levels_px = [self.size_px]
        self.properties = dict(properties or {})

    @property
    def in_memory(self) -> bool:
        return True

    @property
    def hash(self) -> str:
        if self.path is not None:
            return hash_file(self.path)
        return f"sha256:{hashlib.sha256(self._pixels.tobytes()).hexdigest()}"

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        return Image.fromarray(self._pixels[y : y + height, x : x + width])


def _check_pixels(pixels: Any) -> RGB:
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape) < 1:
        raise ValueError(f"an image array must be [height, width, 3] RGB, not {pixels.shape}")
    if pixels.dtype != np.uint8:
        raise TypeError(f"an image array must be uint8, not {pixels.dtype}: scale it to 0..255")
    return pixels


def read_image(path: Path) -> tuple[RGB, float | None, dict[str, str]]:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _read_tiff(path)
    try:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        _check_image_size(path, *image.size)
        return np.asarray(on_white(image)), None, {"format": str(image.format)}
    except Image.UnidentifiedImageError:
        raise OSError(
            f"{path} is neither a slide that OpenSlide reads nor a PNG, JPEG or TIFF image"
        ) from None
    except (OSError, SyntaxError) as error:
        raise OSError(f"the image {path} cannot be read ({error})") from None


def _check_image_size(path: Path, width: int, height: int) -> None:
    if width * height > IMAGE_PX:
        raise ValueError(
            f"the plain image {path} has {width} x {height} pixels, more than fit in memory: "
            "convert it to a tiled pyramidal TIFF first (vips tiffsave --tile --pyramid)"
        )


def _read_tiff(path: Path) -> tuple[RGB, float | None, dict[str, str]]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages.first
            size = (page.imagewidth, page.imagelength)
            pixels = page.asarray() if size[0] * size[1] <= IMAGE_PX else np.empty((0, 0, 3))
            if page.planarconfig == 2 and pixels.ndim == 3:
                pixels = np.moveaxis(pixels, 0, -1)
            mpp = _tiff_mpp(page)
    except MemoryError:
        raise
    except Exception as error:
        # Damaged tags fail in many ways: TiffFileError, struct.error, ZeroDivisionError, ...
        reason = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
        raise OSError(
            f"the TIFF {path} cannot be read ({reason}): the file may be truncated or of an "
            "unsupported variant"
        ) from None
    _check_image_size(path, *size)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(
            f"the TIFF {path} holds {pixels.dtype} of shape {pixels.shape}, expected 8-bit RGB: "
            "convert it first"
        )
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] not in (3, 4):
        raise ValueError(f"the TIFF {path} has {pixels.shape[2]} channels, expected 3 or 4")
    return np.asarray(on_white(Image.fromarray(pixels))), mpp, {"format": "TIFF"}


def _tiff_mpp(page: Any) -> float | None:
    """mpp from the resolution tags where it is plausible: most plain TIFFs say 72 dpi."""
    micrometres = {2: 25400.0, 3: 10000.0}.get(int(page.resolutionunit or 0))
    resolution = [float(v) for v in page.resolution]
    if micrometres is None or min(resolution) <= 0:
        return None
    mpp_x, mpp_y = (micrometres / v for v in resolution)
    if not MPP_RANGE[0] <= mpp_x <= MPP_RANGE[1] or abs(mpp_x / mpp_y - 1) > MPP_ANISOTROPY:
        return None
    return math.sqrt(mpp_x * mpp_y)
