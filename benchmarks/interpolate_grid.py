# SPDX-License-Identifier: Apache-2.0
"""Claim: interpolate_grid runs at the memory's speed, above `grid_sample` and a loop of slerps."""

from __future__ import annotations

from report import save_operator
from ssldiff_fast.bench.interpolate_grid import case
from timing import arguments


def main() -> None:
    """Time both modes and save interpolate_grid.json."""
    parser = arguments(__doc__)
    parser.add_argument("--points", type=int, help="how many; 7,680, on a GPU 131,072")
    chosen = parser.parse_args()
    save_operator([case(chosen.device, mode, chosen.points) for mode in ("bilinear", "slerp")])


if __name__ == "__main__":
    main()
