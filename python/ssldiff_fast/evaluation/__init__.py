# SPDX-License-Identifier: Apache-2.0
"""How good a result is: similarity to its grid, seams, and the glass around its tissue."""

from ssldiff_fast.evaluation.glass import GlassFigures, measure_glass
from ssldiff_fast.evaluation.seam import Seam, measure_seam, seam_figure
from ssldiff_fast.evaluation.similarity import Similarity, grid_similarity

__all__ = [
    "GlassFigures",
    "Seam",
    "Similarity",
    "grid_similarity",
    "measure_glass",
    "measure_seam",
    "seam_figure",
]
