# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ssldiff_fast as sf
from ssldiff_fast.canvas import canvas_noise
from ssldiff_fast.canvas.preview import PreviewFile
from ssldiff_fast.models.preview import LatentPreview, fit_preview
from tiny_models import tiny_model

MATRIX = torch.tensor([[0.5, 0.1, -0.2, 0.0], [0.0, 0.3, 0.1, 0.2], [0.2, -0.1, 0.4, 0.1]])
BIAS = torch.tensor([0.1, -0.2, 0.3])


def linear_decoder(z: Tensor) -> Tensor:
    colours = torch.einsum("kc,nchw->nkhw", MATRIX, z) + BIAS[:, None, None]
    return torch.nn.functional.interpolate(colours, scale_factor=4.0)


def test_the_map_of_a_linear_decoder_is_found() -> None:
    preview = fit_preview(linear_decoder, canvas_noise(0, 8, 16, 16).view(2, 4, 16, 16))
    torch.testing.assert_close(torch.tensor(preview.matrix), MATRIX, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(preview.bias), BIAS, atol=1e-4, rtol=0)
    latent = canvas_noise(1, 4, 8, 12)
    expected = linear_decoder(latent[None])[0, :, ::4, ::4].permute(1, 2, 0)
    expected = ((expected + 1) / 2).clamp(0, 1) * 255
    assert np.abs(preview.image(latent).astype(float) - expected.numpy()).max() <= 1.0


def test_the_bundled_model_has_one_that_resembles_its_decoder() -> None:
    model = sf.load("he-demo")
    assert model.preview is not None
    pixels = torch.full((1, 3, 128, 128), 243 / 127.5 - 1)
    pixels[:, :, :, 64:] = torch.tensor([190, 110, 160.0]).view(3, 1, 1) / 127.5 - 1
    with torch.no_grad():
        image = model.preview.image(model.to_latent(pixels)[0])
    glass, stained = (image[4:-4, part].mean((0, 1)) for part in (slice(4, 12), slice(20, 28)))
    assert glass.min() > 205
    assert stained[1] < glass[1] - 50


def test_it_travels_with_the_model_and_is_no_part_of_its_recipe(tmp_path: Path) -> None:
    model = tiny_model()
    assert "preview" not in model.to_config()
    model.preview = fit_preview(lambda z: z.repeat_interleave(2, 2), canvas_noise(0, 3, 8, 8)[None])
    model.save_pretrained(tmp_path / "tiny")
    assert sf.load(tmp_path / "tiny").preview == model.preview


class Model:
    window = (8, 8)

    def __init__(self, preview: LatentPreview | None = None) -> None:
        self.preview = preview
        self.vae = torch.nn.Linear(1, 1)
        self.decoded = 0

    def from_latent(self, z: Tensor) -> Tensor:
        self.decoded += len(z)
        return linear_decoder(z)


def test_a_picture_is_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "preview.png"
    model = Model()
    show = PreviewFile(path, model, last_step=2, every_s=3600.0)
    latent = canvas_noise(0, 4, 24, 40)
    seen: list[Any] = []
    for step, factor in enumerate((1.0, 0.5, 0.0)):
        show(None, step, 0.0, {"denoised": latent * factor})
        seen.append(np.asarray(Image.open(path)))
    assert seen[0].shape == (24, 40, 3)
    assert (seen[0] == seen[1]).all()
    assert (seen[2] == seen[2][0, 0]).all()
    assert model.decoded == 9  # fitted once, on windows of the canvas
    assert [file.name for file in tmp_path.iterdir()] == ["preview.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentPreview(((1.0,), (1.0,)), (0.0, 0.0, 0.0)), "matrix has 2 rows"),
        (lambda: LatentPreview.from_config({"matrix": []}), "expected matrix and bias"),
        (lambda: PreviewFile("preview.jpg", Model(), last_step=1), "must be a .png"),
        (lambda: fit_preview(linear_decoder, torch.full((1, 4, 2, 2), float("nan"))), "NaN"),
    ],
)
def test_what_is_wrong_is_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
