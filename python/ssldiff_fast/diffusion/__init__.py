# SPDX-License-Identifier: Apache-2.0
"""Noise schedules, predictions, guidance and solvers; knows neither networks nor windows."""

from ssldiff_fast.diffusion.schedule import Schedule

__all__ = ["Schedule"]
