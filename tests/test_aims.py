# SPDX-License-Identifier: Apache-2.0
"""`make aims` prints what was aimed at and measured, the unmet first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

AIMS = Path(__file__).parents[1] / "benchmarks" / "aims.py"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    copy = tmp_path / "aims.py"
    copy.write_text(AIMS.read_text())
    (tmp_path / "results").mkdir()
    return copy


def _run(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )


def test_unmet_aims_come_first(script: Path) -> None:
    aims = [
        {"name": "fast", "aim": "at least 2", "value": 3, "met": True},
        {"name": "small", "aim": "at most 1", "value": 4, "met": False},
    ]
    (script.parent / "results" / "op.json").write_text(json.dumps({"aims": aims}))
    done = _run(script)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "UNMET  op: small: aim at most 1, measured 4",
        "met    op: fast: aim at least 2, measured 3",
        "2 aims, 1 unmet.",
    ]


@pytest.mark.parametrize("text", ["{", "[1]", '{"aims": [{"name": "fast"}]}'])
def test_a_broken_result_is_named(script: Path, text: str) -> None:
    (script.parent / "results" / "op.json").write_text(text)
    done = _run(script)
    assert done.returncode == 2
    assert "op.json is not a benchmark's result" in done.stderr
