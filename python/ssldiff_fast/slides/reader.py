# SPDX-License-Identifier: Apache-2.0
"""Opening slides and plain images.

`open_slide` gives an `OpenSlideSlide` for everything that OpenSlide reads, an `ImageSlide` for
PNG, JPEG and TIFF without a pyramid, and a reader of `tiled` for the rest. All find the right
level, resample with an antialiasing filter, and survive pickling: a worker process opens its own
handle.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from .images import ImageSlide, read_image
from .slide import MPP_ANISOTROPY, MppError, Slide, check_mpp, hash_file, on_white
from .tiled import DziSlide, OmeTiffSlide, ZarrSlide


class OpenSlideSlide(Slide):
    """Anything that OpenSlide reads."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self.path = self._file = path
        self._handle: Any = None
        self._lock = threading.Lock()
        self._pid = -1
        handle = self._open()
        self.size_px = (int(handle.dimensions[0]), int(handle.dimensions[1]))
        self.levels_px = [(int(w), int(h)) for w, h in handle.level_dimensions]
        self._downsamples = [float(d) for d in handle.level_downsamples]
        self.properties = dict(handle.properties)
        self.mpp = self._mpp() if mpp is None else check_mpp(mpp, str(path))

    def _open(self) -> Any:
        import openslide

        with self._lock:
            # A forked worker must not share its parent's handle and cache.
            if self._handle is None or self._pid != os.getpid():
                try:
                    self._handle = openslide.OpenSlide(self._file)
                except openslide.OpenSlideError as error:
                    raise OSError(
                        f"OpenSlide cannot read {self.path} ({error}): the file may be "
                        "truncated or of an unsupported variant"
                    ) from None
                self._pid = os.getpid()
            return self._handle

    def _mpp(self) -> float:
        values = [self.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        if values[0] is None or values[1] is None:
            raise MppError(
                f"{self.path} does not say its mpp (micrometres per pixel): give it, for example "
                "open_slide(path, mpp=0.5) (command line: --mpp 0.5)"
            )
        mpp_x, mpp_y = (check_mpp(float(v), str(self.path)) for v in values if v is not None)
        if abs(mpp_x / mpp_y - 1) > MPP_ANISOTROPY:
            raise MppError(
                f"{self.path} has pixels of {mpp_x:g} x {mpp_y:g} um, expected square ones: give "
                "one mpp for both, or resample the slide (command line: --mpp 0.5)"
            )
        return math.sqrt(mpp_x * mpp_y)

    @property
    def hash(self) -> str:
        quick = self.properties.get("openslide.quickhash-1")
        return f"quickhash-1:{quick}" if quick else hash_file(self._file)

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        import openslide

        down = self._downsamples[level]
        handle = self._open()
        try:
            pixels = handle.read_region((round(x * down), round(y * down)), level, (width, height))
        except openslide.OpenSlideError as error:
            self._forget(handle)  # OpenSlide refuses everything after a failure
            raise OSError(
                f"{self.path} could not be read at level {level}, x={x}, y={y} ({error}): the "
                "file may be truncated"
            ) from None
        return on_white(pixels)

    def _forget(self, handle: Any) -> None:
        # Not closed here: another thread may be reading. The last one to drop it closes it.
        with self._lock:
            if self._handle is handle:
                self._handle = None

    def close(self) -> None:
        with self._lock:
            if self._handle is not None and self._pid == os.getpid():
                self._handle.close()
            self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


# What is tried before OpenSlide: whether a path is of this kind, and its reader.
_READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path, float | None], Slide]], ...] = (
    (lambda path: path.suffix.lower() == ".dzi" and path.is_file(), DziSlide),
    (ZarrSlide.suits, ZarrSlide),
    (OmeTiffSlide.suits, OmeTiffSlide),
)


def open_slide(path: str | os.PathLike[str], *, mpp: float | None = None) -> Slide:
    """Opens a slide, or a plain image whose mpp is given.

    Args:
        path: anything OpenSlide reads, a PNG, JPEG or TIFF, a Deep Zoom image (.dzi), or an
            OME-Zarr folder.
        mpp: micrometres per level-0 pixel. For a slide it overrules what the file says; a plain
            image needs it, unless its TIFF tags give a plausible one.

    Returns:
        The slide, open.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        OSError: a file that neither OpenSlide nor Pillow or tifffile reads.
        MppError: no mpp, an implausible one, or pixels that are not square; a ValueError.
    """
    import openslide

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: check the name")
    if mpp is not None:
        check_mpp(mpp, str(path))
    for suits, reader in _READERS:
        if suits(path):
            return reader(path, mpp)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the slide file in it")
    if openslide.OpenSlide.detect_format(path) is not None:
        return OpenSlideSlide(path, mpp)
    pixels, own_mpp, properties = read_image(path)
    if mpp is None and own_mpp is None:
        raise MppError(
            f"{path} is a plain image and does not say its mpp (micrometres per pixel): give it, "
            "for example open_slide(path, mpp=0.5) (command line: --mpp 0.5)"
        )
    return ImageSlide(pixels, mpp if mpp is not None else own_mpp or 0.0, path, properties)
