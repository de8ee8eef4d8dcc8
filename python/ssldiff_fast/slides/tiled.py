# SPDX-License-Identifier: Apache-2.0
"""Slides that OpenSlide does not read, or reads without their levels: DZI, OME-TIFF, OME-Zarr."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from .images import _tiff_mpp
from .slide import RGB, MppError, Slide, check_mpp, hash_file, on_white

# Neighbouring regions share tiles: this many bytes of decoded ones are kept.
CACHE_BYTES = 64 * 2**20
# A descriptor is a few lines; more is no descriptor.
DESCRIPTOR_BYTES = 2**20
OME_SUFFIXES = (".ome.tif", ".ome.tiff", ".ome.tf2", ".ome.tf8", ".ome.btf")
_MICROMETRES = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3}
_FORMAT = re.compile(r"[A-Za-z0-9]{1,8}")


def known_mpp(path: Path, given: float | None, own: float | None) -> float:
    """The mpp given or the file's own, or an error that says how to give one."""
    if given is not None:
        return check_mpp(given, str(path))
    if own is None:
        raise MppError(
            f"{path} does not say its mpp (micrometres per pixel): give it, for example "
            "open_slide(path, mpp=0.5) (command line: --mpp 0.5)"
        )
    return check_mpp(own, str(path))


class TiledSlide(Slide):
    """A slide whose levels are read tile by tile.

    Subclasses set `path`, `size_px`, `mpp`, `properties`, `levels_px` and, for each level,
    `tiles_px`: (width, height) of its tiles.
    """

    tiles_px: list[tuple[int, int]]

    def __init__(self) -> None:
        self._cache: OrderedDict[tuple[int, int, int], Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def _read_tile(self, level: int, column: int, row: int) -> Image.Image:
        """A tile as RGB; it may reach beyond the level."""

    def _tile(self, level: int, column: int, row: int) -> Image.Image:
        key = (level, column, row)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        tile = on_white(self._read_tile(level, column, row))
        with self._lock:
            self._cache[key] = tile
            size = 3 * math.prod(self.tiles_px[level])
            while len(self._cache) > max(1, CACHE_BYTES // size):
                self._cache.popitem(last=False)
        return tile

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        tile_w, tile_h = self.tiles_px[level]
        result = Image.new("RGB", (width, height), "white")
        for row in range(y // tile_h, -(-(y + height) // tile_h)):
            for column in range(x // tile_w, -(-(x + width) // tile_w)):
                tile = self._tile(level, column, row)
                result.paste(tile, (column * tile_w - x, row * tile_h - y))
        return result

    def close(self) -> None:
        with self._lock:
            self._cache.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class DziSlide(TiledSlide):
    """Deep Zoom: a descriptor, NAME.dzi, and the tiles in NAME_files; ours notes the mpp."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        super().__init__()
        self.path = path
        self._files = path.with_name(f"{path.stem}_files")
        text = self._descriptor()
        comment = re.search(r"<!--\s*(.*?)\s*-->", text, re.DOTALL)
        described = comment[1] if comment else ""
        self.properties: Mapping[str, str] = {"format": "dzi", "description": described}
        self.levels_px = [self.size_px]
        while max(self.levels_px[-1]) > 1:
            width, height = self.levels_px[-1]
            self.levels_px.append((-(-width // 2), -(-height // 2)))
        self.tiles_px = [(self._side, self._side)] * len(self.levels_px)
        self.mpp = known_mpp(path, mpp, _noted_mpp(described))

    def _descriptor(self) -> str:
        """Reads sizes from the descriptor; returns its text."""
        try:
            if self.path is None or self.path.stat().st_size > DESCRIPTOR_BYTES:
                raise ValueError("it is too large")
            text = self.path.read_text(encoding="utf-8")
            image = ElementTree.fromstring(text.encode())
            size = next(node for node in image if node.tag.endswith("Size"))
            self.size_px = (int(size.attrib["Width"]), int(size.attrib["Height"]))
            self._side = int(image.attrib["TileSize"])
            self._overlap = int(image.attrib.get("Overlap", 0))
            self._format = image.attrib["Format"]
            if min(*self.size_px, self._side, self._overlap + 1) < 1:
                raise ValueError("a size is not positive")
            if not _FORMAT.fullmatch(self._format):
                raise ValueError(f"its format is {self._format!r}")
        except (ElementTree.ParseError, ValueError, KeyError, StopIteration) as error:
            reason = str(error) or "no Size"
            raise OSError(f"{self.path} is no Deep Zoom descriptor ({reason})") from None
        return text

    @property
    def hash(self) -> str:
        """Of the descriptor and the finest level that is one tile: whole slides take minutes."""
        digest = hashlib.sha256(Path(str(self.path)).read_bytes())
        one_tile = [max(size) <= self._side for size in self.levels_px].index(True)
        digest.update(self._tile_path(one_tile, 0, 0).read_bytes())
        return f"sha256-coarse:{digest.hexdigest()}"

    def _tile_path(self, level: int, column: int, row: int) -> Path:
        number = len(self.levels_px) - 1 - level
        return self._files / str(number) / f"{column}_{row}.{self._format}"

    def _read_tile(self, level: int, column: int, row: int) -> Image.Image:
        path = self._tile_path(level, column, row)
        try:
            with Image.open(path) as file:
                tile = on_white(file)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the tile {path} of {self.path} is missing: keep the folder {self._files.name} "
                "beside the .dzi"
            ) from None
        except (OSError, SyntaxError) as error:
            raise OSError(f"the tile {path} of {self.path} cannot be read ({error})") from None
        left, top = (self._overlap if index else 0 for index in (column, row))
        box = (left, top, min(tile.width, left + self._side), min(tile.height, top + self._side))
        return tile.crop(box)


def _noted_mpp(described: str) -> float | None:
    """The mpp in our comment, whose last line is JSON."""
    try:
        noted = json.loads(described.rpartition("\n")[2])
        return float(noted["mpp"])
    except (ValueError, KeyError, TypeError):
        return None


class OmeTiffSlide(TiledSlide):
    """An OME-TIFF with its levels, which OpenSlide does not see."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        super().__init__()
        self.path = path
        self._pages: list[Any] = self._load()
        first = self._pages[0]
        self.properties: Mapping[str, str] = {
            "format": "OME-TIFF",
            "tiff.ImageDescription": str(first.description),
        }
        self.levels_px = [(page.imagewidth, page.imagelength) for page in self._pages]
        self.tiles_px = [(page.tilewidth, page.tilelength) for page in self._pages]
        self.size_px = self.levels_px[0]
        self.mpp = known_mpp(path, mpp, _ome_mpp(first.description) or _tiff_mpp(first))

    def _load(self) -> list[Any]:
        import tifffile

        with tifffile.TiffFile(str(self.path)) as tiff:
            pages: list[Any] = [level.keyframe for level in tiff.series[0].levels]
            for page in pages:  # what they look up in the file once, while it is open
                _ = page.decode, page.jpegtables, page.dataoffsets, page.databytecounts
            return pages

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pages": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pages = self._load()

    @staticmethod
    def suits(path: Path) -> bool:
        """Whether a file is an OME-TIFF of 8-bit RGB in tiles with more than one level."""
        import tifffile

        if not path.name.lower().endswith(OME_SUFFIXES):
            return False
        try:
            with tifffile.TiffFile(path) as tiff:
                levels = tiff.series[0].levels
                pages: list[Any] = [level.keyframe for level in levels]
                return len(pages) > 1 and all(
                    page.is_tiled
                    and page.dtype == np.uint8
                    and page.samplesperpixel == 3
                    and page.planarconfig == 1
                    for page in pages
                )
        except Exception:  # damaged tags fail in many ways; OpenSlide then says what is wrong
            return False

    @property
    def hash(self) -> str:
        return hash_file(Path(str(self.path)))

    def _read_tile(self, level: int, column: int, row: int) -> Image.Image:
        page = self._pages[level]
        tile_w = self.tiles_px[level][0]
        index = row * -(-page.imagewidth // tile_w) + column
        try:
            with open(str(self.path), "rb") as file:
                file.seek(page.dataoffsets[index])
                data = file.read(page.databytecounts[index])
            pixels = page.decode(data, index, jpegtables=page.jpegtables)[0]
            return Image.fromarray(np.ascontiguousarray(pixels).reshape(-1, *pixels.shape[-2:]))
        except Exception as error:  # each codec fails in its own way
            raise OSError(
                f"{self.path} could not be read at level {level}, tile {column}, {row} ({error}): "
                "the file may be truncated"
            ) from None


def _ome_mpp(text: str) -> float | None:
    """PhysicalSizeX of OME-XML, where it is in micrometres."""
    pixels = re.search(r"<Pixels\b[^>]*>", text)
    if pixels is None:
        return None
    fields = dict(re.findall(r'(\w+)="([^"]*)"', pixels[0]))
    if fields.get("PhysicalSizeXUnit", "µm") not in ("µm", "&#181;m", "\u03bcm"):
        return None
    try:
        return float(fields["PhysicalSizeX"])
    except (KeyError, ValueError):
        return None


class ZarrSlide(Slide):
    """OME-Zarr 0.4 or 0.5: a folder with an array for every level."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self.path = path
        attributes, arrays = _open_zarr(path)
        scales = attributes["multiscales"][0]
        self._axes = [axis["name"] for axis in scales["axes"]]
        self._arrays = [arrays[entry["path"]] for entry in scales["datasets"]]
        y, x = self._axes.index("y"), self._axes.index("x")
        self.levels_px = [(int(a.shape[x]), int(a.shape[y])) for a in self._arrays]
        self.size_px = self.levels_px[0]
        self._check()
        ours = attributes.get("ssldiff_fast", {})
        described = f"{ours.get('synthetic', '')}\n{json.dumps(ours.get('recipe', {}))}"
        self.properties: Mapping[str, str] = {"format": "OME-Zarr", "description": described}
        self.mpp = known_mpp(path, mpp, _zarr_mpp(scales, x))

    def _check(self) -> None:
        first = self._arrays[0]
        bands = first.shape[self._axes.index("c")] if "c" in self._axes else 1
        if first.dtype != np.uint8 or bands not in (1, 3, 4):
            raise ValueError(
                f"the Zarr {self.path} holds {first.dtype} with {bands} channels, expected 8-bit "
                "RGB: convert it first"
            )

    @staticmethod
    def suits(path: Path) -> bool:
        """Whether a folder is a Zarr."""
        return path.is_dir() and any(
            (path / name).exists() for name in (".zgroup", ".zattrs", "zarr.json")
        )

    @property
    def hash(self) -> str:
        """Of the coarsest level and the sizes of all: whole slides take minutes."""
        digest = hashlib.sha256(json.dumps(self.levels_px).encode())
        last = len(self._arrays) - 1
        digest.update(self._read_level(last, 0, 0, *self.levels_px[last]).tobytes())
        return f"sha256-coarse:{digest.hexdigest()}"

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        wanted = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        try:
            pixels = np.asarray(self._arrays[level][tuple(wanted.get(a, 0) for a in self._axes)])
        except Exception as error:  # each codec fails in its own way
            raise OSError(
                f"{self.path} could not be read at level {level}, x={x}, y={y} ({error})"
            ) from None
        return on_white(Image.fromarray(self._channels_last(pixels)))

    def _channels_last(self, pixels: np.ndarray) -> RGB:
        left = [axis for axis in self._axes if axis in "cyx"]
        pixels = pixels.transpose([left.index(axis) for axis in "yxc" if axis in left])
        if pixels.ndim == 2 or pixels.shape[2] == 1:
            pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
        return np.ascontiguousarray(pixels)


def _open_zarr(path: Path) -> tuple[dict[str, Any], Any]:
    try:
        import zarr
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a Zarr, which is read with zarr, and that is not installed: pip install "
            "'ssldiff_fast[zarr]'"
        ) from None
    try:
        group: Any = zarr.open_group(str(path), mode="r")
        attributes: dict[str, Any] = dict(group.attrs)
        attributes = {**attributes, **attributes.get("ome", {})}
        for entry in attributes["multiscales"][0]["datasets"]:
            group[entry["path"]].shape  # noqa: B018 - each named array must be there
    except Exception as error:  # zarr's own errors are of many kinds
        raise OSError(f"the folder {path} is no OME-Zarr image ({error!r:.100})") from None
    return attributes, group


def _zarr_mpp(scales: Mapping[str, Any], x: int) -> float | None:
    unit = _MICROMETRES.get(str(scales["axes"][x].get("unit", "")))
    for change in scales["datasets"][0].get("coordinateTransformations", ()):
        if change.get("type") == "scale" and unit is not None:
            return float(change["scale"][x]) * unit
    return None
