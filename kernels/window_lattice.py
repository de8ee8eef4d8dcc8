# SPDX-License-Identifier: Apache-2.0
"""What the kernels are told of a band of windows, kept on the device from call to call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Whole = npt.NDArray[np.int64]
# The interior bands of a canvas look alike, so that a few entries serve most canvases.
KEPT = 256
_kept: dict[tuple[torch.device, bytes], Tensor] = {}
_pinned: dict[tuple[torch.device, bytes], Tensor] = {}


def on_device(
    values: npt.NDArray[np.generic],
    device: torch.device,
) -> Tensor:
    """The values as a tensor on the device, uploaded once as long as they are kept.

    A CUDA graph holds their address, so what it uses while it is captured is kept for good.
    """
    key = (device, values.dtype.char.encode() + values.tobytes())
    if key in _pinned:
        return _pinned[key]
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _kept:
        if capturing:
            raise RuntimeError(
                "ssldiff_fast: a CUDA graph is being captured, but these windows were never on the "
                "GPU; run the same call once before the capture."
            )
        if len(_kept) >= KEPT:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # kernels of any stream may still read them
            _kept.clear()
        # Waits for the copy, since other streams may find it here.
        _kept[key] = torch.from_numpy(values.copy()).to(device)
    if capturing:
        _pinned[key] = _kept[key]
    return _kept[key]


@dataclass(frozen=True)
class AxisWindows:
    """The windows of one axis that cover a range of it, as csrc/include/window_lattice.h."""

    origins: Whole  # less the start of the range; ascending
    numbers: Whole  # in the lattice
    window: int

    def covering(self, first: Whole, last: Whole) -> tuple[Whole, Whole]:
        """The windows that cover any position of [first, last], as half-open ranges."""
        return (
            np.searchsorted(self.origins, first - self.window, side="right"),
            np.searchsorted(self.origins, last, side="right"),
        )


def axis_windows(
    origins: list[int], window: int, size: int, wraps: bool, begin: int, end: int
) -> AxisWindows:
    """The windows that cover a position from `begin` to `end` - 1."""
    numbers = np.arange(len(origins), dtype=np.int64)
    starts = np.asarray(origins, dtype=np.int64)
    if wraps:
        # One that covers the range past the border counts with its origin less the size.
        starts, numbers = np.r_[starts - size, starts], np.r_[numbers, numbers]
    covers = (starts < end) & (starts + window > begin)
    return AxisWindows(starts[covers] - begin, numbers[covers], window)


def window_slots(
    rows: AxisWindows, columns: AxisWindows, lattice_columns: int, index: Tensor | None
) -> Whole:  # [rows of windows, columns of windows]
    """Where in the batch each window lies; -1: it was left out."""
    numbers = rows.numbers[:, None] * lattice_columns + columns.numbers
    if index is None:
        return numbers
    given = index.numpy()
    slots = np.searchsorted(given, numbers)
    found = np.append(given, -1)[slots] == numbers
    return np.where(found, slots, -1)
