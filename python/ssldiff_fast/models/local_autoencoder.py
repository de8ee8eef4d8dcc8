# SPDX-License-Identifier: Apache-2.0
"""An autoencoder for parts of a large canvas.

Two things in an autoencoder see the whole of its input: GroupNorm, by its statistics, and
attention. With given statistics, and attention within windows, a part of the canvas depends on what
lies up to a halo around it, and on nothing else.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.autoencoder_blocks import AttnBlock, arranged, attended
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.products import conv1x1
from ssldiff_fast.ops import GroupNormStatistics, group_norm_statistics

# Statistics of the norms, by the names of their modules.
Statistics: TypeAlias = Mapping[str, GroupNormStatistics]

Interval: TypeAlias = tuple[int, int]  # [begin, end) of the positions of a map, along one axis
Intervals: TypeAlias = tuple[Interval, ...]  # along y and x

# A window serves a block of queries this many times smaller along each side.
_BLOCKS = 2
# Sides of the inputs that the halo is looked for in, in latents.
_SIDES = (40, 96, 192)
# A ReLU may be shut on a path that another input opens.
_TRIALS = 2


class FixedGroupNorm(nn.Module):
    """A norm whose statistics are given."""

    def __init__(self, norm: GroupNormSiLU, statistics: GroupNormStatistics) -> None:
        super().__init__()
        self.norm = norm
        self.statistics = statistics

    def forward(
        self,
        x: Tensor,  # [B, C, ...]
    ) -> Tensor:  # like x
        given = self.statistics
        if given.mean.device != x.device:
            mean, m2 = given.mean.to(x.device), given.m2.to(x.device)
            given = self.statistics = GroupNormStatistics(mean, m2, given.count)
        return self.norm(x, statistics=given)


class WindowedAttention(nn.Module):
    """Attention of an `AttnBlock` to the window around what attends.

    Queries of a block of positions, half a window wide, attend to the window around it. At
    the borders of the map that window moves inwards. Blocks lie on a lattice of the whole map, so
    that they are the same for every part of it.
    """

    def __init__(self, block: AttnBlock, window: tuple[int, int]) -> None:
        super().__init__()
        self.block = block
        self.window = window

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        sizes = x.shape[2], x.shape[3]
        whole = (0, sizes[0]), (0, sizes[1])
        return self.part(x, whole, whole, sizes)

    def part(
        self,
        x: Tensor,  # [B, C, n, m], the positions `given`
        given: Intervals,
        wanted: Intervals,
        sizes: tuple[int, int],
    ) -> Tensor:  # [B, C, n', m'], the positions `wanted`
        """Some positions of a map of `sizes`, of those that `reach` says they need, or more."""
        block, normed = self.block, self.block.norm(x)
        inner, residual = (arranged(cropped(map_, given, wanted)) for map_ in (normed, x))
        # [B, n, m, C] from here on: the rows of matrices lie in one piece.
        key, value = (conv1x1(normed, c).permute(0, 2, 3, 1) for c in (block.k, block.v))
        query = conv1x1(inner, block.q).permute(0, 2, 3, 1)
        made = torch.empty_like(query)
        rows, columns = (
            list(self.blocks(interval, size, axis))
            for axis, (interval, size) in enumerate(zip(wanted, sizes))
        )
        for (here_y, seen_y), (here_x, seen_x) in itertools.product(rows, columns):
            here, seen = (
                (slice(None), *(slice(a - begin, b - begin) for (a, b), (begin, _) in pairs))
                for pairs in (zip((here_y, here_x), wanted), zip((seen_y, seen_x), given))
            )
            queries = query[here]
            positions = (queries, key[seen], value[seen])
            q, k, v = (part.flatten(1, 2).contiguous()[:, None] for part in positions)
            made[here] = attended(q, k, v)[:, 0].view(queries.shape)
        return conv1x1(made.permute(0, 3, 1, 2), block.proj_out, add=residual)

    def reach(self, wanted: Interval, size: int, axis: int) -> Interval:
        """The positions that some depend on, along one axis of a map of `size`."""
        seen = [interval for _, interval in self.blocks(wanted, size, axis)]
        return min(seen[0][0], wanted[0]), max(seen[-1][1], wanted[1])

    def blocks(self, wanted: Interval, size: int, axis: int) -> Iterator[tuple[Interval, Interval]]:
        """The blocks of the positions wanted, and the window that each sees."""
        window = min(self.window[axis], size)
        step = max(1, window // _BLOCKS) if window < size else size
        for begin in range(wanted[0] // step * step, wanted[1], step):
            first = min(max(0, begin + step // 2 - window // 2), size - window)
            here = max(begin, wanted[0]), min(begin + step, wanted[1])
            yield here, (first, first + window)


def cropped(
    x: Tensor,  # [B, C, n, m], the positions `given`
    given: Intervals,
    kept: Intervals,
) -> Tensor:  # [B, C, n', m'], the positions `kept`
    """Some of the positions of a map."""
    (top, bottom), (left, right) = (
        (begin - first, end - first) for (begin, end), (first, _) in zip(kept, given)
    )
    return x[:, :, top:bottom, left:right]


def norm_names(network: nn.Module, prefix: str = "") -> list[str]:
    """Names of the norms of an autoencoder, those that start with `prefix`."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, GroupNormSiLU) and name.startswith(prefix)
    ]


@torch.no_grad()
def measure_statistics(
    network: nn.Module,
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,  # [N, C, h, w]
) -> dict[str, GroupNormStatistics]:
    """Statistics of every GroupNorm that a function of the network runs, over all inputs together.

    Args:
        network: the autoencoder; the names are those of its modules.
        function: what is run, for example `network.decode`.
        inputs: one call is made for each of the N.

    Returns:
        By name, [1, G] each, on the network's device.
    """
    parts: dict[str, list[GroupNormStatistics]] = {}

    def note(name: str, norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(norm, GroupNormSiLU)
        parts.setdefault(name, []).append(group_norm_statistics(arguments[0], norm.num_groups))

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name))
        for name, module in network.named_modules()
        if isinstance(module, GroupNormSiLU)
    ]
    try:
        for one in inputs:
            function(one[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: GroupNormStatistics.combine(given) for name, given in parts.items()}


def statistics_to_tensors(statistics: Statistics) -> dict[str, Tensor]:
    """Statistics as the tensors that files hold, [1, G] each: `NAME.mean` and `NAME.variance`."""
    tensors = {}
    for name, given in statistics.items():
        tensors[f"{name}.mean"] = given.mean.detach().cpu().contiguous()
        tensors[f"{name}.variance"] = given.variance.detach().cpu().contiguous()
    return tensors


def statistics_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, GroupNormStatistics]:
    """Statistics of what `statistics_to_tensors` returned.

    Raises:
        ValueError: one of the two is missing, or their shapes differ.
    """
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    result = {}
    for name in names:
        mean, variance = (tensors.get(f"{name}.{part}") for part in ("mean", "variance"))
        if mean is None or variance is None or mean.ndim != 2 or mean.shape != variance.shape:
            raise ValueError(
                f"load: the statistics of the norm {name!r} are not its mean and variance, both "
                "[1, G]; the file is damaged, copy it again."
            )
        result[name] = GroupNormStatistics.from_variance(mean.float(), variance.float())
    return result


def local_autoencoder(
    vae: nn.Module, statistics: Statistics, window: tuple[int, int] | None
) -> nn.Module:
    """An autoencoder with the same weights whose parts do not depend on what lies far away.

    Args:
        vae: the autoencoder; it is not changed.
        statistics: of its norms, by name; those that are not named keep their own.
        window: (h, w) of the windows that attention is kept within, in latents; None leaves
            attention out altogether.
    """
    return _replaced(vae, "", statistics, window)


def _replaced(
    module: nn.Module, name: str, statistics: Statistics, window: tuple[int, int] | None
) -> nn.Module:
    if isinstance(module, GroupNormSiLU) and name in statistics:
        return FixedGroupNorm(module, statistics[name])
    # A shallow copy: the weights are the same tensors.
    made: Any = copy.copy(module)
    made._modules = {
        child: part and _replaced(part, f"{name}.{child}".lstrip("."), statistics, window)
        for child, part in module._modules.items()
    }
    if isinstance(module, AttnBlock):
        return nn.Identity() if window is None else WindowedAttention(made, window)
    return made


def receptive_halo(vae: Any, channels: int) -> int:
    """How far around a latent the latents lie that its pixels depend on: 17 for VQ-f4's decoder.

    Found by tracing: with fixed statistics and without attention, the gradient of one latent's
    pixels is not zero where they depend on the input. Only the build of the network matters, so a
    `VQModel` or `AutoencoderKL` is traced with few channels.

    Args:
        vae: an autoencoder with `decode`.
        channels: channels of its latents.

    Raises:
        ValueError: the network reaches further than a window could.
    """
    if not isinstance(vae, VQModel | AutoencoderKL):
        return _traced(copy.deepcopy(vae).cpu().double().decode, channels)
    return _traced_build(_kind(vae), json.dumps(vae.config(), sort_keys=True), channels, 0)


def encoder_halo(vae: Any) -> int:
    """How far around a latent's own pixels the pixels lie that it depends on, in pixels.

    Found as `receptive_halo` is.

    Args:
        vae: an autoencoder with `encode` and `downsample_factor`.

    Raises:
        ValueError: the network reaches further than a window could.
    """
    factor = int(vae.downsample_factor)
    if not isinstance(vae, VQModel | AutoencoderKL):
        return _traced(copy.deepcopy(vae).cpu().double().encode, 3, factor)
    channels = vae.ddconfig["in_channels"]
    return _traced_build(_kind(vae), json.dumps(vae.config(), sort_keys=True), channels, factor)


def _kind(vae: VQModel | AutoencoderKL) -> str:
    return "kl" if isinstance(vae, AutoencoderKL) else "vq"


def _traced(network: Callable[[Tensor], Tensor], channels: int, factor: int = 1) -> int:
    """The reach of a network, in steps of its input, of which `factor` make a latent."""
    generator = torch.Generator().manual_seed(0)
    for side in (factor * side for side in _SIDES):
        x = torch.randn(_TRIALS, channels, side, side, generator=generator, dtype=torch.float64)
        reach = _reach(network, x)
        if reach < side // 2 - factor:
            return reach
    raise ValueError(
        f"receptive_halo: this autoencoder reaches {_SIDES[-1] // 2} latents far or more; use the "
        "reference way."
    )


@functools.lru_cache
def _traced_build(kind: str, config: str, channels: int, factor: int) -> int:
    """Of a network of this build with few channels, without what sees the whole input.

    Of its encoder where `factor`, the pixels of a latent along one side, is given; of its decoder
    where it is 0.
    """
    arguments = json.loads(config)
    ddconfig = arguments["ddconfig"]
    levels = len(ddconfig["ch_mult"])
    thinned = {"ch": 32, "ch_mult": [1] * levels, "attn_resolutions": []}
    arguments["ddconfig"] = {**ddconfig, **thinned}
    generator = torch.Generator().manual_seed(0)
    thin = {"vq": VQModel, "kl": AutoencoderKL}[kind](**arguments).double()
    for parameter in thin.parameters():
        width = parameter[0].numel() if parameter.dim() > 1 else 100
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values / width**0.5
    one = torch.ones(1, 32, dtype=torch.float64)
    fixed = {
        name: GroupNormStatistics.from_variance(torch.zeros_like(one), one)
        for name, module in thin.named_modules()
        if isinstance(module, GroupNormSiLU)
    }
    local: Any = local_autoencoder(thin, fixed, None)
    if factor:
        return _traced(local.encode, channels, factor)
    # Codes have no gradient; each latent has its own, so the halo is that of the decoder.
    return _traced(functools.partial(local.decode, quantize=False), channels)


@torch.enable_grad()
def _reach(network: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """How far around the middle one, along an axis, the inputs lie that its outputs depend on."""
    x.requires_grad_()
    made = network(x)
    # One latent: `inner` steps of the input, `outer` of the output.
    sides = x.shape[-1], made.shape[-1]
    inner, outer = max(1, sides[0] // sides[1]), max(1, sides[1] // sides[0])
    middle = x.shape[-1] // inner // 2
    here = slice(middle * outer, (middle + 1) * outer)
    made[..., here, here].square().sum().backward()
    assert x.grad is not None
    touched = (x.grad != 0).any(0).any(0).nonzero()
    before, after = middle * inner - touched, touched - ((middle + 1) * inner - 1)
    return int(torch.maximum(before, after).max())
