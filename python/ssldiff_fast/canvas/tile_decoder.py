# SPDX-License-Identifier: Apache-2.0
"""Tiles of latents to images, by whatever can decode them; a tile that overflows is decoded again
in a wider dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]
DecodeTiles = Callable[[Tensor], Tensor]  # [B, C, h, w] -> [B, 3, h * f, w * f] in [-1, 1]


class TileDecoder:
    """The decoder of a model for single tiles.

    Args:
        model: a `LatentDiffusion`, an autoencoder with `decode`, or any callable from tiles
            [B, C, h, w] to images [B, 3, h * f, w * f] in [-1, 1].
        call: the public call that messages name.

    Raises:
        TypeError: the model cannot decode.
    """

    def __init__(self, model: Any, *, call: str = "decode") -> None:
        if not (hasattr(model, "from_latent") or hasattr(model, "decode") or callable(model)):
            raise TypeError(
                f"{call}: model is a {type(model).__name__}, which cannot decode; pass a "
                "LatentDiffusion, an autoencoder or a callable from latents to images."
            )
        self._call = call
        # Of a whole model the autoencoder alone: its U-Net may be in another precision.
        self.vae = getattr(model, "vae", model)
        is_whole = self.vae is not model
        self._scale = float(getattr(model, "scale_factor", 1.0)) if is_whole else 1.0
        self._shift = float(getattr(model, "shift", 0.0)) if is_whole else 0.0
        self._function: DecodeTiles | None = None
        if self.vae is model and not hasattr(model, "decode"):
            self._function = getattr(model, "from_latent", model)
        self._parameter = None
        if isinstance(self.vae, torch.nn.Module):
            self._parameter = next(self.vae.parameters(), None)
        self._wider: Any = None

    def unscaled(self, canvas: Tensor) -> Tensor:
        """The autoencoder's latents of a canvas."""
        return canvas / self._scale + self._shift

    def with_vae(self, vae: torch.nn.Module) -> TileDecoder:
        """The same scale, with another autoencoder."""
        made = copy.copy(self)
        made.vae, made._function, made._wider = vae, None, None
        made._parameter = next(vae.parameters(), None)
        return made

    @torch.no_grad()
    def __call__(
        self,
        tiles: Tensor,  # [B, C, h, w] fp32, in the scale of a canvas
        origins: list[tuple[int, int]],
    ) -> Tensor:  # [B, 3, h * f, w * f] fp32
        """Decode tiles; `origins` (y, x) are for the message about one that cannot be decoded.

        Raises:
            RuntimeError: a tile is NaN or infinite in float32 too.
        """
        decoded = self._decode(self.vae, tiles)
        if bool(torch.isfinite(decoded).all()):
            return decoded
        finite = torch.isfinite(decoded).flatten(1).all(1)
        if self._parameter is not None and self._parameter.dtype != torch.float32:
            # float16 ends at 65,504, and first stages are known to pass it now and then.
            if self._wider is None:
                self._wider = copy.deepcopy(self.vae).float()
            decoded[~finite] = self._decode(self._wider, tiles[~finite.to(tiles.device)])
            finite = torch.isfinite(decoded).flatten(1).all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            origin = origins[min(first, len(origins) - 1)]
            raise RuntimeError(
                f"{self._call}: the decoded image became NaN or infinite in the tile with origin "
                f"{origin}; decode in float32, or check the latents and the autoencoder's weights."
            )
        return decoded

    def _decode(self, vae: Any, tiles: Tensor) -> Tensor:
        if self._function is not None:
            decoded = self._function(tiles)
        else:
            parameter = self._parameter if vae is self.vae else next(vae.parameters())
            latents = self.unscaled(tiles)
            if parameter is not None:
                latents = latents.to(parameter.device, parameter.dtype)
            decoded = vae.decode(latents)
        # diffusers wraps what it decodes.
        return getattr(decoded, "sample", decoded).float()


def to_bytes(
    image: Tensor,  # [3, n, W] in [-1, 1]
) -> Pixels:  # [n, W, 3]
    """Eight bits a channel, cut off (not rounded) as the published code does."""
    scaled = ((image + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0
    pixels: Pixels = scaled.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels
