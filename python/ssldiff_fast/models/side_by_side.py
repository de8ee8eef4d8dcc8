# SPDX-License-Identifier: Apache-2.0
"""Parts of a batch on a GPU at the same time, each on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ssldiff_fast.models.prepared import PreparedContext


def side_by_side(
    evaluate: Callable[..., tuple[Tensor, ...]],
    x: Tensor,  # [B, C, h, w]
    context: PreparedContext,  # of B windows, or 2 B: guided pairs
    *others: Tensor,  # [B or 2 B, ...], as many as contexts
    parts: int,
) -> tuple[Tensor, ...]:  # [B or 2 B, ...]
    """What a network makes of some windows, evaluated in as many parts.

    The first part runs on the current stream, which in the end waits for the others. Streams that
    are captured this way are branches of one graph.
    """
    if parts == 1:
        return evaluate(x, context, *others)
    current = torch.cuda.current_stream(x.device)
    begin = current.record_event()
    each = len(context) // len(x)
    made: list[tuple[Tensor, ...]] = []
    ends: list[torch.cuda.Event] = []
    for number, numbers in enumerate(torch.arange(len(x)).tensor_split(parts)):
        some = slice(int(numbers[0]), int(numbers[-1]) + 1)
        stream = torch.cuda.Stream(x.device) if number else current
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            of_these = partial(_of, each=each, some=some)
            made.append(evaluate(x[some], context.map(of_these), *map(of_these, others)))
        for out in made[-1]:
            out.record_stream(current)
        ends.append(stream.record_event())
    for end in ends:
        current.wait_event(end)
    return tuple(
        torch.cat([out.unflatten(0, (each, -1)) for out in outs], 1).flatten(0, 1)
        for outs in zip(*made, strict=True)
    )


def _of(
    vectors: Tensor,  # [each * B, ...]
    *,
    each: int,
    some: slice,
) -> Tensor:  # [each * windows, ...]
    return vectors.unflatten(0, (each, -1))[:, some].flatten(0, 1)
