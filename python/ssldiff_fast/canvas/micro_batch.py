# SPDX-License-Identifier: Apache-2.0
"""`batch_size="auto"`: the micro-batch that is the faster by window, within the memory there is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.canvas.trial import evaluate
from ssldiff_fast.models.execution import is_out_of_memory

if TYPE_CHECKING:
    from ssldiff_fast.models.ldm import LatentDiffusion

logger = logging.getLogger(__name__)

# More windows at once than this are no faster, and cost rows of windows to pad.
MOST = {"cpu": 32, "cuda": 256}
# A larger batch has to be so many times faster by window to be worth its memory.
WORTH = 1.03
# No further size is tried after so many seconds.
_SECONDS = 6.0


def choose_batch_size(
    seconds: Callable[[int], float],
    *,
    most: int,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The best of 1, 2, 4, ... up to `most` windows.

    A size that does not fit into memory ends the search at the half of it, which was tried.

    Args:
        seconds: runs a batch of so many windows and returns how long it took.
        most: the largest size.
        clock: seconds, for the limit of the search.

    Returns:
        A size that has run.

    Raises:
        MemoryError: not even one window fits.
    """
    end = clock() + _SECONDS
    best, best_each = 0, float("inf")
    size = 1
    while size <= most and (best == 0 or clock() < end):
        try:
            each = seconds(size) / size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if best == 0:
                raise MemoryError(
                    "batch_size auto: not even one window fits into the memory there is; use a "
                    "smaller dtype, or a device with more."
                ) from None
            logger.warning("batch_size auto: %d windows do not fit into memory", size)
            break
        if best_each > WORTH * each:
            best, best_each = size, each
        size *= 2
    logger.warning("batch_size auto: %d (%.3g s a window)", best, best_each)
    return best


def auto_batch_size(model: LatentDiffusion, *, guided: bool) -> int:
    """The best micro-batch of a model here, by evaluations of noise."""
    denoiser = LDMDenoiser(model)
    device = next(model.unet.parameters()).device

    def seconds(size: int) -> float:
        evaluate(denoiser, size, guided=guided)  # loads and chooses kernels
        return evaluate(denoiser, size, guided=guided)

    return choose_batch_size(seconds, most=MOST.get(device.type, MOST["cuda"]))
