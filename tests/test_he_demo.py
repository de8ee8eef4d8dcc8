# SPDX-License-Identifier: Apache-2.0
"""The bundled model, as far as it can be tried without a slide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssldiff_fast as sf
from ssldiff_fast.evaluation import measure_glass
from ssldiff_fast.models.load import BUNDLED
from ssldiff_fast.slides.encode import encode

FOLDER = BUNDLED / "he-demo"


@pytest.fixture(scope="module")
def model() -> sf.LatentDiffusion:
    return sf.load("he-demo")


def test_it_is_small_and_half_precision() -> None:
    from safetensors import safe_open

    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 24e6
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        unet = [name for name in names if name.startswith("model.diffusion_model.")]
        assert {file.get_tensor(name).dtype for name in unet} == {torch.float16}


def test_its_card_names_data_licences_and_figures() -> None:
    card = (FOLDER / "README.md").read_text()
    assert card.startswith("---\n")
    for words in ("BreCaHAD", "NCT-CRC-HE", "BCSS", "CMU-1", "CC BY 4.0", "CC0", "similarity"):
        assert words in card
    assert "@" not in card.split("---")[2]  # no placeholder was left


def test_its_encoder_is_the_one_its_configuration_names(model: sf.LatentDiffusion) -> None:
    assert model.encoder_spec is not None
    assert model.encoder.spec == model.encoder_spec
    assert model.encoder.spec.patch_px == model.window[0] * model.downsample_factor


def test_it_tells_glass_from_stain_and_paints_both(
    model: sf.LatentDiffusion, tmp_path: Path
) -> None:
    """Half of a picture is glass, the other half stroma-coloured noise; so is the result."""
    rng = np.random.default_rng(0)
    image = np.full((256, 512, 3), 243, np.uint8)
    image[:, 256:] = np.clip(rng.normal((190, 110, 160), 30, (256, 256, 3)), 0, 255)
    grid = encode(image, model.encoder, source_mpp=0.5, mask=False, progress=False)
    made = sf.synthesize(model, grid, tmp_path / "out.png", steps=8, progress=False)
    pixels = np.asarray(Image.open(made.path)).astype(float)
    glass, stained = pixels[:, :128].mean((0, 1)), pixels[:, 384:].mean((0, 1))
    assert glass.min() > 215
    assert stained[1] < glass[1] - 25  # stain takes green away first


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_glass_that_a_mask_leaves_out_is_even_and_like_the_glass_beside_tissue(
    model: sf.LatentDiffusion, tmp_path: Path, preset: str
) -> None:
    """Stroma-coloured noise at the left with a glass margin, and glass that is not evaluated."""
    rng = np.random.default_rng(0)
    image = np.full((256, 640, 3), 243, np.uint8)
    image[:, :192] = np.clip(rng.normal((190, 110, 160), 30, (256, 192, 3)), 0, 255)
    grid = encode(image, model.encoder, source_mpp=0.5, mask=False, progress=False)
    grid.valid[:, 2:] = False
    made = sf.synthesize(
        model, grid, tmp_path / "out.png", preset=preset, steps=8, mask=True, progress=False
    )
    figures = measure_glass(np.asarray(Image.open(made.path)), grid.valid.numpy())
    # Decoded tiles of the background's latent had steps of 3 grey levels, in glass that was 5 from
    # what is painted.
    assert figures.beyond == 0
    assert figures.colour < 1.5
