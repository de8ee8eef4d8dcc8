# SPDX-License-Identifier: Apache-2.0
"""How setup.py brings the viewer's JavaScript library into the package: npm fetches it.

Environment variable, read here and nowhere else:
    SSLDIFF_VIEWER      0: never fetch it; 1: fail if it cannot be fetched.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from setuptools.command.build_py import build_py

LIBRARY = Path(__file__).resolve().parent.parent / "python/ssldiff_fast/viewer/library.py"


def load_library() -> ModuleType:
    """The package's own module, by its path: the package cannot be imported yet."""
    spec = importlib.util.spec_from_file_location("_viewer_library", LIBRARY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildViewer(build_py):
    """Fetches the library before the package's files are listed."""

    def run(self) -> None:
        library = load_library()
        choice = os.environ.get("SSLDIFF_VIEWER", "")
        if choice != "0":
            try:
                library.fetch()
            except library.LibraryError as error:
                if choice == "1":
                    raise SystemExit(f"ssldiff_fast: {error}") from None
                print(f"ssldiff_fast: without the viewer: {error}.", flush=True)
        # Whoever asked for the list of files before now has got it without the library.
        self.__dict__.pop("data_files", None)
        super().run()
