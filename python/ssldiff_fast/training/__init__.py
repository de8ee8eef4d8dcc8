# SPDX-License-Identifier: Apache-2.0
"""Training autoencoders, encoders and diffusion models; needs the extra `train`."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDS = ("lightning", "pydantic")


def _check_extra() -> None:
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"training needs {' and '.join(missing)}, which this environment does not have; "
            "install it with: pip install 'ssldiff_fast[train]'"
        )


_check_extra()
