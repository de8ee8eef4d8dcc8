# SPDX-License-Identifier: Apache-2.0
"""Tiles of latents to images and back, by whatever can do it; a tile that overflows is done again
in a wider dtype."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssldiff_fast._checks import all_finite
from ssldiff_fast.models.heap import keep_freed_memory

if TYPE_CHECKING:
    from typing_extensions import Self

Pixels = npt.NDArray[np.uint8]
DecodeTiles = Callable[..., Tensor]  # [B, C, h, w] -> [B, 3, h * f, w * f] in [-1, 1]


class _Tiles(ABC):
    """An autoencoder on single tiles, in one of its two directions.

    Args:
        model: what has the autoencoder.
        call: the public call that messages name.
    """

    verb, made = "", ""

    def __init__(self, model: Any, *, call: str) -> None:
        self._call = call
        # Of a whole model the autoencoder alone: its U-Net may be in another precision.
        self.vae = getattr(model, "vae", model)
        is_whole = self.vae is not model
        self._scale = float(getattr(model, "scale_factor", 1.0)) if is_whole else 1.0
        self._shift = float(getattr(model, "shift", 0.0)) if is_whole else 0.0
        self._parameter = None
        if isinstance(self.vae, torch.nn.Module):
            self._parameter = next(self.vae.parameters(), None)
            keep_freed_memory()
        self._wider: Any = None

    def unscaled(self, canvas: Tensor) -> Tensor:
        """The autoencoder's latents of a canvas."""
        return canvas / self._scale + self._shift

    def scaled(self, latent: Tensor) -> Tensor:
        """The canvas of the autoencoder's latents."""
        return (latent - self._shift) * self._scale

    def with_vae(self, vae: torch.nn.Module) -> Self:
        """The same scale, with another autoencoder."""
        made = copy.copy(self)
        made.vae, made._wider = vae, None
        made._parameter = next(vae.parameters(), None)
        return made

    @torch.no_grad()
    def __call__(
        self,
        tiles: Tensor,  # [B, C, h, w] fp32
        origins: list[tuple[int, int]],
        **options: Any,
    ) -> Tensor:  # [B, C', h', w'] fp32
        """Do the tiles; `origins` (y, x) are for the message about one that cannot be done.

        The options are for the autoencoder's `decode` or `encode`.

        Raises:
            RuntimeError: a tile is NaN or infinite in float32 too.
        """
        done = self._run(self.vae, tiles, **options)
        if all_finite(done):
            return done
        finite = torch.isfinite(done).flatten(1).all(1)
        if _is_narrow(self.vae):
            # float16 ends at 65,504, and first stages are known to pass it now and then.
            if self._wider is None:
                self._wider = copy.deepcopy(self.vae).float()
            again = self._run(self._wider, tiles[~finite.to(tiles.device)], **options)
            done[~finite] = again
            finite = torch.isfinite(done).flatten(1).all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            origin = origins[min(first, len(origins) - 1)]
            raise RuntimeError(
                f"{self._call}: the {self.made} became NaN or infinite in the tile with origin "
                f"{origin}; {self.verb} in float32, or check the input and the autoencoder's "
                "weights."
            )
        return done

    @abstractmethod
    def _run(self, vae: Any, tiles: Tensor, **options: Any) -> Tensor:
        """The tiles by one call of an autoencoder."""

    def _fitting(self, vae: Any, tiles: Tensor) -> Tensor:
        """Tiles where the autoencoder is, in its dtype."""
        parameter = self._parameter if vae is self.vae else next(vae.parameters())
        return tiles if parameter is None else tiles.to(parameter.device, parameter.dtype)


def _is_narrow(vae: Any) -> bool:
    """Whether some of an autoencoder computes in half precision."""
    if not isinstance(vae, torch.nn.Module):
        return False
    return any(parameter.element_size() < 4 for parameter in vae.parameters())


class TileDecoder(_Tiles):
    """Tiles of a canvas to images.

    Args:
        model: a `LatentDiffusion`, an autoencoder with `decode`, or any callable from tiles
            [B, C, h, w] to images [B, 3, h * f, w * f] in [-1, 1].
        call: the public call that messages name.

    Raises:
        TypeError: the model cannot decode.
    """

    verb, made = "decode", "decoded image"

    def __init__(self, model: Any, *, call: str = "decode") -> None:
        if not (hasattr(model, "from_latent") or hasattr(model, "decode") or callable(model)):
            raise TypeError(
                f"{call}: model is a {type(model).__name__}, which cannot decode; pass a "
                "LatentDiffusion, an autoencoder or a callable from latents to images."
            )
        super().__init__(model, call=call)
        self._function: DecodeTiles | None = None
        if self.vae is model and not hasattr(model, "decode"):
            self._function = getattr(model, "from_latent", model)

    def with_vae(self, vae: torch.nn.Module) -> Self:
        """The same scale, with another autoencoder."""
        made = super().with_vae(vae)
        made._function = None
        return made

    def _run(self, vae: Any, tiles: Tensor, **options: Any) -> Tensor:
        if self._function is not None:
            decoded = self._function(tiles, **options)
        else:
            decoded = vae.decode(self._fitting(vae, self.unscaled(tiles)), **options)
        # diffusers wraps what it decodes.
        return getattr(decoded, "sample", decoded).float()


class TileEncoder(_Tiles):
    """Tiles of an image, in [-1, 1], to a canvas.

    Args:
        model: a `LatentDiffusion`, what `sf.adapters.first_stage_from_diffusers` returns, or an
            autoencoder with `encode` and `downsample_factor`.
        call: the public call that messages name.

    Attributes:
        factor: pixels per latent along one side.

    Raises:
        TypeError: the model cannot encode.
    """

    verb, made = "encode", "latent"

    def __init__(self, model: Any, *, call: str = "encode_rows") -> None:
        super().__init__(model, call=call)
        if not (hasattr(self.vae, "encode") and hasattr(self.vae, "downsample_factor")):
            raise TypeError(
                f"{call}: model is a {type(model).__name__}, which cannot encode; pass a "
                "LatentDiffusion or an autoencoder (one of diffusers by "
                "sf.adapters.first_stage_from_diffusers)."
            )
        self.factor = int(self.vae.downsample_factor)

    def _run(self, vae: Any, tiles: Tensor, **options: Any) -> Tensor:
        return self.scaled(vae.encode(self._fitting(vae, tiles), **options).float())


def to_bytes(
    image: Tensor,  # [3, n, W] in [-1, 1]
) -> Pixels:  # [n, W, 3]
    """Eight bits a channel, cut off (not rounded) as the published code does."""
    scaled = (image + 1.0).div_(2.0).clamp_(0.0, 1.0).mul_(255.0)
    pixels: Pixels = scaled.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels


def from_bytes(
    pixels: Pixels,  # [n, W, 3]
) -> Tensor:  # [3, n, W] fp32 in [-1, 1]
    """Eight bits a channel as autoencoders take them."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1
