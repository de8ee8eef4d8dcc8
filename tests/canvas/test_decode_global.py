# SPDX-License-Identifier: Apache-2.0
"""The global decoder gives what one decode of the whole canvas gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from golden_inputs import VQ_SMALL, fill
from ssldiff_fast.canvas import canvas_noise, feature_map, layerwise
from ssldiff_fast.canvas.feature_map import FeatureMap
from ssldiff_fast.canvas.layerwise import Layerwise
from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel

PLAIN = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "resolution": 32}


def vq() -> VQModel:
    return fill(VQModel(**VQ_SMALL), "first_stage_model.").eval()


def kl(**changes: Any) -> AutoencoderKL:
    ddconfig = {**PLAIN, "double_z": True, **changes}
    return fill(AutoencoderKL(ddconfig=ddconfig, embed_dim=4), "first_stage_model.").eval()


@pytest.mark.parametrize("name", ["vq", "kl", "kl with attention at two levels"])
@pytest.mark.parametrize("size", [(21, 14), (8, 8), (1, 3)])
@torch.no_grad()
def test_bands_give_what_the_undivided_network_gives(
    name: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_BAND_BYTES", 50_000)  # several bands a layer
    vae = {"vq": vq, "kl": kl}.get(name, lambda: kl(attn_resolutions=[16]))()
    like, factor = next(vae.parameters()), vae.downsample_factor
    latent = 2 * canvas_noise(0, vae.embed_dim, *size) + 0.5
    network = Layerwise(vae, tmp_path)
    bands = list(network.decode(FeatureMap.of(latent, tmp_path, like)))
    expected = vae.decode(latent[None])
    assert len(bands) > 1 or size != (21, 14)
    torch.testing.assert_close(torch.cat(bands, 2), expected, rtol=1e-4, atol=1e-4)
    image = torch.tanh(canvas_noise(1, 3, size[0] * factor, size[1] * factor))
    bands = list(network.encode(FeatureMap.of(image, tmp_path, like)))
    torch.testing.assert_close(torch.cat(bands, 2), vae.encode(image[None]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_maps_in_files_give_the_same_bytes_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, latent = vq(), canvas_noise(0, 3, 9, 7)

    def decoded() -> np.ndarray:
        source = FeatureMap.of(latent, tmp_path, next(vae.parameters()))
        return torch.cat(list(Layerwise(vae, tmp_path).decode(source)), 2).numpy()

    in_memory = decoded()
    monkeypatch.setattr(feature_map, "_MEMORY_BYTES", 0)
    assert np.array_equal(decoded(), in_memory)
    assert list(tmp_path.iterdir()) == []
