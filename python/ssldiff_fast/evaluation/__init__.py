# SPDX-License-Identifier: Apache-2.0
"""How good a result is: similarity to its grid, and seams."""

from ssldiff_fast.evaluation.seam import Seam, measure_seam, seam_figure
from ssldiff_fast.evaluation.similarity import Similarity, grid_similarity

__all__ = ["Seam", "Similarity", "grid_similarity", "measure_seam", "seam_figure"]
