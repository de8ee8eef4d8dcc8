# SPDX-License-Identifier: Apache-2.0
"""DZI, OME-TIFF and OME-Zarr, written by other libraries and read by ours."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from slide_files import tissue_image
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.reader import open_slide
from ssldiff_fast.slides.slide import MppError, Slide

SIZE = (700, 450)


def _deep_zoom(folder: Path, pixels: np.ndarray, *, overlap: int = 1, comment: str = "") -> Path:
    pyvips = pytest.importorskip("pyvips")
    image = pyvips.Image.new_from_memory(pixels.tobytes(), *pixels.shape[1::-1], 3, "uchar")
    image.dzsave(str(folder / "a"), tile_size=254, overlap=overlap, suffix=".png")
    path = folder / "a.dzi"
    if comment:
        path.write_text(path.read_text().replace("?>", f"?>\n<!-- {comment} -->", 1))
    return path


def _ome_tiff(folder: Path, pixels: np.ndarray, *, compression: str | None = "jpeg") -> Path:
    path = folder / "a.ome.tif"
    half = np.asarray(Image.fromarray(pixels).reduce(2))
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": compression}
    if compression == "jpeg":
        options |= {"subsampling": (1, 1), "compressionargs": {"level": 95}}
    size = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
        metadata = {"axes": "YXS", **size, "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
        tiff.write(pixels, subifds=1, metadata=metadata, **options)
        tiff.write(half, subfiletype=1, **options)
    return path


def _zarr(folder: Path, pixels: np.ndarray, version: str) -> Path:
    zarr = pytest.importorskip("zarr")
    path = folder / "a.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    levels = [pixels, np.asarray(Image.fromarray(pixels).reduce(2))]
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"]
    sets = []
    for number, level in enumerate(levels):
        data = np.ascontiguousarray(level.transpose(2, 0, 1))
        array = group.create_array(str(number), shape=data.shape, chunks=(3, 128, 128), dtype="u1")
        array[:] = data
        scale = [1.0, 0.5 * 2**number, 0.5 * 2**number]
        change = {"type": "scale", "scale": scale}
        sets.append({"path": str(number), "coordinateTransformations": [change]})
    scales = {"axes": axes, "datasets": sets, "version": version}
    attributes = {"multiscales": [scales]}
    group.attrs.put(attributes if version == "0.4" else {"ome": attributes})
    return path


def _made(kind: str, folder: Path, pixels: np.ndarray) -> Slide:
    if kind == "dzi":
        return open_slide(_deep_zoom(folder, pixels), mpp=0.5)
    if kind.startswith("ome"):
        return open_slide(_ome_tiff(folder, pixels, compression=kind.partition(" ")[2] or None))
    return open_slide(_zarr(folder, pixels, kind.partition(" ")[2]))


KINDS = ["dzi", "ome jpeg", "ome deflate", "ome", "zarr 0.4", "zarr 0.5"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_region_has_the_pixels_that_were_written(kind: str, tmp_path: Path) -> None:
    pixels = tissue_image(*SIZE)
    with _made(kind, tmp_path, pixels) as slide:
        assert slide.size_px == SIZE
        assert slide.mpp == pytest.approx(0.5)
        assert len(slide.levels_px) > 1
        limit = 3.0 if "jpeg" in kind else 0.0
        for x, y, width, height in ((0, 0, *SIZE), (250, 120, 300, 300), (699, 449, 1, 1)):
            read = slide.read_region_at(x, y, width, height, out_size=(width, height)).astype(int)
            assert np.abs(read - pixels[y : y + height, x : x + width]).mean() <= limit
        small = slide.read_region_at(0, 0, *SIZE, out_size=(175, 112)).astype(int)
        expected = np.asarray(Image.fromarray(pixels).resize((175, 112), Image.Resampling.BOX))
        assert np.abs(small - expected).mean() < 6
        again = pickle.loads(pickle.dumps(slide))
        assert np.array_equal(again.thumbnail(64), slide.thumbnail(64))
        assert slide.hash == again.hash
        assert slide.hash.startswith("sha256")


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_the_overlap_of_deep_zoom_tiles_is_cut_off(overlap: int, tmp_path: Path) -> None:
    pixels = tissue_image(*SIZE)
    slide = open_slide(_deep_zoom(tmp_path, pixels, overlap=overlap), mpp=0.5)
    assert np.array_equal(slide.read_region_at(0, 0, *SIZE, out_size=SIZE), pixels)


def test_our_comment_in_a_descriptor_gives_mpp_and_recipe(tmp_path: Path) -> None:
    comment = 'SYNTHETIC image, not a scan\n{"seed": 3}\n{"mpp": 0.25}'
    slide = open_slide(_deep_zoom(tmp_path, tissue_image(*SIZE), comment=comment))
    assert slide.mpp == 0.25
    assert slide.properties["description"].startswith("SYNTHETIC image")


def test_a_deep_zoom_image_without_mpp_asks_for_it(tmp_path: Path) -> None:
    path = _deep_zoom(tmp_path, tissue_image(*SIZE))
    with pytest.raises(MppError, match=r"a.dzi does not say its mpp"):
        open_slide(path)


def test_a_missing_or_broken_tile_is_named(tmp_path: Path) -> None:
    slide = open_slide(_deep_zoom(tmp_path, tissue_image(*SIZE)), mpp=0.5)
    (tmp_path / "a_files/10/1_0.png").write_bytes(b"nonsense")
    (tmp_path / "a_files/10/1_1.png").unlink()
    with pytest.raises(OSError, match=r"the tile .*1_0.png of .*a.dzi cannot be read"):
        slide.read_region_at(300, 10, 20, 20, out_size=(20, 20))
    with pytest.raises(FileNotFoundError, match=r"keep the folder a_files beside the .dzi"):
        slide.read_region_at(300, 300, 20, 20, out_size=(20, 20))


BROKEN = {
    "empty": "",
    "text": "nonsense",
    "no size": '<Image TileSize="254" Overlap="1" Format="png"/>',
    "negative": '<Image TileSize="9" Format="png"><Size Width="-1" Height="5"/></Image>',
    "no number": '<Image TileSize="x" Format="png"><Size Width="9" Height="5"/></Image>',
    "a path": '<Image TileSize="9" Format="/../x"><Size Width="9" Height="5"/></Image>',
    "too large": "<Image>" + " " * 2**20 + "</Image>",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_descriptor_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.dzi").write_text(text)
    with pytest.raises(OSError, match=r"a.dzi is no Deep Zoom descriptor \("):
        open_slide(tmp_path / "a.dzi", mpp=0.5)


@pytest.mark.parametrize("kind", ["ome jpeg", "ome deflate"])
def test_a_truncated_ome_tiff_is_one_sentence(kind: str, tmp_path: Path) -> None:
    slide = _made(kind, tmp_path, tissue_image(*SIZE))
    data = Path(str(slide.path)).read_bytes()
    Path(str(slide.path)).write_bytes(data[:2000] + bytes(len(data) - 2000))
    with pytest.raises(OSError, match=r"a.ome.tif could not be read at level 0, tile"):
        slide.read_region_at(0, 0, *SIZE, out_size=SIZE)


def test_a_folder_that_is_no_ome_zarr_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_slide(folder)
    (folder / "zarr.json").write_text("nonsense")
    with pytest.raises(OSError, match="is no OME-Zarr image"):
        open_slide(folder)
    meta = {"zarr_format": 3, "node_type": "group", "attributes": {"multiscales": []}}
    (folder / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(OSError, match="is no OME-Zarr image"):
        open_slide(folder)


def test_encode_takes_them_as_any_slide(tmp_path: Path) -> None:
    from slide_files import FakeEncoder

    path = _ome_tiff(tmp_path, tissue_image(*SIZE))
    grid = encode(path, FakeEncoder(), progress=False)
    assert grid.shape == (7, 10)
