# SPDX-License-Identifier: Apache-2.0
"""What a writer needs to go on after an interruption, in one small file."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .output import atomic_bytes, make_folder, part_path

FILE = "writer.npz"
_VERSION = 2


@dataclass
class WriterState:
    """A saved moment of a writer.

    Attributes:
        settings: of the output; a run goes on only with the same.
        levels: for every level of the pyramid its rows in finished tiles, its further rows, and
            the slot of the scratch file that holds these.
        whole: everything is written, and only the final name may be missing.
        arrays: what the format keeps, such as the places of its tiles.
    """

    settings: Mapping[str, Any]
    levels: list[list[int]]
    whole: bool = False
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Replaces what the folder holds: the old state or the new one is there, never less."""
        head = {
            "version": _VERSION,
            "settings": dict(self.settings),
            "levels": self.levels,
            "whole": self.whole,
        }
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, head=np.asarray(json.dumps(head)), **self.arrays)
        folder = make_folder(folder)
        atomic_bytes(folder / FILE, data.getvalue(), kept=True)
        sync_names(folder)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], settings: Mapping[str, Any]
    ) -> WriterState | None:
        """What the folder holds, None if it holds nothing.

        Raises:
            ValueError: the state is damaged, or of another output.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            head = json.loads(str(arrays.pop("head")))
            state = cls(head["settings"], head["levels"], head["whole"], arrays)
            version = head["version"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            raise ValueError(
                f"the saved state {path} is damaged: remove it to begin the output anew"
            ) from None
        settings = json.loads(json.dumps(settings))
        other = [key for key in settings if state.settings.get(key) != settings[key]]
        if version != _VERSION or other:
            named = ", ".join(
                f"{key} {state.settings.get(key)!r}, not {settings[key]!r}"
                for key in other
                if key != "description"
            )
            raise ValueError(
                f"the saved state {path} is of another output"
                f"{f' ({named})' if named else ' (another recipe or version)'}: give the same "
                "settings, or another state folder"
            )
        return state


def remove_state(folder: str | os.PathLike[str]) -> None:
    """Removes the state, and what a killed process left of a newer one."""
    path = Path(folder) / FILE
    path.unlink(missing_ok=True)
    part_path(path, kept=True).unlink(missing_ok=True)


def sync_names(folder: Path) -> None:
    """Makes the names in a folder durable, which fsync of the files does not."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
