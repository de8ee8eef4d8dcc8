# SPDX-License-Identifier: Apache-2.0
"""Many small images in a folder: as PNG or JPEG files, or in shards that WebDataset reads.

A file or shard appears under its name only when it is whole, so what is there is what is done, and
a run that was killed goes on with the rest.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

from ssldiff_fast._checks import check_choice
from ssldiff_fast.slides.output import atomic, atomic_bytes
from ssldiff_fast.slides.raster import describe
from ssldiff_fast.slides.slide import RGB

FORMATS = ("png", "jpeg", "shards")
# Patches of a shard: 100 to 200 MB of PNG at 256 x 256, as WebDataset advises.
SHARD_PATCHES = 1000
# Bytes a pixel, for the estimate of what a run needs.
_BYTES_PER_PX = {"png": 2.2, "jpeg": 0.7, "shards": 2.2}
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Patch:
    """One image of a run.

    Attributes:
        name: file name without suffix; a WebDataset key, so it has no dot.
        row, column: the cell of the grid.
        x, y: of the cell in level-0 pixels of the source.
        seed: of the noise.
    """

    name: str
    row: int
    column: int
    x: int
    y: int
    seed: int


def patch_name(slide: str, x: int, y: int, seed: int) -> str:
    """`slide_x_y_sSEED`, with nothing in it that a file system or WebDataset minds."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', slide) or 'grid'}_{x}_{y}_s{seed}"


def is_patch_file(name: str) -> bool:
    """Whether a file name is one that `PatchFolder` gives."""
    image, shard = r"[\w-]+_-?\d+_-?\d+_s\d+\.(png|jpg)", r"patches-s\d+-\d{6}\.tar"
    return re.fullmatch(f"{image}|{shard}", name) is not None


class PatchFolder:
    """Where patches go.

    Args:
        folder: it exists.
        format: "png", "jpeg" (4:4:4), or "shards" of PNGs with a JSON beside each.
        quality: of JPEG.
        mpp: micrometres per pixel.
        metadata: what every image says of itself, besides its own place and seed.
    """

    def __init__(
        self,
        folder: Path,
        format: str,
        *,
        quality: int | None = None,
        mpp: float,
        metadata: Mapping[str, Any],
    ) -> None:
        check_choice("format", format, FORMATS, call="synthesize_patches")
        if quality is not None and format != "jpeg":
            raise ValueError(
                f"synthesize_patches: quality is of JPEG, but format is {format!r}; leave it out."
            )
        if quality is not None and not 1 <= quality <= 100:
            raise ValueError(f"synthesize_patches: quality is {quality}, expected 1 to 100.")
        self.folder, self.format = folder, format
        self._quality = JPEG_QUALITY if quality is None else quality
        self._dpi = (25_400 / mpp, 25_400 / mpp)
        self._metadata = dict(metadata)

    def files(self, patches: Sequence[Patch]) -> dict[Path, list[Patch]]:
        """Every file of a run with its patches, which are in order of seeds.

        A seed's shards begin anew, so that a run with more seeds keeps those that are there.
        """
        if self.format != "shards":
            suffix = "jpg" if self.format == "jpeg" else "png"
            return {self.folder / f"{patch.name}.{suffix}": [patch] for patch in patches}
        seeds: dict[int, list[Patch]] = {}
        for patch in patches:
            seeds.setdefault(patch.seed, []).append(patch)
        return {
            self.folder / f"patches-s{seed}-{first // SHARD_PATCHES:06d}.tar": some[
                first : first + SHARD_PATCHES
            ]
            for seed, some in seeds.items()
            for first in range(0, len(some), SHARD_PATCHES)
        }

    def needs(self, patches: int, size_px: tuple[int, int]) -> int:
        """Estimated bytes of so many patches."""
        return int(patches * size_px[0] * size_px[1] * _BYTES_PER_PX[self.format])

    def write(self, files: Mapping[Path, Sequence[Patch]], images: Iterator[RGB]) -> Iterator[int]:
        """Writes files one after another from the images of all their patches, in order.

        Yields:
            1 for every patch that was made; a shard's appear together, when it is whole.
        """
        for path, patches in files.items():
            if self.format != "shards":
                atomic_bytes(path, self._encoded(patches[0], next(images)))
                yield 1
                continue
            with atomic(path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
                for patch in patches:
                    image = self._encoded(patch, next(images))
                    _add(tar, f"{patch.name}.png", image)
                    about = json.dumps(self._about(patch), sort_keys=True).encode()
                    _add(tar, f"{patch.name}.json", about)
                    yield 1

    def _about(self, patch: Patch) -> dict[str, Any]:
        place = {"row": patch.row, "column": patch.column, "x": patch.x, "y": patch.y}
        return {**self._metadata, **place, "seed": patch.seed}

    def _encoded(self, patch: Patch, pixels: RGB) -> bytes:
        file: IO[bytes] = io.BytesIO()
        image, text = Image.fromarray(pixels), describe(self._about(patch))
        if self.format == "jpeg":
            image.save(
                file,
                "JPEG",
                quality=self._quality,
                subsampling=0,
                dpi=self._dpi,
                comment=text.encode(),
            )
        else:
            info = PngImagePlugin.PngInfo()
            info.add_text("Description", text)
            image.save(file, "PNG", dpi=self._dpi, pnginfo=info)
        file.seek(0)
        return file.read()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # Time and owner stay 0, so that the same patches are the same bytes.
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
