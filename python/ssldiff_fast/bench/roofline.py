# SPDX-License-Identifier: Apache-2.0
"""A roofline plot (Williams et al. 2009): what operators reach beside what the machine allows."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg", ".pdf")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vP*X"


def check_plot(path: Path) -> None:
    """Raise before any work where the plot could not be drawn in the end.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: the name ends in no known format.
        FileNotFoundError: the folder does not exist.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"bench: the plot is {path}, but its name must end in .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(path.absolute().parent))
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            "bench: the plot needs matplotlib, which is missing: pip install "
            "'ssldiff_fast[bench]', or do without the plot (--no-plot)."
        )


def draw_roofline(report: dict[str, Any], path: Path) -> None:
    """Draw what `run` found: operations a second over operations a byte, with both limits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    found = report["cases"]
    rates = [case["gigaflops"][case["operator"]] for case in found]
    intensities = [case["operations_per_byte"] for case in found]
    figure = Figure(figsize=(8.0, 6.0 + 0.12 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_limits(axes, report, intensities)
    for i, (case, rate, intensity) in enumerate(zip(found, rates, intensities)):
        share = case["share_of_limit"][case["operator"]]
        label = f"{case['name']}: {rate:.3g} GFLOP/s, {share:.0%} of the {case['limit']}"
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(intensity, rate, marker, color=colour, ms=9, label=label, ls="")
    axes.set_ylim(min(rates) / 3, max([report["gigaflops"], *rates]) * 3)
    axes.set_xlabel("operations per byte of inputs and outputs")
    axes.set_ylabel("billions of operations per second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    figure.suptitle(_title(report), fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_limits(axes: Any, report: dict[str, Any], intensities: list[float]) -> None:
    bandwidth, matrix = report["gigabytes_per_second"], report["gigaflops"]
    corner = matrix / bandwidth
    low, high = min([corner, *intensities]) / 16, max([corner, *intensities]) * 8
    axes.loglog([low, corner, high], [bandwidth * low, matrix, matrix], color="0.25", lw=2)
    axes.set_xlim(low, high)
    words = {"textcoords": "offset points", "ha": "right"}
    half = corner / 2
    copy = f"copy bandwidth\n{bandwidth:.3g} GB/s"
    axes.annotate(copy, (half, bandwidth * half), (-8, -4), **words)
    axes.annotate(f"matrix rate {matrix:.4g} GFLOP/s", (high, matrix), (-4, 5), **words)


def _title(report: dict[str, Any]) -> str:
    machine = report["machine"]
    if report["device"] == "cuda":
        where = machine["gpu"]["name"]
    else:
        where = f"{machine['processor']}, {machine['threads']} threads"
    return f"operators of ssldiff_fast on {where}; torch {machine['torch']}"
