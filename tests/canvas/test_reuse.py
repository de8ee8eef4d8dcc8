# SPDX-License-Identifier: Apache-2.0
"""Feature reuse between neighbouring steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import denoiser as toy_denoiser
from runs import image as toy_image
from torch import Tensor

from small_models import small_model
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    LDMDenoiser,
    ShiftedWindows,
    StateFolder,
    WindowPlan,
    canvas_noise,
    reuse,
    sample,
)
from ssldiff_fast.canvas.reuse import begins
from ssldiff_fast.models.ldm import LatentDiffusion

SIZE, WINDOW = (20, 12), (8, 8)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return small_model()


class Noted(LDMDenoiser):
    """Which calls evaluated the whole network, at what time; goes wrong after some calls."""

    def __init__(self, model: LatentDiffusion, calls: int = -1) -> None:
        super().__init__(model)
        self.whole: list[tuple[float, bool]] = []
        self.calls = calls

    def with_deep(self, x: Tensor, t: float, state: Any, index: Tensor, deep: Any = None) -> Any:
        self.calls -= 1
        if self.calls == 0:
            raise MemoryError("gone")
        self.whole.append((t, deep is None))
        return super().with_deep(x, t, state, index, deep)


def canvas_of(network: Any, size: tuple[int, int] = SIZE, **options: Any) -> CanvasDenoiser:
    cells = canvas_noise(7, 3 * 12, 1, 2).view(3, 2, 1, 12)
    options = {"guidance_scale": 1.75, "batch_size": 2, **options}
    windows = options.pop("windows", None) or WindowPlan.regular(*size, WINDOW, 4)
    return CanvasDenoiser(network, windows, GridField(cells, WINDOW), **options)


def image(canvas: CanvasDenoiser, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {
        "schedule": canvas.denoiser.model.schedule,
        "solver": "dpmpp_2m",
        "steps": 5,
        "reuse": 2,
        **changes,
    }
    return sample(canvas, canvas_noise(0, 3, *canvas.size), **settings)


def test_every_second_step_evaluates_the_outermost_level_alone(model: LatentDiffusion) -> None:
    network = Noted(model)
    image(canvas_of(network))
    steps: dict[float, set[bool]] = {}
    for time, whole in network.whole:
        steps.setdefault(time, set()).add(whole)
    assert list(steps.values()) == [{True}, {False}, {True}, {False}, {True}]


@pytest.mark.parametrize("guidance_scale", [1.0, 1.75])
def test_it_is_the_loop_that_keeps_the_maps_of_the_step_before(
    model: LatentDiffusion, guidance_scale: float
) -> None:
    canvas = canvas_of(LDMDenoiser(model), WINDOW, guidance_scale=guidance_scale)
    unet, network = model.unet, LDMDenoiser(model)
    cond = canvas.fields[0].at(torch.zeros(1, 2, dtype=torch.int64))
    guided = guidance_scale != 1.0
    state = network.prepare(cond, torch.zeros_like(cond) if guided else None)
    tokens = torch.cat((state.cond, state.uncond)) if guided else state.cond
    deep: list[Tensor] = []

    class Loop:
        prediction = model.prediction

        @torch.no_grad()
        def __call__(self, x: Tensor, t: float, *, step: int) -> Tensor:
            given = None if step % 2 == 0 else deep[-1]
            out, made = unet.with_deep(x[None], torch.tensor(t), tokens, given)
            deep.append(made)
            return out[0] if not guided else out[1] + guidance_scale * (out[0] - out[1])

    start = canvas_noise(0, 3, *WINDOW)
    expected = sample(Loop(), start, schedule=model.schedule, solver="dpmpp_2m", steps=5)
    found = image(canvas)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - image(canvas, reuse=1)).abs().max() > 1e-3


def test_steps_where_guidance_begins_or_ends_evaluate_everything(model: LatentDiffusion) -> None:
    canvas = canvas_of(LDMDenoiser(model), guidance_interval=(200, 800))
    times = [999, 850, 700, 550, 400, 250, 100, 50]
    assert begins(canvas, times, 2) == [True, False, True, False, True, False, True, False]
    assert begins(canvas, times, 3) == [True, False, True, False, False, True, True, False]
    image(canvas, reuse=3)


@pytest.mark.parametrize("calls", [1, 4, 9, 11, 14, 20])
def test_a_run_that_was_broken_off_ends_in_the_same_bytes(
    model: LatentDiffusion, tmp_path: Path, calls: int
) -> None:
    folder = StateFolder(tmp_path / "state", share=float("inf"))
    with pytest.raises(MemoryError), folder as state:
        image(canvas_of(Noted(model, calls)), state=state)
    network = Noted(model)
    with StateFolder(tmp_path / "state") as state:
        found = image(canvas_of(network), state=state)
    assert torch.equal(found, image(canvas_of(LDMDenoiser(model))))
    assert len(network.whole) <= 20 - calls + 8  # of 4 calls a step; two steps are done again


def test_ctrl_c_leaves_a_state_of_a_step_that_evaluates_everything(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    def stop(_: Any, step: int, *__: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    options = {"state": tmp_path / "state", "callback_on_step_end": stop}
    with pytest.raises(KeyboardInterrupt):
        image(canvas_of(LDMDenoiser(model)), **options)
    found = image(canvas_of(LDMDenoiser(model)), state=tmp_path / "state")
    assert torch.equal(found, image(canvas_of(LDMDenoiser(model))))


def test_the_state_of_another_interval_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", share=float("inf"))
    with pytest.raises(MemoryError), folder as state:
        image(canvas_of(Noted(model, 20)), state=state)
    with pytest.raises(ValueError, match="reuse is 2 there and 3 here"):
        image(canvas_of(LDMDenoiser(model)), state=tmp_path / "state", reuse=3)


class Whole:
    """A network for the canvas."""

    prediction = "eps"

    def __call__(self, x: Tensor, t: float, *, step: int | None = None) -> Tensor:
        return x


def test_what_cannot_reuse_is_refused_in_one_sentence(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = canvas_of(LDMDenoiser(model))
    moving = canvas_of(LDMDenoiser(model), windows=ShiftedWindows(*SIZE, WINDOW, seed=0))
    with pytest.raises(ValueError, match=r"reuse is 2, but these windows move from step to step"):
        image(moving)
    with pytest.raises(ValueError, match=r"reuse is 2, but in the wavefront order the maps"):
        image(canvas, order="wavefront")
    with pytest.raises(ValueError, match=r"reuse is 2, but the network is a ConvDenoiser"):
        toy_image(toy_denoiser(), reuse=2)
    with pytest.raises(ValueError, match=r"reuse is 2, but the denoiser is a Whole"):
        sample(Whole(), canvas_noise(0, 3, 8, 8), schedule=model.schedule, steps=2, reuse=2)
    with pytest.raises(ValueError, match=r"reuse is 0"):
        image(canvas, reuse=0)
    with pytest.raises(TypeError, match=r"reuse is 1.5, but it must be a whole number"):
        image(canvas, reuse=1.5)
    # Pairs of 64 channels, 8 x 8, in float32: 32 KiB of each of 4 x 2 windows.
    monkeypatch.setattr(reuse, "MOST_BYTES", 8 * 2**15)
    image(canvas, steps=1)
    monkeypatch.setattr(reuse, "MOST_BYTES", 8 * 2**15 - 1)
    with pytest.raises(ValueError, match=r"keeps 0.0312 MiB of each of 8 windows, 0.000244 GiB"):
        image(canvas)


def test_a_network_that_is_compiled_is_refused(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "execution", "compile")
    with pytest.raises(ValueError, match="the network is a CompiledUNet; it is for a model of"):
        image(canvas_of(LDMDenoiser(model)))
