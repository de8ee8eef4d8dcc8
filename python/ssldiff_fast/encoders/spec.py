# SPDX-License-Identifier: Apache-2.0
"""What an encoder of patches is, apart from its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSpec:
    """An SSL encoder and its preprocessing: what a grid must agree with.

    Args:
        name: what grids and models call it, for example "he-demo-encoder" or "uni_v1".
        network: name of its architecture in timm, for example "regnety_002".
        width: D, the width of an embedding.
        tokens: T, embeddings per cell.
        patch_px: side of a patch in pixels at `mpp`; a cell of the grid.
        mpp: micrometres per pixel that it was trained at.
        mean, std: per channel, of pixels in [0, 1].
        head: whether the embedding is the output of the network's linear head (of `width`)
            instead of its pooled features.
        weights_hash: sha256 of the weights, where they are known.

    Raises:
        ValueError: a size or resolution that no encoder can have.
    """

    name: str
    network: str
    width: int
    tokens: int = 1
    patch_px: int = 256
    mpp: float = 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    head: bool = False
    weights_hash: str | None = None

    def __post_init__(self) -> None:
        for field in ("width", "tokens", "patch_px"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"EncoderSpec: {field} is {value!r}, expected a whole number >= 1")
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ValueError(f"EncoderSpec: mpp is {self.mpp!r}, expected micrometres above 0")
        for field in ("mean", "std"):  # JSON has lists
            value = tuple(float(v) for v in getattr(self, field))
            if len(value) != 3:
                raise ValueError(
                    f"EncoderSpec: {field} is {value!r}, expected one number a channel"
                )
            object.__setattr__(self, field, value)
