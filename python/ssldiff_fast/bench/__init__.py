# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the operators: one file each, with what it is timed against and what it costs.

`ssldiff bench`, the scripts in benchmarks/ and pytest-benchmark all run these.
"""

from .case import Case, Figures, measure, require_device
from .operators import OPERATORS, cases

__all__ = ["OPERATORS", "Case", "Figures", "cases", "measure", "require_device"]
