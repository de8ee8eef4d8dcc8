# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ (and, with nvcc, CUDA) operators on PyTorch's stable ABI; see pyproject.toml."""

import sys
from pathlib import Path

import setuptools

SETUPTOOLS = 77  # the first that reads our licence fields and brings bdist_wheel

if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    sys.exit(
        f"ssldiff_fast: setuptools {setuptools.__version__} is too old to build this; run "
        f"`pip install -U 'setuptools>={SETUPTOOLS}'` and the same command again."
    )

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_extension import extension_arguments  # noqa: E402
from build_viewer import BuildViewer  # noqa: E402

arguments = extension_arguments()
arguments["cmdclass"]["build_py"] = BuildViewer

# Folders of data and recipes count as packages too, or setuptools warns of each.
packages = setuptools.find_namespace_packages(
    "python", include=["ssldiff_fast", "ssldiff_fast.*"], exclude=["*__pycache__*"]
)

setuptools.setup(
    packages=[*packages, "ssldiff_fast.kernels"],
    # kernels/ stands beside csrc/ in the repository and is a subpackage once installed.
    package_dir={"": "python", "ssldiff_fast.kernels": "kernels"},
    package_data={
        "ssldiff_fast": ["data/**/*", "py.typed", "**/*.yaml", "**/*.md"],
        "ssldiff_fast.viewer": ["static/*"],
    },
    **arguments,
)
