# SPDX-License-Identifier: Apache-2.0
"""Run by tests/models/test_fused_unet.py in a process of its own, with TRITON_INTERPRET=1.

Prints one JSON object: the relative error of each case against the U-Net itself.
"""

from __future__ import annotations

import json

import torch

from golden_inputs import UNET_A, fill, golden_input, relative_error
from ssldiff_fast.models.fused_unet import FusedUNet
from ssldiff_fast.models.unet import UNet

# Tokens, contexts for each window, and changes of the network. The interpreter is slow: one small
# window each, and two levels.
SMALL = {"channel_mult": [1, 2], "attention_resolutions": [2]}
CASES: dict[str, tuple[int, int, dict[str, object]]] = {
    "one token": (1, 1, SMALL),
    "a guided pair": (1, 2, SMALL),
    "two tokens": (2, 2, SMALL),
    "five tokens": (5, 1, {**SMALL, "num_heads": 4}),
    "depth two": (1, 1, {**SMALL, "transformer_depth": 2}),
}


@torch.no_grad()
def main() -> None:
    errors = {}
    for name, (tokens, contexts, change) in CASES.items():
        unet = fill(UNet(**{**UNET_A, **change}))
        x, t = golden_input("x", 1, 3, 6, 10), torch.tensor(400.0)
        context = golden_input("context", contexts, tokens, 64)
        fused = FusedUNet(unet)
        out = fused(x, fused.prepare_time(t), fused.prepare(context))
        errors[name] = float(relative_error(out, unet(x, t, context)))
        if name == "a guided pair":
            errors["the outermost level"] = _of_outermost_level(unet, x, context)
    print(json.dumps(errors))


def _of_outermost_level(unet: UNet, x: torch.Tensor, context: torch.Tensor) -> float:
    """With what the lower levels made at another timestep."""
    fused = FusedUNet(unet)
    early, late, prepared = torch.tensor(400.0), torch.tensor(300.0), fused.prepare(context)
    _, made = fused.with_deep(x, fused.prepare_time(early), prepared)
    out, _ = fused.with_deep(x, fused.prepare_time(late), prepared, made)
    _, deep = unet.with_deep(x, early, context)
    worst = relative_error(out, unet.with_deep(x, late, context, deep)[0])
    return max(float(worst), float(relative_error(made, deep)))


if __name__ == "__main__":
    main()
