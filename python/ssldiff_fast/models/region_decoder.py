# SPDX-License-Identifier: Apache-2.0
"""A decoder of parts of a canvas, with fixed statistics: the pixels do not depend on the parts.

Convolutions reach a little around what is wanted, attention a window. Each stage of the network is
given what the stages after it need and little more, so that the halo is wide where maps are small
and narrow where they are large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.autoencoder_blocks import Level, ResnetBlock
from ssldiff_fast.models.local_autoencoder import (
    Interval,
    Intervals,
    Statistics,
    WindowedAttention,
    cropped,
    local_autoencoder,
    receptive_halo,
)


@dataclass(frozen=True)
class Reach:
    """What a tile is made of, along one axis of a canvas.

    Attributes:
        size: of the canvas, in latents.
        tile: its latents.
        inputs: the positions that each stage of the network needs; of the first, latents.
    """

    size: int
    tile: Interval
    inputs: tuple[Interval, ...]

    @property
    def read(self) -> Interval:
        """The latents that the tile is made of."""
        return self.inputs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Equal for tiles that can be decoded in one call.

        (Where blocks of attention begin shows in the latents that are read.)
        """
        at = self.tile[0]
        return self.tile[1] - at, self.read[0] - at, self.read[1] - at


class RegionDecoder(Protocol):
    """Decodes tiles of a canvas with their surroundings."""

    def reach(self, tile: Interval, size: int, *, axis: int) -> Reach:
        """What latents `tile` need, along axis 0 (y) or 1 (x) of a canvas of `size` latents."""
        ...

    def decode(
        self,
        z: Tensor,  # [B, C, n, m], the latents that `rows` and `columns` read
        *,
        rows: Reach,
        columns: Reach,
    ) -> Tensor:  # [B, 3, h * f, w * f], the tiles alone
        """Images of tiles that all have a reach of this shape."""
        ...


def region_decoder(
    vae: nn.Module, statistics: Statistics, window: tuple[int, int], channels: int
) -> Any:  # an nn.Module and RegionDecoder
    """The region decoder of an autoencoder, of a kind that fits it.

    Args:
        vae: the autoencoder; it is not changed.
        statistics: of its norms, by name.
        window: (h, w) of what it was trained on, in latents: attention sees no more.
        channels: of its latents.
    """
    network = local_autoencoder(vae, statistics, window)
    if isinstance(vae, VQModel | AutoencoderKL):
        return StagedDecoder(network, window)
    return CroppingDecoder(network, receptive_halo(vae, channels))


class CroppingDecoder(nn.Module):
    """Any network without attention: the region is decoded, and what is around the tile cut off."""

    def __init__(self, network: Any, halo: int) -> None:
        super().__init__()
        self.network, self.halo = network, halo

    def reach(self, tile: Interval, size: int, *, axis: int) -> Reach:
        """See `RegionDecoder`."""
        return Reach(size, tile, (_around(tile, self.halo, size),))

    def decode(
        self,
        z: Tensor,  # [B, C, n, m]
        *,
        rows: Reach,
        columns: Reach,
    ) -> Tensor:  # [B, 3, h * f, w * f]
        """See `RegionDecoder`."""
        decoded = self.network.decode(z)
        decoded = getattr(decoded, "sample", decoded)  # diffusers wraps what it decodes
        sizes = decoded.shape[-2] / z.shape[-2], decoded.shape[-1] / z.shape[-1]
        factor = int(sizes[0])
        if sizes != (factor, factor) or factor < 1:
            raise RuntimeError(
                f"decode: a tile of {list(z.shape[-2:])} latents was decoded to "
                f"{list(decoded.shape[-2:])} pixels, but a whole multiple of the tile was "
                "expected; use the model's own decoder."
            )
        given, kept = (
            tuple((begin * factor, end * factor) for begin, end in intervals)
            for intervals in ((rows.read, columns.read), (rows.tile, columns.tile))
        )
        return cropped(decoded, given, kept)


class StagedDecoder(nn.Module):
    """The decoder of latent diffusion, stage by stage.

    Args:
        network: what `local_autoencoder` made.
        window: (h, w) in latents.
    """

    def __init__(self, network: Any, window: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.stages = list(_stages(network.decoder, window))
        self.factor = int(network.downsample_factor)

    def reach(self, tile: Interval, size: int, *, axis: int) -> Reach:
        """See `RegionDecoder`."""
        wanted = tile[0] * self.factor, tile[1] * self.factor
        inputs = []
        for stage in reversed(self.stages):
            wanted = stage.before(wanted, stage.scale * size, axis)
            inputs.append(wanted)
        return Reach(size, tile, tuple(reversed(inputs)))

    def decode(
        self,
        z: Tensor,  # [B, C, n, m]
        *,
        rows: Reach,
        columns: Reach,
    ) -> Tensor:  # [B, 3, h * f, w * f]
        """See `RegionDecoder`."""
        if isinstance(self.network, VQModel):
            z, _ = self.network.quantize(z)
        h = self.network.decoder_input(z)
        given: Intervals = (rows.read, columns.read)
        sizes = rows.size, columns.size
        kept = tuple((a * self.factor, b * self.factor) for a, b in (rows.tile, columns.tile))
        wanted = [*zip(rows.inputs[1:], columns.inputs[1:]), kept]
        for stage, following in zip(self.stages, wanted):
            h, given = stage.run(h, given, following, sizes)
        return cropped(h, given, kept)


class _Stage(Protocol):
    """A part of a decoder."""

    @property
    def scale(self) -> int:
        """Positions of its input of which one latent is made, along one side."""
        ...

    def before(self, wanted: Interval, size: int, axis: int) -> Interval:
        """The positions of its input, `size` in all, that positions `wanted` of its output need."""
        ...

    def run(
        self,
        x: Tensor,  # [B, C, n, m], the positions `given`
        given: Intervals,
        wanted: Intervals,
        sizes: tuple[int, int],
    ) -> tuple[Tensor, Intervals]:
        """Its output, and the positions that this is of: those that are wanted, or more.

        `sizes` is the canvas in latents.
        """
        ...


@dataclass(frozen=True)
class _Convolutions:
    """Convolutions with what goes on between them."""

    modules: tuple[nn.Module, ...]
    halo: int
    scale: int

    def before(self, wanted: Interval, size: int, axis: int) -> Interval:
        return _around(wanted, self.halo, size)

    def run(
        self, x: Tensor, given: Intervals, wanted: Intervals, sizes: tuple[int, int]
    ) -> tuple[Tensor, Intervals]:
        for module in self.modules:
            x = module(x)
        return x, given


@dataclass(frozen=True)
class _Enlarged:
    """Twice the size, then a convolution."""

    module: Any  # an Upsample
    scale: int

    def before(self, wanted: Interval, size: int, axis: int) -> Interval:
        begin, end = _around(wanted, _halo(self.module.conv), 2 * size)
        return begin // 2, -(-end // 2)

    def run(
        self, x: Tensor, given: Intervals, wanted: Intervals, sizes: tuple[int, int]
    ) -> tuple[Tensor, Intervals]:
        kept = tuple(
            self.before(interval, self.scale * size, axis)
            for axis, (interval, size) in enumerate(zip(wanted, sizes))
        )
        made = self.module(cropped(x, given, kept))
        return made, tuple((2 * begin, 2 * end) for begin, end in kept)


@dataclass(frozen=True)
class _Attention:
    """Attention to the window around what attends."""

    module: WindowedAttention
    scale: int

    def before(self, wanted: Interval, size: int, axis: int) -> Interval:
        return self.module.reach(wanted, size, axis)

    def run(
        self, x: Tensor, given: Intervals, wanted: Intervals, sizes: tuple[int, int]
    ) -> tuple[Tensor, Intervals]:
        scaled = self.scale * sizes[0], self.scale * sizes[1]
        return self.module.part(x, given, wanted, scaled), wanted


def _stages(decoder: Any, window: tuple[int, int]) -> Iterator[_Stage]:
    """The stages of a `Decoder` from latents to pixels."""
    yield _Convolutions((decoder.conv_in,), _halo(decoder.conv_in), 1)
    scale = 1
    for module in (decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2):
        yield _stage(module, window, scale)
    for level in reversed(decoder.up):
        for module in _parts(level):
            yield _stage(module, window, scale)
        if level.upsample is not None:
            yield _Enlarged(level.upsample, scale)
            scale *= 2
    last = decoder.norm_out, decoder.conv_out
    yield _Convolutions(last, _halo(decoder.conv_out), scale)


def _parts(level: Level) -> Iterator[nn.Module]:
    for i, block in enumerate(level.block):
        yield block
        if len(level.attn):
            yield level.attn[i]


def _stage(module: nn.Module, window: tuple[int, int], scale: int) -> _Stage:
    if isinstance(module, WindowedAttention):
        scaled = window[0] * scale, window[1] * scale
        return _Attention(WindowedAttention(module.block, scaled), scale)
    assert isinstance(module, ResnetBlock)
    return _Convolutions((module,), _halo(module.conv1) + _halo(module.conv2), scale)


def _halo(conv: nn.Module) -> int:
    assert isinstance(conv, nn.Conv2d)
    return conv.kernel_size[0] // 2


def _around(wanted: Interval, halo: int, size: int) -> Interval:
    """The interval with a halo on both sides, as far as the map goes."""
    return max(0, wanted[0] - halo), min(size, wanted[1] + halo)
