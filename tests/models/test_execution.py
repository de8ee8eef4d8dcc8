# SPDX-License-Identifier: Apache-2.0
"""How a U-Net is run: layer by layer, as a CUDA graph, or compiled."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import ssldiff_fast as sf
from golden_inputs import UNET_A, fill, golden_input, relative_error
from ssldiff_fast.models import execution as module
from ssldiff_fast.models.execution import CompiledUNet, GraphedNetwork, Network, network_for
from ssldiff_fast.models.fused_unet import FusedUNet, exact_convolutions
from ssldiff_fast.models.unet import UNet

SMALL = {**UNET_A, "channel_mult": [1, 2], "attention_resolutions": [2]}


@torch.no_grad()
def evaluated(network: Network, device: str = "cpu", windows: int = 2) -> Tensor:
    """Guided pairs at one timestep."""
    x, context = golden_input("x", windows, 3, 16, 16), golden_input("context", 2 * windows, 1, 64)
    time = network.prepare_time(torch.tensor(400.0, device=device))
    return network(x.to(device), time, network.prepare(context.to(device)))


def test_on_a_cpu_auto_is_the_unet_itself() -> None:
    unet = UNet(**SMALL)
    assert network_for(unet) is unet
    assert network_for(unet, "eager") is unet


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ("fast", "execution is 'fast'"),
        ("graph", "execution is 'graph', but the device is cpu and graphs are CUDA's; use 'auto'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_read(execution: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network_for(UNet(**SMALL), execution)
    with pytest.raises(ValueError, match=message):
        sf.load("he-demo", execution=execution)


def test_compiled_it_is_the_unet_and_the_log_says_how_long_that_took(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = fill(UNet(**SMALL))
    expected = evaluated(unet)
    # The compiler itself is PyTorch's; its plainest backend keeps this test short.
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **o: compiler(m, backend="aot_eager", **o))
    compiled = network_for(unet, "compile")
    with caplog.at_level(logging.INFO):
        assert relative_error(evaluated(compiled), expected) < 1e-5
        evaluated(compiled)
    said = [r.getMessage() for r in caplog.records if "compiled for 2 windows in" in r.getMessage()]
    assert len(said) == 1


def test_where_compiling_fails_the_log_says_why_and_the_result_is_there(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(unet: UNet, **options: Any) -> Any:
        def call(*arguments: Any) -> Tensor:
            raise RuntimeError("no C++ compiler\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    unet = fill(UNet(**SMALL))
    assert torch.equal(evaluated(CompiledUNet(unet)), evaluated(unet))
    assert "torch.compile failed (no C++ compiler): the U-Net's layers are called" in caplog.text


def test_a_compiled_run_says_so_in_its_recipe(tmp_path: Any) -> None:
    from ssldiff_fast.synthesis_plan import Geometry, Plan
    from tiny_models import tiny_grid, tiny_model

    model = tiny_model()
    preset = sf.canvas.get_preset("fast")
    made = []
    for execution in ("eager", "compile"):
        model.execution = execution
        plan = Plan.make(model, tiny_grid(model, 2, 2), preset, 0, Geometry(), 4)
        made.append(plan.recipe()["compiled"])
    assert made == [False, True]


@pytest.mark.gpu
def test_a_graph_has_the_bits_of_its_layers_at_every_shape_and_time() -> None:
    unet = fill(UNet(**SMALL)).to("cuda", memory_format=torch.channels_last)
    eager, graphed = FusedUNet(unet), network_for(unet)
    assert isinstance(graphed, GraphedNetwork)
    for windows in (2, 3, 2):
        assert torch.equal(evaluated(graphed, "cuda", windows), evaluated(eager, "cuda", windows))


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_of_the_outermost_level_have_the_bits_of_its_layers() -> None:
    unet = fill(UNet(**SMALL)).to("cuda", memory_format=torch.channels_last)
    eager, graphed = FusedUNet(unet), network_for(unet)
    assert isinstance(graphed, GraphedNetwork)
    x, context = golden_input("x", 2, 3, 16, 16).cuda(), golden_input("c", 4, 1, 64).cuda()
    early, late = (eager.prepare_time(torch.tensor(t, device="cuda")) for t in (400.0, 380.0))
    prepared = graphed.prepare(context)
    for _ in range(2):
        expected, deep = eager.with_deep(x, early, prepared)
        out, kept = graphed.with_deep(x, early, prepared)
        assert torch.equal(out, expected)
        assert torch.equal(kept, deep)
        assert torch.equal(out, graphed(x, early, prepared))
        out, same = graphed.with_deep(x * 0.9, late, prepared, kept)
        assert same is kept
        assert torch.equal(out, eager.with_deep(x * 0.9, late, prepared, deep)[0])
        with exact_convolutions():
            below = unet.with_deep(x * 0.9, torch.tensor(380.0).cuda(), context, deep)[0]
        assert relative_error(out, below) < 1e-5


@pytest.mark.gpu
def test_changed_weights_are_captured_anew() -> None:
    unet = fill(UNet(**SMALL)).to("cuda", memory_format=torch.channels_last)
    graphed = network_for(unet)
    before = evaluated(graphed, "cuda")
    with torch.no_grad():
        unet.output_blocks[1][2].conv.weight.mul_(2.0)
    after = evaluated(graphed, "cuda")
    assert not torch.equal(before, after)
    assert torch.equal(after, evaluated(FusedUNet(unet), "cuda"))


@pytest.mark.gpu
def test_where_no_graph_can_be_captured_the_log_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = fill(UNet(**SMALL)).to("cuda", memory_format=torch.channels_last)

    class Refusing:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module.torch.cuda, "graph", Refusing)
    out = evaluated(network_for(unet), "cuda")
    assert torch.equal(out, evaluated(FusedUNet(unet), "cuda"))
    assert "no CUDA graph could be captured (operation not permitted" in caplog.text


def test_a_lack_of_memory_that_an_operator_met_is_no_failure_of_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or all that follows, with fewer windows, would be called layer by layer."""
    unet = UNet(**SMALL)
    graphed = GraphedNetwork(unet, unet)

    def lacking(evaluate: Any) -> Any:
        raise RuntimeError('torch_call_dispatcher( "aten::new_empty", "", stack) API call failed')

    monkeypatch.setattr(graphed, "_captured", lacking)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="API call failed"):
        evaluated(graphed)
    assert not graphed._failed


class Greedy:
    """A network that runs out of memory where more windows than it has room for are captured."""

    def __init__(self, network: FusedUNet, room: int) -> None:
        self.network, self.room = network, room
        self.prepare, self.prepare_time = network.prepare, network.prepare_time
        self.with_deep = network.with_deep

    def __call__(self, x: Tensor, *others: Any) -> Tensor:
        out = self.network(x, *others)
        if torch.cuda.is_current_stream_capturing() and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return out


@pytest.mark.gpu
def test_a_lack_of_memory_while_capturing_is_told_and_smaller_ones_are_captured() -> None:
    unet = fill(UNet(**SMALL)).to("cuda", memory_format=torch.channels_last)
    eager = FusedUNet(unet)
    graphed = GraphedNetwork(Greedy(eager, 2), unet)
    with pytest.raises(torch.OutOfMemoryError):
        evaluated(graphed, "cuda", 3)
    assert torch.equal(evaluated(graphed, "cuda", 2), evaluated(eager, "cuda", 2))
    assert graphed._graphs
