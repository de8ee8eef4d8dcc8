# SPDX-License-Identifier: Apache-2.0
"""Claim: token_attention is five times faster than LayerNorm, projections, attention, residual and
LayerNorm at one token, and the faster way for as many heads and tokens as `few_tokens` says."""

from __future__ import annotations

from typing import Any

import torch

from report import aim, aims_of, save
from ssldiff_fast.bench import measure, require_device
from ssldiff_fast.bench.timing import alternate, matrix_rate, ratios_to
from ssldiff_fast.bench.token_attention import UNFUSED, case, cases
from ssldiff_fast.ops import few_tokens
from timing import arguments

DTYPES = (torch.float32, torch.bfloat16)
# The other levels of the published network: 16 x 16 and 8 x 8 positions.
LEVELS = ((256, 576), (64, 960))
WINDOWS = {"cpu": 8, "cuda": 256}
# Of the sweep: width, heads and tokens, which are the more vectors the further down.
SWEEP = [
    (width, heads, tokens)
    for width in (384, 960)
    for heads, tokens in ((1, 2), (1, 8), (4, 4), (4, 8), (8, 8), (16, 8))
]
LENGTH = 256  # positions of the sweep
# By as much two runs of one function differ; a way that is chosen loses less.
NOISE = 1.1


def sweep(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """How many times as long the unfused way takes, and whether `few_tokens` leaves it."""
    rows = []
    for width, heads, tokens in SWEEP:
        shape = (WINDOWS[device], LENGTH, width)
        one = case(device, shape, heads=heads, tokens=tokens, dtype=dtype)
        one.check()
        functions = {name: one.functions[name] for name in (one.operator, UNFUSED)}
        times = alternate(functions, 9 if device == "cpu" else 20, device)
        row = {"width": width, "heads": heads, "tokens": tokens}
        row |= {"ratio": ratios_to(times, one.operator)[UNFUSED]}
        rows.append({**row, "chosen": few_tokens(width, heads, tokens, device, dtype)})
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ", flush=True)
    return rows


def main() -> None:
    """Time the levels of the published network, sweep heads and tokens, and save the results."""
    device = arguments(__doc__).parse_args().device
    require_device(device)
    matrix = matrix_rate(device)
    every = cases(device)
    every += [case(device, (WINDOWS[device], *level), dtype=d) for level in LEVELS for d in DTYPES]
    figures: dict[str, Any] = {"backend": every[0].backend}
    aims = []
    for one in every:
        figures[one.label] = measure(one, matrix)
        aims += aims_of(one, figures[one.label])
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        rows = figures[f"sweep {name}"] = sweep(device, dtype)
        slowest = min(row["ratio"] for row in rows if row["chosen"])
        label = f"times unfused where few_tokens chooses it, {name}"
        aims.append(aim(label, slowest, 1 / NOISE, "at least"))
    save("token_attention", figures, aims, device)


if __name__ == "__main__":
    main()
