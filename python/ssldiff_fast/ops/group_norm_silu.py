# SPDX-License-Identifier: Apache-2.0
"""GroupNorm with all that surrounds it in the networks, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C, _checks
from ._register import register

_CALL = "group_norm_silu"
_STATISTICS = "group_norm_statistics"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class GroupNormStatistics:
    """Mean and spread of each group, of one tile or of many.

    Args:
        mean: [N, G] fp32 (fp64 of fp64 maps); N is 1 where all samples share them.
        m2: [N, G], the sums of squared deviations from the mean.
        count: values of each group.
    """

    mean: Tensor
    m2: Tensor
    count: int

    @classmethod
    def from_variance(cls, mean: Tensor, variance: Tensor) -> GroupNormStatistics:
        """Statistics measured elsewhere, both [N, G]."""
        return cls(mean, variance, 1)

    @property
    def variance(self) -> Tensor:  # [N, G]
        """The biased variance, which GroupNorm divides by."""
        return self.m2 / self.count

    @staticmethod
    def combine(parts: Sequence[GroupNormStatistics]) -> GroupNormStatistics:
        """The statistics of all tiles together.

        With n_k, mean_k, M2_k of the tiles and n = sum n_k,

            mean = sum_k n_k mean_k / n,   M2 = sum_k M2_k + n_k (mean_k - mean)^2

        (Chan, Golub, LeVeque 1979), summed in float64. A mean of variances would leave out the
        second term.

        Raises:
            ValueError: no tiles at all.
        """
        if not parts:
            raise ValueError("GroupNormStatistics.combine: parts is empty; give one part at least.")
        counts = torch.tensor([part.count for part in parts], dtype=torch.float64)[:, None, None]
        counts = counts.to(parts[0].mean.device)
        means = torch.stack([part.mean.double() for part in parts])
        m2 = torch.stack([part.m2.double() for part in parts])
        mean = (counts * means).sum(0) / counts.sum()
        m2 = (m2 + counts * (means - mean) ** 2).sum(0)
        dtype = parts[0].mean.dtype
        return GroupNormStatistics(mean.to(dtype), m2.to(dtype), sum(part.count for part in parts))


def group_norm_silu(
    x: Tensor,  # [N, C, ...] fp32 | bf16 | fp16 | fp64
    groups: int,
    *,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    add: Tensor | None = None,  # [N, C]
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    statistics: GroupNormStatistics | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:  # like x
    r"""GroupNorm, with what comes before and after it, and SiLU.

    For channel c of group g, with mean and variance over the group's channels and all positions,

        normed = (x + add - mean(x + add)) / sqrt(variance(x + add) + eps)
        z = (normed weight + bias) (1 + scale) + shift
        out = z sigmoid(z)                                    (z itself without `silu`)

    `add` is the time embedding of the published residual block, `scale` and `shift` are those of
    its scale-shift variant. The statistics are summed in float32 (float64 for float64) as
    deviations from means of eight values, combined by Chan's formula in float64: they do not
    cancel, whatever the mean. Channels-last and contiguous maps are read as they lie, and `out` is
    laid out like `x`. The bits do not depend on the number of threads.

    Gradients flow to `x` and all parameters, not into given `statistics`, which count as
    constants. With gz the gradient of z, gain = weight (1 + scale), r = 1 / sqrt(variance + eps)
    and m values in a group,

        grad_x = r (gz gain - sum_group(gz gain) / m - normed sum_group(gz gain normed) / m)

    without the two sums where statistics are given; grad_add is its sum over positions.

    Args:
        x: feature maps with any number of spatial dimensions, or none.
        groups: number of groups; it divides C.
        weight, bias: the norm's own parameters; 1 and 0 without them.
        add: added to x before the norm, the same at every position.
        scale, shift: applied after the norm's own parameters.
        statistics: of `x + add`, for tiles that are to be normed as their whole image;
            computed from `x` without them.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        The result, with shape, dtype and layout of `x`.

    Raises:
        TypeError: no tensor, or a tensor of another dtype.
        ValueError: shapes or devices that disagree, groups that do not divide the channels, a
            negative eps, statistics that want a gradient.
        RuntimeError: the compiled operators are missing.
    """
    _check(x, groups, weight, bias, add, scale, shift, statistics, eps)
    _C.require(_CALL)
    mean, rstd = _given(x, statistics, eps)
    return torch.ops.ssldiff.group_norm_silu(
        x, groups, weight, bias, add, scale, shift, mean, rstd, eps, silu
    )[0]


def group_norm_statistics(
    x: Tensor,  # [N, C, ...] fp32 | bf16 | fp16 | fp64
    groups: int,
) -> GroupNormStatistics:
    """The statistics that group_norm_silu would compute, alone; without gradient.

    Raises:
        TypeError: no tensor, or a tensor of another dtype.
        ValueError: groups that do not divide the channels, or no positions.
        RuntimeError: the compiled operators are missing.
    """
    _check_groups(x, groups, call=_STATISTICS)
    count = x.shape[1] // groups * x.shape[2:].numel()
    if count == 0:
        raise ValueError(
            f"{_STATISTICS}: x has shape {list(x.shape)}, but one position at least was expected."
        )
    _C.require(_STATISTICS)
    mean, m2 = torch.ops.ssldiff.group_norm_statistics(x.detach(), groups)
    return GroupNormStatistics(mean, m2, count)


def group_norm_silu_reference(
    x: Tensor,  # [N, C, ...]
    groups: int,
    *,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    add: Tensor | None = None,  # [N, C]
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    statistics: GroupNormStatistics | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:  # like x
    """The same in plain PyTorch."""
    _check(x, groups, weight, bias, add, scale, shift, statistics, eps)
    maps = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    maps = maps if add is None else maps + add[:, :, None]
    grouped = maps.unflatten(1, (groups, -1))
    if statistics is None:
        mean = grouped.mean((2, 3), keepdim=True)
        variance = (grouped - mean).square().mean((2, 3), keepdim=True)
    else:
        mean, variance = (s[:, :, None, None] for s in (statistics.mean, statistics.variance))
    normed = ((grouped - mean) / (variance + eps).sqrt()).flatten(1, 2)
    if weight is not None:
        normed = normed * weight[:, None]
    if bias is not None:
        normed = normed + bias[:, None]
    if scale is not None:
        normed = normed * (1 + scale[:, :, None])
    if shift is not None:
        normed = normed + shift[:, :, None]
    return (F.silu(normed) if silu else normed).reshape(x.shape)


def _given(
    x: Tensor, statistics: GroupNormStatistics | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    if statistics is None:
        return None, None
    size = (x.shape[0], statistics.mean.shape[1])
    rstd = (statistics.variance + eps).rsqrt()
    return statistics.mean.expand(size), rstd.expand(size)


def _check_groups(x: Tensor, groups: int, *, call: str) -> None:
    _checks.check_tensor("x", x, call=call)
    _checks.check_dtype("x", x, _DTYPES, call=call)
    if x.ndim < 2:
        raise ValueError(f"{call}: x has shape {list(x.shape)}, but [N, C, ...] was expected.")
    _checks.check_count("groups", groups, call=call)
    if x.shape[1] < 1 or x.shape[1] % groups:
        raise ValueError(
            f"{call}: groups is {groups}, but it must divide the {x.shape[1]} channels of x."
        )


def _check(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: GroupNormStatistics | None,
    eps: float,
) -> None:
    _check_groups(x, groups, call=_CALL)
    sizes = {"N": x.shape[0], "C": x.shape[1]}
    # Parameters may be wider than x; float64 only goes with float64.
    dtypes = _DTYPES if x.dtype == torch.float64 else _DTYPES[:3]
    named = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    for name, tensor in named.items():
        if tensor is not None:
            pattern = "C" if name in ("weight", "bias") else "N C"
            _checks.check_shape(name, tensor, pattern, sizes, call=_CALL)
            _checks.check_dtype(name, tensor, dtypes, call=_CALL)
            _checks.check_same_device(_CALL, **{"x": x, name: tensor})
    if not eps >= 0:
        raise ValueError(f"{_CALL}: eps is {eps}, but it must not be below zero.")
    if statistics is not None:
        _check_statistics(x, groups, statistics)


def _check_statistics(x: Tensor, groups: int, statistics: GroupNormStatistics) -> None:
    if not isinstance(statistics, GroupNormStatistics):
        raise TypeError(
            f"{_CALL}: statistics is a {type(statistics).__name__}, but GroupNormStatistics was "
            f"expected; group_norm_statistics returns them."
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name in ("mean", "m2"):
        label, tensor = f"statistics.{name}", getattr(statistics, name)
        _checks.check_shape(label, tensor, "_ G", {"G": groups}, call=_CALL)
        _checks.check_dtype(label, tensor, (dtype,), call=_CALL)
        _checks.check_same_device(_CALL, **{"x": x, label: tensor})
        if tensor.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{_CALL}: {label} is of {tensor.shape[0]} samples, but 1 or the {x.shape[0]} of "
                f"x were expected."
            )
        if tensor.requires_grad:
            raise ValueError(
                f"{_CALL}: {label} wants a gradient, but given statistics are constants; "
                f"detach them."
            )


def _fake(x: Tensor, groups: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((x.shape[0], groups), dtype=dtype)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return _fake(x, groups)[1:]


def _fake_backward(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = [x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)]
    return (
        torch.empty_like(x),
        *channels,
        *(x.new_empty(x.shape[:2], dtype=dtype) for _ in range(3)),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, ctx.groups, *parameters, given, _, _, ctx.silu = inputs
    ctx.given = given is not None
    ctx.save_for_backward(x, *parameters, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    x, *parameters, mean, rstd = ctx.saved_tensors
    grad_x, *grads = torch.ops.ssldiff.group_norm_silu_backward(
        grad, x, ctx.groups, *parameters, mean, rstd, ctx.given, ctx.silu
    )
    wanted = [
        None if parameter is None else made.to(parameter.dtype)
        for parameter, made in zip(parameters, grads)
    ]
    # groups; weight, bias, add, scale, shift; mean, rstd, eps, silu
    return grad_x, None, *wanted, None, None, None, None


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.group_norm_silu import group_norm_silu as kernel

    return kernel(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.group_norm_silu_backward import group_norm_silu_backward as kernel

    return kernel(*arguments)


def _triton_statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.group_norm_silu import group_norm_statistics as kernel

    return kernel(*arguments)


register(
    _CALL,
    fake=_fake,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
    cuda_sources=False,
)
register(f"{_CALL}_backward", fake=_fake_backward, triton=_triton_backward, cuda_sources=False)
register(_STATISTICS, fake=_fake_statistics, triton=_triton_statistics, cuda_sources=False)
