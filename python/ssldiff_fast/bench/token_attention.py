# SPDX-License-Identifier: Apache-2.0
"""token_attention beside LayerNorm, projections, attention, residual and LayerNorm in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..models.attention import CrossAttention
from ..ops import token_attention
from .case import Case

Output = tuple[Tensor, Tensor]  # y and z
CONTEXT = 512  # width of a token in the published models, whose attention has one head
# Windows of the published network's first level with attention: 32 x 32 positions of width 384.
SHAPES = {"cpu": (8, 1024, 384), "cuda": (256, 1024, 384)}
UNFUSED = "unfused"
# Relative to the norm of what is expected, since both compute in another order.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# An element's sum, its two moments, and the norm; a vector's two products with their sums.
OPERATIONS, OPERATIONS_OF_A_VECTOR = 10, 4


@torch.no_grad()
def candidates(
    shape: tuple[int, int, int], heads: int, tokens: int, device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Output]], list[Tensor]]:
    """Ours by every backend that runs here and the baselines; and our inputs.

    What does not depend on the timestep is made beforehand for all of them: the vectors of ours,
    keys and values of the baseline.
    """
    windows, _, width = shape
    attention = CrossAttention(width, heads=heads, head_width=width // heads, context_dim=CONTEXT)
    attention = attention.to(device, dtype)
    before, after = (nn.LayerNorm(width).to(device, dtype) for _ in range(2))
    x = torch.randn(shape, device=device).to(dtype)
    context = torch.randn(windows, tokens, CONTEXT, device=device).to(dtype)
    vectors = attention.absorb(context, before)
    projected = attention.to_k(context), attention.to_v(context)
    given = x, vectors.values, after.weight, after.bias
    others: dict[str, Any] = {"keys": vectors.keys, "offsets": vectors.offsets}
    others |= {"heads": heads if tokens > 1 else 1, "eps": after.eps}

    @torch.no_grad()
    def ours() -> Output:
        return token_attention(*given, **others)

    @torch.no_grad()
    def triton() -> Output:
        from ..kernels.token_attention import token_attention as kernel

        return kernel(*given, *others.values())

    @torch.no_grad()
    def unfused() -> Output:
        y = x + attention.attend(before(x), *projected)
        return y, after(y)

    @torch.no_grad()
    def sum_and_norm() -> Output:  # what is left of one token, unfused
        y = x + vectors.values.to(dtype)[:, None]
        return y, after(y)

    functions: dict[str, Callable[[], Output]] = {"token_attention": ours}
    if device == "cuda" and _C.CUDA_PROBLEM is None:
        functions["Triton"] = triton  # beside CUDA C++, which is what token_attention runs
    functions[UNFUSED] = unfused
    if tokens == 1:
        functions["sum and LayerNorm"] = sum_and_norm
    return functions, [*vectors.tensors(), x, after.weight, after.bias]


def case(
    device: str,
    shape: tuple[int, int, int] | None = None,
    *,
    heads: int = 1,
    tokens: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """One block's attention to the tokens of its windows; shape is [windows, positions, width]."""
    windows, length, width = shape or SHAPES[device]
    size = (windows, length, width)
    functions, inputs = candidates(size, heads, tokens, device, dtype)

    def check() -> None:
        expected = functions[UNFUSED]()
        for name, function in functions.items():
            for made, right in zip(function(), expected):
                error = float((made - right).double().norm() / right.double().norm())
                if not error < LIMITS[dtype]:
                    raise AssertionError(f"{name} differs from plain attention by {error:.1e}")

    elements = windows * length * width
    vectors = heads * tokens if tokens > 1 else 0
    return Case(
        operator="token_attention",
        label=f"{tokens} x {heads} x {width} {str(dtype).removeprefix('torch.')}",
        device=device,
        functions=functions,
        check=check,
        shape={"x": list(size), "context": [windows, tokens, CONTEXT], "heads": [heads]},
        dtype=dtype,
        moved=sum(tensor.nbytes for tensor in inputs) + 2 * elements * dtype.itemsize,
        operations=elements * (OPERATIONS + vectors * OPERATIONS_OF_A_VECTOR),
        aims={UNFUSED: 5} if tokens == 1 else {},
    )


def cases(device: str) -> list[Case]:
    """One and two tokens, as the published models have them."""
    return [
        case(device, tokens=tokens, dtype=dtype)
        for tokens in (1, 2)
        for dtype in (torch.float32, torch.bfloat16)
    ]
