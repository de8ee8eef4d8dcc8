# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import pooled, tokens
from torch import Tensor

from ssldiff_fast.adapters import from_compvis
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    Conditioning,
    GridField,
    PromptField,
    WindowPlan,
    canvas_noise,
)

ONE = WindowPlan.regular(8, 8, (8, 8), 8)


class CompVisModel:
    """What `ldm.models.diffusion.ddpm.LatentDiffusion` offers, with a network of one line."""

    image_size, channels, parameterization = 8, 4, "eps"

    def __init__(self, key: str | None = "crossattn") -> None:
        self.model = SimpleNamespace(conditioning_key=key)
        self.times: list[Tensor] = []

    def get_learned_conditioning(self, cond: Tensor) -> Tensor:
        return torch.nn.functional.normalize(cond, dim=-1)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.times.append(t)
        if isinstance(cond, dict):
            cond = cond["c_crossattn"][0].mean((1, 2)) + cond["c_adm"].mean(1)
        elif cond.ndim == 1:
            cond = cond.float()
        else:
            cond = cond.flatten(1).mean(1)
        return torch.tanh(x + cond[:, None, None, None]) + t[:, None, None, None] / 1000


def test_one_window_is_apply_model() -> None:
    model, x = CompVisModel(), canvas_noise(0, 4, 8, 8)
    field = PromptField(tokens(1), uncond=tokens(1, seed=9))
    denoiser = from_compvis(model)
    assert (denoiser.window, denoiser.channels, denoiser.prediction) == ((8, 8), 4, "eps")
    output = CanvasDenoiser(denoiser, ONE, field, guidance_scale=3.0)(x, 321)
    t = torch.tensor([321])
    cond, uncond = (model.apply_model(x[None], t, tokens(1, s))[0] for s in (1, 9))
    torch.testing.assert_close(output, uncond + 3.0 * (cond - uncond))
    assert model.times[0].dtype == torch.int64  # as the CompVis samplers pass it
    assert model.times[0].shape == (2,)


def test_the_conditioner_comes_after_the_interpolation() -> None:
    model, cells = CompVisModel(), canvas_noise(4, 2, 1, 16).view(1, 2, 1, 16)
    plan = WindowPlan.regular(8, 16, (8, 8), 4)
    denoiser = from_compvis(model, conditioner=model.get_learned_conditioning)
    state = denoiser.prepare(GridField(cells, (8, 8)).at(plan.origins), None)
    expected = model.get_learned_conditioning((cells[0, 0] + cells[0, 1]) / 2)
    torch.testing.assert_close(state.cond.tokens[1], expected)


@pytest.mark.parametrize(
    ("key", "cond", "given"),
    [
        ("adm", Conditioning(labels=torch.tensor([3])), torch.tensor([3])),
        (None, Conditioning(labels=torch.tensor([3])), torch.tensor([3])),
        (None, tokens(1), tokens(1)),
        (
            "crossattn-adm",
            Conditioning(tokens(1), pooled(1)),
            {"c_crossattn": [tokens(1)], "c_adm": pooled(1)},
        ),
    ],
)
def test_conditioning_goes_where_the_models_key_says(key: Any, cond: Any, given: Any) -> None:
    model, x = CompVisModel(key), canvas_noise(0, 4, 8, 8)
    output = CanvasDenoiser(from_compvis(model), ONE, PromptField(cond))(x, 5)
    torch.testing.assert_close(output, model.apply_model(x[None], torch.tensor([5]), given)[0])


def test_times_between_timesteps_stay_so() -> None:
    model = CompVisModel()
    CanvasDenoiser(from_compvis(model), ONE, PromptField(tokens(1)))(torch.zeros(4, 8, 8), 5.5)
    assert model.times[0].tolist() == [5.5]


def bare() -> Any:
    return SimpleNamespace(apply_model=lambda x, t, cond: x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: from_compvis(torch.nn.Linear(1, 1)), TypeError, "Linear without apply_model"),
        (lambda: from_compvis(bare()), ValueError, "window is None, and the model has no image"),
        (lambda: from_compvis(bare(), window=8), ValueError, "channels is None"),
        (lambda: from_compvis(bare(), window=8, channels=4).prediction, ValueError, "prediction"),
        (lambda: from_compvis(bare(), window=8, channels=0), ValueError, "channels is 0"),
        (lambda: from_compvis(CompVisModel("hybrid")), ValueError, "conditioning_key is 'hybrid'"),
        (
            lambda: from_compvis(CompVisModel("adm")).prepare(tokens(1), None),
            ValueError,
            "conditioned by 'adm', but the field gives no labels or pooled",
        ),
        (
            lambda: from_compvis(CompVisModel(), conditioner=lambda c: c[:1]).prepare(
                tokens(2), None
            ),
            ValueError,
            r"conditioner returned \[1, 5, 16\] for tokens \[2, 5, 16\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_output_of_another_shape_is_named() -> None:
    model = SimpleNamespace(apply_model=lambda x, t, cond: x.repeat(1, 2, 1, 1))
    denoiser = from_compvis(model, window=8, channels=4)
    canvas = CanvasDenoiser(denoiser, ONE, PromptField(tokens(1)))
    with pytest.raises(RuntimeError, match=r"returned \[1, 8, 8, 8\] for windows \[1, 4, 8, 8\]"):
        canvas(torch.zeros(4, 8, 8), 1)
