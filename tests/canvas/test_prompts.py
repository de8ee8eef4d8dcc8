# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import ConvDenoiser

from ssldiff_fast.canvas import (
    CanvasDenoiser,
    Conditioning,
    GridField,
    PromptField,
    RegionField,
    WindowPlan,
    canvas_noise,
)
from ssldiff_fast.canvas.conditioning import join_conditioning

WINDOW = (8, 8)


def prompts(count: int, seed: int = 3) -> Tensor:
    return canvas_noise(seed, count, 2, 4)  # [count, T = 2, D = 4]


def plan(height: int = 24, width: int = 32) -> WindowPlan:
    return WindowPlan.regular(height, width, WINDOW, 4)


class Counting(ConvDenoiser):
    """Notes the prompts that it is asked for, and the shape of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.batches: list[int] = []
        self.cond: Tensor | None = None

    def prepare(self, cond: Tensor, uncond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.cond = cond
        return cond, uncond

    def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
        self.asked += index.tolist()
        self.batches.append(len(index))
        return super().__call__(x, t, state, index)


def test_one_prompt_is_held_once_for_all_windows() -> None:
    toy = Counting()
    CanvasDenoiser(toy, plan(), PromptField(prompts(1)))(canvas_noise(0, 3, 24, 32), 300)
    assert toy.cond is not None
    assert toy.cond.shape == (len(plan().origins_x), 2, 4)
    assert toy.cond.stride(0) == 0


def test_one_prompt_is_a_grid_of_equal_cells() -> None:
    x, prompt, negative = canvas_noise(0, 3, 24, 32), prompts(1)[0], prompts(1, seed=8)[0]
    grid = GridField(prompt.expand(3, 4, -1, -1), WINDOW, uncond=negative)
    outputs = [
        CanvasDenoiser(ConvDenoiser(), plan(), field, guidance_scale=3.0)(x, 300)
        for field in (PromptField(prompt, uncond=negative), grid)
    ]
    torch.testing.assert_close(*outputs)


def test_guidance_goes_away_from_the_negative_prompt() -> None:
    x, prompt, negative = canvas_noise(0, 3, 8, 8), prompts(1), prompts(1, seed=8)
    one, toy = WindowPlan.regular(8, 8, WINDOW, 8), ConvDenoiser()
    field = PromptField(prompt, uncond=negative)
    guided = CanvasDenoiser(toy, one, field, guidance_scale=3.0)(x, 300)
    cond, uncond = toy(x[None], 300.0, (prompt, negative), torch.tensor([0]))[:, 0]
    torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond))


@pytest.mark.parametrize("make", [PromptField, lambda c: RegionField(c, torch.ones(1, 24, 32))])
def test_guidance_without_a_negative_prompt_is_refused(make: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale is 5\.0, but the field has no uncond"):
        CanvasDenoiser(ConvDenoiser(), plan(), make(prompts(1)), guidance_scale=5.0)


def soft_masks() -> Tensor:
    ramp = torch.linspace(-1, 2, 32).clamp(0, 1).expand(24, 32)
    corner = torch.zeros(24, 32)
    corner[16:, :12] = 2.0
    return torch.stack((1 - ramp, ramp, corner))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_regions_are_the_masked_mean_of_all_window_outputs(scale: float) -> None:
    x, masks, cond, negative = canvas_noise(0, 3, 24, 32), soft_masks(), prompts(3), prompts(1, 8)
    toy, total, weight = ConvDenoiser(), torch.zeros(3, 24, 32), torch.zeros(24, 32)
    for y, left in plan().origins.tolist():
        place = (slice(None), slice(y, y + 8), slice(left, left + 8))
        for region in range(3):
            state = (cond, negative)
            on, off = toy(x[place][None], 300.0, state, torch.tensor([region]))[:, 0]
            mask = masks[place][region]
            total[place] += mask * (off + scale * (on - off))
            weight[place[1:]] += mask
    field = RegionField(cond, masks, uncond=negative)
    ours = CanvasDenoiser(toy, plan(), field, guidance_scale=scale)(x, 300)
    torch.testing.assert_close(ours, total / weight)


def test_windows_that_a_region_does_not_touch_are_not_evaluated() -> None:
    masks = torch.zeros(2, 24, 32)
    masks[0, :, :16], masks[1, :, 16:] = 1.0, 1.0
    toy = Counting()
    field = RegionField(prompts(2), masks)
    CanvasDenoiser(toy, plan(), field, batch_size=7)(canvas_noise(0, 3, 24, 32), 300)
    rows, columns = 5, 7  # of windows; the middle column alone lies in both regions
    assert set(toy.batches) == {7}
    # Eight pairs a window row, in two batches of seven whose last pair is repeated.
    assert len(toy.asked) == rows * 14
    assert toy.asked[:14] == [0, 0, 0, 0, 1, 1, 1, *[1] * 7]
    assert columns + 1 == 8


def test_one_region_is_one_prompt() -> None:
    x, prompt = canvas_noise(0, 3, 24, 32), prompts(1)
    fields = (PromptField(prompt), RegionField(prompt, torch.full((1, 24, 32), 0.3)))
    outputs = [CanvasDenoiser(ConvDenoiser(), plan(), field)(x, 300) for field in fields]
    torch.testing.assert_close(*outputs)


def test_regions_of_several_canvases_stay_apart() -> None:
    origins = plan().origins[:4]
    one = RegionField(prompts(2), torch.ones(2, 24, 32)).at(origins)
    other = RegionField(prompts(3), torch.ones(3, 24, 32)).at(origins)
    both = join_conditioning([one, other])
    assert len(both) == 8
    weights = both.weights(torch.tensor([0, 7]), WINDOW)
    assert weights[0, :, 0, 0].tolist() == [0.5, 0.5, 0, 0, 0]
    torch.testing.assert_close(weights[1, :, 0, 0], torch.tensor([0, 0, 1 / 3, 1 / 3, 1 / 3]))


def test_windows_over_the_end_of_the_canvas_see_its_beginning() -> None:
    masks = torch.zeros(2, 8, 16)
    masks[0, :, :4], masks[1, :, 4:] = 1.0, 1.0
    regions = RegionField(prompts(2), masks).at(torch.tensor([[0, 12]]))
    weights = regions.weights(torch.tensor([0]), WINDOW)[0]
    assert bool((weights[1, :, :4] == 1).all())
    assert bool((weights[0, :, 4:] == 1).all())


def test_prompts_hold_on_canvases_that_wrap_around() -> None:
    around = WindowPlan.regular(8, 16, WINDOW, 4, wrap=(False, True))
    x, prompt = canvas_noise(0, 3, 8, 16), prompts(1)
    fields = (PromptField(prompt), RegionField(prompt, torch.ones(1, 8, 16)))
    first, other = (CanvasDenoiser(ConvDenoiser(), around, field)(x, 300) for field in fields)
    torch.testing.assert_close(first, other)
    turned = CanvasDenoiser(ConvDenoiser(), around, fields[0])(x.roll(4, 2), 300)
    torch.testing.assert_close(turned, first.roll(4, 2))


def test_each_canvas_of_a_batch_has_regions_of_its_own() -> None:
    x = canvas_noise(0, 6, 24, 32).view(2, 3, 24, 32)
    fields = [RegionField(prompts(2, seed), soft_masks()[:2] + 0.1) for seed in (3, 4)]
    both = CanvasDenoiser(ConvDenoiser(), plan(), fields)(x, 300)
    for number, field in enumerate(fields):
        alone = CanvasDenoiser(ConvDenoiser(), plan(), field)(x[number], 300)
        torch.testing.assert_close(both[number], alone)


def test_conditioning_of_all_kinds_is_indexed_together() -> None:
    cond = Conditioning(
        prompts(5), torch.arange(10.0).view(5, 2), torch.arange(5), added={"ids": torch.eye(5)}
    )
    some = cond[torch.tensor([3, 1])]
    assert len(some) == 2
    assert some.labels is not None
    assert some.labels.tolist() == [3, 1]
    assert torch.equal(some.added["ids"], torch.eye(5)[[3, 1]])
    half = cond.to("cpu", torch.float16)
    assert half.labels is not None
    assert (half.labels.dtype, half.added["ids"].dtype) == (torch.int64, torch.float16)
    assert len(Conditioning.join([cond, some])) == 7


def test_a_prompt_moved_to_another_precision_is_still_held_once() -> None:
    many = Conditioning(prompts(1), labels=torch.tensor([4])).expand(1000).to("cpu", torch.float16)
    assert many.tokens is not None
    assert many.tokens.stride(0) == 0
    assert len(many) == 1000


def bare() -> Tensor:
    masks = torch.ones(2, 24, 32)
    masks[:, 4, 6] = 0
    return masks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptField(prompts(2)), "cond is for 2 windows, but one prompt"),
        (lambda: PromptField(prompts(1), uncond=prompts(2)), "uncond is for 2 windows"),
        (lambda: PromptField(prompts(1) * torch.nan), "tokens holds 8 values that are NaN"),
        (lambda: PromptField(torch.zeros(4)), r"tokens has shape \[4\]"),
        (lambda: RegionField(prompts(3), bare()), r"masks has shape \[2, 24, 32\].*R = 3"),
        (lambda: RegionField(prompts(2), bare()), r"leave 1 pixels.*first at \(y, x\) = \(4, 6\)"),
        (lambda: RegionField(prompts(2), -bare()), "masks go down to -1"),
        (lambda: RegionField(prompts(2), bare() * torch.inf), "masks holds"),
        (lambda: Conditioning(), "all empty"),
        (
            lambda: Conditioning(prompts(2), pooled=torch.zeros(3, 4)),
            r"pooled has shape \[3, 4\].*N = 2",
        ),
        (
            lambda: Conditioning.join(
                [Conditioning(prompts(2)), Conditioning(labels=torch.ones(1))]
            ),
            "some parts have labels and some do not",
        ),
        (
            lambda: Conditioning.join(
                [Conditioning(prompts(2)), Conditioning(torch.zeros(1, 3, 4))]
            ),
            "pad the shorter ones",
        ),
        (
            lambda: CanvasDenoiser(
                ConvDenoiser(), plan(), RegionField(prompts(1), torch.ones(1, 8, 8))
            ),
            "field covers 8 x 8",
        ),
        (
            lambda: GridField(torch.zeros(3, 4, 1, 8), WINDOW, uncond=torch.zeros(2, 8)),
            r"uncond has shape \[2, 8\]",
        ),
    ],
)
def test_bad_prompts_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_fields_of_different_kinds_are_not_joined() -> None:
    with pytest.raises(TypeError, match="different kinds"):
        join_conditioning([prompts(1), Conditioning(prompts(1))])
