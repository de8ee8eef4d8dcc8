# SPDX-License-Identifier: Apache-2.0
"""How a U-Net's inference is run: layer by layer, as a CUDA graph, or compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ssldiff_fast import settings
from ssldiff_fast._checks import check_choice
from ssldiff_fast.models.fused_unet import FusedUNet, versions_of, why_not
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors
from ssldiff_fast.models.unet import UNet

logger = logging.getLogger(__name__)

EXECUTIONS = ("auto", "eager", "graph", "compile")
Evaluate: TypeAlias = Callable[..., tuple[Tensor, ...]]  # (network, windows, times, context, ...)

# The last is what is left of it where one of our compiled operators allocates.
_SIGNS = ("not enough memory", "out of memory", "ALLOC_FAILED", '"aten::new_empty"')


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, its libraries or the allocator of the CPU had too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _SIGNS)


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


@runtime_checkable
class SplitNetwork(Network, Protocol):
    """One whose outermost level can be evaluated alone."""

    def with_deep(
        self, x: Tensor, time: TimeVectors, context: PreparedContext, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `UNet.with_deep`."""
        ...


def check_execution(execution: str, device: torch.device, *, call: str) -> None:
    """Raise ValueError for an unknown execution, or for a graph on a device that is no GPU."""
    check_choice("execution", execution, EXECUTIONS, call=call)
    if device.type != "cuda" and execution == "graph":
        raise ValueError(
            f"{call}: execution is 'graph', but the device is {device} and graphs are CUDA's; use "
            "'auto' or 'eager'."
        )


def network_for(unet: UNet, execution: str = "auto") -> Network | SplitNetwork:
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
    network: SplitNetwork = unet if reason is not None else FusedUNet(unet)
    return network if execution == "eager" else GraphedNetwork(network, unet)


@dataclass
class _Graph:
    """One captured evaluation: what it reads, and what it writes."""

    graph: torch.cuda.CUDAGraph
    read: list[Tensor]
    made: tuple[Tensor, ...]


class GraphedNetwork:
    """A network on a GPU whose evaluations are replayed from CUDA graphs, to the same bits.

    A shape of input is captured at its first call, and anew when `prepare` finds that weights have
    changed. Where that fails, the log says why, and layers are called one by one from then on.

    Args:
        network: what is captured.
        unet: whose parameters it reads.
    """

    def __init__(self, network: SplitNetwork, unet: UNet) -> None:
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
            self._forget()
        return self.network.prepare(context)

    def __call__(self, x: Tensor, time: TimeVectors, context: PreparedContext) -> Tensor:
        """As the network's own."""
        return self._replayed(_output, x, time, context)[0]

    def with_deep(
        self, x: Tensor, time: TimeVectors, context: PreparedContext, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the network's own."""
        if deep is not None:
            return self._replayed(_output, x, time, context, deep)[0], deep
        out, made = self._replayed(_output_and_deep, x, time, context)
        return out, made

    @torch.no_grad()
    def _replayed(
        self,
        evaluate: Evaluate,
        x: Tensor,
        time: TimeVectors,
        context: PreparedContext,
        *deep: Tensor,
    ) -> tuple[Tensor, ...]:
        if self._failed or torch.cuda.is_current_stream_capturing():
            return evaluate(self.network, x, time, context, *deep)
        given = [x, *deep, *_tensors(context)]
        key = (evaluate, len(time), *((tensor.shape, tensor.dtype) for tensor in given))
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._capture(evaluate, x, time, context, deep)
            if captured is None:
                return evaluate(self.network, x, time, context, *deep)
            self._graphs[key] = captured
        torch._foreach_copy_(captured.read, [*given, *time.blocks])
        captured.graph.replay()
        return tuple(out.clone() for out in captured.made)

    def _capture(
        self,
        evaluate: Evaluate,
        x: Tensor,
        time: TimeVectors,
        context: PreparedContext,
        deep: tuple[Tensor, ...],
    ) -> _Graph | None:
        begin = _now()
        still = TimeVectors(tuple(block.clone() for block in time.blocks))
        kept, held, below = x.clone(), context.map(torch.clone), [one.clone() for one in deep]
        try:
            graph, made = self._captured(lambda: evaluate(self.network, kept, still, held, *below))
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._forget()  # of other shapes, perhaps of an earlier run
                raise
            self._failed = True
            reason = str(error).splitlines()[0]
            logger.warning(
                "no CUDA graph could be captured (%s): layers are called one by one", reason
            )
            return None
        logger.info("captured %d windows as a CUDA graph in %.1f s", len(made[0]), _now() - begin)
        return _Graph(graph, [kept, *below, *_tensors(held), *still.blocks], made)

    def _forget(self) -> None:
        self._graphs.clear()
        self._pool = None

    def _captured(
        self, evaluate: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            evaluate()  # loads and chooses kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Graphs are replayed one after another, so they may share what they work in.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = evaluate()
        self._pool = graph.pool()
        return graph, made


def _output(network: SplitNetwork, *given: Any) -> tuple[Tensor, ...]:
    """Of the whole network, or with what its lower levels made of its outermost level."""
    x, time, context, *deep = given
    return (network.with_deep(*given)[0] if deep else network(x, time, context),)


def _output_and_deep(network: SplitNetwork, *given: Any) -> tuple[Tensor, ...]:
    return network.with_deep(*given)


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
            if is_out_of_memory(error):
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
