# SPDX-License-Identifier: Apache-2.0
"""Every operator on every backend that this machine has, against its reference in float64.

The table is tests/parity_table.py; Triton under the interpreter is in test_triton.py.
"""

from __future__ import annotations

import pytest
import torch

from parity_table import LAYOUTS, OPERATORS, Call, difference, doubled, through_triton
from ssldiff_fast import _C, ops

RUNS = [
    pytest.param(name, case, dtype, id=f"{name}-{case}-{dtype}".replace("torch.", ""))
    for name, operator in OPERATORS.items()
    for case in operator.cases
    for dtype in operator.dtypes
]


def cpu_paths() -> list[str]:
    """The instruction sets that this processor can run."""
    paths = []
    for path in ("portable", "avx2", "avx512"):
        try:
            _C.set_cpu_path(path)
        except ValueError:
            continue
        paths.append(path)
    _C.set_cpu_path("best")
    return paths


def made(name: str, case: str, dtype: torch.dtype) -> tuple[Call, list[torch.Tensor]]:
    """The arguments, and what the reference makes of the same values in float64."""
    call = OPERATORS[name].cases[case](dtype)
    return call, call.map(doubled).run(OPERATORS[name].reference)


def test_every_operator_of_the_package_is_in_the_table() -> None:
    names = {name.removesuffix("_reference") for name in ops.__all__ if "_reference" in name}
    assert names - {"philox4x32"} == set(OPERATORS)


@pytest.mark.parametrize(("name", "case", "dtype"), RUNS)
def test_every_cpu_path_agrees_with_the_reference(name: str, case: str, dtype: torch.dtype) -> None:
    call, expected = made(name, case, dtype)
    operator, plain = OPERATORS[name], {}
    try:
        for path in cpu_paths():
            _C.set_cpu_path(path)
            for layout, change in LAYOUTS.items():
                found = call.map(change).run(operator.run)
                first = plain.setdefault(layout if operator.sums_as_stored else "", found)
                assert difference(first, expected) == ""
                same = [torch.equal(a, b) for a, b in zip(found, first, strict=True)]
                assert all(same), f"{path}, {layout}: other bits than the first call"
    finally:
        _C.set_cpu_path("best")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["CUDA", "Triton"])
@pytest.mark.parametrize(("name", "case", "dtype"), RUNS)
def test_on_a_gpu_every_backend_agrees_with_the_reference(
    name: str, case: str, dtype: torch.dtype, backend: str
) -> None:
    call, expected = made(name, case, dtype)
    on_gpu = call.on("cuda")
    if name == "philox_normal":
        on_gpu.options["device"] = "cuda"
    for layout, change in LAYOUTS.items():
        there = on_gpu.map(change)
        if backend == "CUDA":
            found = there.run(OPERATORS[name].run)
        else:
            with through_triton():
                found = there.run(OPERATORS[name].run)
        assert difference(found, expected) == "", layout
