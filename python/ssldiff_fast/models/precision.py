# SPDX-License-Identifier: Apache-2.0
"""`dtype="auto"`: the precision in which a network is the faster on this machine."""

from __future__ import annotations

import copy
import logging
import time

import torch
from torch import Tensor

from ssldiff_fast.models.unet import UNet

logger = logging.getLogger(__name__)

# bfloat16 has to be so many times faster to be taken: it is the less exact, and a choice that
# follows the noise of the clock would differ from run to run.
WORTH = 1.2
_ROUNDS = 2


def choose_dtype(
    unet: UNet,  # in float32, in evaluation mode
    window: tuple[int, int],
) -> torch.dtype:
    """float32 or bfloat16, by a short measurement of both on one window; the log says which.

    On a GPU bfloat16 wherever its arithmetic has it; on other devices both are run.
    """
    device = next(unet.parameters()).device
    if device.type == "cuda":
        has_it = torch.cuda.get_device_capability(device) >= (8, 0)
        chosen = torch.bfloat16 if has_it else torch.float32
        logger.warning("dtype auto: %s on %s", _name(chosen), torch.cuda.get_device_name(device))
        return chosen
    half = copy.deepcopy(unet).to(torch.bfloat16)
    seconds = [_seconds(network, window, device) for network in (unet, half)]
    chosen = torch.bfloat16 if seconds[0] > WORTH * seconds[1] else torch.float32
    logger.warning(
        "dtype auto: %s (an evaluation takes %.3g s in float32, %.3g s in bfloat16 here)",
        _name(chosen),
        *seconds,
    )
    return chosen


@torch.no_grad()
def _seconds(unet: UNet, window: tuple[int, int], device: torch.device) -> float:
    x = torch.zeros(1, unet.in_channels, *window, device=device)
    t = torch.zeros((), device=device)
    width = unet.context_dim
    tokens: Tensor | None = None if width is None else torch.zeros(1, 1, width, device=device)
    context = None if tokens is None else unet.prepare(tokens)
    unet(x, t, context)
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        unet(x, t, context)
        best = min(best, time.perf_counter() - start)
    return best


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
