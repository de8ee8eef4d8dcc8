# SPDX-License-Identifier: Apache-2.0
"""The operators' benchmarks for pytest-benchmark, which keeps and compares the figures of commits.

    pytest benchmarks --benchmark-only

`make test` does not collect this file: timings are no tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssldiff_fast.bench import OPERATORS, Case, cases
from ssldiff_fast.bench.case import once
from ssldiff_fast.bench.timing import stopwatch

ROUNDS = 10
SECONDS = 4.0  # a slow baseline runs less often than that
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CASES = [case for device in DEVICES for name in OPERATORS for case in cases(name, device)]
RUNS = [
    pytest.param(case, function, id=f"{case.name}-{case.device}-{function}".replace(" ", "-"))
    for case in CASES
    for function in case.functions
]


@pytest.mark.parametrize(("case", "function"), RUNS)
def test_operator(case: Case, function: str, benchmark: Any) -> None:
    """Each operator and each baseline by itself; those of one case form a group."""
    run = once(case, function)
    first = stopwatch("cpu")(run) / 1e3
    rounds = max(1, min(ROUNDS, int(SECONDS / max(first, 1e-9))))
    benchmark.group = f"{case.name} on {case.device}"
    benchmark.extra_info.update(bytes=case.moved, operations=case.operations)
    benchmark.pedantic(run, rounds=rounds)
