# SPDX-License-Identifier: Apache-2.0
"""Windows without tissue are left out, and wrap-around images are tileable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import WINDOW, denoiser, digest, image, noise, regular, settings, shifted
from torch import Tensor
from toys import ConvDenoiser

from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    ShiftedWindows,
    TissueMask,
    WindowPlan,
    canvas_noise,
    sample,
    sample_rows,
)
from ssldiff_fast.diffusion import Schedule

GLASS = torch.tensor([0.7, -0.2, 0.4]).view(3, 1, 1)


def tissue(*cells: tuple[int, int]) -> Tensor:
    """6 x 3 cells of the canvas of 44 x 20."""
    there = torch.zeros(6, 3, dtype=torch.bool)
    for y, x in cells:
        there[y, x] = True
    return there


class Noted(ConvDenoiser):
    """Keeps the number of windows of each call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.windows = 0

    def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
        self.windows += len(set(index.tolist()))
        return super().__call__(x, t, state, index)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("windows", [regular(), shifted()], ids=["regular", "shifted"])
def test_what_is_far_from_tissue_becomes_the_background(windows: Any, prediction: str) -> None:
    network = ConvDenoiser(prediction=prediction)
    canvas = denoiser(windows, network, mask=tissue((0, 0)), background=GLASS)
    for solver in ("ddim", "dpmpp_2m"):
        made = image(canvas, solver=solver, eta=0.0)
        far = made[:, 2 * WINDOW[0] + 8 :]
        torch.testing.assert_close(far, GLASS.expand_as(far), atol=2e-4, rtol=0)
        assert float((made[:, :8, :8] - GLASS).abs().mean()) > 0.05


def test_only_windows_that_touch_tissue_are_evaluated() -> None:
    network, plan = Noted(), regular(8)
    canvas = denoiser(plan, network, mask=tissue((3, 1)), background=GLASS)
    image(canvas, steps=1)
    cell_y, cell_x = (3 * 44 / 6, 4 * 44 / 6), (20 / 3, 40 / 3)
    touching = sum(
        y < cell_y[1] and y + 8 > cell_y[0] and x < cell_x[1] and x + 8 > cell_x[0]
        for y, x in plan.origins.tolist()
    )
    assert network.windows == touching > 0


def test_the_edge_of_the_background_is_soft() -> None:
    class Flat(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            return torch.ones(len(state) - (state[1] is None), *x.shape)

    plan = WindowPlan.regular(8, 64, WINDOW, 2, "hann")
    there = torch.zeros(1, 8, dtype=torch.bool)
    there[:, :4] = True
    canvas = CanvasDenoiser(
        Flat(prediction="x0"),
        plan,
        GridField(torch.zeros(1, 8, 1, 3), WINDOW),
        mask=there,
        background=torch.zeros(3, 1, 1),
    )
    row = canvas(torch.zeros(3, 8, 64), 500)[0, 4]
    torch.testing.assert_close(row[:30], torch.ones(30))
    assert bool((row[40:] == 0).all())
    assert bool((row.diff() <= 1e-6).all())
    assert float(row.diff().abs().max()) < 0.5


def test_both_orders_agree_with_a_mask_and_a_tiled_background() -> None:
    background = canvas_noise(5, 3, 4, 8)
    for windows in (regular(), shifted()):
        options = {"mask": tissue((1, 0), (5, 2)), "background": background}
        plain = image(denoiser(windows, **options))
        assert digest(image(denoiser(windows, **options), order="wavefront")) == digest(plain)
    far = denoiser(regular(), mask=tissue((5, 2)), background=background)
    made = image(far, eta=0.0)[:, :16]
    torch.testing.assert_close(made, background.repeat(1, 4, 3)[:, :, :20], atol=2e-4, rtol=0)


def test_evaluations_that_the_mask_saves_are_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = Noted()
    canvas = denoiser(regular(4), network, mask=tissue((0, 0)), background=GLASS, batch_size=64)
    with caplog.at_level(logging.INFO):
        image(canvas, steps=3)
    done, saved = canvas.evaluations(0, 500.0)
    assert done + saved == 2 * len(regular(4))
    assert done * 3 == 2 * network.windows
    assert f"mask: {3 * saved} of {3 * (done + saved)} network evaluations" in caplog.text


def test_everything_is_tissue_and_nothing_changes() -> None:
    whole = denoiser(mask=torch.ones(6, 3, dtype=torch.bool), background=GLASS)
    assert digest(image(whole)) == digest(image())
    assert isinstance(whole.mask, TissueMask)


def test_a_scheduler_of_others_needs_the_schedule_for_the_background() -> None:
    options = {"mask": tissue((0, 0)), "background": GLASS}
    with pytest.raises(ValueError, match="schedule is None, but with a mask"):
        denoiser(**options)(noise(), 300)
    x, schedule = noise(), Schedule()
    output = denoiser(**options, schedule=schedule)(x, 300)
    abar = schedule.abar(300)
    x0 = abar**0.5 * x - (1 - abar) ** 0.5 * output  # of a network that predicts v
    torch.testing.assert_close(x0[:, 30:], GLASS.expand_as(x0)[:, 30:])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: denoiser(mask=tissue((0, 0))), ValueError, "background is None, but mask was"),
        (lambda: denoiser(background=GLASS), ValueError, "mask is None, but background was"),
        (
            lambda: denoiser(mask=tissue((0, 0)), background=torch.zeros(4, 1, 1)),
            ValueError,
            r"background has shape \[4, 1, 1\]",
        ),
        (lambda: TissueMask(tissue()), ValueError, "no cell that is true"),
        (lambda: TissueMask(torch.ones(2, 2)), TypeError, "tissue is float32, but bool"),
        (lambda: TissueMask(torch.ones(2).bool()), ValueError, r"tissue has shape \[2\]"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def wrapped(wrap: tuple[bool, bool], windows: Any = None) -> CanvasDenoiser:
    cells = canvas_noise(9, 12, 1, 3).view(4, 3, 1, 3)
    plan = windows or WindowPlan.regular(32, 24, WINDOW, 4, "hann", wrap=wrap)
    return CanvasDenoiser(
        ConvDenoiser(), plan, GridField(cells, WINDOW, wrap=wrap), guidance_scale=1.5
    )


@pytest.mark.parametrize("wrap", [(True, False), (False, True), (True, True)])
def test_a_wrapped_canvas_has_no_border_where_it_wraps(wrap: tuple[bool, bool]) -> None:
    """Rolled by a cell, everything is rolled: no place is special."""
    x = canvas_noise(1, 3, 32, 24)
    canvas = wrapped(wrap)
    shift = [8 * wraps for wraps in wrap]
    cells = canvas_noise(9, 12, 1, 3).view(4, 3, 1, 3).roll([int(w) for w in wrap], (0, 1))
    moved = CanvasDenoiser(
        ConvDenoiser(),
        WindowPlan.regular(32, 24, WINDOW, 4, "hann", wrap=wrap),
        GridField(cells, WINDOW, wrap=wrap),
        guidance_scale=1.5,
    )
    rolled = moved(x.roll(shift, (1, 2)), 300)
    torch.testing.assert_close(rolled, canvas(x, 300).roll(shift, (1, 2)))


def test_shifted_windows_wrap_too() -> None:
    windows = ShiftedWindows(32, 24, WINDOW, seed=0, wrap=(True, True), overlap_from=2)
    assert all(windows(step).wrap == (True, True) for step in range(3))
    made = sample(wrapped((True, True), windows), canvas_noise(0, 3, 32, 24), **settings(steps=4))
    assert bool(torch.isfinite(made).all())


def test_the_orders_agree_where_windows_wrap_along_x(tmp_path: Path) -> None:
    canvas = wrapped((False, True))
    x = canvas_noise(0, 3, 32, 24)
    plain = sample(canvas, x, **settings())
    assert torch.equal(sample(canvas, x, order="wavefront", **settings()), plain)
    rows = sample_rows(canvas, x, scratch=tmp_path, **settings())
    assert torch.equal(torch.cat([part.canvas for part in rows], dim=1), plain)


def test_the_wavefront_order_refuses_windows_that_wrap_along_y() -> None:
    with pytest.raises(ValueError, match=r"wrap along y.*order='plain'"):
        sample_rows(wrapped((True, False)), canvas_noise(0, 3, 32, 24), **settings())


def test_a_field_that_does_not_wrap_with_the_windows_is_refused() -> None:
    plan = WindowPlan.regular(32, 24, WINDOW, 4, wrap=(False, True))
    cells = torch.zeros(4, 3, 1, 3)
    with pytest.raises(ValueError, match="windows wrap along x, but the field does not"):
        CanvasDenoiser(ConvDenoiser(), plan, GridField(cells, WINDOW))
    wide = GridField(torch.zeros(4, 4, 1, 3), WINDOW, wrap=(False, True))
    with pytest.raises(ValueError, match="period of 24 latents"):
        CanvasDenoiser(ConvDenoiser(), plan, wide)
