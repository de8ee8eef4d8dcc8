# SPDX-License-Identifier: Apache-2.0
"""A picture of the canvas while it is denoised."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ssldiff_fast.models.preview import LatentPreview, fit_preview
from ssldiff_fast.slides.output import atomic_bytes

# Windows of the canvas that a map is fitted on, along each axis.
_FITTED = 3
# Longest side of the picture: every n-th latent of a larger canvas.
_SIDE = 2048


class PreviewFile:
    """Writes what the denoised canvas looks like to a PNG, now and then; a `callback_on_step_end`.

    Args:
        path: The PNG; replaced each time.
        model: Has `from_latent` and `window`; its `preview` is used, or fitted on the canvas once.
        every_s: Seconds between pictures, at least; the last step always gets one.
        last_step: The number of the last step.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Any,
        *,
        last_step: int,
        every_s: float = 5.0,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".png":
            raise ValueError(f"PreviewFile: the preview {self.path} must be a .png.")
        self._model = model
        self._preview: LatentPreview | None = model.preview
        self._every = every_s
        self._last_step = last_step
        self._written: float | None = None

    def __call__(self, denoiser: Any, step: int, t: float, shown: dict[str, Tensor]) -> None:
        """Writes a picture where one is due."""
        now = time.perf_counter()
        soon = self._written is not None and now - self._written < self._every
        if soon and step != self._last_step:
            return
        self.write(shown["denoised"])
        self._written = now

    def write(
        self,
        latent: Tensor,  # [C, H, W] fp32
    ) -> None:
        """Writes the picture of a canvas."""
        preview = self._preview or self._fit(latent)
        every = -(-max(latent.shape[1:]) // _SIDE)
        data = io.BytesIO()
        Image.fromarray(preview.image(latent[:, ::every, ::every])).save(data, "PNG")
        atomic_bytes(self.path, data.getvalue())

    def _fit(self, latent: Tensor) -> LatentPreview:
        h, w = self._model.window
        parameter = next(self._model.vae.parameters())

        def places(size: int, window: int) -> list[int]:
            return sorted(set(torch.linspace(0, size - window, _FITTED).long().tolist()))

        windows = [
            latent[:, y : y + h, x : x + w]
            for y in places(latent.shape[1], h)
            for x in places(latent.shape[2], w)
        ]
        self._preview = fit_preview(
            lambda z: self._model.from_latent(z.to(parameter)), torch.stack(windows)
        )
        return self._preview
