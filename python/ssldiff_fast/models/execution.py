# SPDX-License-Identifier: Apache-2.0
"""How a U-Net's inference is run: layer by layer, as a CUDA graph, or compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ssldiff_fast import settings
from ssldiff_fast._checks import check_choice
from ssldiff_fast.models.fused_unet import FusedUNet, versions_of, why_not
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors
from ssldiff_fast.models.unet import UNet

logger = logging.getLogger(__name__)

EXECUTIONS = ("auto", "eager", "graph", "compile")
_WARM_UPS = 2  # calls that load and choose kernels, before one is captured


class Network(Protocol):
    """A U-Net for inference, with all that does not depend on the windows prepared."""

    def prepare(self, context: Tensor) -> PreparedContext:
        """What the blocks need of tokens [N, T, D]."""
        ...

    def prepare_time(self, t: Tensor) -> TimeVectors:
        """What the blocks need of timesteps."""
        ...

    def __call__(self, x: Tensor, time: TimeVectors, context: PreparedContext) -> Tensor:
        """The model output [B or 2 B, C, h, w] of windows [B, C, h, w]."""
        ...


def check_execution(execution: str, device: torch.device, *, call: str) -> None:
    """Raise ValueError for an unknown execution, or for a graph on a device that is no GPU."""
    check_choice("execution", execution, EXECUTIONS, call=call)
    if device.type != "cuda" and execution == "graph":
        raise ValueError(
            f"{call}: execution is 'graph', but the device is {device} and graphs are CUDA's; use "
            "'auto' or 'eager'."
        )


def network_for(unet: UNet, execution: str = "auto") -> Network:
    """The fastest form of a U-Net where it is, or the one that is asked for.

    Args:
        unet: on its device and in its dtype.
        execution: "eager" calls layer after layer. "graph" captures all launches of one
            evaluation as a CUDA graph, for each shape of its input, and replays it: the same bits
            without the time that a processor takes to launch. "compile" is `torch.compile`, which
            rounds differently. "auto" is "graph" on a GPU and "eager" elsewhere.

    Raises:
        ValueError: an unknown execution, or a graph on a device that is no GPU.
    """
    device = next(unet.parameters()).device
    check_execution(execution, device, call="network_for")
    if execution == "compile":
        return CompiledUNet(unet)
    if device.type != "cuda":
        return unet
    reason = why_not(unet)
    if reason is not None:
        logger.warning("the U-Net's layers are called one by one, since %s", reason)
    network: Network = unet if reason is not None else FusedUNet(unet)
    return network if execution == "eager" else GraphedNetwork(network, unet)


@dataclass
class _Graph:
    """One captured evaluation: what it reads, and what it writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    time: list[Tensor]
    context: PreparedContext
    out: Tensor


class GraphedNetwork:
    """A network on a GPU whose evaluations are replayed from CUDA graphs, to the same bits.

    A shape of input is captured at its first call, and anew when `prepare` finds that weights have
    changed. Where that fails, the log says why, and layers are called one by one from then on.

    Args:
        network: what is captured.
        unet: whose parameters it reads.
    """

    def __init__(self, network: Network, unet: UNet) -> None:
        self.network = network
        self.prepare_time = network.prepare_time
        self._parameters = list(unet.parameters())
        self._versions: tuple[int, ...] = ()
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._pool: Any = None
        self._failed = False

    def prepare(self, context: Tensor) -> PreparedContext:
        """As the network's own."""
        versions = versions_of(self._parameters)
        if versions != self._versions:
            self._versions = versions
            self._graphs.clear()
        return self.network.prepare(context)

    @torch.no_grad()
    def __call__(self, x: Tensor, time: TimeVectors, context: PreparedContext) -> Tensor:
        """As the network's own."""
        if self._failed or torch.cuda.is_current_stream_capturing():
            return self.network(x, time, context)
        tensors = _tensors(context)
        key = (x.shape, x.dtype, len(time), *((t.shape, t.dtype) for t in tensors))
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._capture(x, time, context)
            if captured is None:
                return self.network(x, time, context)
            self._graphs[key] = captured
        read = [captured.x, *captured.time, *_tensors(captured.context)]
        torch._foreach_copy_(read, [x, *time.blocks, *tensors])
        captured.graph.replay()
        return captured.out.clone()

    def _capture(self, x: Tensor, time: TimeVectors, context: PreparedContext) -> _Graph | None:
        begin = _now()
        try:
            captured = self._captured(x, time, context)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._failed = True
            reason = str(error).splitlines()[0]
            logger.warning(
                "no CUDA graph could be captured (%s): layers are called one by one", reason
            )
            return None
        logger.info(
            "captured %d windows as a CUDA graph in %.1f s", len(captured.out), _now() - begin
        )
        return captured

    def _captured(self, x: Tensor, time: TimeVectors, context: PreparedContext) -> _Graph:
        still = TimeVectors(tuple(block.clone() for block in time.blocks))
        kept, held = x.clone(), context.map(torch.clone)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.network(kept, still, held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Graphs are replayed one after another, so they may share what they work in.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self.network(kept, still, held)
        self._pool = graph.pool()
        return _Graph(graph, kept, list(still.blocks), held, out)


class CompiledUNet:
    """A U-Net compiled by `torch.compile` for the shapes that it meets.

    What was compiled is kept in the cache folder for the next process. Where compiling fails, the
    log says why, and layers are called one by one from then on.
    """

    def __init__(self, unet: UNet) -> None:
        settings.keep_compiled()
        self.unet = unet
        self.prepare, self.prepare_time = unet.prepare, unet.prepare_time
        self._compiled: Callable[..., Tensor] | None = torch.compile(unet, dynamic=False)
        self._shapes: set[tuple[int, ...]] = set()

    @torch.no_grad()
    def __call__(self, x: Tensor, time: TimeVectors, context: PreparedContext) -> Tensor:
        """As the U-Net's own."""
        if self._compiled is None:
            return self.unet(x, time, context)
        shape = (*x.shape, len(context))
        if shape in self._shapes:
            return self._compiled(x, time, context)
        begin = _now()
        try:
            out = self._compiled(x, time, context)
        except Exception as error:  # whatever a compiler, or what it calls, raises
            if isinstance(error, torch.OutOfMemoryError | KeyboardInterrupt):
                raise
            self._compiled = None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning(
                "torch.compile failed (%s): the U-Net's layers are called one by one", reason
            )
            return self.unet(x, time, context)
        self._shapes.add(shape)
        logger.info("compiled for %d windows in %.1f s", len(x), _now() - begin)
        return out


def _tensors(context: PreparedContext) -> list[Tensor]:
    """What holds the vectors of a context."""
    if context.packed is not None:
        return [context.packed]
    return [tensor for block in context.blocks for tensor in block.tensors()]


def _now() -> float:
    return time.perf_counter()
