# SPDX-License-Identifier: Apache-2.0
"""scatter_mean with bands, windows left out, guidance and a solver step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from operator_cases import PLANS, assert_close, raw_plan
from scatter_cases import ASKED, Call, accumulated, covering, make_call
from ssldiff_fast import _C
from ssldiff_fast.diffusion.guidance import guide
from ssldiff_fast.diffusion.solvers import AffineStep, apply_step, denoised
from ssldiff_fast.ops import CanvasStep, WindowPlan, philox_normal, scatter_mean
from ssldiff_fast.ops import scatter_mean_reference as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ODD = PLANS["odd-overlap"]


def assert_agrees(call: Call, made: tuple[Tensor, ...]) -> None:
    expected = call.double().run(reference)
    # Noise is drawn in float32, whatever the windows are.
    step = call.options.get("step")
    is_noisy = step is not None and step.noise != 0.0
    for actual, wanted in zip(made, expected, strict=True):
        assert_close(actual.cpu().float() if is_noisy else actual.cpu(), wanted)


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    assert len(actual) == len(expected)
    return all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ASKED)
def test_it_agrees_with_the_reference_in_float64(name: str, dtype: torch.dtype) -> None:
    call = make_call(name, dtype)
    made = call.run(scatter_mean)
    assert {tensor.dtype for tensor in made} == {accumulated(dtype)}
    assert_agrees(call, made)


@pytest.mark.parametrize("layout", ["channels-last", "transposed", "unlike"])
@pytest.mark.parametrize("name", ["guided", "guided-pixels", "everything", "wide-step"])
def test_every_layout_gives_the_same_bits(name: str, layout: str) -> None:
    call = make_call(name)

    def laid_out(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and layout != "transposed":
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    changed = call.map(laid_out)
    if layout == "unlike":
        changed = replace(changed, windows=call.windows)
    assert same(changed.run(scatter_mean), call.run(scatter_mean))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["background-wide", "everything", "wide-step"])
def test_every_instruction_set_gives_the_same_bits(
    cpu_path: str, name: str, layout: torch.memory_format
) -> None:
    call = make_call(name, torch.bfloat16)
    call = replace(call, windows=call.windows.contiguous(memory_format=layout))
    expected = call.run(scatter_mean)
    _C.set_cpu_path("portable")
    assert same(call.run(scatter_mean), expected)


@given(
    window=st.integers(1, 7),
    size=st.integers(7, 24),
    stride=st.integers(1, 7),
    wrap=st.booleans(),
    masked=st.booleans(),
    cuts=st.lists(st.integers(0, 24), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_any_bands_give_the_same_bits(
    window: int, size: int, stride: int, wrap: bool, masked: bool, cuts: list[int]
) -> None:
    plan = WindowPlan.regular(
        size, 9, (window, window), min(stride, window), "hann", wrap=(wrap, False)
    )
    windows, uncond = torch.randn(2, len(plan), 2, window, window)
    background, canvas = torch.randn(2, 2, size, 9)
    kept = torch.arange(len(plan))
    if masked:
        kept = kept[torch.rand(len(plan)) < 0.7]

    def banded(begin: int, end: int, numbers: Tensor) -> Tensor:
        step = CanvasStep(canvas[:, begin:end], x=0.7, output=0.3, noise=0.1, seed=9, step=1)
        made: Tensor = scatter_mean(
            windows[numbers],
            plan,
            numbers,
            rows=(begin, end),
            background=background[:, begin:end],
            uncond=uncond[numbers],
            guidance_scale=1.75,
            step=step,
        )
        return made

    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    bands = [
        banded(begin, end, kept[torch.isin(kept, covering(plan, (begin, end)))])
        for begin, end in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(bands, dim=1), banded(0, size, kept))


def test_windows_left_out_do_not_count() -> None:
    call = make_call("left-out")
    assert call.index is not None
    everything = torch.full((len(call.plan), *call.windows.shape[1:]), 1e30)
    everything[call.index] = 2.0
    out = scatter_mean(everything[call.index], call.plan, call.index)
    assert_close(out, torch.full_like(out, 2.0))


def test_a_background_is_what_the_windows_left_out_hold() -> None:
    plan = ODD.plan
    background = torch.randn(3, plan.height, plan.width)
    (h, w), kept = plan.window, torch.arange(0, len(plan), 2)
    windows = torch.stack([background[:, y : y + h, x : x + w] for y, x in plan.origins.tolist()])
    windows[kept] = torch.randn(len(kept), *windows.shape[1:])
    some = scatter_mean(windows[kept], plan, kept, background=background)
    assert_close(some, scatter_mean(windows, plan))
    nothing = scatter_mean(windows[:0], plan, kept[:0], background=background)
    assert_close(nothing, background)


def test_a_background_is_not_read_where_no_window_is_left_out() -> None:
    plan = PLANS["disjoint"].plan
    windows = PLANS["disjoint"].windows()
    background = torch.full((2, plan.height, plan.width), torch.nan)
    kept = torch.arange(1, len(plan))
    out = scatter_mean(windows[kept], plan, kept, background=background)
    assert torch.equal(out.isnan()[0], scatter_mean(windows, plan)[0].isnan() | _area(plan))


def _area(plan: WindowPlan) -> Tensor:
    first = torch.zeros(plan.height, plan.width, dtype=torch.bool)
    first[: plan.window[0], : plan.window[1]] = True
    return first


def test_fused_guidance_has_the_bits_of_guide() -> None:
    call = make_call("guided")
    guided = guide(call.windows, call.options["uncond"], 1.75)
    assert torch.equal(call.run(scatter_mean)[0], scatter_mean(guided, call.plan))


def test_a_fused_step_has_the_bits_of_the_solver() -> None:
    call = make_call("full-step")
    step: CanvasStep = call.options["step"]
    affine = AffineStep(
        t=0,
        time=0.0,
        x=step.x,
        output=step.output,
        denoised_x=step.denoised_x,
        denoised_output=step.denoised_output,
        noise=step.noise,
        history=step.history,
    )
    mean = scatter_mean(call.windows, call.plan)
    noise = philox_normal(step.seed, 1, (0, call.plan.height), call.plan.width, step=step.step)
    made = call.run(scatter_mean)
    expected = apply_step(affine, step.canvas, mean, noise=noise, history=step.previous)
    assert torch.equal(made[0], expected)
    assert torch.equal(made[1], denoised(affine, step.canvas, mean))


def test_rows_without_height_give_an_empty_canvas() -> None:
    made = scatter_mean(ODD.windows(), ODD.plan, rows=(4, 4))
    assert made.shape == (3, 0, ODD.plan.width)
    empty = torch.zeros(0, 3, 7, 5)
    assert scatter_mean(empty, ODD.plan, torch.arange(0), rows=(4, 4)).shape == (3, 0, 23)


def test_a_small_band_of_a_huge_canvas_is_in_its_place() -> None:
    # 2^36 pixels; only what covers the band is ever made.
    size, window = 2**18, 1024
    plan = WindowPlan.regular(size, size, (window, window), window)
    row = len(plan.origins_y) - 1
    numbers = row * len(plan.origins_x) + torch.arange(len(plan.origins_x))
    values = torch.arange(len(numbers), dtype=torch.float32)
    windows = values[:, None, None, None].expand(-1, 1, window, window)
    out = scatter_mean(windows, plan, numbers, rows=(size - 3, size))
    assert torch.equal(out[0], values.repeat_interleave(window).expand(3, -1))
    step = CanvasStep(out, x=0.0, output=0.0, noise=1.0, seed=4, step=2**32 - 1)
    made = scatter_mean(windows, plan, numbers, rows=(size - 3, size), step=step)
    drawn = philox_normal(4, 1, (size - 3, size), size, step=2**32 - 1)
    assert torch.equal(made, drawn)


def differentiable(name: str) -> tuple[Call, list[Tensor]]:
    """A call in float64, and those of its tensors that gradients flow to."""
    call = make_call(name, torch.float64)
    options, step = dict(call.options), call.options.get("step")
    leaves = [call.windows.requires_grad_()]
    if "uncond" in options:
        leaves.append(options["uncond"].requires_grad_())
    if step is not None:
        leaves.append(step.canvas.requires_grad_())
        if step.previous is not None:
            leaves.append(step.previous.requires_grad_())
    return call, leaves


@pytest.mark.parametrize("name", ASKED)
def test_every_gradient_is_that_of_the_reference(name: str) -> None:
    call, leaves = differentiable(name)
    seeds = [torch.randn_like(made) for made in call.run(scatter_mean)]
    found, expected = (
        torch.autograd.grad(
            sum((made * seed).sum() for made, seed in zip(call.run(function), seeds)), leaves
        )
        for function in (scatter_mean, reference)
    )
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)


def test_gradcheck_passes_with_everything() -> None:
    plan = WindowPlan.regular(5, 4, (3, 2), (1, 2), "hann", wrap=(True, False))
    index = torch.arange(0, len(plan), 2)
    windows, uncond = torch.randn(2, len(index), 1, 3, 2, dtype=torch.float64)
    canvas, previous, background = torch.randn(3, 1, 3, 4, dtype=torch.float64)

    def function(w: Tensor, u: Tensor, c: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        step = CanvasStep(c, 0.5, 0.3, 0.1, 0.2, p, 0.7, -0.4)
        made: tuple[Tensor, Tensor] = scatter_mean(
            w, plan, index, rows=(1, 4), background=background, uncond=u, guidance_scale=2.0,
            step=step,
        )  # fmt: skip
        return made

    leaves = [t.clone().requires_grad_() for t in (windows, uncond, canvas, previous)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def raw(call: Call) -> tuple[Any, ...]:
    """What the registered operator takes."""
    rows = call.options["rows"] or (0, call.plan.height)
    scale = call.options.get("guidance_scale", 1.0)
    is_tensor = isinstance(scale, Tensor)
    given = (call.options.get("uncond"), scale if is_tensor else None)
    shared = (call.index, *given, call.options.get("background"), *raw_plan(call.plan, rows))
    number = 1.0 if is_tensor else scale
    step = call.options.get("step")
    if step is None:
        return call.windows, *shared, number, True
    own = (call.windows, step.canvas, step.previous)
    return *own, *shared, number, step.coefficients, 5, step.step


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["band", "background", "guided-windows", "step", "everything"])
def test_opcheck_passes(name: str, grad: bool) -> None:
    call = make_call(name)
    if grad:
        call.windows.requires_grad_()
    operators = torch.ops.ssldiff
    has_step = call.options.get("step") is not None
    operator = (operators.scatter_mean_step if has_step else operators.scatter_mean).default
    torch.library.opcheck(operator, raw(call))


@pytest.mark.parametrize("name", ["background", "everything"])
def test_it_stays_one_node_under_compile(name: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    call = make_call(name)

    def function(windows: Tensor) -> tuple[Tensor, ...]:
        return replace(call, windows=2 * windows).run(scatter_mean)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert same(compiled(call.windows), function(call.windows))
    nodes = [n for g in graphs for n in g.graph.nodes if "scatter_mean" in str(n.target)]
    assert len(nodes) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ASKED)
def test_on_a_gpu_it_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    call = make_call(name, dtype)
    there = call.map(lambda tensor: tensor.cuda())
    made = there.run(scatter_mean)
    assert_agrees(call, made)
    assert same(there.run(scatter_mean), made)


@pytest.mark.gpu
def test_on_a_gpu_it_can_be_captured_in_a_graph() -> None:
    call = make_call("everything").map(lambda tensor: tensor.cuda())
    expected = call.run(scatter_mean)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call.run(scatter_mean)
    for tensor in made:
        tensor.fill_(torch.nan)
    graph.replay()
    assert same(made, expected)
