# SPDX-License-Identifier: Apache-2.0
"""Files of tiles: whole or an error, whatever the system takes at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from ssldiff_fast.slides import open_writer
from ssldiff_fast.slides.folder_sink import write_file


def test_a_file_is_whole_where_the_system_takes_a_few_bytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real = bytes(range(256)), os.write
    monkeypatch.setattr(os, "write", lambda handle, left: real(handle, left[:100]))
    write_file(f"{tmp_path}/tile", data)
    assert (tmp_path / "tile").read_bytes() == data


def test_a_longer_file_is_replaced_and_an_empty_one_is_made(tmp_path: Path) -> None:
    (tmp_path / "tile").write_bytes(b"torn and longer")
    write_file(f"{tmp_path}/tile", b"whole")
    write_file(f"{tmp_path}/empty", b"")
    assert (tmp_path / "tile").read_bytes() == b"whole"
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize("name", ["out.dzi", "out.zarr"])
def test_a_disk_that_fills_at_a_tile_is_one_sentence_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    opened, real = [], os.open

    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def kept(path: str, flags: int, *mode: int, **more: int) -> int:
        handle = real(path, flags, *mode, **more)
        if flags & os.O_TRUNC and ".part/" in str(path):
            opened.append(handle)
        return handle

    writer = open_writer(tmp_path / name, 32, 32, 0.5, tile=16, threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(os, "open", kept)
        with pytest.raises(OSError, match=r"out\.\w+ could not be written .*: make room"), writer:
            writer.write_rows(np.zeros((32, 32, 3), np.uint8))
    assert opened
    for handle in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)
    assert list(tmp_path.iterdir()) == []
