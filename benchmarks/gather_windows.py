# SPDX-License-Identifier: Apache-2.0
"""Claim: gather_windows cuts, casts and lays out windows at the memory's speed."""

from __future__ import annotations

from report import save_operator
from ssldiff_fast.bench.gather_windows import LAYOUTS, case
from timing import arguments


def main() -> None:
    """Time all windows of a canvas in both layouts and save gather_windows.json."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, help="side of the canvas; 2048, on a GPU 8192")
    chosen = parser.parse_args()
    save_operator([case(chosen.device, label, chosen.size) for label in LAYOUTS])


if __name__ == "__main__":
    main()
