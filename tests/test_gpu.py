# SPDX-License-Identifier: Apache-2.0
"""The whole way from a grid to pixels on a GPU, against the same on the CPU.

Beside a GPU it needs torch and timm alone: no slide is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ssldiff_fast as sf
from golden_inputs import UNET_A, VQ_SMALL, fill, golden_input, golden_output, relative_error
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    LDMDenoiser,
    StateFolder,
    canvas_noise,
    decode_image,
    get_preset,
    sample,
)
from ssldiff_fast.models import LatentDiffusion
from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.models.unet import UNet
from tiny_models import tiny_grid, tiny_model

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 2, 3


@pytest.fixture(autouse=True)
def _whole_float32() -> Iterator[None]:
    """Convolutions in float32 proper: cuDNN's default, TF32, keeps ten bits of the mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def well_separated_codes() -> LatentDiffusion:
    """A model in which rounding does not decide between two codes."""
    model = tiny_model()
    torch.nn.init.normal_(model.vae.quantize.embedding.weight)
    return model


def denoised(
    model: LatentDiffusion,
    preset_name: str,
    device: str,
    *,
    mask: Tensor | None = None,
    background: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The canvas of a few steps of a preset."""
    preset, model = get_preset(preset_name), model.to(device)
    size = (ROWS * model.window[0], COLUMNS * model.window[1])
    denoiser = CanvasDenoiser(
        LDMDenoiser(model),
        preset.windows(*size, model.window, seed=0, steps=4),
        GridField(tiny_grid(model, ROWS, COLUMNS).embeddings, model.window, preset.interpolation),
        guidance_scale=preset.guidance_scale,
        batch_size=4,
        mask=mask,
        background=background,
    )
    return sample(
        denoiser,
        canvas_noise(0, model.latent_channels, *size).to(device),
        schedule=model.schedule,
        solver=preset.solver,
        steps=4,
        spacing=preset.spacing,
        eta=preset.eta,
        **options,
    )


@pytest.mark.parametrize("preset", ["paper", "fast", "authors"])
def test_the_canvas_stays_on_the_gpu_and_is_that_of_the_cpu(preset: str) -> None:
    expected = denoised(tiny_model(), preset, "cpu")
    canvas = denoised(tiny_model(), preset, "cuda")
    assert canvas.device.type == "cuda"
    # Sums run in another order in every layer of every step.
    assert relative_error(canvas.cpu(), expected) < 1e-4


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_features_are_reused_as_on_the_cpu(execution: str) -> None:
    expected = denoised(tiny_model(), "paper", "cpu", reuse=2)
    model = tiny_model()
    model.execution = execution
    assert relative_error(denoised(model, "paper", "cuda", reuse=2).cpu(), expected) < 1e-4
    exact = denoised(model, "paper", "cuda").cpu()
    assert relative_error(exact, expected) > 1e-3


def test_the_same_seed_gives_the_same_canvas_bit_for_bit() -> None:
    first, second = (denoised(tiny_model(), "fast", "cuda") for _ in range(2))
    assert torch.equal(first, second)


def test_in_bfloat16_the_canvas_is_near_that_of_float32() -> None:
    expected = denoised(tiny_model(), "fast", "cpu")
    half = tiny_model()
    half.unet.to(torch.bfloat16)
    assert half.conditioner is not None
    half.conditioner.to(torch.bfloat16)
    assert relative_error(denoised(half, "fast", "cuda").cpu(), expected) < 0.1


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_decode_is_that_of_the_cpu_wherever_the_canvas_is(where: str) -> None:
    model, latent = well_separated_codes(), canvas_noise(0, 3, 16, 24)
    expected = decode_image(model, latent, stride=4).astype(int)
    image = decode_image(model.to("cuda"), latent.to(where), stride=4).astype(int)
    # What differs is where rounding crosses a grey level.
    assert np.abs(image - expected).max() <= 1
    assert (image == expected).mean() > 0.99


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_unet_is_the_published_one(layout: torch.memory_format) -> None:
    unet = fill(UNet(**UNET_A)).to("cuda", memory_format=layout)
    x, context = (
        golden_input("unet_a_1tok.x", 2, 3, 32, 32),
        golden_input("unet_a_1tok.context", 2, 1, 64),
    )
    with torch.no_grad():
        out = unet(x.cuda(), torch.tensor([17, 803], device="cuda"), context.cuda())
    assert relative_error(out.cpu(), golden_output("unet_a_1tok.out")) < 1e-4


def test_the_decode_is_the_published_one() -> None:
    vae = fill(VQModel(**VQ_SMALL), "first_stage_model.").to("cuda")
    latent = golden_input("decode.latent", 1, 3, 128, 96)[0].cuda()
    image = decode_image(vae, latent, stride=32, window=(64, 64), batch_size=4).astype(int)
    difference = np.abs(image - golden_output("decode.image_u8_stride32")[0].numpy())
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def test_synthesis_on_a_gpu_writes_the_image_of_the_cpu(tmp_path: Path) -> None:
    model = well_separated_codes()
    grid, images = tiny_grid(model, ROWS, COLUMNS), []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.png"
        sf.synthesize(model.to(device), grid, path, steps=2, progress=False)
        images.append(np.asarray(Image.open(path)).astype(int))
    # A latent that rounding puts nearer to another code would show in its tile.
    assert np.abs(images[0] - images[1]).mean() < 1


def test_the_micro_batch_is_measured_there_and_belongs_to_the_recipe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model().to("cuda")
    made = sf.synthesize(
        *(model, tiny_grid(model, ROWS, COLUMNS), tmp_path / "image.png"),
        steps=2,
        batch_size="auto",
        progress=False,
    )
    chosen = made.recipe["batch_size"]
    assert chosen in [2**power for power in range(9)]
    assert f"batch_size auto: {chosen} (" in caplog.text
    again = sf.synthesize(
        *(model, tiny_grid(model, ROWS, COLUMNS), tmp_path / "again.png"),
        steps=2,
        batch_size=chosen,
        progress=False,
    )
    assert again.path.read_bytes() == made.path.read_bytes()


@pytest.mark.parametrize("preset", ["paper", "fast", "authors"])
def test_both_orders_end_in_the_same_bits_on_a_gpu(preset: str) -> None:
    plain = denoised(tiny_model(), preset, "cuda")
    wavefront = denoised(tiny_model(), preset, "cuda", order="wavefront")
    assert wavefront.device.type == "cuda"
    assert torch.equal(wavefront, plain)


def test_a_masked_run_goes_on_from_its_state_on_a_gpu(tmp_path: Path) -> None:
    mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    mask[0, 0] = True
    options: dict[str, Any] = {"mask": mask, "background": torch.zeros(3, 1, 1)}
    whole = denoised(tiny_model(), "fast", "cuda", **options)

    def stop(_: object, step: int, *__: object) -> None:
        if step == 2:
            raise InterruptedError

    def kept() -> StateFolder:
        return StateFolder(tmp_path / "state", share=float("inf"))

    with pytest.raises(InterruptedError), kept() as state:
        denoised(tiny_model(), "fast", "cuda", state=state, callback_on_step_end=stop, **options)
    with kept() as state:
        again = denoised(tiny_model(), "fast", "cuda", state=state, **options)
    assert torch.equal(again, whole)
