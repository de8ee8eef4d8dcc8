# SPDX-License-Identifier: Apache-2.0
"""What every benchmark's result holds besides its figures, and where it is kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"


def aim(
    name: str, value: float, bound: float, direction: Literal["at least", "at most"]
) -> dict[str, Any]:
    """One aim of a result: what it is, what was measured, and whether that meets it."""
    met = value >= bound if direction == "at least" else value <= bound
    return {"name": name, "aim": f"{direction} {bound:g}", "value": round(value, 4), "met": met}


def _git(*arguments: str) -> str:
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


def machine() -> dict[str, Any]:
    """Where a figure was measured."""
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(name: str, figures: dict[str, Any], aims: list[dict[str, Any]]) -> Path:
    """Write `results/NAME.json` and print where it is and which aims are met."""
    result = {
        "what": name,
        **figures,
        "aims": aims,
        "machine": machine(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for entry in aims:
        state = "met" if entry["met"] else "NOT MET"
        print(f"{entry['name']}: {entry['value']} (aim {entry['aim']}): {state}")
    print(path)
    return path
