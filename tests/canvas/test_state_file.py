# SPDX-License-Identifier: Apache-2.0
"""States are safetensors files that are whole, or known not to be."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ssldiff_fast.canvas import state_file
from ssldiff_fast.canvas.state_file import load, save
from ssldiff_fast.canvas.wide import Memory, Spill


def tensors() -> dict[str, Tensor]:
    values = torch.arange(6 * 35).view(6, 5, 7)
    return {
        "b": values.float().transpose(0, 2),
        "a": values.to(torch.bfloat16),
        "index": values[0, 0],
        "bytes": values.to(torch.uint8)[:, ::2],
        "none": torch.empty(3, 0, 2),
        "mask": values > 100,
    }


@pytest.mark.parametrize("piece", [7, 2**20])
def test_tensors_come_back_and_the_library_reads_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(state_file, "_PIECE_BYTES", piece)
    path, header = tmp_path / "a.safetensors", '{"text": "with 00000000000000000000000000000000"}'
    save(path, tensors(), header, Memory())
    for wide in (Memory(), Spill(tmp_path)):
        found, text = load(path, wide)
        assert text == header
        assert found.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(tensors())
        assert file.metadata()["header"] == header
        for name, tensor in tensors().items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"x": torch.arange(5.0), "y": torch.zeros(2, 3)}, '{"numbers": 1}', Memory())
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"^(it|its|x|y|Expecting|Extra|Invalid|'utf|Unterm)"):
            load(path, Memory())
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^(it|its|x|y|Expecting|Extra)"):
            load(path, Memory())


def test_a_head_that_claims_too_much_makes_nothing(tmp_path: Path) -> None:
    for entry in (
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]},
    ):
        head = json.dumps({"__metadata__": {"checksum": "", "header": ""}, "x": entry}).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
        with pytest.raises(ValueError, match=r"another size than its place|it is no state"):
            load(path, Memory())


PEAK = """
import sys, torch
from ssldiff_fast.bench.timing import peak_resident
from pathlib import Path
from ssldiff_fast.canvas.state_file import load, save
from ssldiff_fast.canvas.wide import Spill
spill, path = Spill(sys.argv[1]), Path(sys.argv[1]) / "a.safetensors"
before = peak_resident()
held = {}
for number in range(16):
    held[str(number)] = spill.empty(2**22, like=torch.empty(0)).fill_(number)
    spill.release(held[str(number)])
save(path, held, "", spill)
assert load(path, spill)[0].keys() == held.keys()
print(peak_resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell, or do not drop pages")
def test_rows_that_wait_in_a_file_are_not_in_memory_while_they_are_saved(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB, of 256
