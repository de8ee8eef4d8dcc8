# SPDX-License-Identifier: Apache-2.0
"""`sf.optimize`: the same results from faster layers, and a line that says which."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import ssldiff_fast as sf
from compvis_network import UNetModel
from golden_inputs import UNET_A, UNET_B, fill, golden_input, golden_output, relative_error
from ssldiff_fast.models import UNet
from ssldiff_fast.models.feed_forward import GEGLU
from ssldiff_fast.models.optimize import Norm, OneTokenProcessor, Product
from ssldiff_fast.models.winograd import LEAST_CHANNELS, Conv3x3


def diffusers_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return unet.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_diffusers_unet_gives_the_same_output(
    tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    unet = diffusers_unet()
    x, context = torch.randn(2, 3, 8, 8), torch.randn(2, tokens, 16)
    names = list(unet.state_dict())
    with torch.no_grad():
        expected = unet(x, 17, encoder_hidden_states=context).sample
        with caplog.at_level(logging.INFO):
            assert sf.optimize(unet) is unet
        out = unet(x, 17, encoder_hidden_states=context).sample
    assert relative_error(out, expected) < 5e-6  # measured 2.3e-6, by Winograd
    assert list(unet.state_dict()) == names
    kinds = {type(module) for module in unet.modules()}
    assert {Product, Conv3x3, GEGLU, Norm} <= kinds
    said = caplog.messages[-1]
    assert "UNet2DConditionModel" in said
    assert "products by oneDNN" in said
    assert "convolutions by Winograd" in said
    assert "norms by group_norm_silu" in said
    assert "gates in one pass" in said
    assert "one token" in said


def test_with_one_token_queries_and_keys_of_diffusers_are_not_read() -> None:
    unet = sf.optimize(diffusers_unet())
    x, context = torch.randn(1, 3, 8, 8), torch.randn(1, 1, 16)
    with torch.no_grad():
        expected = unet(x, 17, encoder_hidden_states=context).sample
        for name, parameter in unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter.fill_(torch.nan)
        assert torch.equal(unet(x, 17, encoder_hidden_states=context).sample, expected)


def test_twice_is_once() -> None:
    unet = sf.optimize(sf.optimize(diffusers_unet()))
    processors = unet.attn_processors.values()
    wrapped = [p for p in processors if isinstance(p, OneTokenProcessor)]
    assert wrapped
    assert not any(isinstance(p.inner, OneTokenProcessor) for p in wrapped)


def test_training_goes_on_as_before() -> None:
    unet = sf.optimize(diffusers_unet())
    unet(
        torch.randn(1, 3, 8, 8), 17, encoder_hidden_states=torch.randn(1, 3, 16)
    ).sample.sum().backward()
    assert all(p.grad is not None for p in unet.parameters())


def test_our_own_unet_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    unet = fill(UNet(**UNET_A)).eval()
    with caplog.at_level(logging.INFO):
        assert sf.optimize(unet) is unet
    for words in ("shared guidance prefix", "group_norm_silu", "token_attention", "oneDNN"):
        assert words in caplog.messages[-1]


def test_only_convolutions_of_the_known_kind_are_changed() -> None:
    width = LEAST_CHANNELS
    kept = [
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.Conv2d(width, width, 3),
        nn.Conv2d(width, width, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(width, width, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1),
    ]
    network = sf.optimize(nn.Sequential(*kept, nn.Conv2d(width, width, 3, padding=1)))
    assert [type(m) is Conv3x3 for m in network] == [False] * len(kept) + [True]


def test_an_unknown_network_is_left_as_it_is_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = nn.Sequential(nn.ReLU())
    assert sf.optimize(network) is network
    assert "Sequential is used as it is" in caplog.messages[-1]


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(TypeError, match="network is a dict"):
        sf.optimize({})  # type: ignore[type-var]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("tag", "config", "tokens"), [("unet_a_1tok", UNET_A, 1), ("unet_b_5tok", UNET_B, 5)]
)
def test_a_unet_of_the_compvis_code_becomes_ours(
    tag: str, config: dict[str, Any], tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    network = fill(UNetModel(**config))
    x, context = (
        golden_input(f"{tag}.x", 2, 3, 32, 32),
        golden_input(f"{tag}.context", 2, tokens, 64),
    )
    t, published = torch.tensor([17, 803]), golden_output(f"{tag}.out")
    before = dict(network.named_parameters())
    with torch.no_grad():
        assert relative_error(network(x, t, context), published) < 1e-5
        with caplog.at_level(logging.INFO):
            assert sf.optimize(network) is network
        assert relative_error(network(x, timesteps=t, context=context), published) < 1e-5
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert isinstance(network, UNet)
    assert network.num_classes is None  # what its owner may look at
    for words in ("UNetModel:", "shared guidance prefix", "group_norm_silu", "token_attention"):
        assert words in caplog.messages[-1]
    again = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    with torch.no_grad():
        assert torch.equal(again(x, t, context), network(x, t, context))


def test_what_became_ours_takes_a_guided_pair_and_trains() -> None:
    network = sf.optimize(fill(UNetModel(**UNET_A)))
    x, context, t = torch.randn(2, 3, 32, 32), torch.randn(4, 1, 64), torch.tensor([5, 6])
    with torch.no_grad():
        pair = network(x, t, context)
        assert relative_error(pair[2:], network(x, t, context[2:])) < 1e-5
    network(x, t, context[:2]).sum().backward()
    assert all(p.grad is not None for p in network.out.parameters())
    with pytest.raises(ValueError, match="takes no classes"):
        network(x, t, context, y=torch.zeros(2))


def changed(network: nn.Module, change: str) -> nn.Module:
    if change == "computes something else":
        network.out[1] = nn.ReLU()
    elif change == "has hooks":
        network.middle_block.register_forward_hook(lambda module, args, out: None)
    elif change == "parameters":
        network.out.append(nn.Conv2d(3, 3, 1))
    elif change == "settings":
        network.num_heads = 0
    return network


@pytest.mark.parametrize(
    "change", ["computes something else", "has hooks", "parameters", "settings"]
)
def test_one_that_is_not_quite_of_that_shape_keeps_its_blocks_and_the_log_says_why(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = changed(fill(UNetModel(**UNET_A)), change)
    x, context, t = torch.randn(2, 3, 32, 32), torch.randn(2, 1, 64), torch.tensor([5, 6])
    with torch.no_grad():
        expected = network(x, t, context)
        with caplog.at_level(logging.INFO):
            sf.optimize(network)
        assert type(network) is UNetModel
        assert relative_error(network(x, t, context), expected) < 5e-6
    assert "UNetModel keeps its blocks: " in caplog.messages[0]
    assert change in caplog.messages[0]
    assert "products by oneDNN" in caplog.messages[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_said_of_ours_is_what_its_dtype_gets(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        sf.optimize(fill(UNet(**UNET_A)).to(dtype))
    exact = dtype == torch.float32
    for words, expected in (("oneDNN", exact), ("feed-forwards", exact), ("gates", not exact)):
        assert (words in caplog.messages[-1]) == expected


def test_layers_of_half_precision_are_left_to_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).to(torch.bfloat16)
    sf.optimize(network)
    assert type(network[0]) is nn.Linear
    assert "is used as it is" in caplog.messages[-1]


def test_channels_last_alone_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        sf.optimize(nn.Sequential(nn.Conv2d(3, 8, 5)))
    assert caplog.messages[-1] == "optimize: Sequential: 1 convolutions channels-last"
