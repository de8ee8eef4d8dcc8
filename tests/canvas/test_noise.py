# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from ssldiff_fast.canvas.noise import canvas_noise, offset_shares
from ssldiff_fast.ops import philox_normal


def test_the_noise_of_a_canvas_is_that_of_its_coordinates() -> None:
    assert torch.equal(canvas_noise(7, 3, 40, 33, step=4), philox_normal(7, 3, (0, 40), 33, step=4))


def test_a_recipe_and_its_seed_mean_the_same_noise_for_ever() -> None:
    published = [0.01888273, -0.51768988, 0.28260022, 0.4240531]
    torch.testing.assert_close(
        canvas_noise(7, 2, 8, 8, step=3)[1, 5, :4], torch.tensor(published), rtol=1e-6, atol=0
    )


def test_the_window_lattice_starts_where_the_seed_says() -> None:
    assert offset_shares(7) == (0.7896759384311736, 0.11433548806235194)
    starts = {offset_shares(seed) for seed in range(50)}
    assert len(starts) == 50
    assert all(0 <= share < 1 for start in starts for share in start)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}; expected"):
        canvas_noise(seed, 1, 2, 2)
    with pytest.raises(ValueError, match=f"seed is {seed}; expected"):
        offset_shares(seed)
