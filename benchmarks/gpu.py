# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one go: `make gpu`.

Every backend is tested against the reference, then every benchmark that has a GPU side runs; one
that fails does not keep the others from running. Results are small JSON files in
benchmarks/results/gpu/, also copied to the folder of --copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from report import RESULTS, save

HERE = Path(__file__).parent
# Folders and files with tests marked gpu; others may need libraries that a GPU machine lacks.
# The longest come first, so that none is left over when the others have ended.
TESTS = (
    "tests/ops/test_triton.py",
    "tests/test_gpu.py",
    "tests/models/test_fused_unet.py",
    "tests/models/test_execution.py",
    "tests/models/test_self_attention.py",
    "tests/models/test_side_by_side.py",
    "tests/canvas",
    "tests/ops",
)
# What matters most comes first.
BENCHMARKS: tuple[tuple[str, ...], ...] = (
    ("unet.py", "--size", "paper", "--dtype", "bfloat16"),
    ("unet.py", "--size", "demo", "--dtype", "bfloat16", "--keep", "--no-compile"),
    ("scatter_mean.py",),
    ("gather_windows.py",),
    ("group_norm_silu.py",),
    ("token_attention.py",),
    ("vq_nearest.py",),
    ("philox_normal.py",),
    ("interpolate_grid.py",),
    ("sampler.py", "--size", "paper", "--dtype", "bfloat16"),
    ("sampler.py",),
    ("notebook.py",),
)
# The slowest part of it takes processors alone, and is kept for the benchmark: beside the tests.
COMPILE = (*BENCHMARKS[0], "--compile-only")
# Seconds for one step and for all of them, which leaves the build its share of ten minutes.
LIMIT, IN_ALL = 220, 480
WORKERS = 14  # of pytest-xdist, where it is there
OUTCOMES = ("failure", "error")  # what pytest's report calls a test that did not pass


def run(command: list[str], limit: float = LIMIT) -> dict[str, Any]:
    """One step, with its seconds; "" or why it failed."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=HERE.parent, timeout=limit, check=False).returncode
        problem = f"exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = f"ended after {limit:g} seconds"
    return {"seconds": round(time.perf_counter() - start, 1), "problem": problem}


def run_tests() -> dict[str, Any]:
    """The tests marked gpu: how many of each outcome, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist") is not None:  # most of the time is Triton's compiling
            command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
        step = run([*command, *TESTS])
        if not report.is_file():
            return step
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if any(case.find(what) is not None for what in OUTCOMES)]
    failed = [case.get("name", "") for case in bad]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {**step, "passed": passed, "skipped": skipped, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copy", default="", help="folder that gets a copy of the results")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"make gpu: torch {torch.__version__} sees no CUDA device; `ssldiff doctor` shows what "
            "it does see.",
            file=sys.stderr,
        )
        return 2
    start = time.perf_counter()
    ahead = subprocess.Popen(
        [sys.executable, str(HERE / COMPILE[0]), "--device", "cuda", *COMPILE[1:]], cwd=HERE.parent
    )
    steps = {"tests": run_tests()}
    ahead.terminate()
    ahead.wait()
    for script, *options in BENCHMARKS:
        command = [sys.executable, str(HERE / script), "--device", "cuda", *options]
        left = IN_ALL - (time.perf_counter() - start)
        steps[" ".join([script, *options])] = run(command, min(LIMIT, max(left, 1.0)))
        save("gpu", {"steps": steps}, [], "cuda")
        if chosen.copy:  # each time: whatever ends this run keeps what there is
            shutil.copytree(RESULTS / "gpu", chosen.copy, dirs_exist_ok=True)
    print(json.dumps(steps, indent=1))
    return 1 if any(step["problem"] for step in steps.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
