# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions of inference on a CPU by Winograd's F(4x4, 3x3): four times fewer products.

For each tile d of 6x6 positions, of which neighbours overlap by two, and each filter g (Lavin and
Gray 2016, section 4.1),

    Y = A' [(G g G') * (B' d B)] A        (* by element, summed over input channels)

is the 4x4 outputs in its middle. The sum over channels is one matrix product for each of the 36
places of a tile. The transforms are those of polynomials at `POINTS` and infinity; the usual
points 0, +-1, +-2 round twice as much. In float32 a layer's error is 5 to 10 times that of a direct
convolution (1e-6 to 3e-6, by its channels), and the published U-Net's twice (3e-6). Maps of half
precision are read and written so, with float32 between: on processors whose bfloat16 products are
twice as fast as float32's, four times fewer products are still the faster; where they have tiles of
registers for it (AMX), the direct way is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast import _C
from ssldiff_fast.models.packed import PANEL, PackedWeights
from ssldiff_fast.models.products import is_eager_inference

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
PLACES = (len(POINTS) + 1) ** 2
# With fewer channels in or out the transforms cost what the products save.
LEAST_CHANNELS = 32


def serves(conv: nn.Conv2d) -> bool:
    """Whether a 3x3 convolution of stride 1 is faster this way."""
    wide = min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    dtype = conv.weight.dtype
    return wide and _C.has_vectors() and (dtype == torch.float32 or dtype in _halves())


@cache
def _halves() -> tuple[torch.dtype, ...]:
    tiles: bool = torch.cpu._is_amx_tile_supported()
    return () if tiles else (torch.bfloat16, torch.float16)


def packed(
    weight: Tensor,  # [out, C, 3, 3]
) -> Tensor:  # [36, panels, C, PANEL] fp32
    """G g G' of each filter, computed in float64, by panels of output channels."""
    rows = []
    for point in POINTS:
        norm = 1.0
        for other in POINTS:
            norm *= point - other if other != point else 1.0
        rows.append([1 / norm, point / norm, point**2 / norm])
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    filters = torch.einsum("ui,ocij,vj->uvco", g, weight.detach().double(), g).flatten(0, 1)
    filters = F.pad(filters, (0, -len(weight) % PANEL)).unflatten(2, (-1, PANEL))
    return filters.transpose(1, 2).to(torch.float32).contiguous()


def winograd(
    x: Tensor,  # [N, C, h, w] fp32 | bf16 | fp16
    conv: nn.Conv2d,
    *,
    zoom: int = 1,
    add: Tensor | None = None,  # [N, out, zoom h, zoom w], dtype of x
) -> Tensor:  # [N, out, zoom h, zoom w], channels-last
    """The convolution of `x`, plus another map; without gradient.

    With a `zoom` of 2, of `x` enlarged by nearest neighbours, which are never written.
    """
    # The operator knows no float16, which hardly anyone computes with on a CPU.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    filters, *bias = _filters.of(conv, *(w for w in (conv.weight, conv.bias) if w is not None))
    maps = x.permute(0, 2, 3, 1).to(dtype).contiguous()
    added = None if add is None else add.permute(0, 2, 3, 1).to(dtype).contiguous()
    operator: Callable[..., Tensor] = torch.ops.ssldiff.winograd
    out = operator(maps, filters, conv.out_channels, zoom, bias[0] if bias else None, added)
    return out.to(x.dtype).permute(0, 3, 1, 2)


def _pack(weight: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
    return packed(weight), *(values.detach().to(torch.float32).contiguous() for values in bias)


_filters = PackedWeights(_pack)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 with zeros around; parameters as torch's."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,  # [N, C, h, w]
        *,
        zoom: int = 1,
        add: Tensor | None = None,  # [N, out, zoom h, zoom w]
    ) -> Tensor:  # [N, out, zoom h, zoom w]
        """The convolution of `x` enlarged `zoom` times by nearest neighbours, plus another map."""
        eager = is_eager_inference(x)
        same = x.dtype == self.weight.dtype and (add is None or add.dtype == x.dtype)
        if eager and same and zoom in (1, 2) and serves(self):
            return winograd(x, self, zoom=zoom, add=add)
        if zoom != 1:
            x = F.interpolate(x, scale_factor=zoom, mode="nearest")
        out = super().forward(x)
        if add is None:
            return out
        return out.add_(add) if eager and out.dtype == add.dtype else out + add

    def _apply(self, *args: Any, **options: Any) -> Conv3x3:
        _filters.forget(self)
        super()._apply(*args, **options)
        return self


def _fake_winograd(
    maps: Tensor,
    filters: Tensor,
    out_channels: int,
    zoom: int,
    bias: Tensor | None,
    add: Tensor | None,
) -> Tensor:
    count, height, width, _ = maps.shape
    return maps.new_empty(count, zoom * height, zoom * width, out_channels)


if _C.CPU_PROBLEM is None:
    torch.library.register_fake("ssldiff::winograd", _fake_winograd)
