# SPDX-License-Identifier: Apache-2.0
"""Cross-attention over one or a few tokens, with the residual and the LayerNorm that follows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C, _checks
from ._register import register

_CALL = "token_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# More tokens than this are attention's usual business.
MAX_TOKENS = 8
# What pays: heads * tokens vectors of at least this many times their number in width. Ours takes
# time by vectors times width, projections by the width's square. benchmarks/token_attention.py
# sweeps both ways.
WIDTH_PER_VECTOR = {"cpu": 6, "cuda": 24}
# In half precision a GPU's projections are so fast that more vectors than this never pay.
MOST_VECTORS_IN_HALF = 4


def token_attention(
    x: Tensor,  # [N, L, C] fp32 | bf16 | fp16 | fp64
    values: Tensor,  # [N, C], or with keys [N, heads * T, C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    *,
    keys: Tensor | None = None,  # [N, heads * T, C]
    offsets: Tensor | None = None,  # [N, heads * T]
    heads: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # twice [N, L, C], dtype of x
    r"""Attention to the conditioning of each window, added to `x`, and its LayerNorm.

        y = x + sum_s p_s values_s,      p = 1 for one token, otherwise
        p = softmax over the T tokens of each head of  <LN(x), keys_s> + offsets_s
        z = LN(y) norm_weight + norm_bias,    LN(u) = (u - mean(u)) / sqrt(var(u) + eps)

    Multi-head attention of the positions x to tokens y_j is this, because all that depends on
    the tokens alone can be multiplied out beforehand, once for all timesteps. With W_q, W_k, W_v
    the rows of head h, W_o its columns, d its width, H the number of heads, and g, c the weight
    and bias of the LayerNorm before it (`CrossAttention.absorb` does it), vector s = h T + j is

        values_s = W_o W_v y_j + b_o / H,    u_s = W_q' W_k y_j / sqrt(d),
        keys_s = g u_s,    offsets_s = <c, u_s>

    and for one token just `values = W_o W_v y + b_o`: the softmax over one key is 1, so neither
    x nor that LayerNorm, W_q and W_k have any influence.

    `x` is read once, y and z are written once. Sums run in float32 (float64 for float64) in a
    fixed order; y is rounded once, and z computed from y before it is rounded. Each position
    depends on its own `x` alone, so a NaN stays in its row. Gradients flow to all tensors.

    Args:
        x: positions of the windows; the last dimension is best contiguous.
        values: what each token adds, per head; in the dtype of x, or float32 beside a half.
        norm_weight, norm_bias: of the LayerNorm that follows, likewise.
        keys: per head and token, for 2 to 8 tokens; likewise.
        offsets: added to the logits, likewise; without them zeros.
        heads: into how many the keys divide.
        eps: of both LayerNorms.

    Returns:
        y and z, contiguous.

    Raises:
        TypeError: a tensor of another dtype, or no tensor.
        ValueError: shapes or devices that disagree, no heads, one token or too many for keys.
        RuntimeError: the compiled operators are missing.
    """
    _check(x, values, norm_weight, norm_bias, keys, offsets, heads, eps)
    _C.require(_CALL)
    if keys is not None:
        exact = _accumulator(x.dtype)
        offsets = keys.new_zeros(keys.shape[:2]) if offsets is None else offsets
        keys, offsets = keys.to(exact), offsets.to(exact)
    values = values.to(_accumulator(x.dtype))
    y, z = torch.ops.ssldiff.token_attention(
        x, values, norm_weight, norm_bias, keys, offsets, heads, eps
    )
    return y, z


def token_attention_reference(
    x: Tensor,  # [N, L, C]
    values: Tensor,  # [N, C], or with keys [N, heads * T, C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    *,
    keys: Tensor | None = None,  # [N, heads * T, C]
    offsets: Tensor | None = None,  # [N, heads * T]
    heads: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # twice [N, L, C]
    """The same in plain PyTorch."""
    _check(x, values, norm_weight, norm_bias, keys, offsets, heads, eps)
    exact, width = _accumulator(x.dtype), x.shape[-1:]
    y = x.to(exact)
    if keys is None:
        y = y + values.to(exact)[:, None]
    else:
        logits = F.layer_norm(y, width, eps=eps) @ keys.to(exact).mT
        if offsets is not None:
            logits = logits + offsets.to(exact)[:, None]
        shares = logits.unflatten(-1, (heads, -1)).softmax(-1).flatten(-2)
        y = y + shares @ values.to(exact)
    z = F.layer_norm(y, width, norm_weight.to(exact), norm_bias.to(exact), eps)
    return y.to(x.dtype), z.to(x.dtype)


def few_tokens(
    width: int, heads: int, tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> bool:
    """Whether `token_attention` is the faster way for so many tokens, not queries and keys.

    Args:
        width: C.
        heads, tokens: of the attention.
        device: the kind of device, "cpu" or "cuda".
        dtype: of x.
    """
    if tokens == 1:
        return True
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return heads * tokens <= MOST_VECTORS_IN_HALF
    least = WIDTH_PER_VECTOR.get(device, WIDTH_PER_VECTOR["cuda"])
    return tokens <= MAX_TOKENS and width >= least * heads * tokens


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    x: Tensor,
    values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    keys: Tensor | None,
    offsets: Tensor | None,
    heads: int,
    eps: float,
) -> None:
    sizes = _checks.check_shape("x", x, "N L C", call=_CALL)
    _checks.check_dtype("x", x, _DTYPES, call=_CALL)
    if sizes["C"] < 1:
        raise ValueError(f"{_CALL}: x has shape {list(x.shape)}, but a width above 0 was expected.")
    _checks.check_positive("eps", _checks.check_number("eps", eps, call=_CALL), call=_CALL)
    _checks.check_count("heads", heads, call=_CALL)
    others = {"values": values, "norm_weight": norm_weight, "norm_bias": norm_bias}
    patterns = {"values": "N C", "norm_weight": "C", "norm_bias": "C"}
    if keys is not None:
        others["keys"], patterns["keys"], patterns["values"] = keys, "N S C", "N S C"
    if offsets is not None:
        others["offsets"], patterns["offsets"] = offsets, "N S"
    for name in sorted(others):  # keys first: values and offsets have as many
        sizes = _checks.check_shape(name, others[name], patterns[name], sizes, call=_CALL)
        dtypes = dict.fromkeys((x.dtype, _accumulator(x.dtype)))
        _checks.check_dtype(name, others[name], dtypes, call=_CALL)
    _checks.check_same_device(_CALL, x=x, **others)
    _checks.check_dtype("norm_bias", norm_bias, (norm_weight.dtype,), call=_CALL)
    if keys is None:
        if heads != 1 or offsets is not None:
            raise ValueError(
                f"{_CALL}: heads or offsets are given without keys, but one token has neither; "
                "pass keys too, or values [N, C] alone."
            )
    elif sizes["S"] not in [heads * tokens for tokens in range(2, MAX_TOKENS + 1)]:
        raise ValueError(
            f"{_CALL}: keys has {sizes['S']} vectors for {heads} heads, but 2 to {MAX_TOKENS} "
            "tokens for each head were expected; one token needs no keys, and for more use "
            "scaled_dot_product_attention."
        )


def _fake(
    x: Tensor,
    values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    keys: Tensor | None,
    offsets: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, norm_weight, _, keys, offsets, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(x, values, norm_weight, keys, offsets)


def _backward(ctx: Any, grad_y: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
    """Recomputes y from x, so that nothing but x is kept; grad_y and grad_z are [N, L, C]."""
    x, values, norm_weight, keys, offsets = ctx.saved_tensors
    exact = values.dtype
    # In the sums' own precision also where the caller's backward runs under autocast.
    with torch.autocast(x.device.type, enabled=False):
        wide, grad_y, grad_z = (tensor.to(exact) for tensor in (x, grad_y, grad_z))
        if keys is None:
            y = wide + values[:, None]
        else:
            normed, _, scale = _layer_norm(wide, None, ctx.eps)
            logits = torch.baddbmm(offsets[:, None], normed, keys.mT)
            shares = logits.unflatten(-1, (ctx.heads, -1)).softmax(-1).flatten(-2)  # [N, L, S]
            y = torch.baddbmm(wide, shares, values)
        grad, grad_weight, grad_bias = _layer_norm_gradient(
            grad_z, y, norm_weight.to(exact), ctx.eps
        )
        grad = grad + grad_y
        if keys is None:
            grad_values, grad_keys, grad_offsets = grad.sum(1), None, None
        else:
            grad_values = shares.mT @ grad
            grad_logits = _softmax_gradient(grad @ values.mT, shares, ctx.heads)
            grad_keys, grad_offsets = grad_logits.mT @ normed, grad_logits.sum(1)
            grad_normed = grad_logits @ keys
            along = (grad_normed * normed).mean(-1, keepdim=True)
            grad_normed = grad_normed - grad_normed.mean(-1, keepdim=True) - normed * along
            grad = grad + scale * grad_normed
    parameter = norm_weight.dtype
    norm_gradients = grad_weight.to(parameter), grad_bias.to(parameter)
    # heads, eps
    return grad.to(x.dtype), grad_values, *norm_gradients, grad_keys, grad_offsets, None, None


def _softmax_gradient(grad: Tensor, shares: Tensor, heads: int) -> Tensor:
    """Of the logits [N, L, heads * T], from that of the shares."""
    by_head = shares.unflatten(-1, (heads, -1))
    products = grad.unflatten(-1, (heads, -1)) * by_head
    return (products - by_head * products.sum(-1, keepdim=True)).flatten(-2)


def _layer_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x), and of each row its mean and the reciprocal of its deviation."""
    return torch.native_layer_norm(x, x.shape[-1:], weight, weight, eps)


def _layer_norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the LayerNorm of x: of x, of its weight and of its bias."""
    _, mean, scale = _layer_norm(x, weight, eps)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, scale, weight, weight, [True, True, True]
    )
    return found


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.token_attention import token_attention as kernel

    return kernel(*arguments)


register(_CALL, fake=_fake, triton=_triton, setup_context=_setup_context, backward=_backward)
