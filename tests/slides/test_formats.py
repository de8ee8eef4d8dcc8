# SPDX-License-Identifier: Apache-2.0
"""Every format and codec, read by libraries that did not write it."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import pyvips
import tifffile
from PIL import Image

from slide_files import tissue_image
from ssldiff_fast.slides import Georeference, open_writer
from ssldiff_fast.slides.codecs import TIFF_CODECS
from ssldiff_fast.slides.reduction import REDUCTIONS, halve_reference

WIDTH, HEIGHT, MPP = 1301, 1100, 0.25
RECIPE = {"model": "he-demo", "seed": 3, "note": "10 µm -- {braces} <tag> & ]]>"}
SCENE = Georeference("EPSG:32633", (10, 0, 500_000, 0, -10, 5_000_000))
# Mean absolute error on smooth colours at quality 90.
LOSSY_ERROR = 2.0

# Codecs of TIFFs that the builds of libvips and GDAL on PyPI have.
VIPS_READS = ("jpeg", "deflate", "lzw", "webp")
GDAL_READS = ("jpeg", "deflate", "lzw", "zstd", "webp")


def smooth(width: int = WIDTH, height: int = HEIGHT, bands: int = 3) -> np.ndarray:
    """Colours that change slowly, all channels differently: swapped ones show."""
    y, x = np.mgrid[0:height, 0:width] / 200.0
    waves = [np.sin(x + y), np.cos(x - 2 * y), np.sin(2 * x) * 0.5 - 0.4, np.cos(3 * y)]
    image = np.stack([(128 + 120 * wave) for wave in waves[:bands]], axis=2)
    return image.clip(0, 255).astype(np.uint8)


def write(path: Path, image: np.ndarray, chunk: int = 300, **options) -> Path:
    height, width, bands = image.shape
    options = {"mpp": MPP, "bands": bands, **options}
    with open_writer(path, width, height, metadata=RECIPE, **options) as writer:
        for start in range(0, height, chunk):
            writer.write_rows(image[start : start + chunk])
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pyramid_of(image: np.ndarray, smallest: int = 512) -> list[np.ndarray]:
    levels = [image]
    while max(levels[-1].shape[:2]) > smallest:
        levels.append(halve_reference(levels[-1]))
    return levels


def vips_level(path: Path, **options: int) -> np.ndarray:
    return pyvips.Image.new_from_file(str(path), **options).numpy()


def gdal(path: Path | str, level: int | None = None) -> np.ndarray:
    rasterio = pytest.importorskip("rasterio")
    options = {} if level is None else {"overview_level": level}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, **options) as dataset:
            return np.moveaxis(dataset.read(), 0, -1)


@pytest.mark.parametrize("codec", TIFF_CODECS)
def test_a_tiff_of_every_codec_has_its_colours_in_two_readers(tmp_path: Path, codec: str) -> None:
    image = smooth()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        path = write(tmp_path / "a.tif", image, codec=codec)
    lossy = TIFF_CODECS[codec].lossy
    readers = [lambda level: tifffile.imread(path, key=level)]
    if codec in VIPS_READS:
        readers.append(lambda level: vips_level(path, page=level))
    if codec in GDAL_READS:
        readers.append(lambda level: gdal(path, level - 1 if level else None))
    with tifffile.TiffFile(path) as tiff:
        assert {page.compression for page in tiff.pages} == {TIFF_CODECS[codec].tiff}
    assert len(readers) >= 2 or codec in ("jpeg2000", "jpegxl")
    for reader in readers:
        for level, want in enumerate(pyramid_of(image)):
            error = np.abs(reader(level).astype(int) - want).mean()
            assert error < LOSSY_ERROR if lossy else error == 0


def test_a_tile_of_jpeg_2000_is_read_by_pillow(tmp_path: Path) -> None:
    image = smooth(256, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        path = write(tmp_path / "a.tif", image, codec="jpeg2000")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        place, count = page.dataoffsets[0], page.databytecounts[0]
    tile = path.read_bytes()[place : place + count]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(tile))), image)


def test_codecs_that_common_readers_lack_come_with_a_warning(tmp_path: Path) -> None:
    for name, codec in TIFF_CODECS.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            open_writer(tmp_path / "a.tif", 64, 64, MPP, codec=name).abort()
        assert [str(w.message).startswith(f"codec {name}: ") for w in said] == (
            [True] if codec.warning else []
        )
        assert (name in ("jpeg", "deflate", "lzw")) == (not codec.warning)


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_an_ome_tiff_has_its_levels_as_subifds_and_its_recipe_as_annotation(
    tmp_path: Path, codec: str
) -> None:
    image = smooth()
    path = write(tmp_path / "a.ome.tif", image, codec=codec)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert tiff.is_bigtiff
        assert len(tiff.pages) == 1
        assert len(tiff.series) == 1
        levels = [level.asarray() for level in tiff.series[0].levels]
        xml = tiff.ome_metadata
    others = [gdal(path), gdal(path, 0), gdal(path, 1)]
    vips = [vips_level(path), vips_level(path, subifd=0), vips_level(path, subifd=1)]
    for read in (levels, others, vips):
        assert [pixels.shape for pixels in read] == [p.shape for p in pyramid_of(image)]
        for pixels, want in zip(read, pyramid_of(image)):
            error = np.abs(pixels.astype(int) - want).mean()
            assert error == 0 if codec == "deflate" else error < LOSSY_ERROR
    root = ElementTree.fromstring(xml)
    space = root.tag.split("}")[0] + "}"
    pixels = root.find(f".//{space}Pixels")
    assert (pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeY")) == (str(MPP), str(MPP))
    assert pixels.get("PhysicalSizeXUnit") in (None, "µm")
    note = root.find(f".//{space}CommentAnnotation")
    assert json.loads(note.find(f"{space}Value").text) == RECIPE
    assert root.find(f".//{space}Image/{space}Description").text.startswith("SYNTHETIC image")


@pytest.mark.parametrize("format", ["ome", "universal"])
def test_the_ome_xml_is_valid(tmp_path: Path, format: str) -> None:
    xmlschema = pytest.importorskip("xmlschema")
    found = importlib.util.find_spec("ome_types")  # which holds the schema
    if found is None or found.origin is None:
        pytest.skip("ome-types is not installed")
    path = write(tmp_path / ("a.ome.tif" if format == "ome" else "a.tif"), smooth(), format=format)
    schema = xmlschema.XMLSchema(str(Path(found.origin).with_name("ome-2016-06.xsd")))
    with tifffile.TiffFile(path) as tiff:
        text = tiff.pages[0].description
    schema.validate(text)
    with pytest.raises(xmlschema.XMLSchemaValidationError):
        schema.validate(text.replace('SizeX="', 'SizeX="-'))


def test_openslide_sees_the_first_level_of_an_ome_tiff(tmp_path: Path) -> None:
    image = smooth()
    path = write(tmp_path / "a.ome.tif", image, codec="deflate")
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((WIDTH, HEIGHT),)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP)
        pixels = np.asarray(slide.read_region((0, 0), 0, (WIDTH, HEIGHT)))[..., :3]
    np.testing.assert_array_equal(pixels, image)


def test_universal_is_a_pyramid_for_all_readers(tmp_path: Path) -> None:
    image = smooth()
    path = write(tmp_path / "a.tif", image, format="universal", codec="deflate")
    expected = pyramid_of(image)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == tuple((p.shape[1], p.shape[0]) for p in expected)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(MPP)
        last = np.asarray(slide.read_region((0, 0), 2, slide.level_dimensions[2]))[..., :3]
    np.testing.assert_array_equal(last, expected[2])
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert len(tiff.pages) == 3
        chained = [page.offset for page in tiff.pages]
        assert list(tiff.pages[0].subifds) == chained[1:]
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [level.shape for level in expected]
    np.testing.assert_array_equal(vips_level(path, page=1), expected[1])


def stitched(path: Path, number: int, size: tuple[int, int], tile: int, ending: str) -> np.ndarray:
    """A level of a Deep Zoom image from its tiles."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    folder = path.with_name(f"{path.stem}_files") / str(number)
    files = list(folder.iterdir())
    assert len(files) == -(-size[0] // tile) * -(-size[1] // tile)
    for file in files:
        column, row = (int(part) for part in file.stem.split("_"))
        pixels = np.asarray(Image.open(file))
        assert file.suffix == f".{ending}"
        np.testing.assert_allclose(
            pixels.astype(int), pyvips.Image.new_from_file(str(file)).numpy(), atol=1
        )
        y, x = row * tile, column * tile
        image[y : y + len(pixels), x : x + pixels.shape[1]] = pixels
    return image


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_a_deep_zoom_image_has_all_levels_down_to_one_pixel(tmp_path: Path, codec: str) -> None:
    image = smooth()
    path = write(tmp_path / "a.dzi", image, codec=codec)
    text = path.read_text()
    root = ElementTree.fromstring(text)
    assert (root.get("Format"), root.get("Overlap"), root.get("TileSize")) == (codec, "0", "256")
    size = next(iter(root))
    assert (size.get("Width"), size.get("Height")) == (str(WIDTH), str(HEIGHT))
    assert "SYNTHETIC image" in text
    assert json.loads(text.split("\n")[2]) == RECIPE
    expected = pyramid_of(image, 1)
    assert sorted(int(p.name) for p in (tmp_path / "a_files").iterdir()) == list(range(12))
    for level, want in enumerate(expected):
        pixels = stitched(path, 11 - level, want.shape[1::-1], 256, codec)
        if codec == "png":
            np.testing.assert_array_equal(pixels, want)
        elif min(want.shape[:2]) >= 64:  # waves of a few pixels are no longer smooth
            assert np.abs(pixels.astype(int) - want).mean() < LOSSY_ERROR


@pytest.mark.parametrize("format", ["zarr", "zarr-0.5"])
@pytest.mark.parametrize("codec", ["blosc", "deflate", "zstd"])
def test_an_ome_zarr_is_read_by_zarr_and_by_its_own_text(
    tmp_path: Path, format: str, codec: str
) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    import numcodecs

    image = smooth()
    path = write(tmp_path / "a.zarr", image, format=format, codec=codec)
    group = zarr.open_group(path, mode="r")
    attributes = dict(group.attrs)
    ome = attributes.get("ome", attributes)
    multiscales = ome["multiscales"][0]
    assert ome.get("version", multiscales.get("version")) == ("0.5" if "5" in format else "0.4")
    assert [axis["name"] for axis in multiscales["axes"]] == list("tczyx")
    assert attributes["ssldiff_fast"]["recipe"] == RECIPE
    expected = pyramid_of(image)
    for level, (dataset, want) in enumerate(zip(multiscales["datasets"], expected, strict=True)):
        scale = dataset["coordinateTransformations"][0]["scale"]
        assert scale == [1, 1, 1, MPP * 2**level, MPP * 2**level]
        np.testing.assert_array_equal(group[dataset["path"]][0, :, 0].transpose(1, 2, 0), want)
    # GDAL reads Zarr 2 with any of these codecs; Zarr 3 is read by zarr alone.
    if format == "zarr":
        for level, want in enumerate(expected):
            np.testing.assert_array_equal(gdal(f'ZARR:"{path}":/{level}'), want)
        # A reader of its own: the metadata as text, the chunks through their codec.
        head = json.loads((path / "0" / ".zarray").read_text())
        assert head["dimension_separator"] == "/"
        data = (path / "0" / "0" / "0" / "0" / "1" / "2").read_bytes()
        chunk = np.frombuffer(numcodecs.get_codec(head["compressor"]).decode(data), np.uint8)
        pixels = chunk.reshape(3, 512, 512).transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels[:, : WIDTH - 1024], image[512:1024, 1024:])


@pytest.mark.parametrize(
    ("bands", "codec"), [(3, "jpeg"), (3, "deflate"), (4, "deflate"), (4, "zstd")]
)
def test_a_scene_has_its_place_its_bands_and_the_order_of_the_cloud(
    tmp_path: Path, bands: int, codec: str
) -> None:
    rasterio = pytest.importorskip("rasterio")
    image = smooth(2000, 1100, bands)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        path = write(
            tmp_path / "a.geo.tif", image, codec=codec, georeference=SCENE, mpp=None, tile=256
        )
    with rasterio.open(path) as dataset:
        assert dataset.crs.to_epsg() == 32633
        assert tuple(dataset.transform)[:6] == SCENE.transform
        assert dataset.overviews(1) == [2, 4]
        assert dataset.count == bands
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        text = dataset.tags()["TIFFTAG_IMAGEDESCRIPTION"]
        assert json.loads(text.split("\n", 1)[1]) == RECIPE
    expected = pyramid_of(image)
    with tifffile.TiffFile(path) as tiff:
        pages = list(tiff.pages)
        assert len(pages) == 3
        # Directories first, each level's tiles before those of the next finer one.
        first = [min(page.dataoffsets) for page in pages]
        assert first == sorted(first, reverse=True)
        assert max(page.offset for page in pages) < min(first)
        for page in pages:
            assert list(page.dataoffsets) == sorted(page.dataoffsets)
        read = [page.asarray() for page in pages]
    for level, want in enumerate(expected):
        for pixels in (read[level], gdal(path, level - 1 if level else None)):
            error = np.abs(pixels.astype(int) - want).mean()
            assert error < LOSSY_ERROR if codec == "jpeg" else error == 0


def test_a_scene_with_mpp_is_a_slide_too(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    path = write(tmp_path / "a.tif", smooth(), format="cog", georeference=SCENE, tile=256)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_count == 3
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif", "a.dzi", "a.zarr", "a.geo.tif", "a.png"])
def test_the_bytes_depend_on_neither_chunks_nor_threads(
    tmp_path: Path, name: str, reduction: str
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr", minversion="3")
    image = tissue_image(333, 250)
    options = {"reduction": reduction, **({"tile": 16} if name != "a.png" else {})}
    contents = []
    for chunk, threads in ((250, None), (1, 1), (37, 3)):
        folder = tmp_path / str(chunk)
        folder.mkdir()
        write(folder / name, image, chunk=chunk, threads=threads, **options)
        files = [path for path in folder.rglob("*") if path.is_file()]
        contents.append({str(path.relative_to(folder)): digest(path) for path in files})
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("name", ["a.dzi", "a.zarr", "a.geo.tif", "a.ome.tif"])
def test_only_what_belongs_to_an_output_is_overwritten(tmp_path: Path, name: str) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr", minversion="3")
    path = write(tmp_path / name, smooth(300, 200))
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"exists and is kept.*--overwrite"):
        write(path, smooth(300, 200))
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    write(path, smooth(40, 30), overwrite=True)
    assert len(list(tmp_path.rglob("*"))) <= len(before)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_folder_that_is_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a_files").mkdir()
    (tmp_path / "a_files" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"the folder .*a_files exists and is kept"):
        write(tmp_path / "a.dzi", smooth(30, 20), overwrite=True)
    pytest.importorskip("zarr", minversion="3")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="is a folder but no Zarr and is kept"):
        write(tmp_path / "a.zarr", smooth(30, 20), overwrite=True)
    assert len(list(tmp_path.rglob("mine.txt"))) == 2
