# SPDX-License-Identifier: Apache-2.0
"""Maps of features that are written once, by rows, and read again by rows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssldiff_fast.models.group_norm import GROUPS
from ssldiff_fast.ops import GroupNormStatistics, group_norm_statistics

# Maps larger than this lie in files.
_MEMORY_BYTES = 2**30


class FeatureMap:
    """A map [C, H, W], with the statistics of what has been written.

    Args:
        channels, height, width: C, H, W.
        folder: where its file lies if it is too large for memory.
        like: rows are read with the device and dtype of this tensor.
    """

    def __init__(self, channels: int, height: int, width: int, folder: Path, like: Tensor) -> None:
        self.shape = (channels, height, width)
        self._parts: list[GroupNormStatistics] = []
        self._like = like
        self._file: Path | None = None
        # Rows outermost, so that a band is one piece of the file.
        shape = (height, channels, width)
        if 4 * channels * height * width <= _MEMORY_BYTES:
            self._rows: np.ndarray | None = np.empty(shape, np.float32)
        else:
            handle, name = tempfile.mkstemp(suffix=".features", dir=folder)
            os.close(handle)
            self._file = Path(name)
            self._rows = np.memmap(name, np.float32, "w+", shape=shape)

    @classmethod
    def of(
        cls,
        values: Tensor,  # [C, H, W]
        folder: Path,
        like: Tensor,
    ) -> FeatureMap:
        """A map that holds these values."""
        channels, height, width = values.shape
        made = cls(channels, height, width, folder, like)
        made.write(0, values[None])
        return made

    def read(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end): [1, C, end - begin, W]."""
        assert self._rows is not None
        rows = np.ascontiguousarray(self._rows[begin:end].transpose(1, 0, 2))
        return torch.from_numpy(rows)[None].to(self._like)

    def write(
        self,
        begin: int,
        rows: Tensor,  # [1, C, n, W]
    ) -> None:
        """Rows from `begin` on, each only once."""
        assert self._rows is not None
        values = rows[0].float().cpu().numpy().transpose(1, 0, 2)
        self._rows[begin : begin + len(values)] = values
        if self.shape[0] % GROUPS == 0:
            self._parts.append(group_norm_statistics(rows, GROUPS))

    @property
    def statistics(self) -> GroupNormStatistics | None:
        """Of all that was written, where the channels make groups; combined by Chan's formula."""
        return GroupNormStatistics.combine(self._parts) if self._parts else None

    def close(self) -> None:
        """Give the memory, or the file, back."""
        self._rows = None
        if self._file is not None:
            self._file.unlink(missing_ok=True)
