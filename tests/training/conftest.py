# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from tiny_training import Workshop, make_workshop, trained_workshop


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    """Images and recipes, nothing trained."""
    return make_workshop(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """All three runs, done once; tests do not change them."""
    return trained_workshop(tmp_path_factory.mktemp("trained"))
