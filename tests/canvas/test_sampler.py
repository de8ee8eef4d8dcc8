# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import ColourDenoiser, ConvDenoiser

from ssldiff_fast.canvas import (
    PRESETS,
    CanvasDenoiser,
    GridField,
    Preset,
    ShiftedWindows,
    WindowPlan,
    canvas_noise,
    get_preset,
    sample,
)
from ssldiff_fast.diffusion import SOLVERS, Schedule

WINDOW = (8, 8)
SCHEDULE = Schedule()


def colours(rows: int, columns: int) -> GridField:
    cells = canvas_noise(2, rows * columns, 1, 3).clamp(-1, 1).view(rows, columns, 1, 3)
    return GridField(cells, WINDOW)


def run(preset: Preset, seed: int = 0, cells: int = 8, order: str = "plain") -> Tensor:
    size = cells * WINDOW[0]
    denoiser = CanvasDenoiser(
        ColourDenoiser(SCHEDULE if preset.solver != "authors" else ShiftedTime()),
        preset.windows(size, size, WINDOW, seed=seed),
        colours(cells, cells),
        guidance_scale=1.0,
    )
    return sample(
        denoiser,
        canvas_noise(seed, 3, size, size),
        schedule=SCHEDULE,
        solver=preset.solver,
        steps=preset.steps,
        spacing=preset.spacing,
        eta=preset.eta,
        seed=seed,
        order=order,
    )


class ShiftedTime(Schedule):
    """The schedule as the published loop tells it to the network: one later."""

    def abar(self, t: int) -> float:
        return super().abar(t - 1)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_every_preset_paints_the_colours_of_the_grid(preset: Preset) -> None:
    image = run(preset)
    cells = image.view(3, 8, 8, 8, 8).mean((2, 4)).permute(1, 2, 0)
    # Cells blend into their neighbours, so each is nearer to itself than to any other by far.
    target = colours(8, 8).grid[:, :, 0]
    correlation = torch.corrcoef(torch.stack((cells.flatten(), target.flatten())))[0, 1]
    assert float(correlation) > 0.85


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_image(preset: Preset) -> None:
    image = run(preset, seed=3, cells=3)
    assert torch.equal(image, run(preset, seed=3, cells=3))
    assert torch.equal(image, run(preset, seed=3, cells=3, order="wavefront"))
    assert not torch.equal(image, run(preset, seed=4, cells=3))


def test_shifted_windows_leave_no_seam_where_fixed_ones_do() -> None:
    window, size, preset = (16, 16), 192, get_preset("fast")
    cells = canvas_noise(2, 144, 1, 3).clamp(-1, 1).view(12, 12, 1, 3)
    shifted = preset.windows(size, size, window, seed=0)
    assert isinstance(shifted, ShiftedWindows)

    def image(windows: WindowPlan | ShiftedWindows) -> Tensor:
        canvas = CanvasDenoiser(
            ColourDenoiser(SCHEDULE, window=window), windows, GridField(cells, window)
        )
        noise = canvas_noise(0, 3, size, size)
        return sample(canvas, noise, schedule=SCHEDULE, solver=preset.solver, steps=preset.steps)

    assert seam(image(WindowPlan.regular(size, size, window, window)), window) > 3.0
    blended = image(shifted)
    assert abs(seam(blended, window) - 1.0) < 0.1
    for step in (18, 19):
        assert abs(seam(blended, shifted.stride(step), shifted.offset(step)) - 1.0) < 0.1


def seam(image: Tensor, period: tuple[int, int], offset: tuple[int, int] = (0, 0)) -> float:
    """Mean absolute difference across window borders over that elsewhere."""
    at_border, elsewhere = [], []
    for axis, every, shift in zip((1, 2), period, offset):
        differences = image.diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
        for position, difference in enumerate(differences.tolist()):
            (at_border if (position + 1 - shift) % every == 0 else elsewhere).append(difference)
    return (sum(at_border) / len(at_border)) / (sum(elsewhere) / len(elsewhere))


@dataclass
class Whole:
    """A denoiser of the whole canvas that looks at each pixel by itself."""

    prediction: str = "v"

    def __call__(self, x: Tensor, t: float, *, step: int | None = None) -> Tensor:
        return torch.tanh(x + t / 1000)


def test_a_pixelwise_network_gives_the_same_image_on_windows_as_on_the_whole_canvas() -> None:
    class Pixelwise(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            return torch.tanh(x + t / 1000)[None]

    noise = canvas_noise(0, 3, 24, 24)
    windows = WindowPlan.regular(24, 24, WINDOW, 3, "gaussian")
    canvas = CanvasDenoiser(Pixelwise(), windows, colours(3, 3))
    for solver in SOLVERS:
        options: dict[str, Any] = {"schedule": SCHEDULE, "solver": solver, "steps": 6}
        torch.testing.assert_close(
            sample(canvas, noise, **options), sample(Whole(), noise, **options)
        )


def test_a_run_from_pure_noise_stays_finite() -> None:
    schedule = Schedule(zero_terminal_snr=True)
    for solver in SOLVERS:
        image = sample(Whole(), canvas_noise(0, 3, 8, 8), schedule=schedule, solver=solver, steps=5)
        assert bool(torch.isfinite(image).all())


def test_fresh_noise_is_that_of_the_seed_at_the_step() -> None:
    noise = canvas_noise(0, 3, 8, 8)
    options: dict[str, Any] = {"schedule": SCHEDULE, "steps": 4, "eta": 1.0}
    drawn = sample(Whole(), noise, seed=5, **options)
    given = sample(
        Whole(), noise, step_noise=lambda step: canvas_noise(5, 3, 8, 8, step=step + 1), **options
    )
    assert torch.equal(drawn, given)
    assert not torch.equal(drawn, sample(Whole(), noise, seed=6, **options))


def test_the_callback_sees_every_step_and_may_replace_the_canvas() -> None:
    seen: list[tuple[int, float]] = []

    def callback(pipe: Any, step: int, t: float, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(pipe, Whole)
        assert kwargs["latents"].shape == kwargs["denoised"].shape == (3, 8, 8)
        seen.append((step, t))
        return {"latents": torch.zeros(3, 8, 8)} if step == 3 else {}

    image = sample(
        Whole(),
        canvas_noise(0, 3, 8, 8),
        schedule=SCHEDULE,
        steps=4,
        callback_on_step_end=callback,
    )
    assert seen == [(0, 999.0), (1, 749.0), (2, 499.0), (3, 249.0)]
    assert torch.equal(image, torch.zeros(3, 8, 8))


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    sample(Whole(), canvas_noise(0, 3, 8, 8), schedule=SCHEDULE, steps=2, progress=True)
    assert "denoising" in capsys.readouterr().err
    sample(Whole(), canvas_noise(0, 3, 8, 8), schedule=SCHEDULE, steps=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "euler"}, "solver is 'euler'"),
        ({"steps": -4}, "steps is -4; expected 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"eta": -0.5}, "eta is -0.5"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"spacing": "even"}, "spacing is 'even'"),
        ({"seed": -1, "eta": 1.0}, "seed is -1"),
        ({"noise": canvas_noise(0, 1, 8, 8)[0]}, r"noise has shape \[8, 8\]"),
        ({"noise": torch.full((3, 8, 8), float("nan"))}, "noise holds 192 values that are NaN"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    settings = {"noise": canvas_noise(0, 3, 8, 8), "schedule": SCHEDULE, "steps": 3, **options}
    noise = settings.pop("noise")
    with pytest.raises(ValueError, match=message):
        sample(Whole(), noise, **settings)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(3, 8, 4), r"at step 0 has shape \[3, 8, 4\]"),
        (torch.full((3, 8, 8), float("inf")), "NaN or infinite at step 0, in float32"),
    ],
)
def test_a_bad_model_output_stops_the_run(output: Tensor, message: str) -> None:
    class Broken(Whole):
        def __call__(self, x: Tensor, t: float, *, step: int | None = None) -> Tensor:
            return output

    with pytest.raises(RuntimeError, match=message):
        sample(Broken(), canvas_noise(0, 3, 8, 8), schedule=SCHEDULE, steps=3)


def test_presets_are_what_the_design_says() -> None:
    paper, authors, fast = (get_preset(name) for name in ("paper", "authors", "fast"))
    assert (paper.solver, paper.steps, paper.eta, paper.guidance_scale) == ("ddim", 50, 0.0, 1.75)
    assert paper.stride((64, 64)) == (16, 16)
    assert isinstance(paper.windows(64, 64, (32, 32), seed=0), WindowPlan)
    assert (authors.solver, authors.guidance_scale) == ("authors", 4.0)
    assert authors.interpolation == "slerp"
    assert (fast.solver, fast.steps) == ("dpmpp_2m", 20)
    assert isinstance(fast.windows(64, 64, (32, 32), seed=0), ShiftedWindows)


def test_a_stride_of_the_callers_replaces_the_presets() -> None:
    windows = get_preset("paper").windows(64, 64, (32, 32), seed=0, stride=32)
    assert isinstance(windows, WindowPlan)
    assert len(windows) == 4


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'quick', but it must be one of authors, fast, paper"):
        get_preset("quick")
