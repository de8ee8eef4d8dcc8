# SPDX-License-Identifier: Apache-2.0
"""Tiles side by side with a halo around each, along one axis; for both ways of the autoencoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

_Tile = TypeVar("_Tile")

# Windows that statistics are measured on.
_SAMPLES = 16


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in latents: what is read, [begin, end), and what of it is kept."""

    top: int
    begin: int
    end: int
    kept: int

    @classmethod
    def around(cls, top: int, tile: int, halo: int, size: int) -> Span:
        """The tile that begins at `top`, with its halo as far as the canvas goes."""
        bottom = min(top + tile, size)
        return cls(top, max(0, top - halo), min(bottom + halo, size), bottom - top)

    @property
    def before(self) -> int:
        """Latents read before the first that is kept."""
        return self.top - self.begin

    def within(self, factor: int = 1) -> slice:
        """What is kept of what was read, where `factor` values belong to a latent."""
        return slice(self.before * factor, (self.before + self.kept) * factor)


def batches(size: int, tile: int, halo: int, batch_size: int) -> Iterator[list[Span]]:
    """The tiles of an axis in groups that go through the network together, being of one shape:
    all but those at the two ends."""
    spans = [Span.around(top, tile, halo, size) for top in range(0, size, tile)]
    yield from grouped(spans, lambda span: (span.end - span.begin, span.before), batch_size)


def grouped(
    tiles: Iterable[_Tile], shape: Callable[[_Tile], Any], batch_size: int
) -> Iterator[list[_Tile]]:
    """Neighbours of one shape, `batch_size` of them at most."""
    for _, group in itertools.groupby(tiles, shape):
        members = list(group)
        for first in range(0, len(members), batch_size):
            yield members[first : first + batch_size]


def sample_origins(height: int, width: int, window: tuple[int, int]) -> list[tuple[int, int]]:
    """Origins of windows spread over rows of a canvas, which statistics are measured on."""
    room = max(0, height - window[0]), max(0, width - window[1])
    shares = [number / (_SAMPLES - 1) for number in range(_SAMPLES)]
    # Along the diagonal, there and back, so that all of the height is seen.
    return sorted(
        {(int(room[0] * abs(1 - 2 * (3 * share % 1))), int(room[1] * share)) for share in shares}
    )
