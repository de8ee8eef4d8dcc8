# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions of inference on a CPU by Winograd's F(4x4, 3x3): four times fewer products.

For each tile d of 6x6 positions, of which neighbours overlap by two, and each filter g (Lavin and
Gray 2016, section 4.1),

    Y = A' [(G g G') * (B' d B)] A        (* by element, summed over input channels)

is the 4x4 outputs in its middle. The sum over channels is one matrix product for each of the 36
places of a tile. The transforms are those of polynomials at `POINTS` and infinity; the usual
points 0, +-1, +-2 round twice as much. In float32 a layer's error is 5 to 10 times that of a direct
convolution (1e-6 to 3e-6, by its channels), and the published U-Net's twice (3e-6); half precision
takes the direct way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast import _C
from ssldiff_fast.models.products import is_eager_inference

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
PLACES = (len(POINTS) + 1) ** 2
# Output channels that lie side by side in packed filters.
PANEL = 32
# With fewer channels in or out the transforms cost what the products save.
LEAST_CHANNELS = 32


@dataclass(frozen=True, eq=False)
class _Filters:
    packed: Tensor  # [36, panels, C, PANEL]
    weight: Tensor  # what they were made from: held, so that no other takes its address
    version: int


# Gone with the layer; made anew when its weights have changed.
_filters: WeakKeyDictionary[nn.Module, _Filters] = WeakKeyDictionary()


def serves(conv: nn.Conv2d) -> bool:
    """Whether a 3x3 convolution of stride 1 is faster this way."""
    return (
        min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and conv.weight.dtype == torch.float32
        and _C.CPU_PROBLEM is None
    )


def packed(
    weight: Tensor,  # [out, C, 3, 3]
) -> Tensor:  # [36, panels, C, PANEL]
    """G g G' of each filter, computed in float64, by panels of output channels."""
    rows = []
    for point in POINTS:
        norm = 1.0
        for other in POINTS:
            norm *= point - other if other != point else 1.0
        rows.append([1 / norm, point / norm, point**2 / norm])
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    filters = torch.einsum("ui,ocij,vj->uvco", g, weight.detach().double(), g).flatten(0, 1)
    filters = F.pad(filters, (0, -len(weight) % PANEL))
    return filters.unflatten(2, (-1, PANEL)).transpose(1, 2).to(weight.dtype).contiguous()


def winograd(
    x: Tensor,  # [N, C, h, w] fp32
    conv: nn.Conv2d,
    *,
    zoom: int = 1,
    add: Tensor | None = None,  # [N, out, zoom h, zoom w] fp32
) -> Tensor:  # [N, out, zoom h, zoom w], channels-last
    """The convolution of `x`, plus another map; without gradient.

    With a `zoom` of 2, of `x` enlarged by nearest neighbours, which are never written.
    """
    filters, bias = _filters_of(conv), conv.bias
    maps = x.permute(0, 2, 3, 1).contiguous()
    added = None if add is None else add.permute(0, 2, 3, 1).contiguous()
    operator: Callable[..., Tensor] = torch.ops.ssldiff.winograd
    return operator(maps, filters, conv.out_channels, zoom, bias, added).permute(0, 3, 1, 2)


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
        if eager and x.dtype == torch.float32 and zoom in (1, 2) and serves(self):
            return winograd(x, self, zoom=zoom, add=add)
        if zoom != 1:
            x = F.interpolate(x, scale_factor=zoom, mode="nearest")
        out = super().forward(x)
        if add is None:
            return out
        return out.add_(add) if eager and out.dtype == add.dtype else out + add

    def _apply(self, *args: Any, **options: Any) -> Conv3x3:
        _filters.pop(self, None)  # of the weights before they moved
        super()._apply(*args, **options)
        return self


def _filters_of(conv: nn.Conv2d) -> Tensor:
    weight = conv.weight
    version = -1 if weight.is_inference() else weight._version
    found = _filters.get(conv)
    same = found is not None and found.weight.data_ptr() == weight.data_ptr()
    if found is None or not same or found.version != version:
        found = _filters[conv] = _Filters(packed(weight), weight.detach(), version)
    return found.packed


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
