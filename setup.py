# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ (and, with nvcc, CUDA) operators on PyTorch's stable ABI; see pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_extension import extension_arguments

setup(
    packages=[*find_packages("python"), "ssldiff_fast.kernels"],
    # kernels/ stands beside csrc/ in the repository and is a subpackage once installed.
    package_dir={"": "python", "ssldiff_fast.kernels": "kernels"},
    package_data={"ssldiff_fast": ["data/**/*", "py.typed", "**/*.yaml"]},
    **extension_arguments(),
)
