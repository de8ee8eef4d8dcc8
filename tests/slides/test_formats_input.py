# SPDX-License-Identifier: Apache-2.0
"""What formats refuse, and that they do so before anything is written."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from slide_files import refuse
from ssldiff_fast.slides import Georeference, open_writer

MPP = 0.25
SCENE = Georeference("EPSG:32633", (10, 0, 500_000, 0, -10, 5_000_000))
REFUSED = {
    "format": ("a.tif", {"format": "svs"}, ValueError, "format 'svs' is unknown, expected one of"),
    "another format": (
        "a.ome.tif",
        {"format": "universal"},
        ValueError,
        r"does not fit the output 'a\.ome\.tif': name it with \.tif, or choose ome",
    ),
    "quality of lzw": ("a.tif", {"codec": "lzw", "quality": 5}, ValueError, "is lossless"),
    "quality of zarr": ("a.zarr", {"quality": 5}, ValueError, "OME-Zarr is lossless"),
    "codec of zarr": ("a.zarr", {"codec": "jpeg"}, ValueError, r"expected one of \['blosc'"),
    "codec of dzi": ("a.dzi", {"codec": "deflate"}, ValueError, r"expected one of \['jpeg', 'png"),
    "tile of png": ("a.png", {"tile": 256}, ValueError, "codec, quality and tile are of a TIFF"),
    "tile": ("a.dzi", {"tile": 254}, ValueError, "tile is 254, expected a multiple of 16"),
    "large tile": ("a.tif", {"tile": 65_536}, ValueError, "multiple of 16 from 16 to 4096"),
    "odd tile": ("a.tif", {"tile": 1.5}, TypeError, "tile must be an integer"),
    "reduction": ("a.tif", {"reduction": "cubic"}, ValueError, "reduction 'cubic' is unknown"),
    "bands": ("a.tif", {"bands": 4}, ValueError, "only a GeoTIFF has 4"),
    "5 bands": ("a.geo.tif", {"bands": 5}, ValueError, "has 5 bands, expected 3"),
    "jpeg of 4": ("a.geo.tif", {"bands": 4, "codec": "jpeg"}, ValueError, "has 3 bands, not 4"),
    "no mpp": ("a.tif", {"mpp": None}, ValueError, "only a GeoTIFF is written without one"),
    "place": ("a.tif", {"georeference": SCENE}, ValueError, r"name a \.geo\.tif"),
    "tiles in a folder": (
        "a.dzi",
        {"width": 900_000, "height": 900_000},
        ValueError,
        r"would have 12362256 tiles in one level",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_lacks_is_refused_before_anything_is_written(
    tmp_path: Path, case: str
) -> None:
    name, changes, kind, message = REFUSED[case]
    if name.endswith("zarr"):
        pytest.importorskip("zarr", minversion="3")
    options = {"width": 64, "height": 64, "mpp": MPP, **changes}
    with pytest.raises(kind, match=message):
        open_writer(tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="expected six finite numbers"):
        Georeference("EPSG:32633", (1, 2, 3))
    with pytest.raises(ValueError, match="maps all pixels onto one line"):
        Georeference("EPSG:32633", (0, 0, 3, 0, 0, 5))


def test_an_unknown_crs_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    with pytest.raises(ValueError, match=r"CRS 'EPSG:0' is unknown, expected one such as"):
        open_writer(
            tmp_path / "a.geo.tif",
            30,
            20,
            MPP,
            georeference=Georeference("EPSG:0", SCENE.transform),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("a.geo.tif", "rasterio", "geo"), ("a.zarr", "zarr", "zarr")]
)
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    place = SCENE if extra == "geo" else None
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'ssldiff_fast\[{extra}\]'"):
        open_writer(tmp_path / name, 64, 64, MPP, georeference=place)
    assert list(tmp_path.iterdir()) == []


def test_a_codec_that_was_not_built_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import imagecodecs

    class Missing:
        available = False

    monkeypatch.setattr(imagecodecs, "JPEG2K", Missing, raising=False)
    with pytest.raises(RuntimeError, match=r"jpeg2000 is not in this build of imagecodecs"):
        open_writer(tmp_path / "a.tif", 64, 64, MPP, codec="jpeg2000")
    assert list(tmp_path.iterdir()) == []


def test_an_output_of_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    usage, real = shutil.disk_usage(tmp_path), os.statvfs(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    few = os.statvfs_result([*real[:5], 1000, 20, 20, *real[8:]])
    monkeypatch.setattr(os, "statvfs", lambda path: few)
    with pytest.raises(OSError, match=r"needs about \d+ files and its disk takes 20 more"):
        open_writer(tmp_path / "a.dzi", 2000, 2000, MPP)
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_for_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zarr", minversion="3")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**26))
    for name in ("a.ome.tif", "a.dzi", "a.zarr", "a.geo.tif"):
        with pytest.raises(OSError, match=r"needs about .* and its disk has 64\.0 MiB free"):
            open_writer(tmp_path / name, 10_000, 10_000, MPP)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_encoded_before_the_output_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssldiff_fast.slides import cascade

    monkeypatch.setattr(cascade, "Scratch", refuse("the writer"))
    with pytest.raises(FileNotFoundError, match="does not exist: make it first"):
        open_writer(tmp_path / "nowhere" / "a.dzi", 64, 64, MPP)
