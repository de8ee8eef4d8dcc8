# SPDX-License-Identifier: Apache-2.0
"""The losses and the codebook's beginning, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from ssldiff_fast.ops.vq_nearest import vq_nearest
from ssldiff_fast.training.codes import codes_from_latents
from ssldiff_fast.training.encoder import nt_xent
from ssldiff_fast.training.vae import gradient_difference


def plain_nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float) -> float:
    """Chen et al. 2020, eq. 1, term by term."""
    views = [row / row.norm() for row in torch.cat([a, b]).double()]
    count, total = len(views), 0.0
    for i in range(count):
        j = (i + len(a)) % count
        others = [math.exp(views[i] @ views[k] / temperature) for k in range(count) if k != i]
        total -= math.log(math.exp(views[i] @ views[j] / temperature) / sum(others))
    return total / count


@pytest.mark.parametrize(("count", "temperature"), [(2, 0.2), (5, 0.5), (7, 1.0)])
def test_nt_xent_is_the_published_formula(count: int, temperature: float) -> None:
    a, b = torch.randn(2, count, 6)
    expected = plain_nt_xent(a, b, temperature)
    assert float(nt_xent(a, b, temperature)) == pytest.approx(expected, rel=1e-5)


def test_nt_xent_is_smaller_the_closer_the_partners_are() -> None:
    a = torch.randn(8, 16)
    losses = [float(nt_xent(a, a + s * torch.randn(8, 16), 0.2)) for s in (0.1, 1.0, 10.0)]
    assert losses == sorted(losses)


def test_the_gradient_difference_sees_edges_and_not_brightness() -> None:
    a = torch.rand(2, 3, 8, 8)
    assert float(gradient_difference(a, a + 0.3)) == pytest.approx(0, abs=1e-6)
    b = a.clone()
    b[..., 4:] += 0.5  # one edge of 7
    assert float(gradient_difference(a, b)) == pytest.approx(0.5 / 7, rel=1e-5)


def test_a_codebook_from_latents_uses_nearly_all_its_codes_where_a_random_one_does_not() -> None:
    latents = torch.randn(4000, 3) * torch.tensor([2.0, 1.0, 0.5]) + 5
    codes = codes_from_latents(latents, 128)
    error, used = nearest(latents, codes)
    assert codes.shape == (128, 3)
    assert used > 0.95 * 128
    random = torch.empty(128, 3).uniform_(-1 / 128, 1 / 128)
    random_error, random_used = nearest(latents, random)
    assert random_used < 20
    assert error < 0.05 * random_error


def nearest(latents: torch.Tensor, codes: torch.Tensor) -> tuple[float, int]:
    vectors, indices = vq_nearest(latents, codes)
    return float((vectors - latents).pow(2).mean()), indices.unique().numel()


def test_lloyds_steps_bring_codes_closer_than_a_random_subset() -> None:
    latents = torch.randn(2000, 3)
    subset = latents[torch.randperm(2000)[:64]]
    assert nearest(latents, codes_from_latents(latents, 64))[0] < 0.9 * nearest(latents, subset)[0]


def test_with_fewer_latents_than_codes_every_latent_is_a_code() -> None:
    latents = torch.randn(5, 3)
    codes = codes_from_latents(latents, 12)
    assert codes.shape == (12, 3)
    assert nearest(latents, codes)[0] < 1e-12
