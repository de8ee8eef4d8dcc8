# SPDX-License-Identifier: Apache-2.0
"""How visible the borders of windows are in an image.

Neighbouring pixels on the two sides of a border are compared with neighbouring pixels elsewhere:
the mean absolute difference across borders over that across all other places, horizontal and
vertical differences together. 1.00 is no seam; blocks that don't match give more, borders that are
blurred by averaging give less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROWS = 256  # rows differenced at once, so that memory does not grow with the image


@dataclass(frozen=True)
class Seam:
    """Differences across borders over differences elsewhere.

    Attributes:
        figure: horizontal and vertical differences together; 1.00 is no seam.
        horizontal: of differences between left and right neighbours alone (vertical borders).
        vertical: of differences between upper and lower neighbours alone (horizontal borders).
        noise: standard deviation of `figure` among lattices shifted against the borders, which
            have no seams: about how far from 1 it may lie by chance. NaN where no direction has
            two borders.
        borders: how many borders there are, in both directions.
    """

    figure: float
    horizontal: float
    vertical: float
    noise: float
    borders: int

    @property
    def deviations(self) -> float:
        """How many times `noise` the figure lies from 1; above 3 is hardly chance."""
        if self.figure == 1:
            return 0.0
        return abs(self.figure - 1) / self.noise if self.noise > 0 else float("inf")


def seam_figure(image: np.ndarray, window_px: int) -> float:
    """`measure_seam(...).figure` for the borders of windows of one size."""
    return measure_seam(image, window_px).figure


def measure_seam(
    image: np.ndarray,  # [H, W, 3] uint8
    window_px: int | None = None,
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    period: int = 1,
    near: int | None = None,
) -> Seam:
    """Measure the seams of an image.

    Grey levels are differenced channel by channel and averaged, so that a step in hue counts as
    well as one in brightness.

    Args:
        image: RGB.
        window_px: side of a window in pixels: borders lie at its multiples inside the image.
        rows: instead, the first pixel row below each border.
        columns: instead, the first pixel column right of each border.
        period: compare only with places that lie whole multiples of it from a border. A decoder
            that doubles the resolution twice has a texture of period 4 of its own, and JPEG one
            of 8, which are no seams; with 1 every other place counts.
        near: compare each border only with places up to that many pixels from it. Texture changes
            slowly, so this has a third of the noise or less; it does not see seams that are wider.

    Returns:
        The figure, its two directions, and how much of it may be chance.

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not RGB, or has no borders, or nothing beside them.
    """
    _check_image(image)
    height, width = image.shape[:2]
    at = [
        _borders("rows", rows, window_px, height),
        _borders("columns", columns, window_px, width),
    ]
    if not len(at[0]) + len(at[1]):
        raise ValueError(
            f"measure_seam: no border lies inside the image of {width} x {height} pixels; give a "
            "window_px below its sides, or rows and columns"
        )
    if period < 1 or (near is not None and near < period):
        raise ValueError(
            f"measure_seam: period is {period} and near is {near}, expected a period of at least 1 "
            "and a near of at least the period, in pixels"
        )
    profiles = _profiles(image)
    vertical, horizontal = (
        _share(profile, borders, (period, near)) for profile, borders in zip(profiles, at)
    )
    return Seam(
        figure=_ratio([vertical, horizontal]),
        horizontal=_ratio([horizontal]),
        vertical=_ratio([vertical]),
        noise=_noise(profiles, at, (period, near)),
        borders=len(at[0]) + len(at[1]),
    )


def _profiles(
    image: np.ndarray,  # [H, W, 3] uint8
) -> tuple[np.ndarray, np.ndarray]:  # [H] and [W] fp64; entry p is between p - 1 and p, 0 is unused
    """Sums of absolute differences across each row's upper and each column's left border."""
    height, width = image.shape[:2]
    down, across = np.zeros(height), np.zeros(width)
    for start in range(0, height, _ROWS):
        band = image[max(0, start - 1) : start + _ROWS].astype(np.int16)
        down[max(1, start) : start + _ROWS] = np.abs(np.diff(band, axis=0)).mean((1, 2))
        own = band[1:] if start else band
        across[1:] += np.abs(np.diff(own, axis=1)).sum((0, 2), dtype=np.int64)
    return down, across / (3 * height)


def _share(
    profile: np.ndarray,  # [L]
    borders: np.ndarray,  # [B] int
    reach: tuple[int, int | None],  # period and near
    barred: np.ndarray | None = None,  # [E] int, neither borders nor elsewhere
) -> tuple[int, float, float]:  # B, the sum at the borders, and the sum to be expected there
    if not len(borders):
        return 0, 0.0, 0.0
    period, near = reach
    usable = np.ones(len(profile), dtype=bool)
    usable[0] = False
    usable[borders] = False
    if barred is not None:
        usable[barred] = False
    expected = 0.0
    if near is None:
        phases = np.zeros(len(profile), dtype=bool)
        for phase in np.unique(borders % period):
            phases[phase::period] = True
        expected = len(borders) * _mean(profile[usable & phases])
    else:
        for border in borders:
            first = border - near // period * period
            place = slice(first % period if first < 0 else first, border + near + 1, period)
            expected += _mean(profile[place][usable[place]])
    return len(borders), float(profile[borders].sum()), expected


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _ratio(shares: list[tuple[int, float, float]]) -> float:
    """Sum at the borders over the sum to be expected there, each direction for itself.

    Textures differ by direction, so an image with more borders in one of them must be compared
    with as large a share of that direction elsewhere.
    """
    shares = [share for share in shares if share[0]]
    if not shares:
        return float("nan")
    at, expected = sum(share[1] for share in shares), sum(share[2] for share in shares)
    if math.isnan(expected):
        raise ValueError(
            "measure_seam: every place is a border, so that nothing is left to compare with; give "
            "a larger window_px or near, fewer borders, or a smaller period"
        )
    if expected == 0:
        return 1.0 if at == 0 else float("inf")
    return at / expected


def _noise(
    profiles: Sequence[np.ndarray], at: list[np.ndarray], reach: tuple[int, int | None]
) -> float:
    """Standard deviation of the figure where there is no seam: the borders moved by less than the
    smallest gap between two of them, all together."""
    gap = min(np.diff(borders).min() for borders in at if len(borders) > 1) if _several(at) else 0
    figures = []
    for offset in range(reach[0], int(gap), reach[0]):
        moved = [
            _share(profile, borders[borders + offset < len(profile)] + offset, reach, borders)
            for profile, borders in zip(profiles, at)
        ]
        if not any(math.isnan(expected) for _, _, expected in moved):
            figures.append(_ratio(moved))
    return float(np.std(figures)) if len(figures) > 1 else float("nan")


def _several(at: list[np.ndarray]) -> bool:
    return any(len(borders) > 1 for borders in at)


def _borders(
    name: str, positions: Sequence[int] | None, window_px: int | None, length: int
) -> np.ndarray:  # [B] int64, ascending
    if window_px is not None and positions is not None:
        raise ValueError(f"measure_seam: window_px and {name} exclude each other; give one")
    if window_px is not None:
        if window_px < 2:
            raise ValueError(f"measure_seam: window_px is {window_px}, expected at least 2")
        return np.arange(window_px, length, window_px)
    found = np.unique(np.asarray(positions if positions is not None else [], dtype=np.int64))
    if len(found) and not (found[0] > 0 and found[-1] < length):
        raise ValueError(
            f"measure_seam: {name} go from {found[0]} to {found[-1]}, expected positions from 1 to "
            f"{length - 1}, inside the image"
        )
    return found


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise TypeError(f"measure_seam: the image is {kind}, expected a uint8 array")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"measure_seam: the image is {list(image.shape)}, expected RGB [H, W, 3]")
