# SPDX-License-Identifier: Apache-2.0
"""The U-Net against the published implementation's numbers, names and keywords."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from golden_inputs import (
    UNET_A,
    UNET_B,
    fill,
    golden_input,
    golden_output,
    published_shapes,
    relative_error,
)
from ssldiff_fast.models import UNet
from ssldiff_fast.models.unet_blocks import timestep_embedding

PAPER = {
    **UNET_A,
    "image_size": 64,
    "model_channels": 192,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 3, 5],
    "context_dim": 512,
}
TINY: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
}
TINY_CONDITIONED = {**TINY, "use_spatial_transformer": True, "context_dim": 16}


@pytest.mark.golden
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("tag", "config", "tokens"),
    [("unet_a_1tok", UNET_A, 1), ("unet_a_2tok", UNET_A, 2), ("unet_b_5tok", UNET_B, 5)],
)
def test_reproduces_the_published_network(
    tag: str, config: dict[str, Any], tokens: int, layout: torch.memory_format
) -> None:
    unet = fill(UNet(**config)).to(memory_format=layout)
    middle: list[torch.Tensor] = []
    unet.middle_block.register_forward_hook(lambda module, args, out: middle.append(out))
    x = golden_input(f"{tag}.x", 2, 3, 32, 32).contiguous(memory_format=layout)
    context = golden_input(f"{tag}.context", 2, tokens, 64)
    with torch.no_grad():
        out = unet(x, torch.tensor([17, 803]), context)
    assert relative_error(out, golden_output(f"{tag}.out")) < 1e-5
    assert relative_error(middle[0], golden_output(f"{tag}.middle")) < 1e-5


@pytest.mark.parametrize(
    ("section", "config"), [("SMALL", {**UNET_A, "context_dim": 512}), ("PAPER", PAPER)]
)
def test_has_exactly_the_published_parameters_in_their_order(
    section: str, config: dict[str, Any]
) -> None:
    with torch.device("meta"):
        unet = UNet(**config)
    ours = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    published = published_shapes("unet_keys.txt", section)
    assert list(ours.items()) == list(published.items())


@pytest.mark.golden
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_close_and_keep_the_dtype_of_x(dtype: torch.dtype) -> None:
    unet = fill(UNet(**UNET_A))
    inputs = (
        golden_input("unet_a_1tok.x", 2, 3, 32, 32),
        torch.tensor([17, 803]),
        golden_input("unet_a_1tok.context", 2, 1, 64),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        autocast = unet(*inputs)
    with torch.no_grad():
        half = unet.to(dtype)(*inputs)
    for out in (autocast, half):
        assert out.dtype is torch.float32
        assert relative_error(out, golden_output("unet_a_1tok.out")) < 3e-2


def test_a_new_network_predicts_zero_because_its_branches_start_at_zero() -> None:
    unet = UNet(**TINY_CONDITIONED)
    out = unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 5]), torch.randn(2, 1, 16))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(
    "options",
    [
        {"use_scale_shift_norm": True},
        {"resblock_updown": True},
        {"conv_resample": False},
        {"num_heads": -1, "num_head_channels": 16},
        {"use_new_attention_order": True},
        {"num_heads_upsample": 4},
        {"dropout": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_published_option_without_context_runs_and_trains(options: dict[str, Any]) -> None:
    unet = fill(UNet(**{**TINY, **options})).train()
    out = unet(torch.randn(2, 3, 8, 8), torch.tensor(5))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_the_two_orders_of_qkv_are_permutations_of_each_other() -> None:
    unets = [fill(UNet(**TINY, use_new_attention_order=new)) for new in (False, True)]
    state = unets[0].state_dict()
    for name in [name for name in state if ".qkv." in name]:
        # by head (q, k, v) -> by q, k, v (head)
        state[name] = state[name].unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2)
    unets[1].load_state_dict(state)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([9])
    with torch.no_grad():
        torch.testing.assert_close(unets[0](x, t), unets[1](x, t))


def test_deeper_transformers_and_checkpointing_give_the_same_gradients() -> None:
    results = []
    for use_checkpoint in (False, True):
        config = {**TINY_CONDITIONED, "transformer_depth": 2, "use_checkpoint": use_checkpoint}
        unet = fill(UNet(**config)).train()
        x, context = golden_input("x", 2, 3, 8, 8), golden_input("context", 2, 2, 16)
        unet(x, torch.tensor([1, 2]), context).square().mean().backward()
        results.append([p.grad for p in unet.parameters()])
    for plain, saved in zip(*results):
        torch.testing.assert_close(plain, saved)


def test_timestep_embedding_is_cosines_then_sines() -> None:
    out = timestep_embedding(torch.tensor([0.0, 2.5]), 5)
    assert out.shape == (2, 5)
    assert out[0].tolist() == [1, 1, 0, 0, 0]
    expected = torch.tensor([2.5, 2.5 / 100])
    torch.testing.assert_close(out[1, :2], expected.cos())
    torch.testing.assert_close(out[1, 2:4], expected.sin())


def test_configuration_survives_a_round_trip() -> None:
    unet = UNet(**TINY_CONDITIONED, use_fp16=True)
    again = UNet(**unet.config.to_config())
    assert again.config == unet.config


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_chanels": 32}, TypeError, "unknown keyword 'model_chanels'"),
        ({"num_classes": 10}, ValueError, "num_classes=10"),
        ({"n_embed": 256}, ValueError, "n_embed=256"),
        ({"dims": 3}, ValueError, "dims=3"),
        ({"model_channels": 40}, ValueError, "multiple of 32"),
        ({"model_channels": -32}, ValueError, "model_channels=-32"),
        ({"channel_mult": []}, ValueError, "channel_mult"),
        ({"dropout": 1.5}, ValueError, "dropout=1.5"),
        ({"num_heads": -1}, ValueError, "num_heads"),
        ({"num_heads": 7}, ValueError, "do not divide into heads"),
        ({"context_dim": None}, ValueError, "context_dim"),
        ({"use_spatial_transformer": False}, ValueError, "use_spatial_transformer"),
        ({"transformer_depth": 0}, ValueError, "transformer_depth=0"),
    ],
)
def test_a_wrong_keyword_is_named(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        UNet(**{**TINY_CONDITIONED, **change})


def test_a_missing_keyword_is_named() -> None:
    with pytest.raises(TypeError, match="missing keyword in_channels"):
        UNet(**{k: v for k, v in TINY.items() if k != "in_channels"})


@pytest.mark.parametrize(
    ("x", "t", "context", "words"),
    [
        ([2, 4, 8, 8], [2], [2, 1, 16], r"x has shape \[2, 4, 8, 8\], expected \[B, 3, h, w\]"),
        ([2, 3, 8, 9], [2], [2, 1, 16], "multiples of 2"),
        ([2, 3, 8, 8], [3], [2, 1, 16], r"t has shape \[3\]"),
        ([2, 3, 8, 8], [2], None, "context is missing"),
        ([2, 3, 8, 8], [2], [2, 1, 15], r"expected \[2, T, 16\]"),
        ([2, 3, 8, 8], [2], [1, 1, 16], r"expected \[2, T, 16\]"),
    ],
)
def test_a_wrong_input_is_named(
    x: list[int], t: list[int], context: list[int] | None, words: str
) -> None:
    unet = UNet(**TINY_CONDITIONED)
    tokens = None if context is None else torch.zeros(context)
    with pytest.raises(ValueError, match=words):
        unet(torch.zeros(x), torch.zeros(t), tokens)


def test_context_for_an_unconditioned_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="context is given"):
        UNet(**TINY)(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 1, 16))


def test_the_map_of_the_lower_levels_stands_for_them() -> None:
    # With as many channels as groups a norm would undo what a timestep adds.
    unet = fill(UNet(**{**TINY_CONDITIONED, "model_channels": 64}))
    entered: list[int] = []
    unet.middle_block.register_forward_hook(lambda *_: entered.append(1))
    x = golden_input("x", 2, 3, 8, 8)
    context = golden_input("context", 4, 1, 16)
    with torch.no_grad():
        exact, deep = unet.with_deep(x, torch.tensor(500), context)
        again, kept = unet.with_deep(x, torch.tensor(500), context, deep)
        other, _ = unet.with_deep(x, torch.tensor(400), context, deep)
        whole = unet(x, torch.tensor(400), context)
    assert len(entered) == 2
    assert kept is deep
    assert deep.shape == (4, unet.deep_width, 8, 8)
    assert torch.equal(again, exact)
    assert not torch.equal(other, exact)
    assert not torch.equal(other, whole)
    with pytest.raises(ValueError, match=r"deep has shape \[2, 128, 8, 8\], expected \[4, width"):
        unet.with_deep(x, torch.tensor(500), context, deep[:2])
