# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: GPU tests run only where there is a GPU, and every test starts from the
same seed and keeps its threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ssldiff_fast import _C
from ssldiff_fast.models import threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _given_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test's threads or log lines depend on what else this machine does."""
    monkeypatch.setattr(threads, "_usual_numbers", set)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path of the CPU kernels that this processor can run, chosen while a test runs."""
    try:
        _C.set_cpu_path(request.param)
    except ValueError:
        pytest.skip(f"this processor cannot run {request.param}")
    yield request.param
    _C.set_cpu_path("best")
