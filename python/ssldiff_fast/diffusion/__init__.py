# SPDX-License-Identifier: Apache-2.0
"""Noise schedules, predictions, guidance and solvers; knows neither networks nor windows."""

from ssldiff_fast.diffusion.guidance import guide
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.diffusion.solvers import SOLVERS, AffineStep, apply_step, denoised, get_solver

__all__ = ["SOLVERS", "AffineStep", "Schedule", "apply_step", "denoised", "get_solver", "guide"]
