# SPDX-License-Identifier: Apache-2.0
"""Small slides and a stand-in encoder for tests of everything that reads slides."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor

GLASS = 243


def tissue_image(width: int = 640, height: int = 512, *, seed: int = 0) -> np.ndarray:
    """White glass with an ellipse of stained tissue in its middle, uint8 [height, width, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    inside = ((x / width - 0.5) / 0.33) ** 2 + ((y / height - 0.5) / 0.33) ** 2 < 1
    waves = 20 * np.sin(x / 9.0) + 20 * np.cos(y / 7.0)
    image = np.full((height, width, 3), GLASS, float)
    for channel, level in enumerate((200, 130, 180)):
        image[..., channel][inside] = (level + waves)[inside]
    image += generator.normal(0, 1.5, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def blank_image(width: int = 640, height: int = 512) -> np.ndarray:
    generator = np.random.default_rng(1)
    return (GLASS + generator.normal(0, 1.5, (height, width, 3))).clip(0, 255).astype(np.uint8)


def write_slide(
    path: Path,
    pixels: np.ndarray,
    *,
    mpp: float | tuple[float, float] | None = 0.5,
    levels: int = 1,
    compression: str | None = "deflate",
) -> Path:
    """A generic tiled TIFF that OpenSlide reads, each level half of the one before."""
    options: dict = {"tile": (64, 64), "photometric": "rgb", "compression": compression}
    if mpp is not None:
        pair = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        options |= {
            "resolution": (10_000 / pair[0], 10_000 / pair[1]),
            "resolutionunit": "CENTIMETER",
        }
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            tiff.write(pixels, subfiletype=int(level > 0), **options)
            even = pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2].astype(float)
            quarter = even[0::2, 0::2] + even[1::2, 0::2] + even[0::2, 1::2] + even[1::2, 1::2]
            pixels = (quarter / 4 + 0.5).astype(np.uint8)
    return path


def unwritable_folder(folder: Path) -> Path:
    """A folder that nobody writes to; for root, whom no permission stops, one of the kernel's."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/proc/self")
    folder.mkdir()
    folder.chmod(0o500)
    return folder


@dataclass(frozen=True)
class FakeSpec:
    name: str = "fake"
    width: int = 6
    tokens: int = 1
    patch_px: int = 64
    mpp: float = 0.5
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.2, 0.2, 0.2)
    weights_hash: str | None = "0123456789abcdef"


class FakeEncoder:
    """Mean and deviation of each channel; notes the batches it was given."""

    def __init__(self, spec: FakeSpec = FakeSpec()) -> None:
        self.spec = spec
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:  # [N, H, W, 3] uint8
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (self.spec.patch_px, self.spec.patch_px, 3)
        self.batches.append(len(images))
        pixels = images.float() / 255
        tokens = torch.cat([pixels.mean((1, 2)), pixels.std((1, 2))], 1)  # [N, 6]
        return tokens[:, None].repeat(1, self.spec.tokens, 1)


def refuse(what: str) -> Callable[..., None]:
    """A callable that must not be called."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"{what} ran before the input was checked")

    return fail
