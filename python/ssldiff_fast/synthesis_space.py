# SPDX-License-Identifier: Apache-2.0
"""How many bytes a synthesis in the wavefront order keeps beside its output, and where."""

from __future__ import annotations

from dataclasses import dataclass

from ssldiff_fast.canvas.decode_overlapped import OverlappedDecoder
from ssldiff_fast.canvas.glass import GlassDecoder
from ssldiff_fast.ops import WindowPlan
from ssldiff_fast.synthesis_plan import Plan

# States of a run that are on the disk at once: two are kept while a third is written.
_STATES = 3


@dataclass(frozen=True)
class WaitingRows:
    """About the bytes of rows that wait, in files where the network is on a CPU.

    Attributes:
        canvas: rows of the canvas and model outputs, of all steps; a state holds them too.
        image: rows of decoded tiles and of pixels.
    """

    canvas: int
    image: int

    @classmethod
    def of(cls, plan: Plan) -> WaitingRows:
        denoiser, steps = plan.canvas_denoiser, plan.preset.steps
        windows, channels = denoiser.plan(0), plan.model.latent_channels
        pair = 1 if plan.preset.guidance_scale == 1.0 else 2
        itemsize = next(plan.model.unet.parameters()).element_size()
        outputs = _window_rows(windows) * pair * itemsize
        # Rows are dropped by whole bands, so that up to one more than needed is kept; a solver with
        # history keeps the denoised ones too.
        rows = 2 * 4 * windows.width * (windows.window[0] + _band(windows))
        decoder = plan.decoder()
        if isinstance(decoder, GlassDecoder):
            decoder = decoder.decoder
        height = windows.window[0]
        tiles = 0
        if isinstance(decoder, OverlappedDecoder):
            height = _band(decoder.plan)
            tiles = _window_rows(decoder.tiles_of(0)) * 4 * plan.factor**2
        pixels = 2 * 3 * plan.size_px[0] * height * plan.factor
        return cls(steps * channels * (rows + outputs), 3 * tiles + pixels)

    def bytes_needed(self, *, keeps_state: bool) -> int:
        """On the disk, beside the output."""
        return self.canvas * (1 + _STATES * keeps_state) + self.image


def _band(plan: WindowPlan) -> int:
    """Rows that become final with one window row, at most."""
    gaps = zip(plan.origins_y, (*plan.origins_y[1:], plan.height))
    return max(below - above for above, below in gaps)


def _window_rows(plan: WindowPlan) -> int:
    """Values of one channel in the window rows that cover a row of the canvas, and the next."""
    covering = max(len(plan.window_rows(y, y + 1)) for y in plan.origins_y)
    return (covering + 1) * len(plan.origins_x) * plan.window[0] * plan.window[1]
