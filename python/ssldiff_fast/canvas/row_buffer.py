# SPDX-License-Identifier: Apache-2.0
"""Rows that arrive in bands and are read by ranges."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ssldiff_fast._checks import check_finite, check_shape


class RowBuffer:
    """The rows of a canvas or image [C, H, W], taken from bands as they are asked for.

    Args:
        bands: [C, n, W] each, one below the other from row `begin` on.
        height, width: H, W.
        begin: row of the canvas that the first band starts with.
        call: the public call that messages name.
        name: what messages call the rows.
    """

    def __init__(
        self,
        bands: Iterable[Tensor],
        height: int,
        width: int,
        *,
        begin: int,
        call: str,
        name: str = "latents",
    ) -> None:
        self._bands = iter(bands)
        self._held: Tensor | None = None
        self.begin = self.end = begin  # rows held: [begin, end)
        self._size = (height, width)
        self._call = call
        self._name = name
        self._where = "the canvas" if name == "latents" else "the image"

    def upto(self, end: int) -> Tensor:
        """Rows [begin, end) and perhaps more: [C, n, W]; draws bands until they are there.

        Raises:
            ValueError: a band has another width, NaN or too many rows, or the bands end too early.
        """
        while self.end < end or self._held is None:
            band = next(self._bands, None)
            if band is None:
                raise ValueError(
                    f"{self._call}: the {self._name} end at row {self.end}, but "
                    f"{self._where} has {self._size[0]} rows; pass all of them."
                )
            self._add(band)
        return self._held

    def forget(self, before: int) -> None:
        """Rows above row `before` are not needed again."""
        if self._held is not None and before > self.begin:
            count = min(before, self.end) - self.begin
            # A copy, or the whole band would stay in memory for its last rows.
            self._held = self._held[:, count:].clone()
            self.begin += count

    def _add(self, band: Tensor) -> None:
        height, width = self._size
        check_shape(self._name.rstrip("s"), band, "C n W", {"W": width}, call=self._call)
        check_finite(self._name.rstrip("s"), band, call=self._call)
        self.end += band.shape[1]
        if self.end > height:
            raise ValueError(
                f"{self._call}: the {self._name} have {self.end} rows or more, but {self._where} "
                f"has {height}; pass only those."
            )
        self._held = band if self._held is None else torch.cat((self._held, band), dim=1)
