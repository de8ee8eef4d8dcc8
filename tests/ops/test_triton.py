# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels without a GPU (interpreted, and compiled ahead of time), and on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")
FEW_BYTES = 64  # a thread's registers that may spill: sixteen
PROGRAMS = Path(__file__).parents[1] / "triton_programs.py"


def _run(what: str, cache: Path, **environment: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, str(PROGRAMS), what],
        env={**kept, **environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_under_the_interpreter_every_kernel_agrees_with_the_reference(tmp_path: Path) -> None:
    found = _run("interpret", tmp_path, TRITON_INTERPRET="1")
    assert len(found) > 80
    assert {name: message for name, message in found.items() if message} == {}


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_agrees_with_the_reference(tmp_path: Path) -> None:
    found = _run("gpu", tmp_path)
    assert len(found) > 80
    assert {name: message for name, message in found.items() if message} == {}


def test_every_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    found = _run("compile", tmp_path)
    kernels = {
        name
        for path in (PROGRAMS.parents[1] / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert len(kernels) >= 7
    for architecture in (80, 90, 100):
        made = {key.split()[0] for key in found if key.endswith(f"sm_{architecture}")}
        assert made == kernels
    assert all("cubin" in made for made in found.values())
    stack = {key: re.search(r"(\d+) of stack", made) for key, made in found.items()}
    spilled = {key: int(of[1]) for key, of in stack.items() if of and int(of[1]) > FEW_BYTES}
    # Newer GPUs than those named are not measured; products by descriptors are for sm_90 and on.
    known = re.compile(r".* sm_80$|.* sm_90$")
    assert {key for key in spilled if known.match(key)} <= {
        f"geglu_linear_kernel geglu_linear {dtype} sm_80" for dtype in ("bf16", "fp16")
    }, spilled
