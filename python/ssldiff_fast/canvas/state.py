# SPDX-License-Identifier: Apache-2.0
"""A folder from which a run that was killed goes on to the same bytes.

A state is one file, written beside the one before it, flushed to the disk and then renamed, so
that at every moment one whole state is there; the last two are kept, each with a checksum and the
recipe it belongs to. A lock that dies with its process keeps other runs out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ssldiff_fast.canvas.state_file import load, save
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.models.threads import given_threads

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

# Share of the run's time that writing states may take.
SHARE = 0.008
# Bytes a second that are expected of a disk before the first state was timed.
_DISK_RATE = 100e6
_KEPT = 2
_FORMAT = 2


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on.

    Attributes:
        tensors: by name.
        numbers: JSON values: where the run is.
        wide: where the tensors are.
    """

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]
    wide: Memory = field(default_factory=Memory)


class StateFolder:
    """The states of one run; a context manager that holds the folder's lock.

    Args:
        path: The folder; made if it is not there.
        share: Share of the run's time that writing may take; states are spaced by what a write
            has been measured to cost. `math.inf` writes whenever there is something to write.

    Raises:
        RuntimeError: on entry, if another process uses the folder.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, share: float = SHARE) -> None:
        self.path = Path(path)
        self.share = share
        self._lock = FileLock(self.path / "lock", timeout=0)
        self._recipe: dict[str, Any] = {}
        self._number = 0
        self._start = time.perf_counter()
        self._spent = 0.0
        self._cost: float | None = None
        self._warned = False

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(
                f"the state folder {self.path} is a file: choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise RuntimeError(
                f"the state folder {self.path} is in use by another process: wait for it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            raise OSError(
                f"the state folder {self.path} cannot be used ({error.strerror}): choose another "
                "folder"
            ) from None
        for part in _unfinished(self.path):
            part.unlink(missing_ok=True)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        unused = not self.files()
        self._lock.release()
        if unused:
            with contextlib.suppress(OSError):
                (self.path / "lock").unlink(missing_ok=True)
                self.path.rmdir()

    def files(self) -> list[Path]:
        """The states that are there, the newest first."""
        return sorted(self.path.glob("state-*.safetensors"), reverse=True)

    def open(
        self,
        recipe: Mapping[str, Any],
        *,
        resume: bool | None = None,
        wide: Memory | None = None,
    ) -> Snapshot | None:
        """The newest whole state, and what all later ones belong to.

        Args:
            recipe: JSON values: everything that decides the bytes, the seed included.
            resume: True: there must be a state; False: those that are there are dropped; None:
                goes on where there is one.
            wide: where the snapshot's tensors are made.

        Returns:
            None where the run starts from the beginning.

        Raises:
            ValueError: the state is of another recipe; the message names the difference.
            FileNotFoundError: `resume` is True and there is no state.
        """
        self._recipe = json.loads(json.dumps(recipe))
        files = self.files()
        self._number = 1 + max((_number_of(file) for file in files), default=0)
        if resume is False:
            self.clear()
            return None
        for file in files:
            snapshot = self._read(file, wide or Memory())
            if snapshot is not None:
                return snapshot
        if resume:
            raise FileNotFoundError(
                f"the state folder {self.path} holds no state to go on from: check its path, or "
                "start without resume"
            )
        return None

    def _read(self, file: Path, wide: Memory) -> Snapshot | None:
        try:
            tensors, text = load(file, wide)
            header = json.loads(text)
        except (ValueError, OSError) as error:
            logger.warning("state: %s cannot be read (%s); the one before is used", file, error)
            return None
        difference = difference_of(header["recipe"], self._recipe)
        if header["format"] != _FORMAT:
            difference = f"its format is {header['format']} there and {_FORMAT} here"
        if difference:
            raise self.of_another_run(difference)
        _warn_of_environment(header["environment"])
        return Snapshot(tensors, header["numbers"], wide)

    def of_another_run(self, difference: str) -> ValueError:
        """The error that refuses a state of other settings."""
        return ValueError(
            f"the state folder {self.path} belongs to another run ({difference}): go on with "
            "that run's settings, choose another folder, or start over with resume=False "
            "(command line: --no-resume)"
        )

    def due(self, size: int) -> bool:
        """Whether a state of `size` bytes may be written now, within the share of the time."""
        cost = self._cost if self._cost is not None else 0.02 + size / _DISK_RATE
        return self._spent + cost <= self.share * (time.perf_counter() - self._start)

    def write(self, snapshot: Snapshot) -> None:
        """Writes a state; the earlier ones stay until it is on the disk.

        Raises:
            OSError: no space is left, or the disk fails; the earlier state is whole.
        """
        begin = time.perf_counter()
        header = json.dumps(
            {
                "format": _FORMAT,
                "recipe": self._recipe,
                "numbers": dict(snapshot.numbers),
                "environment": environment(),
            }
        )
        path = self.path / f"state-{self._number:08d}.safetensors"
        part = path.with_suffix(".part")
        try:
            save(part, snapshot.tensors, header, snapshot.wide)
            os.replace(part, path)
            _flush(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise self._write_error(error) from None
        self._number += 1
        for old in self.files()[_KEPT:]:
            old.unlink(missing_ok=True)
        self._cost = time.perf_counter() - begin
        self._spent += self._cost

    def save_if_due(self, snapshot: Snapshot) -> None:
        """Writes a state when its cost allows.

        A full disk does not end the run, which has lost nothing yet: it is tried again when the
        next state is due.
        """
        if self.due(sum(tensor.nbytes for tensor in snapshot.tensors.values())):
            self.try_write(snapshot)

    def try_write(self, snapshot: Snapshot) -> None:
        """Writes a state; where that fails, says so once and lets the run go on."""
        try:
            self.write(snapshot)
            self._warned = False
        except OSError as error:
            self._spent += self._cost or 0.0
            if not self._warned:
                logger.warning("state: %s; the run goes on", error)
            self._warned = True

    def _write_error(self, error: Exception) -> OSError:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
            "No space left" in str(error) or "quota" in str(error)
        )
        reason = "no space is left" if full else str(getattr(error, "strerror", None) or error)
        return OSError(
            f"a state could not be written to {self.path} ({reason}), but the one before it is "
            "whole: make room on its disk"
        )

    def clear(self) -> None:
        """Removes all states, for the run is over."""
        for file in self.files():
            file.unlink(missing_ok=True)


def going_on(folder: StateFolder) -> str:
    """What a user is told of a run that was stopped."""
    return (
        f"stopped; the run goes on from {folder.path} when it is started again with the same "
        "settings"
    )


def remove_state(path: str | os.PathLike[str]) -> None:
    """Removes a state folder of a run that is over, and nothing that is not a state's."""
    folder = Path(path)
    for file in [*folder.glob("state-*.safetensors"), *_unfinished(folder), folder / "lock"]:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _unfinished(folder: Path) -> list[Path]:
    """What a run that was killed while it wrote has left; safetensors writes to .tmp first."""
    return [*folder.glob("*.part"), *folder.glob(".tmp*")]


def _number_of(file: Path) -> int:
    digits = file.stem.removeprefix("state-")
    return int(digits) if digits.isdigit() else 0


def _flush(path: Path) -> None:
    # A folder can be opened for reading only, and on Windows not at all.
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def difference_of(there: Any, here: Any, name: str = "") -> str:
    """The first setting in which two recipes differ, in words; empty where they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            found = difference_of(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return ""
    return "" if there == here else f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def environment() -> dict[str, Any]:
    """What decides the rounding of a network besides the recipe."""
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": given_threads(),
    }


def _warn_of_environment(there: Mapping[str, Any]) -> None:
    difference = difference_of(dict(there), environment())
    if difference:
        logger.warning(
            "state: it was written elsewhere (%s), where the network may round differently; "
            "the run goes on, but its bytes may not be those of an uninterrupted one",
            difference,
        )
