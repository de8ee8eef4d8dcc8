# SPDX-License-Identifier: Apache-2.0
"""Wide rows in a file: their values, their space, and what is said when there is none."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slide_files import unwritable_folder
from ssldiff_fast.canvas import wide
from ssldiff_fast.canvas.wide import Memory, Spill, wide_rows
from ssldiff_fast.slides.pixel_band import PixelBand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_was_written_stays_when_it_is_released(tmp_path: Path, dtype: torch.dtype) -> None:
    spill = Spill(tmp_path)
    values = torch.arange(3 * 7 * 1111).view(3, 7, 1111).to(dtype)
    made = spill.empty(3, 7, 1111, like=values)
    assert (made.shape, made.dtype) == (values.shape, dtype)
    made.copy_(values)
    spill.release(made, made[1:], values)
    assert torch.equal(made, values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_band_are_read_past_the_map(tmp_path: Path, dtype: torch.dtype) -> None:
    spill = Spill(tmp_path)
    values = torch.arange(2 * 3 * 7 * 111).view(2, 3, 7, 111).to(dtype)
    spill.empty(5000, like=values).fill_(1)  # so that the band begins somewhere
    band = spill.empty(2, 3, 7, 111, like=values)
    band.copy_(values)
    for held in (band, band[1], band[:, :, 2:], values, values.transpose(1, 2)):
        for rows in (slice(None), slice(1, 3), slice(2, 2), slice(4, 99)):
            for columns in (slice(None), slice(5, 50), slice(110, 111)):
                part = spill.read(held, rows, columns)
                assert torch.equal(part, held[..., rows, columns])
                assert part.data_ptr() != held.data_ptr()
                assert Memory().read(held, rows, columns).shape == part.shape


def test_space_is_used_again_and_tensors_do_not_overlap(tmp_path: Path) -> None:
    spill, like = Spill(tmp_path), torch.empty(0)
    held = [spill.empty(100, 1000, like=like).fill_(number) for number in range(60)]
    size = os.fstat(spill._file.fileno()).st_size
    assert size > 2**24  # it has grown once
    for _ in range(10):
        del held[::2]
        held += [spill.empty(100, 1000, like=like).fill_(i) for i in range(60 - len(held))]
        held += [spill.empty(100, 1000, like=like).fill_(7) for _ in range(60 - len(held))]
    assert os.fstat(spill._file.fileno()).st_size == size
    starts = sorted(tensor.data_ptr() for tensor in held)
    assert all(b - a >= held[0].nbytes for a, b in itertools.pairwise(starts))
    for tensor in held:
        assert bool((tensor == tensor[0, 0]).all())


def test_a_view_keeps_its_place_and_its_file(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    view = spill.empty(10, 1000, like=torch.empty(0)).fill_(3)[4:6]
    band = spill.pixels(20, 300)
    assert isinstance(band, PixelBand)
    band[:, 0:300] = np.full((20, 300, 3), 9, np.uint8)
    part = band[3:5, 7:9]
    del spill, band
    gc.collect()
    assert bool((view == 3).all())
    assert (np.asarray(part) == 9).all()


def test_pixels_and_tensors_of_one_size_share_their_space(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    for _ in range(200):
        band = spill.pixels(64, 4096)
        assert isinstance(band, PixelBand)
        assert band.shape == (64, 4096, 3)
        del band
        spill.empty(64, 4096, 3, like=torch.empty(0, dtype=torch.uint8))
    assert os.fstat(spill._file.fileno()).st_size == 2**24


def test_nothing_of_no_size_is_made_in_memory(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    assert spill.empty(3, 0, 4, like=torch.empty(0)).shape == (3, 0, 4)
    assert spill.pixels(0, 4).shape == (0, 4, 3)


def test_in_memory_all_is_one_piece(tmp_path: Path) -> None:
    assert Memory().share(70, 2**40) == 70
    assert Spill(tmp_path).share(70, 2**40) == 1
    assert Spill(tmp_path).share(70, 1) == 70
    memory = Memory()
    assert wide_rows(memory) is memory
    assert type(wide_rows(None)) is Memory
    assert type(wide_rows(tmp_path)) is Spill


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not be written .*choose another folder"):
        Spill(unwritable_folder(tmp_path / "locked"))
    with pytest.raises(OSError, match="nowhere could not be written"):
        Spill(tmp_path / "nowhere")


def test_a_full_disk_is_named_and_what_lies_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = Spill(tmp_path)
    before = spill.empty(1000, like=torch.empty(0)).fill_(5)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"for rows that wait \(No space left on device\): make room"):
        spill.empty(2**23, like=torch.empty(0))
    assert bool((before == 5).all())


PEAK = """
import sys, torch
from ssldiff_fast.bench.timing import peak_resident
from ssldiff_fast.canvas.wide import Spill
spill = Spill(sys.argv[1])
before = peak_resident()
held = []
for _ in range(64):
    held.append(spill.empty(2**20, like=torch.empty(0)).fill_(1))
    spill.release(held[-1])
for tensor in held:
    assert bool((tensor == 1).all())
    spill.release(tensor)
print(peak_resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell, or do not drop pages")
def test_what_is_released_is_not_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32  # MiB, of 256


def test_pieces_are_chosen_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_PIECE_BYTES", 1000)
    assert Spill(tmp_path).share(50, 100) == 10
