# SPDX-License-Identifier: Apache-2.0
"""What every benchmark's result holds besides its figures, and where it is kept."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from ssldiff_fast.bench import Case, measure, require_device
from ssldiff_fast.bench.machine import machine
from ssldiff_fast.bench.timing import matrix_rate

RESULTS = Path(__file__).parent / "results"


def aim(
    name: str, value: float, bound: float, direction: Literal["at least", "at most"]
) -> dict[str, Any]:
    """One aim of a result: what it is, what was measured, and whether that meets it."""
    met = value >= bound if direction == "at least" else value <= bound
    rounded = float(f"{value:.4g}")
    return {"name": name, "aim": f"{direction} {bound:g}", "value": rounded, "met": met}


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    )
    return done.stdout.strip()


def commit() -> str | None:
    """The commit that is measured."""
    return _git("rev-parse", "--short", "HEAD") or None


def save(
    name: str, figures: dict[str, Any], aims: list[dict[str, Any]], device: str = "cpu"
) -> Path:
    """Write `results/NAME.json`, of a GPU `results/gpu/NAME.json`, and print which aims are met."""
    measured = commit()
    result = {
        "what": name,
        "device": device,
        **figures,
        "aims": aims,
        "machine": machine(),
        "commit": measured,
        "dirty": bool(_git("status", "--porcelain")) if measured else None,
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


def save_operator(cases: list[Case]) -> Path:
    """Measure an operator's cases, the first of them in full view, and save what was found."""
    operator, device = cases[0].operator, cases[0].device
    require_device(device)
    matrix = matrix_rate(device)
    figures = {case.label: measure(case, matrix) for case in cases}
    aims = [entry for case in cases for entry in aims_of(case, figures[case.label])]
    only = figures[""] if list(figures) == [""] else figures
    return save(operator, {"backend": cases[0].backend, **only}, aims, device)


def aims_of(case: Case, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Which aims of a case its figures meet."""
    label = f" ({case.label})" if case.label else ""
    aims = [
        aim(f"times {baseline}{label}", figures["ratio"][baseline], bound, "at least")
        for baseline, bound in case.aims.items()
    ]
    if case.share_aim is not None:
        for name, share in figures["share_of_copy"].items():
            other = "" if name == case.operator else f" ({name})"
            words = f"share of the copy bandwidth{label}{other}"
            aims.append(aim(words, share, case.share_aim, "at least"))
    if case.megabytes_aim is not None and case.operator in figures["peak_megabytes"]:
        memory = figures["peak_megabytes"][case.operator]
        aims.append(
            aim(f"megabytes beside the inputs{label}", memory, case.megabytes_aim, "at most")
        )
    return aims
