# SPDX-License-Identifier: Apache-2.0
"""Claim: a writer is as fast as its codec, and its memory does not depend on the image's size.

Each format's megapixels per second (of all levels) beside its codec's alone on the same tiles and
threads (with a file for each tile, where the format has that), and the peak resident memory of a
process that writes squares of several sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ssldiff_fast.slides.folder_sink import FolderSink
from ssldiff_fast.slides.output import RowWriter
from ssldiff_fast.slides.writers import open_writer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "TIFF, jpeg": ("a.tif", {}),
    "TIFF, deflate": ("a.tif", {"codec": "deflate"}),
    "OME-TIFF, jpeg": ("a.ome.tif", {}),
    "GeoTIFF, deflate": ("a.geo.tif", {"codec": "deflate"}),
    "Deep Zoom, jpeg": ("a.dzi", {}),
    "OME-Zarr, blosc": ("a.zarr", {}),
}
# Rows of one call: a row of tiles of every format; for the memory, as few as keep a call small.
BAND_ROWS, BAND_BYTES = 512, 2**21


def texture(height: int, width: int) -> np.ndarray:
    """Stained-looking colours with noise, as flat ones are encoded too fast; [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = 40 * np.sin(x / 9) + 40 * np.cos(y / 7)
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    image = np.array([190.0, 130.0, 180.0]) + waves[..., None] + noise
    return image.clip(0, 255).astype(np.uint8)


def write(writer: RowWriter, band: np.ndarray, height: int) -> None:
    """Writes a band of rows again and again."""
    with writer:
        for start in range(0, height, len(band)):
            writer.write_rows(band[: height - start])


def empty(folder: Path) -> None:
    """Gives back the room of all files and keeps their names.

    Without a journal, ext4 steps over the numbers of files removed in the last minutes, one by one,
    for every file that is made: the next rounds would measure that, four times as long as the rest.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            os.truncate(path, 0)
    os.sync()  # what the disk owes to one round is not what the next one waits for


def fullest(folder: Path) -> Path:
    """The folder with the most files."""
    return Path(max(os.walk(folder), key=lambda entry: len(entry[2]))[0])


def speed(case: str, folder: Path, size: int, threads: int, rounds: int) -> dict[str, float]:
    """Megapixels per second of writer and codec, alternating, medians.

    Of formats with a file for every tile also those of the codec with such files, which bound it;
    they are made in the folder of the writer's own, as a file may cost ten times as much in another
    (see `empty`). They are not made durable, as the writer's are in its time.
    """
    name, options = CASES[case]
    folder = Path(tempfile.mkdtemp(dir=folder))
    band = texture(BAND_ROWS, size)

    def opened(fresh: Path) -> Any:
        fresh.mkdir()
        return open_writer(fresh / name, size, size, 0.5, threads=threads, **options)

    probe = opened(folder / "probe")
    sink, sizes = probe._sink, [level.size for level in probe._cascade.levels]
    side = sink.tile
    probe.abort()
    columns = range(0, size - side + 1, side)
    tiles = [np.ascontiguousarray(band[:side, x : x + side]) for x in columns]
    count = sum(level.rows * level.columns for level in sizes)

    def encoded(number: int) -> bytes:
        return sink.encode(0, tiles[number % len(tiles)])

    def filed(number: int) -> None:
        (there / f"alone {number}").write_bytes(encoded(number))

    of_pool = {"codec": encoded, "codec_and_files": filed}
    if not isinstance(sink, FolderSink):
        del of_pool["codec_and_files"]
    times: dict[str, list[float]] = {"writer": [], **{name: [] for name in of_pool}}
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds):
            start = time.perf_counter()
            write(opened(folder / str(number)), band, size)
            times["writer"].append(time.perf_counter() - start)
            there = fullest(folder / str(number))
            for baseline, work in of_pool.items():
                start = time.perf_counter()
                for future in [pool.submit(work, tile) for tile in range(count)]:
                    future.result()
                times[baseline].append(time.perf_counter() - start)
            empty(folder)
    megapixels = count * side * side / 1e6
    rates = {name: megapixels / float(np.median(values)) for name, values in times.items()}
    bound = rates.get("codec_and_files", rates["codec"])
    return {
        "ratio": round(rates["writer"] / bound, 3),
        **{f"{name}_megapixels_per_second": round(rate, 1) for name, rate in rates.items()},
    }


def peak(folder: Path, size: int, threads: int) -> float:
    """Peak resident megabytes of a process that writes a square TIFF."""
    command = [sys.executable, __file__, "--one", str(size), "--folder", str(folder)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def one(folder: Path, size: int, threads: int) -> None:
    """Writes a square in bands of a few rows and prints the peak."""
    band = texture(max(1, BAND_BYTES // (3 * size)), size)
    writer = open_writer(folder / "square.tif", size, size, 0.5, threads=threads, overwrite=True)
    write(writer, band, size)
    # As ssldiff_fast.bench.timing reads it, without PyTorch's own memory beside it.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)


def main() -> None:
    """Time all and save writers.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192, help="side of the squares that are timed")
    parser.add_argument("--squares", default="4096,16384", help="sides for the memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="a disk with room for the largest")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen.folder, chosen.one, chosen.threads)
        return
    from report import aim, save  # imports torch, which a process whose memory counts does not

    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rates = {
                case: speed(case, folder, chosen.size, chosen.threads, chosen.rounds)
                for case in CASES
            }
        peaks = {
            str(size): round(peak(folder, int(size), chosen.threads), 1)
            for size in chosen.squares.split(",")
        }
    finally:
        shutil.rmtree(folder)
    growth = max(peaks.values()) / next(iter(peaks.values())) - 1
    aims = [
        aim(f"share of the codec's speed, {case}", figures["ratio"], 0.8, "at least")
        for case, figures in rates.items()
    ]
    aims.append(aim("growth of the peak memory over the sizes", growth, 0.05, "at most"))
    shown = {"size": chosen.size, "threads": chosen.threads, "peak_megabytes": peaks}
    save("writers", {"speed": rates, **shown}, aims)


if __name__ == "__main__":
    main()
