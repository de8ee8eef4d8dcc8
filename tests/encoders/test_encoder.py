# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ssldiff_fast.encoders import Encoder, EncoderSpec
from ssldiff_fast.encoders.encoder import build_network, weights_hash

SIDE = 32
SPEC = EncoderSpec(
    name="tiny",
    network="test_resnet",
    width=12,
    patch_px=SIDE,
    mean=(0.7, 0.5, 0.6),
    std=(0.2, 0.3, 0.25),
    head=True,
)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(SPEC)


def patches(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def test_embeddings_are_those_of_the_network_on_normalised_pixels(encoder: Encoder) -> None:
    x = torch.from_numpy(patches()).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (SPEC.mean, SPEC.std))
    with torch.no_grad():
        expected = encoder.network((x - mean) / std)
    found = encoder(patches())
    assert found.shape == (3, 1, 12)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0], expected)


def test_bytes_and_floats_tensors_and_arrays_give_the_same(encoder: Encoder) -> None:
    pixels = patches()
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    expected = encoder(pixels)
    assert torch.equal(encoder(torch.from_numpy(pixels)), expected)
    torch.testing.assert_close(encoder(floats), expected)
    torch.testing.assert_close(encoder(floats.numpy().astype(np.float64)), expected)


def test_a_patch_has_the_same_embedding_in_any_company(encoder: Encoder) -> None:
    together = encoder(patches())
    for index, patch in enumerate(patches()):
        torch.testing.assert_close(encoder(patch[None])[0], together[index], rtol=1e-4, atol=1e-5)


def test_no_patches_have_no_embeddings(encoder: Encoder) -> None:
    assert encoder(np.zeros((0, SIDE, SIDE, 3), np.uint8)).shape == (0, 1, 12)


def test_pooled_features_are_used_where_there_is_no_head() -> None:
    width = build_network(SPEC).num_features
    assert isinstance(width, int)
    encoder = Encoder(replace(SPEC, head=False, width=width))
    assert encoder(patches()).shape == (3, 1, width)


def test_weights_in_half_precision_load_and_have_the_same_hash(encoder: Encoder) -> None:
    weights = encoder.network.state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    again = Encoder(SPEC, half)
    assert again.spec.weights_hash == encoder.spec.weights_hash == weights_hash(weights)
    assert next(again.network.parameters()).dtype == torch.float32


def test_the_hash_changes_with_any_weight_name_or_shape(encoder: Encoder) -> None:
    weights = dict(encoder.network.state_dict())
    name = next(iter(weights))
    others = [
        {**weights, name: weights[name] + 1},
        {**weights, "more": torch.zeros(1)},
        {**weights, name: weights[name].flatten()},
        {k: v for k, v in weights.items() if k != name},
    ]
    hashes = {weights_hash(other) for other in others}
    assert len(hashes) == 4
    assert weights_hash(weights) not in hashes
    assert weights_hash(dict(reversed(weights.items()))) == weights_hash(weights)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, SIDE, SIDE + 1, 3), np.uint8),
        np.zeros((SIDE, SIDE, 3), np.uint8),
        np.zeros((1, 3, SIDE, SIDE), np.uint8),
        np.zeros((1, SIDE, SIDE, 3), np.float32),
        np.zeros((1, 4, SIDE, SIDE), np.float32),
    ],
)
def test_patches_of_another_shape_or_kind_are_named(encoder: Encoder, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 32, 32, 3\] or floats"):
        encoder(wrong)


def test_weights_of_another_network_are_one_sentence(encoder: Encoder) -> None:
    weights = dict(encoder.network.state_dict())
    weights.pop(next(iter(weights)))
    with pytest.raises(ValueError, match="weights do not fit the encoder 'tiny'") as caught:
        Encoder(SPEC, weights)
    assert "\n" not in str(caught.value)


def test_the_weights_must_be_those_that_the_spec_names(encoder: Encoder) -> None:
    weights = encoder.network.state_dict()
    assert Encoder(encoder.spec, weights).spec == encoder.spec
    with pytest.raises(ValueError, match="but there are other weights"):
        Encoder(encoder.spec, {k: v + 1 for k, v in weights.items()})
    with pytest.raises(ValueError, match="but there are no weights"):
        Encoder(encoder.spec)


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(ValueError, match=r"'resnet_of_the_future', which timm \S+ does not have"):
        Encoder(replace(SPEC, network="resnet_of_the_future"))


def test_features_of_another_width_are_named() -> None:
    with pytest.raises(ValueError, match="says width 13, but the features of 'test_resnet' are"):
        Encoder(replace(SPEC, head=False, width=13))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 1.5}, "width is 1.5"),
        ({"tokens": -1}, "tokens is -1"),
        ({"patch_px": 0}, "patch_px is 0"),
        ({"mpp": 0.0}, "mpp is 0.0"),
        ({"mpp": float("nan")}, "mpp is nan"),
        ({"mean": (0.5,)}, "one number a channel"),
    ],
)
def test_a_spec_that_no_encoder_can_have_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SPEC, **changes)


def test_a_spec_from_json_equals_the_one_that_was_written() -> None:
    assert replace(SPEC, mean=list(SPEC.mean), std=list(SPEC.std)) == SPEC  # type: ignore[arg-type]
