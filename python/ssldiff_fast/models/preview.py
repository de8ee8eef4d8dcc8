# SPDX-License-Identifier: Apache-2.0
"""Latents to colours by a linear map: a preview that costs nothing beside a decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssldiff_fast._checks import check_finite, check_shape

# Each channel has a value in the matrix for every colour; see `LatentPreview`.
_COLOURS = 3


@dataclass(frozen=True)
class LatentPreview:
    """colour = matrix latent + bias, at every latent by itself.

    Args:
        matrix: 3 rows of C numbers, for latents in the scale of a canvas.
        bias: 3 numbers; colours are in [-1, 1].
    """

    matrix: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.matrix}
        if len(self.matrix) != _COLOURS or len(self.bias) != _COLOURS or len(widths) != 1:
            raise ValueError(
                f"LatentPreview: matrix has {len(self.matrix)} rows of {sorted(widths)} and bias "
                f"{len(self.bias)} numbers, but 3 rows of one length and 3 numbers were expected."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentPreview:
        """Of the "preview" part of a model's config.json."""
        if set(config) != {"matrix", "bias"}:
            raise ValueError(
                f"model configuration: preview has {sorted(config)}, expected matrix and bias."
            )
        rows: Sequence[Sequence[float]] = config["matrix"]
        return cls(tuple(tuple(map(float, row)) for row in rows), tuple(map(float, config["bias"])))

    def to_config(self) -> dict[str, Any]:
        """The numbers, as `from_config` takes them."""
        return {"matrix": [list(row) for row in self.matrix], "bias": list(self.bias)}

    def image(
        self,
        latent: Tensor,  # [C, H, W] fp32
    ) -> npt.NDArray[np.uint8]:
        """A pixel for each latent: [H, W, 3] uint8."""
        check_shape("latent", latent, "C H W", {"C": len(self.matrix[0])}, call="LatentPreview")
        matrix, bias = torch.tensor(self.matrix), torch.tensor(self.bias)
        colours = torch.einsum("kc,chw->hwk", matrix.to(latent), latent) + bias.to(latent)
        scaled = ((colours + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0
        pixels: npt.NDArray[np.uint8] = scaled.round().to(torch.uint8).cpu().numpy()
        return pixels


@torch.no_grad()
def fit_preview(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,  # [N, C, h, w] fp32
) -> LatentPreview:
    """The linear map that is nearest to a decoder on some latents, by least squares.

    Args:
        decode: [N, C, h, w] -> [N, 3, h * f, w * f] in [-1, 1], such as `model.from_latent`.
        latents: What the decoder is tried on: a few windows like those that will be shown.
    """
    sizes = check_shape("latents", latents, "N C h w", call="fit_preview")
    check_finite("latents", latents, call="fit_preview")
    images = torch.cat([decode(one[None]).float() for one in latents])
    colours = torch.nn.functional.adaptive_avg_pool2d(images, (sizes["h"], sizes["w"]))
    known = latents.movedim(1, -1).reshape(-1, sizes["C"]).double().cpu()
    wanted = colours.movedim(1, -1).reshape(-1, _COLOURS).double().cpu()
    known = torch.cat((known, torch.ones(len(known), 1, dtype=torch.float64)), dim=1)
    # A little ridge, for channels that do not vary in these latents.
    normal = known.T @ known + 1e-6 * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(normal, known.T @ wanted)  # [C + 1, 3]
    rows = [[round(value, 5) for value in column] for column in solved.T.tolist()]
    return LatentPreview(tuple(tuple(row[:-1]) for row in rows), tuple(row[-1] for row in rows))
