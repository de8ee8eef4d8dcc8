# SPDX-License-Identifier: Apache-2.0
"""The canvas that a run starts from, whole or as a function of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssldiff_fast._checks import check_dtype, check_finite, check_shape
from ssldiff_fast.canvas.denoiser import CanvasDenoiser
from ssldiff_fast.canvas.run import digest

# Rows (begin, end) -> [C, n, W] or [B, C, n, W] fp32.
NoiseRows: TypeAlias = Callable[[int, int], Tensor]
# Rows of a function that take part in the recipe.
_DIGEST_ROWS = 16


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        shape: (B, C, H, W).
        single: whether the caller has one canvas without a batch axis.
        device: of the canvas.
        rows: (begin, end) -> [B, C, n, W].
        identity: makes a digest, for the recipe.
    """

    shape: tuple[int, int, int, int]
    single: bool
    device: torch.device
    rows: NoiseRows
    identity: Callable[[], str]

    @property
    def like(self) -> Tensor:
        """An empty tensor with the shape of the canvas, without its memory."""
        return torch.empty((), device=self.device).expand(self.shape)

    @classmethod
    def of(cls, noise: Tensor | NoiseRows, denoiser: Any, *, call: str) -> Start:
        """The start of a tensor or a function, checked against the denoiser."""
        if isinstance(noise, Tensor):
            return cls._of_tensor(noise, denoiser, call)
        if not callable(noise):
            raise TypeError(
                f"{call}: noise is a {type(noise).__name__}, but a tensor or a function from rows "
                "(begin, end) to a tensor was expected."
            )
        if not isinstance(denoiser, CanvasDenoiser):
            raise TypeError(
                f"{call}: noise is a function, which needs a CanvasDenoiser to say the canvas's "
                "size; pass the whole canvas."
            )
        return cls._of_function(noise, denoiser, call)

    @classmethod
    def _of_tensor(cls, noise: Tensor, denoiser: Any, call: str) -> Start:
        check_dtype("noise", noise, [torch.float32], call=call)
        if isinstance(denoiser, CanvasDenoiser):
            whole = denoiser.as_batch("noise", noise, call=call)
        else:
            check_shape("noise", noise, "B C H W" if noise.ndim == 4 else "C H W", call=call)
            whole = noise if noise.ndim == 4 else noise[None]
        check_finite("noise", noise, call=call)
        batch, channels, height, width = whole.shape
        return cls(
            (batch, channels, height, width),
            noise.ndim == 3,
            noise.device,
            lambda begin, end: whole[:, :, begin:end],
            lambda: digest(noise),
        )

    @classmethod
    def _of_function(cls, noise: NoiseRows, denoiser: CanvasDenoiser, call: str) -> Start:
        height, width = denoiser.size
        first = noise(0, 1)
        single = first.ndim == 3
        batch = 1 if single else len(first)

        def rows(begin: int, end: int) -> Tensor:
            drawn = noise(begin, end)
            drawn = drawn[None] if single else drawn
            name = f"noise({begin}, {end})"
            check_dtype(name, drawn, [torch.float32], call=call)
            sizes = {"B": batch, "C": denoiser.channels, "n": end - begin, "W": width}
            check_shape(name, drawn, "B C n W", sizes, call=call)
            check_finite(name, drawn, call=call)
            return drawn

        shape = (batch, denoiser.channels, height, width)
        return cls(
            shape, single, first.device, rows, lambda: digest(rows(0, min(height, _DIGEST_ROWS)))
        )
