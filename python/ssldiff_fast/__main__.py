# SPDX-License-Identifier: Apache-2.0
"""`python -m ssldiff_fast`: the same as `ssldiff`."""

from .cli import run

run()
