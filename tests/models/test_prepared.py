# SPDX-License-Identifier: Apache-2.0
"""Conditioning prepared once, and the one way in which a block attends to its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_inputs import fill, golden_input
from ssldiff_fast.models import UNet
from ssldiff_fast.models.attention import BasicTransformerBlock, SpatialTransformer
from ssldiff_fast.models.prepared import PreparedContext, TokenVectors
from ssldiff_fast.ops.token_attention import MAX_TOKENS

TINY: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "transformer_depth": 2,
    "context_dim": 16,
}
# One token, a few in the narrow and the wide level, and too many in one or in both.
TOKENS = [1, 2, 4, 5, MAX_TOKENS + 1]


def test_packed_vectors_are_chosen_and_followed_as_others_are() -> None:
    packed, last = torch.randn(5, 7), torch.randn(1, 7)
    loose = [
        PreparedContext(tuple(TokenVectors(v) for v in p.split([3, 4], dim=1)))
        for p in (packed, last)
    ]
    tight = [PreparedContext.of_one_token(p, (3, 4)) for p in (packed, last)]
    index = torch.tensor([4, 0, 4])
    expected, found = (many[index].followed_by(one) for many, one in (loose, tight))
    assert found.packed is not None
    assert found.packed.shape == (6, 7)
    for block, other in zip(found.blocks, expected.blocks, strict=True):
        assert torch.equal(block.values, other.values)


def tiny_unet() -> UNet:
    return fill(UNet(**TINY)).eval()


def inputs(tokens: int, windows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = golden_input("windows", windows, 3, 8, 8)
    return x, torch.arange(windows) * 100, golden_input("tokens", windows, tokens, 16)


def published(block: BasicTransformerBlock, x: Tensor, context: Tensor) -> Tensor:
    """The block with every projection and norm in the published order."""
    attention = block.attn2
    y = x + block.attn1(block.norm1(x))
    query, key, value = (
        attention.split_heads(part)
        for part in (
            attention.to_q(block.norm2(y)),
            attention.to_k(context),
            attention.to_v(context),
        )
    )
    out = F.scaled_dot_product_attention(query, key, value)
    y = y + attention.to_out(out.transpose(1, 2).flatten(2))
    return y + block.ff(block.norm3(y))


def random_block(width: int = 64, heads: int = 2) -> BasicTransformerBlock:
    block = BasicTransformerBlock(width, heads=heads, head_width=width // heads, context_dim=16)
    for norm in (block.norm1, block.norm2, block.norm3):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block.double()


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_block_and_its_gradients_are_those_of_the_published_order(tokens: int) -> None:
    block = random_block()
    x = torch.randn(2, 9, 64, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, context, *block.parameters()]
    found = []
    for function in (block, lambda *given: published(block, *given)):
        out = function(x, context)
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        unread = [torch.zeros_like(leaf) for leaf in leaves]
        found.append([out, *(z if g is None else g for g, z in zip(grads, unread))])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_with_one_token_the_query_its_norm_and_the_key_are_never_read() -> None:
    block = random_block()
    dead = [*block.norm2.parameters(), block.attn2.to_q.weight, block.attn2.to_k.weight]
    x, context = torch.randn(2, 9, 64).double(), torch.randn(2, 1, 16).double()
    expected = block(x, context)
    with torch.no_grad():
        for parameter in dead:
            parameter.fill_(torch.nan)
    out = block(x, context)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(parameter.grad is None for parameter in dead)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_prepared_context_gives_the_same_output(tokens: int) -> None:
    unet = tiny_unet()
    x, t, context = inputs(tokens)
    with torch.no_grad():
        expected = unet(x, t, context)
        prepared = unet.prepare(context)
        assert len(prepared) == 3
        assert torch.equal(unet(x, t, prepared), expected)
        some = torch.tensor([2, 0])
        torch.testing.assert_close(unet(x[some], t[some], prepared[some]), expected[some])


def test_preparing_makes_vectors_of_every_block_by_the_faster_way() -> None:
    unet = tiny_unet()
    one, two, many = (unet.prepare(torch.randn(3, tokens, 16)) for tokens in (1, 2, MAX_TOKENS + 1))
    blocks = [b for b in unet.modules() if isinstance(b, BasicTransformerBlock)]
    assert len(one.blocks) == len(two.blocks) == len(many.blocks) == len(blocks)
    for block, vectors in zip(blocks, one.blocks):
        assert vectors.keys is None
        assert vectors.values.shape == (3, block.norm3.normalized_shape[0])
    assert all(v.offsets is not None and v.offsets.shape == (3, 4) for v in two.blocks)
    assert all(v.offsets is None and v.keys is not None for v in many.blocks)
    assert one.nbytes == 4 * 3 * sum(block.norm3.normalized_shape[0] for block in blocks)


def test_a_guided_pair_is_the_windows_then_the_null_for_each() -> None:
    unet = tiny_unet()
    x, t, context = inputs(2)
    null = torch.zeros(1, 2, 16)
    with torch.no_grad():
        pair = unet.prepare(context).followed_by(unet.prepare(null))
        both = unet(x.repeat(2, 1, 1, 1), t.repeat(2), pair)
        tokens = torch.cat((context, null.expand_as(context)))
        torch.testing.assert_close(both, unet(x.repeat(2, 1, 1, 1), t.repeat(2), tokens))


def test_a_transformer_takes_a_prepared_context_alone() -> None:
    unet = tiny_unet()
    transformers = [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
    assert [t.first_block for t in transformers] == list(range(0, 2 * len(transformers), 2))
    x, context = torch.randn(2, 64, 4, 4), torch.randn(2, 2, 16)
    last = next(t for t in reversed(transformers) if t.norm.num_channels == 64)
    with torch.no_grad():
        assert torch.equal(last(x, unet.prepare(context)), last(x, context))


@pytest.mark.parametrize("tokens", TOKENS)
def test_training_in_mixed_precision_reaches_every_parameter_that_counts(tokens: int) -> None:
    unet = fill(UNet(**{**TINY, "use_checkpoint": True})).train()
    x, t, context = inputs(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        unet(x, t, context).square().mean().backward()
    dead = [] if tokens > 1 else ["norm2", "attn2.to_q", "attn2.to_k"]
    for name, parameter in unet.named_parameters():
        if any(word in name for word in dead):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
def test_in_half_precision_the_vectors_stay_float32(tokens: int, dtype: torch.dtype) -> None:
    block = random_block().to(dtype)
    x, context = torch.randn(2, 9, 64).to(dtype), torch.randn(2, tokens, 16).to(dtype)
    vectors = block.prepare(context)
    assert all(tensor.dtype == torch.float32 for tensor in vectors.tensors())
    with torch.no_grad():
        out, expected = block(x, vectors), published(block.double(), x.double(), context.double())
    assert out.dtype == dtype
    # A dozen roundings of 2^-9 or 2^-12 each, in parts that add up.
    error = (out.double() - expected).norm() / expected.norm()
    assert float(error) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_block_compiles_whole(tokens: int) -> None:
    block = random_block().float()
    x, context = torch.randn(2, 9, 64), torch.randn(2, tokens, 16)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, context), block(x, context))
        vectors = block.prepare(context)
        torch.testing.assert_close(compiled(x, vectors), block(x, context))


def test_a_prepared_context_that_does_not_fit_is_one_sentence() -> None:
    unet = tiny_unet()
    x, t, context = inputs(1)
    prepared = unet.prepare(context)
    with pytest.raises(ValueError, match="prepared for 2 windows and 14 blocks, expected 3 and 14"):
        unet(x, t, prepared[:2])
    other = UNet(**{**TINY, "transformer_depth": 1}).prepare(context)
    with pytest.raises(ValueError, match="prepared for 3 windows and 7 blocks, expected 3 and 14"):
        unet(x, t, other)
    plain = UNet(**{**TINY, "use_spatial_transformer": False, "context_dim": None})
    with pytest.raises(ValueError, match="context is given, expected no context"):
        plain.prepare(context)
    for bad in (context[0], context[..., :15], context[:, :0]):
        with pytest.raises(ValueError, match=r"expected \[N, T, 16\]"):
            unet.prepare(bad)


def test_vectors_say_what_they_hold() -> None:
    values = torch.zeros(2, 4)
    assert len(TokenVectors(values).tensors()) == 1
    assert len(TokenVectors(values, values, values).tensors()) == 3
