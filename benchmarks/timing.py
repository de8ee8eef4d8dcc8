# SPDX-License-Identifier: Apache-2.0
"""The command line of every benchmark that has a GPU side; the timing itself is the package's."""

from __future__ import annotations

import argparse

from ssldiff_fast.bench.timing import (
    alternate,
    copy_bandwidth,
    peak_megabytes,
    peak_resident,
    ratios_to,
)

__all__ = [
    "alternate",
    "arguments",
    "copy_bandwidth",
    "peak_megabytes",
    "peak_resident",
    "ratios_to",
]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark that has a GPU side takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser
