# SPDX-License-Identifier: Apache-2.0
"""Named recipes for the sampler and the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from ssldiff_fast._checks import check_choice
from ssldiff_fast.canvas.windows import ShiftedWindows
from ssldiff_fast.ops import WindowPlan


@dataclass(frozen=True)
class Preset:
    """A way to make a large image.

    Args:
        name: What users call it.
        solver: Name of the solver.
        steps: Number of steps.
        eta: Share of fresh noise in every step.
        guidance_scale: 1 is no guidance.
        shifted: Windows side by side whose offset moves every step, instead of a regular stride.
        overlap: Windows that cover a latent, along each axis: the stride is window / overlap.
            Not used where `shifted`.
        weights: Window weights in the average.
        interpolation: How the field interpolates the grid.
        decode_overlap: Tiles that cover a latent along each axis of the reference decode, on
            average: their stride is window / decode_overlap.
        decode_weights: Weights of a tile's pixels in the decode's blend.
        decoder: Which decoder makes the pixels: "reference", "global" or "local".
        spacing: Spacing of the timesteps.
        guidance_interval: (low, high) in t outside of which there is no guidance; None: everywhere.
        reuse: The network's lower levels are evaluated in every so many steps (`sample`); 1: in
            all. Not for `shifted` windows.
        overlapped_steps: Last steps in which shifted windows overlap by a quarter, so that their
            borders blend.
    """

    name: str
    solver: str
    steps: int
    eta: float
    guidance_scale: float
    shifted: bool
    overlap: int
    weights: str
    interpolation: str
    decode_overlap: float
    decode_weights: str = "gaussian"
    decoder: str = "reference"
    spacing: str = "trailing"
    overlapped_steps: int = 0
    guidance_interval: tuple[float, float] | None = None
    reuse: int = 1

    def stride(self, window: tuple[int, int]) -> tuple[int, int]:
        """The stride (y, x) in latents of regular windows."""
        return max(1, window[0] // self.overlap), max(1, window[1] // self.overlap)

    def decode_stride(self, window: tuple[int, int]) -> tuple[int, int]:
        """The stride (y, x) in latents of the decoder's tiles."""
        h, w = (max(1, round(side / self.decode_overlap)) for side in window)
        return h, w

    def windows(
        self,
        height: int,
        width: int,
        window: tuple[int, int],
        *,
        seed: int,
        steps: int | None = None,
        stride: int | tuple[int, int] | None = None,
        wrap: tuple[bool, bool] = (False, False),
    ) -> WindowPlan | ShiftedWindows:
        """The windows on a canvas.

        Args:
            height: Canvas height H in latents.
            width: Canvas width W in latents.
            window: (h, w) of a window in latents.
            seed: Where the offsets of shifted windows start.
            steps: Number of steps of the run, if not the preset's own.
            stride: Stride in latents, if not the preset's own.
            wrap: Whether windows go on round the end of y, and of x.
        """
        if self.shifted:
            return ShiftedWindows(
                height,
                width,
                window,
                seed=seed,
                stride=stride,
                weights=self.weights,
                overlap_from=(steps or self.steps) - self.overlapped_steps,
                wrap=wrap,
            )
        own = self.stride(window) if stride is None else stride
        return WindowPlan.regular(height, width, window, own, self.weights, wrap=wrap)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # The paper's section 4: stride 16 of windows of 64, s = 1.75.
        Preset(
            name="paper",
            solver="ddim",
            steps=50,
            eta=0.0,
            guidance_scale=1.75,
            shifted=False,
            overlap=4,
            weights="uniform",
            interpolation="bilinear",
            decode_overlap=4,
        ),
        # The published notebook, where it departs from the paper: w = 3, stochastic steps, slerp.
        Preset(
            name="authors",
            solver="authors",
            steps=50,
            eta=1.0,
            guidance_scale=4.0,
            shifted=False,
            overlap=4,
            weights="uniform",
            interpolation="slerp",
            decode_overlap=4,
        ),
        Preset(
            name="fast",
            solver="dpmpp_2m",
            steps=20,
            eta=0.0,
            guidance_scale=1.75,
            shifted=True,
            overlap=1,
            weights="hann",
            interpolation="bilinear",
            # Every three quarters of a window: half the work of half windows, and no seam either.
            decode_overlap=4 / 3,
            decode_weights="hann",
            overlapped_steps=2,
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset called `name`."""
    if not isinstance(name, str):
        raise TypeError(
            f"get_preset: preset is a {type(name).__name__}, but a name or a Preset was expected."
        )
    check_choice("preset", name, PRESETS, call="get_preset")
    return PRESETS[name]
