# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation: the nearest code of each vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C, _checks
from ._register import register

_CALL = "vq_nearest"
_DTYPES = (torch.float32, torch.float64)


def vq_nearest(
    z: Tensor,  # [M, D] fp32 | fp64
    codes: Tensor,  # [K, D], dtype of z
) -> tuple[Tensor, Tensor]:  # [M, D], [M] int64
    """Nearest code of each vector, by squared Euclidean distance.

        indices(m) = argmin_k sum_d (z(m, d) - codes(k, d))^2,    vectors(m) = codes(indices(m))

    Ties go to the lowest index. No [M, K] matrix is made: memory does not grow with K. A distance
    that is NaN never wins; a vector with a NaN gets code 0. The gradient of `vectors` passes
    straight through to `z`; for a loss on the codes themselves use `codes[indices]`.

    Args:
        z: vectors to quantise.
        codes: the codebook.

    Returns:
        The nearest codes, and their indices.

    Raises:
        TypeError: a tensor of another dtype, or no tensor.
        ValueError: shapes or devices that disagree, or an empty codebook.
        RuntimeError: the compiled operators are missing.
    """
    _check(z, codes)
    _C.require(_CALL)
    return torch.ops.ssldiff.vq_nearest(z, codes)


def vq_nearest_reference(
    z: Tensor,  # [M, D]
    codes: Tensor,  # [K, D]
) -> tuple[Tensor, Tensor]:  # [M, D], [M] int64
    """The same in plain PyTorch, with the whole [M, K] matrix in memory."""
    _check(z, codes)
    distances = ((z[:, None] - codes) ** 2).sum(-1)  # [M, K]
    indices = torch.where(distances.isnan(), torch.inf, distances).argmin(1)
    return z + (codes[indices] - z).detach(), indices


def _check(z: Tensor, codes: Tensor) -> None:
    sizes = _checks.check_shape("z", z, "M D", call=_CALL)
    _checks.check_dtype("z", z, _DTYPES, call=_CALL)
    sizes = _checks.check_shape("codes", codes, "K D", sizes, call=_CALL)
    _checks.check_dtype("codes", codes, (z.dtype,), call=_CALL)
    _checks.check_same_device(_CALL, z=z, codes=codes)
    if sizes["K"] < 1 or sizes["K"] >= 2**31 or sizes["D"] < 1:
        raise ValueError(
            f"{_CALL}: codes has shape {list(codes.shape)}, but between 1 and 2^31 - 1 codes of at "
            f"least one component were expected."
        )


def _fake(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:1], dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: Any, grad_vectors: Tensor, grad_indices: Tensor | None
) -> tuple[Tensor | None, ...]:
    # Straight through to z; codes: none, their loss goes through codes[indices].
    return grad_vectors, None


def _triton(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.vq_nearest import vq_nearest as kernel

    return kernel(z, codes)


register(
    _CALL,
    fake=_fake,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
    cuda_sources=False,
)
