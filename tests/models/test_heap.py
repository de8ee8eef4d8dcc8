# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Whether a map of 20 MiB is a piece by itself, which goes back to the system when it is freed.
MAP = """
import ctypes, sys, torch
from ssldiff_fast.models.heap import keep_freed_memory
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks".split()]
    _fields_ += [(f"other{n}", ctypes.c_int) for n in range(6)]
count = ctypes.CDLL(None).mallinfo
count.restype = Counts
if sys.argv[1] == "kept":
    keep_freed_memory()
before = count().hblks
map = torch.empty(20 * 2**20, dtype=torch.uint8)
print(count().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does with free memory")
@pytest.mark.parametrize(("way", "pieces"), [("kept", 0), ("given back", 1)])
def test_maps_of_a_network_lie_in_the_heap(way: str, pieces: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAP, way], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == pieces
