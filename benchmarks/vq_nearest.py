# SPDX-License-Identifier: Apache-2.0
"""Claim: vq_nearest is far faster than `cdist().argmin()`, in memory that does not grow with K."""

from __future__ import annotations

from report import save_operator
from ssldiff_fast.bench.vq_nearest import case
from timing import arguments


def main() -> None:
    """Time 65,536 vectors and 8,192 codes and save vq_nearest.json."""
    parser = arguments(__doc__)
    parser.add_argument("--vectors", type=int, default=65_536)
    parser.add_argument("--codes", type=int, default=8_192)
    chosen = parser.parse_args()
    save_operator([case(chosen.device, chosen.vectors, chosen.codes)])


if __name__ == "__main__":
    main()
