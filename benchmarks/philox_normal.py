# SPDX-License-Identifier: Apache-2.0
"""Claim: noise by coordinate costs no more than `randn`, which only one order of work repeats."""

from __future__ import annotations

from report import save_operator
from ssldiff_fast.bench.philox_normal import case
from timing import arguments


def main() -> None:
    """Time the noise of a canvas and save philox_normal.json."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, help="side of the canvas; 1024, on a GPU 8192")
    chosen = parser.parse_args()
    save_operator([case(chosen.device, chosen.size)])


if __name__ == "__main__":
    main()
