# SPDX-License-Identifier: Apache-2.0
"""Tiny networks of diffusers with random weights, each with conditioning that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.canvas import Conditioning, canvas_noise

TOKENS, WIDTH = 5, 16


def tokens(count: int, seed: int = 1) -> Tensor:
    return canvas_noise(seed, count, TOKENS, WIDTH)


def pooled(count: int, seed: int = 2) -> Tensor:
    return canvas_noise(seed, 1, count, 12)[0]


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make().eval()
        for parameter in network.parameters():  # some layers start from zero
            torch.nn.init.normal_(parameter, std=0.15)
    return network


def unet_2d_condition(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return _seeded(lambda: UNet2DConditionModel(**(settings | more)))


def unet_2d_condition_sdxl() -> Any:
    return unet_2d_condition(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )


def unet_2d(**more: Any) -> Any:
    from diffusers import UNet2DModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "num_class_embeds": 7,
    }
    return _seeded(lambda: UNet2DModel(**(settings | more)))


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
        )
    )


def pixart(**more: Any) -> Any:
    from diffusers import PixArtTransformer2DModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 1,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "caption_channels": WIDTH,
        "in_channels": 4,
        "cross_attention_dim": 24,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    return _seeded(lambda: PixArtTransformer2DModel(**(settings | more)))


def transformer_2d() -> Any:
    from diffusers import Transformer2DModel

    return _seeded(
        lambda: Transformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=4,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=7,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
    )


def _prompt(count: int) -> Conditioning:
    return Conditioning(tokens(count))


def _sdxl(count: int) -> Conditioning:
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(count, -1)
    return Conditioning(tokens(count), pooled(count), added={"time_ids": ids})


def _labels(count: int) -> Conditioning:
    return Conditioning(labels=torch.arange(count) % 6)


def _masked(count: int) -> Conditioning:
    mask = torch.ones(count, TOKENS, dtype=torch.int64)
    mask[:, 3:] = 0
    return Conditioning(tokens(count), token_mask=mask)


def _sd3(count: int) -> Conditioning:
    return Conditioning(tokens(count), pooled(count))


def _sized(count: int) -> Conditioning:
    added = {
        "resolution": torch.full((count, 2), 64.0),
        "aspect_ratio": torch.ones(count, 1),
    }
    return Conditioning(tokens(count), added=added)


# Name -> network, conditioning of so many windows, and how diffusers' pipelines call the network.
Case = tuple[Callable[[], Any], Callable[[int], Conditioning], Callable[..., Tensor]]


def _call(**names: str) -> Callable[..., Tensor]:
    def call(network: Any, x: Tensor, t: Any, cond: Conditioning) -> Tensor:
        values = {name: getattr(cond, kind) for name, kind in names.items()}
        return network(x, timestep=t.expand(len(x)), **values).sample

    return call


def _call_sdxl(network: Any, x: Tensor, t: Any, cond: Conditioning) -> Tensor:
    added = {"text_embeds": cond.pooled, "time_ids": cond.added["time_ids"]}
    return network(x, t, encoder_hidden_states=cond.tokens, added_cond_kwargs=added).sample


def _call_pixart(network: Any, x: Tensor, t: Any, cond: Conditioning) -> Tensor:
    output = network(
        x,
        encoder_hidden_states=cond.tokens,
        encoder_attention_mask=cond.token_mask,
        timestep=t.expand(len(x)),
        added_cond_kwargs=dict(cond.added) or {"resolution": None, "aspect_ratio": None},
    ).sample
    return output.chunk(2, dim=1)[0]


CASES: dict[str, Case] = {
    "UNet2DConditionModel": (
        unet_2d_condition,
        _prompt,
        _call(encoder_hidden_states="tokens"),
    ),
    "UNet2DConditionModel-masked": (
        unet_2d_condition,
        _masked,
        _call(encoder_hidden_states="tokens", encoder_attention_mask="token_mask"),
    ),
    "UNet2DConditionModel-SDXL": (unet_2d_condition_sdxl, _sdxl, _call_sdxl),
    "UNet2DConditionModel-classes": (
        lambda: unet_2d_condition(num_class_embeds=7),
        lambda count: Conditioning(tokens(count), labels=torch.arange(count) % 6),
        _call(encoder_hidden_states="tokens", class_labels="labels"),
    ),
    "UNet2DModel": (unet_2d, _labels, _call(class_labels="labels")),
    "SD3Transformer2DModel": (
        sd3,
        _sd3,
        _call(encoder_hidden_states="tokens", pooled_projections="pooled"),
    ),
    "PixArtTransformer2DModel": (pixart, _masked, _call_pixart),
    "PixArtTransformer2DModel-1024": (
        lambda: pixart(use_additional_conditions=True),
        _sized,
        _call_pixart,
    ),
    "Transformer2DModel": (transformer_2d, _labels, _call(class_labels="labels")),
}
