# SPDX-License-Identifier: Apache-2.0
"""All benchmarks of a machine in one go, and the table of what they found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .case import measure, require_device
from .machine import machine
from .operators import OPERATORS, cases
from .timing import matrix_rate

COLUMNS = ("operator", "ms", "GB/s", "GFLOP/s", "of the limit", "times faster than")


def run(
    operators: Sequence[str] = (),
    device: str = "cpu",
    *,
    rounds: int = 30,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Measure operators on this machine.

    Args:
        operators: names; without any all that have a benchmark.
        device: "cpu" or "cuda".
        rounds: how often, at most, each function runs.
        progress: told the name of each case before it is measured.

    Returns:
        The machine, its limits (`gigabytes_per_second` of a copy, the median over the cases;
        `gigaflops` of a matrix product), and the figures of each case.

    Raises:
        ValueError: an operator without a benchmark.
        RuntimeError: no such device, or the compiled operators are missing.
    """
    require_device(device)
    unknown = [name for name in operators if name not in OPERATORS]
    if unknown:
        cases(unknown[0], device)
    progress("the machine's limits")
    matrix = matrix_rate(device)
    found = []
    for operator in operators or OPERATORS:
        for case in cases(operator, device):
            progress(case.name)
            head = {"operator": case.operator, "name": case.name, "backend": case.backend}
            found.append({**head, **measure(case, matrix, rounds)})
    return {
        "device": device,
        "machine": machine(),
        "gigabytes_per_second": statistics.median(
            case["gigabytes_per_second"]["copy"] for case in found
        ),
        "gigaflops": round(matrix, 2),
        "cases": found,
    }


def table(report: dict[str, Any]) -> str:
    """The cases in aligned columns, the machine's limits below."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for case in report["cases"]:
        for name in case["gigabytes_per_second"]:
            if name != "copy":
                rows.append(_row(case, name))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:])]
            + [row[-1]]
        )
        for row in rows
    ]
    lines.append("")
    lines.append(
        f"limits: a copy reads and writes {report['gigabytes_per_second']:.3g} GB/s, a matrix "
        f"product takes {report['gigaflops']:.4g} GFLOP/s"
    )
    return "\n".join(lines)


def _row(case: dict[str, Any], name: str) -> tuple[str, ...]:
    own = name == case["operator"]
    ratios = case["ratio"].items() if own else []
    return (
        case["name"] if own else f"{case['name']} ({name})",
        f"{case['times'][name]['median_ms']:.3g}",
        f"{case['gigabytes_per_second'][name]:.3g}",
        f"{case['gigaflops'][name]:.4g}",
        f"{case['share_of_limit'][name]:.0%} {case['limit']}",
        ", ".join(f"{other} {ratio:.3g}" for other, ratio in ratios),
    )
