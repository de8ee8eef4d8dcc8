# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import pyvips
import tifffile
from PIL import Image

from slide_files import refuse, tissue_image, unwritable_folder
from ssldiff_fast.slides import PyramidWriter, open_slide, open_writer
from ssldiff_fast.slides.reduction import REDUCTIONS

# Mean absolute error of JPEG at quality 90 on smooth colours; the other codec is exact.
JPEG_ERROR = 1.5
RECIPE = {"model": "he-demo", "seed": 3, "note": "10 µm"}


def colours(width: int, height: int) -> np.ndarray:
    """Wide bands of pure colours and grey ramps: swapped channels and subsampling show."""
    bands = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (200, 120, 170), (0, 0, 0)]
    image = np.zeros((height, width, 3), np.uint8)
    for index, colour in enumerate(bands):
        image[:, index * width // 6 : (index + 1) * width // 6] = colour
    image[height // 2 :, : width // 2] = np.linspace(0, 255, width // 2)[None, :, None]
    return image


def write(path: Path, image: np.ndarray, chunk: int = 97, mpp: float = 0.5, **options) -> Path:
    height, width = image.shape[:2]
    with open_writer(path, width, height, mpp, metadata=RECIPE, **options) as writer:
        for start in range(0, height, chunk):
            writer.write_rows(image[start : start + chunk])
    return path


def pyramid_of(image: np.ndarray) -> list[np.ndarray]:
    levels = [image]
    while max(levels[-1].shape) > 512:
        rows, cols = levels[-1].shape[0] % 2, levels[-1].shape[1] % 2
        even = np.pad(levels[-1], ((0, rows), (0, cols), (0, 0)), mode="edge").astype(int)
        total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
        levels.append(((total + 2) // 4).astype(np.uint8))
    return levels


def openslide_levels(path: Path) -> list[np.ndarray]:
    with openslide.OpenSlide(path) as slide:
        return [
            np.asarray(slide.read_region((0, 0), level, size))[..., :3]
            for level, size in enumerate(slide.level_dimensions)
        ]


def tifffile_levels(path: Path) -> list[np.ndarray]:
    with tifffile.TiffFile(path) as tiff:
        return [page.asarray() for page in tiff.pages]


def vips_levels(path: Path, count: int) -> list[np.ndarray]:
    return [pyvips.Image.new_from_file(str(path), page=page).numpy() for page in range(count)]


SIZES = [(1, 1), (255, 17), (256, 256), (257, 513), (1300, 1025), (2049, 600)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_three_readers_see_every_level_as_it_was_written(
    tmp_path: Path, size: tuple[int, int], codec: str
) -> None:
    image = colours(*size)
    path = write(tmp_path / "a.tif", image, codec=codec)
    expected = pyramid_of(image)
    readers = [openslide_levels(path), tifffile_levels(path), vips_levels(path, len(expected))]
    for levels in readers:
        assert [level.shape for level in levels] == [level.shape for level in expected]
        for level, want in zip(levels, expected):
            error = np.abs(level.astype(int) - want).mean()
            assert error == 0 if codec == "deflate" else error < JPEG_ERROR
        for level, first in zip(levels, readers[0]):  # decoders of one standard
            assert np.abs(level.astype(int) - first).max() <= 1


def test_openslide_finds_mpp_levels_and_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tissue_image(1301, 1100), mpp=0.2527)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(0.2527, 1e-6)
        assert slide.level_dimensions == ((1301, 1100), (651, 550), (326, 275))
        assert slide.level_downsamples == pytest.approx((1, 2, 4), rel=3e-3)
        assert slide.properties["tiff.ImageDescription"].startswith("SYNTHETIC image")
    with open_slide(path) as again:
        assert again.mpp == pytest.approx(0.2527, rel=1e-6)


@pytest.mark.parametrize("format", ["tif", "universal"])
@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_random_regions_are_equal_in_three_readers(tmp_path: Path, format: str, codec: str) -> None:
    image = tissue_image(
        2304, 1696
    )  # exactly halved, as OpenSlide's regions lie between pixels else
    path = write(tmp_path / "a.tif", image, codec=codec, format=format)
    levels, pages = pyramid_of(image), tifffile_levels(path)
    random = np.random.default_rng(0)
    with openslide.OpenSlide(path) as slide:
        for _ in range(30):
            level = int(random.integers(len(levels)))
            columns, rows = slide.level_dimensions[level]
            width, height = (
                int(random.integers(1, columns // 2)),
                int(random.integers(1, rows // 2)),
            )
            x, y = int(random.integers(columns - width)), int(random.integers(rows - height))
            here = slice(y, y + height), slice(x, x + width)
            corner = (x << level, y << level)
            by_openslide = slide.read_region(corner, level, (width, height))
            whole = pyvips.Image.new_from_file(str(path), page=level)
            regions = [
                np.asarray(by_openslide)[..., :3].astype(int),
                whole.crop(x, y, width, height).numpy().astype(int),
                pages[level][here].astype(int),
            ]
            for region in regions:
                # Decoders of one standard.
                assert np.abs(region - regions[-1]).max() <= (0 if codec == "deflate" else 1)
                error = np.abs(region - levels[level][here]).mean()
                assert error == 0 if codec == "deflate" else error < JPEG_ERROR


def test_an_image_is_wider_than_a_jpeg_could_be(tmp_path: Path) -> None:
    image = colours(70_000, 20)
    path = write(tmp_path / "a.tif", image)
    for levels in (openslide_levels(path), tifffile_levels(path), vips_levels(path, 8)):
        assert levels[0].shape == image.shape
        assert np.abs(levels[0].astype(int) - image).mean() < JPEG_ERROR
    write(tmp_path / "a.dzi", image)
    wide = open_slide(tmp_path / "a.dzi")
    assert wide.size_px == (70_000, 20)
    last = np.asarray(wide.read_region_at(69_000, 0, 1000, 20, out_size=(1000, 20)))
    assert np.abs(last.astype(int) - image[:, 69_000:]).mean() < JPEG_ERROR


def test_tiles_lie_beyond_the_4_gib_of_a_classic_tiff(tmp_path: Path) -> None:
    image, far = colours(600, 300), 5 * 2**30
    with open_writer(tmp_path / "a.tif", 600, 300, 0.5, codec="deflate") as writer:
        writer.write_rows(image[:256])
        writer._cascade.drain()
        writer._sink._file.seek(far)  # a hole, which takes no room
        writer._sink._end = far
        writer.write_rows(image[256:])
    expected = pyramid_of(image)
    for read in (openslide_levels, tifffile_levels, lambda path: vips_levels(path, 2)):
        for level, want in zip(read(tmp_path / "a.tif"), expected, strict=True):
            np.testing.assert_array_equal(level, want)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert max(tiff.pages[0].dataoffsets) >= far


def test_every_level_has_the_tags_that_readers_need(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tissue_image(1301, 1100))
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert len(tiff.pages) == 3
        for index, page in enumerate(tiff.pages):
            assert int(page.tags["NewSubfileType"].value) == int(index > 0)
            assert page.is_tiled
            assert (page.tilewidth, page.tilelength) == (256, 256)
            assert page.tags["YCbCrSubSampling"].value == (1, 1)
            assert "Predictor" not in page.tags
            assert int(page.resolutionunit) == 3
            span = 10_000 / page.resolution[0]
            assert span == pytest.approx(0.5 * 1301 / page.imagewidth, rel=1e-6)


def test_the_recipe_is_in_the_file_and_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tissue_image(200, 100))
    assert json.loads((tmp_path / "a.tif.json").read_text()) == RECIPE
    with tifffile.TiffFile(path) as tiff:
        said, recipe = tiff.pages[0].description.split("\n", 1)
    assert said.startswith("SYNTHETIC image, not a scan of tissue")
    assert json.loads(recipe) == RECIPE


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_the_bytes_depend_on_neither_chunks_nor_threads(tmp_path: Path, codec: str) -> None:
    image = tissue_image(700, 601)
    first = write(tmp_path / "a.tif", image, chunk=601, codec=codec)
    for chunk in (1, 255, 256, 257):
        other = write(tmp_path / f"{chunk}.tif", image, chunk=chunk, codec=codec)
        assert other.read_bytes() == first.read_bytes()
    write(tmp_path / "one.tif", image, chunk=601, codec=codec, threads=1)
    assert (tmp_path / "one.tif").read_bytes() == first.read_bytes()


def test_halving_rounds_to_nearest_and_repeats_an_odd_border() -> None:
    rows = np.array([[0, 1, 2], [1, 1, 3], [4, 6, 9]], np.uint8)[..., None].repeat(3, 2)
    assert REDUCTIONS["box"].halve(rows)[..., 0].tolist() == [[1, 3], [5, 9]]


def test_nothing_has_the_final_name_before_it_is_whole(tmp_path: Path) -> None:
    image = tissue_image(300, 300)
    with open_writer(tmp_path / "a.tif", 300, 300, 0.5) as writer:
        writer.write_rows(image)
        assert not (tmp_path / "a.tif").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "a.tif.json"]


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_a_failed_run_leaves_nothing(tmp_path: Path, name: str) -> None:
    def fail() -> None:
        with open_writer(tmp_path / name, 300, 600, 0.5) as writer:
            writer.write_rows(tissue_image(300, 300))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_missing_rows_are_an_error_and_leave_nothing(tmp_path: Path, name: str) -> None:
    writer = open_writer(tmp_path / name, 300, 600, 0.5)
    writer.write_rows(tissue_image(300, 300))
    with pytest.raises(RuntimeError, match="has 300 of 600 rows"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="is closed"):
        writer.write_rows(tissue_image(300, 300))


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    with open_writer(tmp_path / name, 30, 20, 0.5) as writer:
        with pytest.raises(ValueError, match=r"rows must be \[rows, 30, 3\]"):
            writer.write_rows(np.zeros((5, 31, 3), np.uint8))
        with pytest.raises(TypeError, match="must be uint8"):
            writer.write_rows(np.zeros((5, 30, 3), np.float32))
        with pytest.raises(ValueError, match="0 rows are written of 20, and 21 more came"):
            writer.write_rows(np.zeros((21, 30, 3), np.uint8))
        writer.write_rows(np.zeros((20, 30, 3), np.uint8))


def test_a_png_holds_pixels_recipe_and_resolution(tmp_path: Path) -> None:
    image = tissue_image(301, 200)
    path = write(tmp_path / "a.png", image)
    with Image.open(path) as png:
        np.testing.assert_array_equal(np.asarray(png), image)
        assert json.loads(png.text["Description"].split("\n", 1)[1]) == RECIPE
        assert 25_400 / png.info["dpi"][0] == pytest.approx(0.5, rel=1e-3)
    assert json.loads((tmp_path / "a.png.json").read_text()) == RECIPE


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_an_existing_output_is_kept_unless_overwritten(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, tissue_image(64, 64))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"exists and is kept.*--overwrite"):
        open_writer(path, 64, 64, 0.5)
    assert path.read_bytes() == before
    write(path, tissue_image(65, 64), overwrite=True)
    assert open_slide(path, mpp=0.5).size_px == (65, 64)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_outputs_that_cannot_be_written_are_refused_before_the_start(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PermissionError, match="cannot be written to"):
        open_writer(unwritable_folder(tmp_path / "locked") / name, 64, 64, 0.5)
    with pytest.raises(FileNotFoundError, match="does not exist: make it first"):
        open_writer(tmp_path / "nowhere" / name, 64, 64, 0.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        open_writer(tmp_path / "file" / name, 64, 64, 0.5)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / name).mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_writer(tmp_path / "b" / name, 64, 64, 0.5)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**26))
    with pytest.raises(OSError, match=r"needs about .* and its disk has 64\.0 MiB free"):
        open_writer(tmp_path / name, 10_000, 10_000, 0.5)


def test_a_disk_that_fills_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_writer(tmp_path / "a.tif", 300, 600, 0.5)

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def writelines(self, parts: list[bytes]) -> None:
            self.write(b"".join(parts))

        def close(self) -> None:
            pass

    def fill() -> None:
        with writer:
            monkeypatch.setattr(writer._sink, "_file", Full())
            writer.write_rows(tissue_image(300, 600))

    with pytest.raises(OSError, match=r"near row \d+ \(No space left on device\)"):
        fill()
    assert list(tmp_path.iterdir()) == []


FILL_THE_DISK = """
import resource, signal, sys
import numpy as np, torch
from ssldiff_fast.slides import Grid, open_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
name = sys.argv[1]
try:
    if name.endswith(".h5"):
        Grid(torch.randn(20, 20, 1, 50), torch.ones(20, 20), mpp=0.5, cell_px=64).save(name)
    else:
        noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
        with open_writer(name, 300, 300, 0.5) as writer:
            writer.write_rows(noise)
except OSError as error:
    print(error, end="")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.h5"])
@pytest.mark.parametrize("limit", [10, 60_000], ids=["at once", "later"])
def test_wherever_the_system_stops_writing_it_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, name: str, limit: int
) -> None:
    command = [sys.executable, "-c", FILL_THE_DISK, name, str(limit)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{name} could not be written")
    assert "(File too large): make room on its disk" in done.stdout
    assert "\n" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"width": -5}, ValueError, "width of the output is -5 pixels"),
        ({"height": 0}, ValueError, "height of the output is 0 pixels"),
        ({"width": 10**9}, ValueError, "expected 1 to 1000000"),
        ({"width": 2.5}, TypeError, "must be an integer"),
        ({"mpp": 352.8}, ValueError, r"output's mpp is 352\.8"),
        ({"mpp": float("nan")}, ValueError, "output's mpp is nan"),
        ({"codec": "gif"}, ValueError, r"codec 'gif' is unknown, expected one of \['deflate'"),
        ({"quality": 0}, ValueError, "quality is 0, expected 1 to 100"),
        ({"tile": 100}, ValueError, "tile is 100, expected a multiple of 16"),
        ({"metadata": {"a": object()}}, TypeError, "JSON"),
    ],
    ids=str,
)
def test_impossible_outputs_are_refused(
    tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    options = {"width": 64, "height": 64, "mpp": 0.5, **changes}
    with pytest.raises(error, match=message):
        open_writer(tmp_path / "a.tif", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.svs", "a", "a.jpg", ".tif", "a.hdf5"])
def test_other_formats_are_refused_with_the_list_of_those_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PyramidWriter, "__init__", refuse("the writer"))
    with pytest.raises(ValueError, match=r"must be one of \.tif or \.tiff \(tiled"):
        open_writer(tmp_path / name, 64, 64, 0.5)


def test_a_png_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write \.tif above 256 megapixels"):
        open_writer(tmp_path / "a.png", 20_000, 20_000, 0.5)
