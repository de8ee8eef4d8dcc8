# SPDX-License-Identifier: Apache-2.0
"""Output files that appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

# Left free beside what a file is estimated to need, so that the machine goes on working.
SPARE_BYTES = 64 * 2**20
# Names of parts say whose they are: a folder may be shared by machines.
_HOST = re.sub(r"\W", "_", socket.gethostname())


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False, needs: int = 0) -> Path:
    """Checks, before any work starts, that a file can be written.

    What a process that was killed has left of it is removed.

    Args:
        path: the file to be written.
        overwrite: whether an existing file may be replaced.
        needs: estimated size in bytes, compared with the free space of the folder.

    Returns:
        The path as a `Path`.

    Raises:
        FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError,
        PermissionError, OSError: with one sentence that says what to do.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"the output {path} is a folder: give the name of a file in it")
    if not folder.exists():
        raise FileNotFoundError(f"the output folder {folder} does not exist: make it first")
    if not folder.is_dir():
        raise NotADirectoryError(
            f"the output folder {folder} is not a folder: choose another place for {path.name}"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"the output {path} exists and is kept: choose another name, or overwrite it with "
            "overwrite=True (command line: --overwrite)"
        )
    _check_writable(folder)
    _remove_leftovers(path)
    check_space(path, needs)
    return path


def check_space(path: Path, needs: int, *, files: int = 0) -> None:
    """Raises OSError unless the disk of `path` has room for so many bytes, and so many files."""
    free = shutil.disk_usage(path.parent).free
    if needs and needs + SPARE_BYTES > free:
        raise OSError(
            f"the output {path} needs about {_size(needs)} and its disk has {_size(free)} free: "
            "make room, or choose another folder"
        )
    if files and hasattr(os, "statvfs"):
        status = os.statvfs(path.parent)
        if status.f_files and files > status.f_favail:  # some file systems do not count
            raise OSError(
                f"the output {path} needs about {files} files and its disk takes {status.f_favail} "
                "more: choose .tif, which is one file, or another disk"
            )


def check_there(path: Path, part: Path) -> None:
    """Raises OSError where the part of an output has gone while it is written."""
    if not part.exists():
        raise OSError(
            f"the output folder {path.parent} has vanished while {path.name} was written: make it "
            "again, and begin anew"
        )


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """An output folder that is there already, or is made with its parents."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the output folder {folder} cannot be made ({error.strerror}): choose another folder"
        ) from None
    return folder


def _check_writable(folder: Path) -> None:
    # os.access does not know read-only mounts of every kind, so a file is really made.
    try:
        # Without a name where the system can, so that a run killed here leaves nothing.
        with tempfile.TemporaryFile(prefix=".ssldiff-", suffix=".part", dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"the output folder {folder} cannot be written to ({error.strerror}): "
            "choose another folder"
        ) from None


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def part_path(path: Path, *, kept: bool = False) -> Path:
    """A hidden name in the same folder, so that the final rename never crosses a disk.

    What is kept for a later process to go on with has the same name in all of them.
    """
    who = "" if kept else f".{_HOST}-{os.getpid()}"
    return path.with_name(f".{path.name}{who}.part")


def _remove_leftovers(path: Path) -> None:
    """Removes what processes of this machine that were killed have left of an output, unkept."""
    name = rf"\.{re.escape(path.name)}(\.json)?\.{re.escape(_HOST)}-(\d+)\.(part|rows).*"
    names = re.compile(name)
    with contextlib.suppress(OSError):
        for entry in path.parent.iterdir():
            found = names.fullmatch(entry.name)
            if found is None or _is_alive(int(found[2])):
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def publish(part: Path, path: Path) -> None:
    """Gives a finished file its final name, once its bytes are on the disk."""
    with open(part, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, path)


def write_error(path: Path, error: Exception, where: str = "", *, kept: str = "") -> OSError:
    """What is raised when writing fails, usually because the disk has filled up.

    Args:
        path: the output.
        error: the system's.
        where: how far it is written.
        kept: the partial output, where a later run goes on with it.
    """
    # HDF5 wraps the system's words in several lines of its own.
    inner = re.search(r"error message = '([^']*)'", str(error))
    reason = inner[1] if inner else getattr(error, "strerror", None) or str(error)
    what = f"run again: {kept} is kept" if kept else "choose another folder"
    return OSError(
        f"{path} could not be written{where} ({reason}): make room on its disk, "
        f"{'and' if kept else 'or'} {what}"
    )


@contextlib.contextmanager
def atomic(path: Path, *, kept: bool = False) -> Iterator[Path]:
    """Yields a temporary name; on success it becomes `path`, on failure it is removed.

    With `kept` all processes use one name, so that what a killed one left is replaced by the next.
    """
    part = part_path(path, kept=kept)
    try:
        yield part
        publish(part, path)
    except OSError as error:
        if error.errno is None:  # it is a sentence already
            raise
        raise write_error(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def atomic_bytes(path: str | os.PathLike[str], data: bytes, *, kept: bool = False) -> None:
    """Writes a small file, whole or not at all."""
    with atomic(Path(path), kept=kept) as part:
        part.write_bytes(data)


class RowWriter(ABC):
    """Rows of pixels in, a file out.

    A context manager. When its block fails, the unfinished file is dropped, or kept where the
    writer was given a folder for its state.
    """

    @property
    @abstractmethod
    def rows_written(self) -> int:
        """Rows that the writer has: the first row that it still needs."""

    @abstractmethod
    def write_rows(self, rows: Any) -> None:
        """Appends rows of pixels, uint8 [rows, width, 3], any number of them; an array, or a
        `PixelBand`, of which no more than a few tiles are then in memory."""

    @abstractmethod
    def checkpoint(self) -> None:
        """Saves the state, crash-safe: a run that dies later goes on from here."""

    @abstractmethod
    def finish(self) -> None:
        """Gives the file its name; needs all rows."""

    @abstractmethod
    def suspend(self) -> None:
        """Closes the unfinished file; keeps it and its state where it has a folder for that."""

    @abstractmethod
    def abort(self) -> None:
        """Removes what was written, and its state, unless it is finished."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.suspend()
