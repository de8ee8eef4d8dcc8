# SPDX-License-Identifier: Apache-2.0
"""Published run folders, which do not name their encoder, from their checkpoint to a slide."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch
from PIL import Image

import ssldiff_fast as sf
from small_models import CONFIG, RUN, full_state, lightning_checkpoint, small_model, write_run
from ssldiff_fast.models.ldm import LatentDiffusion

CELL_PX = 16  # a window of 8 latents through the small autoencoder
PATCH_WIDTH, REGION_WIDTH = 10, 12


@pytest.fixture
def patch_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentDiffusion:
    state = full_state(small_model(), ema=True)
    return sf.load(write_run(tmp_path / "patch", lightning_checkpoint(monkeypatch, state)))


@pytest.fixture
def region_model(tmp_path: Path) -> LatentDiffusion:
    """Conditioned on patch and region tokens, as the BRCA model at 20x."""
    run = copy.deepcopy(RUN)
    params = run["model"]["params"]
    params["unet_config"]["params"]["context_dim"] = 512
    params["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.SSLEmbedder",
        "params": {
            "patch_embed_dim": PATCH_WIDTH,
            "region_embed_dim": REGION_WIDTH,
            "normalize_ssl": True,
        },
    }
    model = small_model(
        unet={**CONFIG["unet"], "context_dim": 512},
        conditioner={
            "type": "patch_region",
            "width": PATCH_WIDTH,
            "region_width": REGION_WIDTH,
            "context_dim": 512,
        },
    )
    return sf.load(write_run(tmp_path / "region", full_state(model), run=run))


def hand_made(
    tokens: int = 1, width: int = 12, *, rows: int = 3, columns: int = 3, mpp: float = 0.5
) -> sf.Grid:
    """A grid by an encoder that the model knows nothing of."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(rows, columns, tokens, width, generator=generator)
    valid = torch.ones(rows, columns, dtype=torch.bool)
    return sf.Grid(embeddings, valid, mpp=mpp, cell_px=CELL_PX, encoder={"name": "hipt"})


def pixels(model: LatentDiffusion, grid: sf.Grid, out: Path, **settings: Any) -> np.ndarray:
    sf.synthesize(model, grid, out, steps=2, progress=False, **settings)
    return np.asarray(Image.open(out)).astype(int)


@pytest.mark.parametrize("preset", ["authors", "paper", "fast"])
def test_a_run_folder_and_a_grid_make_a_slide(
    patch_model: LatentDiffusion, tmp_path: Path, preset: str
) -> None:
    grid = hand_made(rows=2)
    made = sf.synthesize(
        patch_model, grid, tmp_path / "out.tif", preset=preset, steps=3, progress=False
    )
    assert made.recipe["model"]["name"] == "patch"
    assert made.recipe["grid"]["encoder"] == "hipt"
    with openslide.OpenSlide(made.path) as slide:
        assert slide.dimensions == (3 * CELL_PX, 2 * CELL_PX)
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.5)


def test_the_recipe_tells_averaged_weights_and_configurations_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = full_state(small_model(), ema=True)
    other = copy.deepcopy(RUN)
    other["model"]["params"]["cond_stage_config"]["params"]["normalize_ssl"] = False
    run = write_run(tmp_path / "run", lightning_checkpoint(monkeypatch, state))
    twin = write_run(tmp_path / "twin", lightning_checkpoint(monkeypatch, state), run=other)
    models = [sf.load(run), sf.load(run), sf.load(run, use_ema=False), sf.load(twin)]
    for model in models:
        model.name = "run"
    hashes = [
        sf.synthesize(
            model, hand_made(), tmp_path / f"{number}.png", steps=1, progress=False
        ).recipe["model"]
        for number, model in enumerate(models)
    ]
    assert hashes[0] == hashes[1]
    assert all(a != b for a, b in itertools.combinations(hashes[1:], 2))


def test_a_cell_becomes_a_window_whatever_pixels_it_was_encoded_from(
    patch_model: LatentDiffusion, tmp_path: Path
) -> None:
    grid = sf.Grid(hand_made().embeddings, hand_made().valid, mpp=0.25, cell_px=4 * CELL_PX)
    made = sf.synthesize(patch_model, grid, tmp_path / "out.tif", steps=1, progress=False)
    assert made.mpp == pytest.approx(1.0)
    with openslide.OpenSlide(made.path) as slide:
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(1.0)


@pytest.mark.parametrize("preset", ["authors", "fast"])
def test_patch_and_region_tokens_both_shape_the_image(
    region_model: LatentDiffusion, tmp_path: Path, preset: str
) -> None:
    grid = hand_made(2, REGION_WIDTH)
    first = pixels(region_model, grid, tmp_path / "a.png", preset=preset)
    for token in (0, 1):
        changed = grid.embeddings.clone()
        changed[:, :, token] = -changed[:, :, token]
        other = sf.Grid(changed, grid.valid, mpp=0.5, cell_px=CELL_PX)
        assert (
            pixels(region_model, other, tmp_path / f"{token}.png", preset=preset) != first
        ).any()


def test_patches_without_regions_are_enough(region_model: LatentDiffusion, tmp_path: Path) -> None:
    image = pixels(region_model, hand_made(1, PATCH_WIDTH), tmp_path / "a.png")
    assert image.shape == (3 * CELL_PX, 3 * CELL_PX, 3)


@pytest.mark.parametrize("preset", ["authors", "paper"])
def test_far_from_every_valid_cell_the_image_is_unconditional(
    patch_model: LatentDiffusion, tmp_path: Path, preset: str
) -> None:
    whole = hand_made()
    embeddings = torch.full_like(whole.embeddings, float("nan"))
    embeddings[0, 0] = whole.embeddings[0, 0]
    valid = torch.zeros_like(whole.valid)
    valid[0, 0] = True
    grid = sf.Grid(embeddings, valid, mpp=0.5, cell_px=CELL_PX)
    # Windows and tiles side by side, so that a cell's pixels depend on its own window alone.
    settings: dict[str, Any] = {"preset": preset, "stride": 8, "decode_stride": 8}
    weak, strong = (
        pixels(patch_model, grid, tmp_path / f"{scale}.png", guidance_scale=scale, **settings)
        for scale in (2.0, 6.0)
    )
    near, far = np.s_[:CELL_PX, :CELL_PX], np.s_[-CELL_PX:, -CELL_PX:]
    assert (weak[near] != strong[near]).any()
    assert abs(weak[far] - strong[far]).max() <= 1


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (hand_made(width=5), r"1 token\(s\) of width 5 and the model takes 1 of width 12"),
        (hand_made(tokens=2), r"2 token\(s\) of width 12 and the model takes 1 of width 12"),
        (
            sf.Grid(hand_made().embeddings, torch.zeros(3, 3), mpp=0.5, cell_px=CELL_PX),
            "no valid cell",
        ),
        (
            sf.Grid(hand_made().embeddings / 0, torch.ones(3, 3), mpp=0.5, cell_px=CELL_PX),
            r"NaN or infinity in 9 cell\(s\)",
        ),
    ],
    ids=["width", "tokens", "empty", "nan"],
)
def test_an_unfit_grid_is_one_sentence_before_the_model_runs(
    patch_model: LatentDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grid: sf.Grid,
    message: str,
) -> None:
    monkeypatch.setattr(patch_model.conditioner, "forward", None)  # not callable
    with pytest.raises(ValueError, match=message):
        pixels(patch_model, grid, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
