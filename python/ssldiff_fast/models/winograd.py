# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions of inference on a CPU by Winograd's F(2x2, 3x3): 2.25 times fewer products.

For each tile d of 4x4 positions, of which neighbours overlap by two, and each filter g (Lavin and
Gray 2016, section 4.1),

    Y = A' [(G g G') * (B' d B)] A        (* by element, summed over input channels)

is the 2x2 outputs in its middle. The sum over channels is one matrix product for each of the 16
places of a tile. B and A hold zeros and ones alone, so the float32 result is as near to the exact
one as a direct convolution's; half precision takes the direct way.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ssldiff_fast import _C
from ssldiff_fast.models.products import is_eager_inference, linear

# Of transformed tiles and their products at a time; more falls out of the caches.
CHUNK_BYTES = 2**24
# Below this many channels in or out the transforms cost what the products save (measured: 0.7x at
# 64, even at 128, 1.2x at 192, 1.5x at 384, and 4x at 960, whose direct filters stay in no cache).
LEAST_CHANNELS = 160

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class _Filters:
    transformed: Tensor  # [16, out, C]
    made_from: tuple[int, int]


# Gone with the layer; made anew when its weights have changed.
_filters: WeakKeyDictionary[nn.Module, _Filters] = WeakKeyDictionary()


def serves(conv: nn.Conv2d) -> bool:
    """Whether a 3x3 convolution of stride 1 is faster this way."""
    return (
        min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and conv.weight.dtype == torch.float32
        and _C.CPU_PROBLEM is None
    )


def transformed(
    weight: Tensor,  # [out, C, 3, 3]
) -> Tensor:  # [16, out, C]
    """G g G' of each filter, computed in float64."""
    g = torch.tensor(_G, dtype=torch.float64)
    filters = torch.einsum("ui,ocij,vj->uvoc", g, weight.detach().double(), g)
    return filters.flatten(0, 1).to(weight.dtype).contiguous()


def winograd(
    x: Tensor,  # [N, C, h, w] fp32
    conv: nn.Conv2d,
    *,
    add: Tensor | None = None,  # [N, out, h, w] fp32
) -> Tensor:  # [N, out, h, w], channels-last
    """The convolution of `x`, plus another map; without gradient."""
    filters = _filters_of(conv)
    maps = x.permute(0, 2, 3, 1).contiguous()
    added = None if add is None else add.permute(0, 2, 3, 1).contiguous()
    count, height, width, channels = maps.shape
    tiles = 4 * (height + 1) * (width + 1)  # values of a channel, about
    step = max(1, CHUNK_BYTES // (4 * tiles * (channels + conv.out_channels)))
    out = maps.new_empty(count, height, width, conv.out_channels)
    for first in range(0, count, step):
        part = slice(first, first + step)
        also = None if added is None else added[part]
        out[part] = _convolve(maps[part], filters, conv.bias, also)
    return out.permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 with zeros around; parameters as torch's."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,  # [N, C, h, w]
        *,
        add: Tensor | None = None,  # [N, out, h, w]
    ) -> Tensor:  # [N, out, h, w]
        """The convolution of `x`, plus another map."""
        eager = is_eager_inference(x)
        if eager and x.dtype == torch.float32 and serves(self):
            return winograd(x, self, add=add)
        out = super().forward(x)
        if add is None:
            return out
        return out.add_(add) if eager and out.dtype == add.dtype else out + add


def _convolve(maps: Tensor, filters: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    tiles = torch.ops.ssldiff.winograd_tiles(maps)
    products = [linear(place, filter) for place, filter in zip(tiles, filters)]
    made: Tensor = torch.ops.ssldiff.winograd_maps(products, bias, add, list(maps.shape[:3]))
    return made


def _filters_of(conv: nn.Conv2d) -> Tensor:
    weight = conv.weight
    made_from = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
    found = _filters.get(conv)
    if found is None or found.made_from != made_from:
        found = _filters[conv] = _Filters(transformed(conv.weight), made_from)
    return found.transformed


def _fake_tiles(maps: Tensor) -> Tensor:
    count, height, width, channels = maps.shape
    return maps.new_empty(16, count * ((height + 1) // 2) * ((width + 1) // 2), channels)


def _fake_maps(
    products: list[Tensor], bias: Tensor | None, add: Tensor | None, sizes: list[int]
) -> Tensor:
    return products[0].new_empty(*sizes, products[0].shape[1])


if _C.CPU_PROBLEM is None:
    torch.library.register_fake("ssldiff::winograd_tiles", _fake_tiles)
    torch.library.register_fake("ssldiff::winograd_maps", _fake_maps)
