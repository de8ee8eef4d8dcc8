# SPDX-License-Identifier: Apache-2.0
"""Writers that are killed, interrupted or out of space go on to the same bytes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ssldiff_fast.slides import open_writer

WIDTH, HEIGHT, TILE = 300, 400, 32
FORMATS = ["a.tif", "a.ome.tif", "u.tif", "a.dzi", "a.zarr", "a.geo.tif", "a.png"]

# One process serves all formats and forks a writer for each kill: importing takes far longer
# than writing. Where a writer ends before it is killed, the next ones have less time.
KILL_WRITERS = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from test_resume import image_of, options_of
from ssldiff_fast.slides import open_writer

def write(name):
    image = image_of()
    height, width = image.shape[:2]
    with open_writer(f"{name}/{name}", width, height, 0.5, state="state", **options_of(name)) as w:
        while w.rows_written < height:
            w.write_rows(image[w.rows_written :][:23])
            w.checkpoint()

random.seed(0)
total = 0
for name in sys.argv[2:]:
    os.mkdir(name)
    kills, seconds = 0, 0.4
    while kills < 3:
        child = os.fork()
        if child == 0:
            write(name)
            os._exit(0)
        time.sleep(random.random() * seconds)
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            kills += 1
        else:
            seconds /= 2
            shutil.rmtree(name)
            os.mkdir(name)
    if os.path.exists("state/writer.npz") or not os.path.exists(f"{name}/{name}"):
        write(name)  # or the last one was killed between its end and its exit
    total += kills
print(total)
"""


def image_of() -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x + y, 2 * x, x * y // 50], axis=2).astype(np.uint8)


def options_of(name: str) -> dict:
    """Small tiles, so that there are many; Lanczos where it is, as it keeps more."""
    if name == "a.png":
        return {}
    kind = {"format": "universal"} if name == "u.tif" else {}
    reduction = "lanczos" if name in ("a.tif", "a.dzi") else "box"
    return {"tile": TILE, "reduction": reduction, "threads": 2, **kind}


def require(name: str) -> None:
    if name == "a.zarr":
        pytest.importorskip("zarr", minversion="3")


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file of the output, hidden ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole(folder: Path, name: str) -> dict[str, str]:
    """What an uninterrupted run leaves."""
    folder.mkdir()
    image = image_of()
    with open_writer(folder / name, WIDTH, HEIGHT, 0.5, **options_of(name)) as writer:
        writer.write_rows(image)
    return contents(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_runs_killed_at_random_moments_end_with_the_same_bytes(tmp_path: Path) -> None:
    names = [name for name in FORMATS if name != "a.zarr" or find_spec("zarr")]
    command = [sys.executable, "-c", KILL_WRITERS, str(Path(__file__).parent), *names]
    (tmp_path / "killed").mkdir()
    done = subprocess.run(
        command, cwd=tmp_path / "killed", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 3 * len(names)
    for name in names:
        assert contents(tmp_path / "killed" / name) == whole(tmp_path / name, name)
    assert list((tmp_path / "killed" / "state").iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("at", [0, 1, 31, 32, 33, 200, 399, 400])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, name: str, at: int) -> None:
    require(name)
    expected = whole(tmp_path / "whole", name)
    folder, state, image = tmp_path / "out", tmp_path / "state", image_of()
    folder.mkdir()

    def open_again():
        return open_writer(folder / name, WIDTH, HEIGHT, 0.5, state=state, **options_of(name))

    def interrupt() -> None:
        with open_again() as writer:
            writer.write_rows(image[:at])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not (folder / name).exists()
    with open_again() as writer:
        assert writer.rows_written == at
        writer.write_rows(image[at:])
    assert contents(folder) == expected
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
def test_what_follows_the_last_saved_state_is_written_again(tmp_path: Path, name: str) -> None:
    require(name)
    expected = whole(tmp_path / "whole", name)
    folder, image = tmp_path / "out", image_of()
    folder.mkdir()
    options = {"state": tmp_path / "state", **options_of(name)}
    writer = open_writer(folder / name, WIDTH, HEIGHT, 0.5, **options)
    writer.write_rows(image[:100])
    writer.checkpoint()
    saved = (tmp_path / "state" / "writer.npz").read_bytes()
    writer.write_rows(255 - image[100:350])  # of a run that went another way
    writer.suspend()
    (tmp_path / "state" / "writer.npz").write_bytes(saved)
    with open_writer(folder / name, WIDTH, HEIGHT, 0.5, **options) as writer:
        assert writer.rows_written == 100
        writer.write_rows(image[100:])
    assert contents(folder) == expected


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_a_run_killed_before_its_state_is_removed_leaves_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(tmp_path / "whole", name)
    folder, state = tmp_path / "out", tmp_path / "state"
    folder.mkdir()

    def again() -> None:
        with open_writer(folder / name, WIDTH, HEIGHT, 0.5, state=state, **options_of(name)) as w:
            w.write_rows(image_of()[w.rows_written :])

    with monkeypatch.context() as patch:
        for module in ("png", "pyramid"):
            patch.setattr(f"ssldiff_fast.slides.{module}.remove_state", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again()
    assert (state / "writer.npz").exists()
    assert contents(folder) == expected
    again()
    assert contents(folder) == expected
    assert list(state.iterdir()) == []


def test_a_state_of_another_output_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    open_writer(tmp_path / "a.tif", 64, 64, 0.5, state=state).suspend()
    with pytest.raises(ValueError, match=r"of another output \(codec 'jpeg', not 'deflate'"):
        open_writer(tmp_path / "a.tif", 64, 64, 0.5, codec="deflate", state=state)
    with pytest.raises(ValueError, match="another recipe or version"):
        open_writer(tmp_path / "a.tif", 64, 64, 0.5, metadata={"seed": 1}, state=state)
    (state / "writer.npz").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match=r"saved state .*writer\.npz is damaged: remove it"):
        open_writer(tmp_path / "a.tif", 64, 64, 0.5, state=state)


@pytest.mark.parametrize("name", ["a.tif", "a.dzi", "a.png"])
def test_a_lost_part_is_named(tmp_path: Path, name: str) -> None:
    open_writer(tmp_path / name, 64, 64, 0.5, state=tmp_path / "state").suspend()
    for path in tmp_path.glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match="is gone, which the state in"):
        open_writer(tmp_path / name, 64, 64, 0.5, state=tmp_path / "state")


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "a.tif", 64, 64, 0.5, state=tmp_path / "state")
    with pytest.raises(BlockingIOError, match="another process is writing this output"):
        open_writer(tmp_path / "a.tif", 64, 64, 0.5, state=tmp_path / "state")
    writer.abort()


def test_without_a_folder_there_is_nothing_to_save(tmp_path: Path) -> None:
    for name in ("a.tif", "a.png"):
        writer = open_writer(tmp_path / name, 64, 64, 0.5)
        with pytest.raises(RuntimeError, match="has no folder for its state"):
            writer.checkpoint()
        writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_that_vanishes_is_named(tmp_path: Path, name: str) -> None:
    require(name)
    folder = tmp_path / "out"
    folder.mkdir()
    options = {} if name == "a.png" else {"tile": 16}
    writer = open_writer(folder / name, 64, 64, 0.5, **options)
    writer.write_rows(np.zeros((16, 64, 3), np.uint8))
    folder.rename(tmp_path / "elsewhere")  # at once, though tiles are still being written
    with pytest.raises(OSError, match=rf"folder .*out has vanished while {name} was written"):
        writer.write_rows(np.zeros((16, 64, 3), np.uint8))
    writer.abort()


KILL_ONE = """
import os, signal, sys
import numpy as np
from ssldiff_fast.slides import open_writer
writer = open_writer(sys.argv[1], 64, 64, 0.5)
writer.write_rows(np.zeros((16, 64, 3), np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_killed_run_without_a_state_left_is_removed_by_the_next(
    tmp_path: Path, name: str
) -> None:
    require(name)
    command = [sys.executable, "-c", KILL_ONE, name]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert len(list(tmp_path.iterdir())) in (1, 2)
    elsewhere = tmp_path / f".{name}.another_machine-1.part"
    elsewhere.write_text("of a run that may live")
    other = open_writer(tmp_path / f"my.{name}", 64, 64, 0.5)  # of this process, which does
    kept = {path.name for path in tmp_path.iterdir() if path.name.startswith(".my.")}
    with open_writer(tmp_path / name, 64, 64, 0.5) as writer:
        writer.write_rows(np.zeros((64, 64, 3), np.uint8))
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == {*kept, elsewhere.name}
    other.abort()


FILL_THE_DISK = """
import resource, signal, sys
import numpy as np
from ssldiff_fast.slides import open_writer
image = np.random.default_rng(0).integers(0, 255, (400, 300, 3), dtype=np.uint8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def write():
    with open_writer("a.tif", 300, 400, 0.5, tile=32, codec="deflate", state="state") as writer:
        while writer.rows_written < 400:
            writer.write_rows(image[writer.rows_written :][:40])
            writer.checkpoint()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    write()
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
from ssldiff_fast.slides.writers import open_writer as again
with again("a.tif", 300, 400, 0.5, tile=32, codec="deflate", state="state") as writer:
    print(writer.rows_written)
    writer.write_rows(image[writer.rows_written :])
with again("b.tif", 300, 400, 0.5, tile=32, codec="deflate") as writer:
    writer.write_rows(image)
print(open("a.tif", "rb").read() == open("b.tif", "rb").read())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL_THE_DISK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, rows, equal = done.stdout.splitlines()
    assert said.startswith("a.tif could not be written near row ")
    assert said.endswith("make room on its disk, and run again: .a.tif.part is kept")
    assert int(rows) > 0
    assert equal == "True"


PEAK = """
import sys
from pathlib import Path
import numpy as np
from ssldiff_fast.slides import open_writer
height = int(sys.argv[1])
rows = np.random.default_rng(0).integers(0, 255, (64, 512, 3), dtype=np.uint8)
with open_writer("a.tif", 512, height, 0.5, threads=2, overwrite=True) as writer:
    for _ in range(height // 64):
        writer.write_rows(rows)
# Not of getrusage, which counts what pytest has, too.
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in lines if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others tell the peak in other ways")
def test_the_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    def peak(height: int) -> int:
        command = [sys.executable, "-c", PEAK, str(height)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak(32_768) < 1.05 * peak(4096)
