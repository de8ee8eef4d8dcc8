# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from ssldiff_fast.canvas.noise import canvas_noise, philox4x32, philox_normal

# Random123's kat_vectors for philox4x32 with 10 rounds.
KNOWN = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in words(counter))
    k0, k1 = words(key)
    assert [int(word[0]) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == words(expected)


def test_a_pixel_has_the_same_noise_in_every_canvas() -> None:
    whole = canvas_noise(7, 3, 40, 33, step=4)
    assert torch.equal(philox_normal(7, 2, (11, 29), 21, step=4), whole[:2, 11:29, :21])


def test_rows_far_down_a_huge_canvas_are_drawn_by_themselves() -> None:
    y = 2**31 + 5
    assert torch.equal(
        philox_normal(7, 1, (y, y + 3), 4), philox_normal(7, 1, (y - 9, y + 3), 4)[:, 9:]
    )


def test_canvases_wider_than_a_chunk_are_whole() -> None:
    wide = philox_normal(1, 1, (0, 2), 70_000)
    assert torch.equal(wide[:, :, 69_990:], philox_normal(1, 1, (0, 2), 70_000)[:, :, 69_990:])
    assert torch.equal(wide[:, :, :10], canvas_noise(1, 1, 2, 10))


def test_seed_step_and_channel_each_change_the_noise() -> None:
    draws = [
        canvas_noise(0, 2, 8, 8)[0],
        canvas_noise(0, 2, 8, 8)[1],
        canvas_noise(1, 2, 8, 8)[0],
        canvas_noise(2**32, 2, 8, 8)[0],
        canvas_noise(0, 2, 8, 8, step=1)[0],
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert not bool((a == b).any())


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = canvas_noise(3, 3, 256, 256)
    flat = noise.flatten().double()
    assert noise.dtype == torch.float32
    assert stats.kstest(flat.numpy(), "norm").pvalue > 0.01
    assert abs(float((flat**4).mean()) - 3.0) < 0.08
    for a, b in [
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[1:], noise[:-1]),
        (canvas_noise(3, 3, 256, 256, step=1), noise),
    ]:
        # 200,000 pairs of independent normals: a standard deviation of 0.0023.
        assert abs(float((a * b).mean())) < 0.01


def test_no_rows_are_an_empty_canvas() -> None:
    assert philox_normal(0, 3, (5, 5), 4).shape == (3, 0, 4)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}; expected"):
        canvas_noise(seed, 1, 2, 2)


def test_coordinates_beyond_the_counter_are_named() -> None:
    with pytest.raises(ValueError, match="coordinates and steps count from 0"):
        philox_normal(0, 1, (2**32, 2**32 + 1), 4)
    with pytest.raises(ValueError, match="step -1"):
        canvas_noise(0, 1, 2, 2, step=-1)
    with pytest.raises(ValueError, match="width is 0"):
        canvas_noise(0, 1, 2, 0)
