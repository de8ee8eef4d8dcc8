# SPDX-License-Identifier: Apache-2.0
"""The published overlapped decode, as a stream of finished pixel rows.

An autoencoder trained on patches decodes patches: window-sized tiles, each with its own GroupNorm
statistics and attention, are blended by a Gaussian, and the result is cut off (not rounded) to
eight bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast._checks import check_choice, check_finite, check_positive, check_shape
from ssldiff_fast.canvas.bands import blend_window_rows, crop_windows, micro_batches
from ssldiff_fast.ops.window_plan import WEIGHTS, WindowPlan

Pixels = npt.NDArray[np.uint8]
DecodeTiles = Callable[[Tensor], Tensor]  # [B, C, h, w] -> [B, 3, h * f, w * f] in [-1, 1]


def decode_overlapped(
    model: Any,
    latent: Tensor,  # [C, H, W] fp32
    *,
    stride: int | tuple[int, int],
    window: tuple[int, int] | None = None,
    weights: str = "gaussian",
    batch_size: int = 8,
    rows_held: int | None = None,
    progress: bool = False,
) -> Iterator[Pixels]:
    """Decode a canvas tile by tile into bands of pixel rows, from top to bottom.

    Args:
        model: A `LatentDiffusion`, an autoencoder with `decode`, or any callable from tiles
            [B, C, h, w] to images [B, 3, h * f, w * f] in [-1, 1].
        latent: The canvas.
        stride: Distance between tiles in latents; the published notebook has window / 4.
        window: (h, w) of a tile in latents; the model's own unless given.
        weights: Weights of a tile's pixels in the blend. The published "gaussian" is still 0.21
            at a tile's edge, where its convolutions saw zeros for neighbours: half-overlapping
            tiles leave a faint line there, which "hann", zero at the edge, does not.
        batch_size: Tiles of one call of the decoder, at most; belongs to the recipe.
        rows_held: Tile rows gathered before they are blended; changes memory, not the result.
        progress: Show a progress bar.

    Returns:
        An iterator of [rows, W * f, 3] uint8 arrays which together are the image.
    """
    call = "decode_overlapped"
    check_shape("latent", latent, "C H W", call=call)
    check_finite("latent", latent, call=call)
    check_positive("batch_size", batch_size, call=call)
    check_choice("weights", weights, WEIGHTS, call=call)
    if window is None:
        window = getattr(model, "window", None)
        if window is None:
            raise ValueError(
                f"{call}: window is None, but this model has no window of its own; pass (h, w)."
            )
    plan = WindowPlan.regular(latent.shape[1], latent.shape[2], window, stride)
    return _bands(_tile_decoder(model), latent, plan, weights, batch_size, rows_held, progress)


def decode_image(model: Any, latent: Tensor, **options: Any) -> Pixels:
    """The whole image of `decode_overlapped`, with its arguments: [H * f, W * f, 3] uint8."""
    return np.concatenate(list(decode_overlapped(model, latent, **options)))


def _tile_decoder(model: Any) -> DecodeTiles:
    names = [name for name in ("from_latent", "decode") if hasattr(model, name)]
    if not names and not callable(model):
        raise TypeError(
            f"decode_overlapped: model is a {type(model).__name__}, which cannot decode; pass a "
            "LatentDiffusion, an autoencoder or a callable from latents to images."
        )
    decode: DecodeTiles = getattr(model, names[0]) if names else model
    # Of a whole model the autoencoder alone: its U-Net may be in another precision.
    decoder = getattr(model, "vae", model)
    parameter = next(decoder.parameters(), None) if isinstance(decoder, torch.nn.Module) else None
    if parameter is None:
        return decode
    device, dtype = parameter.device, parameter.dtype
    return lambda tiles: decode(tiles.to(device, dtype))


def _bands(
    decode: DecodeTiles,
    latent: Tensor,
    plan: WindowPlan,
    weights: str,
    batch_size: int,
    rows_held: int | None,
    progress: bool,
) -> Iterator[Pixels]:
    with tqdm(total=len(plan), desc="decoding", unit="tile", disable=not progress) as bar:
        first = _tile_row(decode, latent, plan, 0, batch_size)
        bar.update(len(plan.origins_x))
        factor = _factor(first, plan)

        def rows() -> Iterator[Tensor]:
            yield first
            for row in range(1, len(plan.origins_y)):
                yield _tile_row(decode, latent, plan, row, batch_size)
                bar.update(len(plan.origins_x))

        weight_y, weight_x = (WEIGHTS[weights](size * factor) for size in plan.window)
        pixels = plan.scaled(factor, weight_y, weight_x)
        for band in blend_window_rows(pixels, rows(), rows_held=rows_held):
            yield _to_bytes(band)


def _tile_row(
    decode: DecodeTiles, latent: Tensor, plan: WindowPlan, row: int, batch_size: int
) -> Tensor:
    """One row of tiles, decoded: [Q, 3, h * f, w * f] fp32."""
    count = len(plan.origins_x)
    with torch.no_grad():
        tiles = [
            decode(crop_windows(latent, plan, row, columns)).float()
            for columns in micro_batches(count, batch_size)
        ]
    decoded = torch.cat(tiles)[:count]
    finite = torch.isfinite(decoded).flatten(1).all(1)
    if not bool(finite.all()):
        column = int((~finite).nonzero()[0])
        raise RuntimeError(
            "decode_overlapped: the decoded image became NaN or infinite in the tile with origin "
            f"({plan.origins_y[row]}, {plan.origins_x[column]}); decode in float32."
        )
    return decoded


def _factor(decoded: Tensor, plan: WindowPlan) -> int:
    height, width = decoded.shape[-2:]
    factor = int(height) // plan.window[0]
    if (height, width) != (plan.window[0] * factor, plan.window[1] * factor) or factor < 1:
        raise RuntimeError(
            f"decode_overlapped: a tile of {plan.window} latents was decoded to {height} x {width} "
            "pixels, but a whole multiple of the tile was expected; use the model's own decoder."
        )
    return factor


def _to_bytes(image: Tensor) -> Pixels:
    """[3, n, W] in [-1, 1] -> [n, W, 3] uint8, cut off as the published code does."""
    scaled = ((image + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0
    pixels: Pixels = scaled.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels
