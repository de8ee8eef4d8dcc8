# SPDX-License-Identifier: Apache-2.0
"""Conditioners: normalised inside, zero stays zero, published names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from golden_inputs import fill, golden_input, published_shapes
from ssldiff_fast.models import PatchConditioner, PatchRegionConditioner
from ssldiff_fast.models.conditioner import build_conditioner


def test_tokens_are_a_linear_map_of_the_normalised_embedding() -> None:
    conditioner = fill(PatchConditioner(6, 10))
    embeddings = 30 * golden_input("embeddings", 3, 1, 6)
    expected = F.linear(
        embeddings / embeddings.norm(dim=-1, keepdim=True),
        conditioner.patch_fc.weight,
        conditioner.patch_fc.bias,
    )
    torch.testing.assert_close(conditioner(embeddings), expected)
    torch.testing.assert_close(conditioner(7 * embeddings), expected)


def test_without_normalising_the_length_counts() -> None:
    conditioner = fill(PatchConditioner(6, 10, normalize=False))
    embeddings = golden_input("embeddings", 3, 1, 6)
    expected = F.linear(embeddings, conditioner.patch_fc.weight, conditioner.patch_fc.bias)
    torch.testing.assert_close(conditioner(embeddings), expected)


def test_the_null_token_is_the_conditioner_of_zeros() -> None:
    patch = fill(PatchConditioner(6, 10))
    assert torch.equal(patch.null(2), patch.patch_fc.bias.expand(2, 1, 10))
    both = fill(PatchRegionConditioner(6, 8, 10))
    biases = torch.stack([both.patch_fc.bias, both.region_fc.bias])
    assert torch.equal(both.null(2), biases.expand(2, 2, 10))


def test_patch_and_region_ignore_the_padding_of_the_shorter() -> None:
    conditioner = fill(PatchRegionConditioner(6, 8, 10))
    embeddings = golden_input("embeddings", 3, 2, 8)
    padded = embeddings.clone()
    padded[:, 0, 6:] = 0
    tokens = conditioner(padded)
    assert tokens.shape == (3, 2, 10)
    assert conditioner.width == 8
    torch.testing.assert_close(
        tokens[:, 1], conditioner.region_fc(F.normalize(embeddings[:, 1], dim=-1))
    )
    torch.testing.assert_close(
        tokens[:, 0], conditioner.patch_fc(F.normalize(embeddings[:, 0, :6], dim=-1))
    )


def test_a_missing_region_is_the_zero_vector() -> None:
    conditioner = fill(PatchRegionConditioner(6, 8, 10))
    patch = golden_input("patch", 3, 1, 6)
    with_zero = torch.zeros(3, 2, 8)
    with_zero[:, :1, :6] = patch
    assert torch.equal(conditioner(patch), conditioner(with_zero))


def test_half_precision_weights_normalise_in_float32() -> None:
    conditioner = fill(PatchConditioner(512, 8))
    embeddings = 300 * golden_input("wide", 2, 1, 512)  # its norm overflows float16 when squared
    expected = conditioner(embeddings)
    tokens = conditioner.half()(embeddings)
    assert tokens.dtype is torch.float16
    torch.testing.assert_close(tokens.float(), expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("section", "conditioner"),
    [
        ("LatentDiffusion state_dict, cond=patch", PatchConditioner(384, 512)),
        ("LatentDiffusion state_dict, cond=ssl", PatchRegionConditioner(384, 768, 512)),
    ],
)
def test_has_the_published_parameters(section: str, conditioner: torch.nn.Module) -> None:
    published = published_shapes("ldm_toplevel_keys.txt", section)
    prefix = "cond_stage_model."
    ours = {prefix + name: tuple(p.shape) for name, p in conditioner.named_parameters()}
    assert ours == {k: v for k, v in published.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    "conditioner",
    [PatchConditioner(6, 10, normalize=False), PatchRegionConditioner(6, 8, 10)],
)
def test_configuration_survives_a_round_trip(conditioner: torch.nn.Module) -> None:
    again = build_conditioner(conditioner.config())
    assert type(again) is type(conditioner)
    assert again.config() == conditioner.config()


@pytest.mark.parametrize("shape", [[3, 6], [3, 1, 7], [3, 2, 6, 1]])
def test_a_wrong_width_is_named(shape: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, T, 6\]"):
        PatchConditioner(6, 10)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [[3, 6], [3, 2, 6], [3, 1, 8], [3, 3, 8]])
def test_a_wrong_shape_for_patch_and_region_is_named(shape: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 2, 8\]"):
        PatchRegionConditioner(6, 8, 10)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "text", "width": 6}, "type is 'text'"),
        ({"type": "patch", "width": 6, "context_dim": 0}, "context_dim=0"),
        ({"type": "patch", "width": 6, "context_dim": 10, "null": "learned"}, "'learned'"),
        ({"type": "patch", "wdith": 6, "context_dim": 10}, "wdith"),
    ],
)
def test_a_wrong_configuration_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_conditioner(config)
