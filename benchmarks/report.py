# SPDX-License-Identifier: Apache-2.0
"""What every benchmark's result holds besides its figures, and where it is kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from ssldiff_fast import _C

RESULTS = Path(__file__).parent / "results"


def aim(
    name: str, value: float, bound: float, direction: Literal["at least", "at most"]
) -> dict[str, Any]:
    """One aim of a result: what it is, what was measured, and whether that meets it."""
    met = value >= bound if direction == "at least" else value <= bound
    return {"name": name, "aim": f"{direction} {bound:g}", "value": round(value, 4), "met": met}


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    )
    return done.stdout.strip()


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [li.split(":", 1)[1] for li in info.read_text().splitlines() if "model name" in li]
        name = names[0].strip() if names else name
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {isa}"


def gpu() -> dict[str, Any] | None:
    """The GPU's name, memory and versions, and where its operators come from."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if find_spec("triton") else None,
        "cuda_operators": _C.CUDA_PROBLEM or "built",
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def machine() -> dict[str, Any]:
    """Where a figure was measured."""
    return {
        "processor": processor(),
        "gpu": gpu(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(
    name: str, figures: dict[str, Any], aims: list[dict[str, Any]], device: str = "cpu"
) -> Path:
    """Write `results/NAME.json`, of a GPU `results/gpu/NAME.json`, and print which aims are met."""
    commit = _git("rev-parse", "--short", "HEAD")
    result = {
        "what": name,
        "device": device,
        **figures,
        "aims": aims,
        "machine": machine(),
        "commit": commit or None,
        "dirty": bool(_git("status", "--porcelain")) if commit else None,
        "date": datetime.date.today().isoformat(),
    }
    path = (RESULTS if device == "cpu" else RESULTS / "gpu") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for entry in aims:
        state = "met" if entry["met"] else "NOT MET"
        print(f"{entry['name']}: {entry['value']} (aim {entry['aim']}): {state}")
    print(path)
    return path
