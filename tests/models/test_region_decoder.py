# SPDX-License-Identifier: Apache-2.0
"""Parts of a canvas decoded by themselves are parts of one decode of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_inputs import VQ_SMALL, fill
from ssldiff_fast.canvas import canvas_noise
from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.autoencoder_blocks import AttnBlock
from ssldiff_fast.models.local_autoencoder import (
    FixedGroupNorm,
    WindowedAttention,
    local_autoencoder,
    measure_statistics,
    receptive_halo,
)
from ssldiff_fast.models.region_decoder import StagedDecoder, region_decoder
from ssldiff_fast.ops import GroupNormStatistics

DDCONFIG = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "resolution": 32}
VQ_F4 = {"ch": 32, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "z_channels": 3}
WINDOW = (8, 8)


def vq() -> VQModel:
    return fill(VQModel(**VQ_SMALL), "first_stage_model.").eval()


def kl(**changes: Any) -> AutoencoderKL:
    ddconfig = {**DDCONFIG, "double_z": True, **changes}
    return fill(AutoencoderKL(ddconfig=ddconfig, embed_dim=4), "first_stage_model.").eval()


BUILDS = {"vq": vq, "kl": kl, "kl with attention at two levels": lambda: kl(attn_resolutions=[16])}


def fixed(vae: Any) -> Any:
    latents = canvas_noise(1, vae.embed_dim, 8, 8)[None]
    return measure_statistics(vae, vae.decode, latents.to(next(vae.parameters()).dtype))


def part(network: StagedDecoder, latent: Tensor, rows: Any, columns: Any) -> Tensor:
    """The image of some latents of [C, H, W], of nothing but what they need."""
    reach = [
        network.reach(tile, size, axis=axis)
        for axis, (tile, size) in enumerate(zip((rows, columns), latent.shape[1:]))
    ]
    read = [slice(*along.read) for along in reach]
    return network.decode(latent[None, :, read[0], read[1]], rows=reach[0], columns=reach[1])[0]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((45, 37), (0, 45), (0, 37)),
        ((45, 37), (0, 7), (0, 9)),
        ((45, 37), (17, 24), (15, 16)),
        ((45, 37), (38, 45), (30, 37)),
        ((8, 8), (3, 8), (0, 8)),
        ((1, 3), (0, 1), (1, 3)),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_part_is_that_part_of_one_decode_of_the_whole(
    name: str, size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    vae = BUILDS[name]()
    statistics, latent = fixed(vae), canvas_noise(0, vae.embed_dim, *size)
    network = region_decoder(vae, statistics, WINDOW, vae.embed_dim)
    if "two levels" in name:  # where the windows of `local_autoencoder` are those of latents
        whole = part(network, latent, (0, size[0]), (0, size[1]))
    else:
        undivided: Any = local_autoencoder(vae, statistics, WINDOW)
        whole = undivided.decode(latent[None])[0]
    f = vae.downsample_factor
    expected = whole[:, rows[0] * f : rows[1] * f, columns[0] * f : columns[1] * f]
    made = part(network, latent, rows, columns)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_where_a_window_sees_everything_it_is_the_autoencoder_itself() -> None:
    vae, latent = vq(), canvas_noise(0, 3, 8, 6)
    network = region_decoder(vae, measure_statistics(vae, vae.decode, latent[None]), WINDOW, 3)
    made = part(network, latent, (0, 8), (0, 6))
    torch.testing.assert_close(made, vae.decode(latent[None])[0], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_attention_sees_the_window_around_what_attends() -> None:
    block = fill(AttnBlock(32))
    one = torch.ones(1, 32)
    statistics = GroupNormStatistics.from_variance(torch.zeros_like(one), one)
    block.norm = FixedGroupNorm(block.norm, statistics)  # type: ignore[assignment]
    attention = WindowedAttention(block, (16, 16)).eval()
    # Blocks of 8 on a map of 45, of which 6 to 42 are wanted.
    assert list(attention.blocks((6, 42), 45, 0)) == [
        ((6, 8), (0, 16)),
        ((8, 16), (4, 20)),
        ((16, 24), (12, 28)),
        ((24, 32), (20, 36)),
        ((32, 40), (28, 44)),
        ((40, 42), (29, 45)),
    ]
    assert attention.reach((6, 42), 45, 0) == (0, 45)
    x = canvas_noise(0, 32, 45, 21)[None]
    changed = x.clone()
    changed[:, :, :6] += 1.0
    made, other = attention(x), attention(changed)
    assert torch.equal(made[:, :, 16:], other[:, :, 16:])  # the window of 16 begins at 12
    assert not torch.allclose(made[:, :, 8:12], other[:, :, 8:12])
    # A map narrower than a window is seen whole, at once.
    assert list(attention.blocks((2, 9), 9, 1)) == [((2, 9), (0, 9))]
    torch.testing.assert_close(attention(x[:, :, :9, :9]), block(x[:, :, :9, :9]))


def test_without_attention_a_tile_needs_the_traced_halo() -> None:
    builds: list[Any] = [VQModel(ddconfig=VQ_F4, n_embed=8, embed_dim=3), kl()]
    for vae in builds:
        network = region_decoder(vae, {}, (16, 16), 3)
        network.stages = [
            stage
            for stage in network.stages
            if not isinstance(getattr(stage, "module", None), WindowedAttention)
        ]
        reach = network.reach((500, 600), 1000, axis=0)
        halo = receptive_halo(vae, vae.embed_dim)
        assert reach.read == (500 - halo, 600 + halo)
        assert network.reach((0, 100), 110, axis=1).read == (0, 110)


@torch.no_grad()
def test_a_tile_reads_no_more_than_it_depends_on() -> None:
    vae = vq().double()
    network = region_decoder(vae, fixed(vae), WINDOW, 3)
    latent = canvas_noise(0, 3, 90, 8).double()
    tile = (40, 48)
    begin, end = network.reach(tile, 90, axis=0).read
    expected = part(network, latent, tile, (0, 8))
    for row, same in ((begin - 1, True), (begin, False), (end - 1, False), (end, True)):
        changed = latent.clone()
        changed[:, row] += 3.0
        whole = part(network, changed, (0, 90), (0, 8))[:, 160:192]
        assert torch.allclose(whole, expected, rtol=0, atol=1e-12) is same
