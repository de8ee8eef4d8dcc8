# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: GPU tests run only where there is a GPU, and every test starts from the
same seed."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
