# SPDX-License-Identifier: Apache-2.0
"""Tissue on a thumbnail, found band by band: of all its pixels only the mask is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .slide import RGB

Mask = NDArray[np.bool_]  # [h, w]

# The thumbnail's resolution: nuclei and scanner noise are below it, cells of 64 um above.
MASK_MPP = 8.0
# Chroma (largest minus smallest channel, 0..255) that separates tissue from glass. Otsu's value is
# clipped to this range: on a slide that is all tissue or all glass it splits what is one class.
CHROMA_RANGE = (10.0, 18.0)
# Grey and this dark is no stain but pen, dust, the edge of the coverslip or missing pixels.
BLACK = 50.0
# Smaller specks go, smaller holes are filled.
SPECK_UM2 = 2_500.0
HOLE_UM2 = 2_500.0
# Pixels of a thumbnail in memory at once, in whole rows, and rows beyond that the Gaussian sees.
_BAND_PX, _REACH = 2**18, 4
_BINS = 256


def tissue_mask(
    thumbnail: RGB,  # [h, w, 3] uint8
    mpp: float = MASK_MPP,
) -> Mask:
    """Where a thumbnail shows stained tissue.

    Tissue is what is more colourful than glass: Otsu's threshold on the chroma, within a range
    that keeps it sane for slides that are wholly tissue or wholly blank, without black pen and
    dust, then without specks and small holes.

    Args:
        thumbnail: RGB pixels.
        mpp: their size in micrometres, which scales specks and holes.

    Returns:
        bool [h, w].
    """
    shape = (thumbnail.shape[0], thumbnail.shape[1])
    return tissue_of_rows(lambda rows: thumbnail[rows.start : rows.stop], shape, mpp)


def tissue_of_rows(
    read: Callable[[range], RGB],  # rows -> [rows, w, 3] uint8
    shape: tuple[int, int],
    mpp: float = MASK_MPP,
) -> Mask:
    """`tissue_mask` of a thumbnail [h, w] whose rows are read as they are needed, once."""
    mask = np.empty(shape, bool)
    bands = list(_bands(shape))
    # The threshold is known once all rows have been seen; their chroma waits in a file.
    with tempfile.TemporaryFile(buffering=0) as kept:
        low, high = np.inf, -np.inf
        for rows in bands:
            chroma, ink = _smoothed(read, rows, shape[0])
            low, high = min(low, float(chroma.min())), max(high, float(chroma.max()))
            kept.write(np.where(ink, -chroma, chroma).data)

        def again() -> Iterator[tuple[range, NDArray[np.float32]]]:
            kept.seek(0)
            for rows in bands:
                count = len(rows) * shape[1]
                yield rows, np.fromfile(kept, np.float32, count).reshape(len(rows), shape[1])

        threshold = np.clip(_otsu(again(), low, high), *CHROMA_RANGE)
        for rows, chroma in again():
            mask[rows.start : rows.stop] = chroma > threshold
    _drop_small(mask, SPECK_UM2 / mpp**2)
    np.logical_not(mask, out=mask)
    _drop_small(mask, HOLE_UM2 / mpp**2)
    return np.logical_not(mask, out=mask)


def _bands(shape: tuple[int, ...]) -> Iterator[range]:
    height, width = shape
    rows = max(1, _BAND_PX // width)
    for top in range(0, height, rows):
        yield range(top, min(top + rows, height))


def _smoothed(
    read: Callable[[range], RGB], rows: range, height: int
) -> tuple[NDArray[np.float32], Mask]:
    """Chroma without scanner noise, and where that is no stain but black: [rows, w] each."""
    from skimage.filters import gaussian

    begin, end = max(0, rows.start - _REACH), min(height, rows.stop + _REACH)
    smooth = gaussian(
        read(range(begin, end)).astype(np.float32), sigma=1, truncate=_REACH, channel_axis=-1
    )[rows.start - begin :][: len(rows)]
    chroma: NDArray[np.float32] = smooth.max(-1) - smooth.min(-1)
    return chroma, (smooth.max(-1) < BLACK) & (chroma < CHROMA_RANGE[1])


def _otsu(bands: Iterator[tuple[range, NDArray[np.float32]]], low: float, high: float) -> float:
    """Otsu's threshold of the chroma, as scikit-image has it of an image in memory."""
    from skimage.filters import threshold_otsu

    if high - low <= 0.1:  # of what is nearly constant the histogram has no bins
        return low
    counts = np.zeros(_BINS, np.int64)
    for _, chroma in bands:
        found, edges = np.histogram(np.abs(chroma), _BINS, (low, high))
        counts += found
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))


def _drop_small(mask: Mask, area: float) -> None:
    """Clears, in place, what is connected and has fewer than `area` pixels.

    Bands are labelled by themselves, and labels that touch across a border joined: labels of the
    whole would be eight times as large as the mask.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from skimage.measure import label

    bands, firsts = list(_bands(mask.shape)), [0]
    sizes: list[NDArray[np.int64]] = []
    pairs: list[NDArray[np.int64]] = []
    above = np.full(mask.shape[1], -1)
    for rows in bands:
        labels, count = label(mask[rows.start : rows.stop], connectivity=1, return_num=True)
        sizes.append(np.bincount(labels.ravel(), minlength=count + 1)[1:])
        # Numbers of the components in all bands; -1 is none.
        top, bottom = (np.where(line > 0, line + (firsts[-1] - 1), -1) for line in labels[[0, -1]])
        pairs.append(np.stack([above, top])[:, (above >= 0) & (top >= 0)])
        above = bottom
        firsts.append(firsts[-1] + count)
    if not firsts[-1]:
        return
    first, second = np.concatenate(pairs, 1)
    graph = coo_array((np.ones(len(first), bool), (first, second)), (firsts[-1], firsts[-1]))
    _, whole = connected_components(graph, directed=False)
    large = np.bincount(whole, np.concatenate(sizes))[whole] >= area
    for rows, begin, end in zip(bands, firsts, firsts[1:]):
        labels = label(mask[rows.start : rows.stop], connectivity=1)
        mask[rows.start : rows.stop] = np.concatenate([[False], large[begin:end]])[labels]
