# SPDX-License-Identifier: Apache-2.0
"""Memory that a network on a CPU frees stays with the process, for its next call.

glibc gives what is free at the end of its heap back to the system once it is twice the largest
piece that was ever freed by itself, 32 MiB at most. A network whose maps are smaller than that
gives back tens of megabytes with every call, and gets them again page by page: a tenth of a
decode's time, and some hundredths of an evaluation's.
"""

from __future__ import annotations

import functools

import torch

# The largest piece that counts, less what glibc adds to it.
_LARGEST = 2**25 - 2**14


@functools.cache
def keep_freed_memory() -> None:
    """Free the largest piece that counts; up to 64 MiB at the end of the heap are then kept.

    Its pages are never touched. What the user has told glibc (MALLOC_TRIM_THRESHOLD_) stays so,
    and elsewhere this does nothing.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
