# SPDX-License-Identifier: Apache-2.0
"""The viewer's library, OpenSeadragon: fetched by npm when the package is built.

It is not in the repository. `setup.py` loads this file by its path and calls `fetch`, so that the
library and its licence travel in the wheel; where npm is missing or offline the rest is installed
without it, and `python -m ssldiff_fast.viewer.library` fetches it later. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "6.1.1"
# The registry's checksum of that version's archive: nothing else is unpacked.
INTEGRITY = "sha512-" + (
    "g4iKe2q8B642SaBT3+x4ZF3/8b1TxPPydyjmtrOLgDrlYWMKd9ZXM+1Cb/xa9DVySkvs/7l6HR1nHKfD5F3Tsw=="
)
FOLDER = Path(__file__).resolve().parent / "static"
SCRIPT, LICENCE = "openseadragon.min.js", "openseadragon.LICENSE.txt"
_STAMP = "openseadragon.version"
_MEMBERS = {
    "package/build/openseadragon/openseadragon.min.js": SCRIPT,
    "package/LICENSE.txt": LICENCE,
}
TIMEOUT_S = 120
COMMAND = "python -m ssldiff_fast.viewer.library"


class LibraryError(RuntimeError):
    """OpenSeadragon could not be fetched; the message says why and what to do."""


def present(folder: Path = FOLDER) -> bool:
    """Whether the pinned version lies in the folder, with its licence."""
    stamp = folder / _STAMP
    whole = all((folder / name).is_file() for name in (SCRIPT, LICENCE, _STAMP))
    return whole and stamp.read_text().strip() == VERSION


def check(folder: Path = FOLDER) -> None:
    """Raises with what to do where the library is missing."""
    if not present(folder):
        raise LibraryError(
            f"the viewer's library OpenSeadragon {VERSION} is not in this installation (npm was "
            f"missing or offline when it was built): install Node.js with npm and run `{COMMAND}`"
        )


def fetch(folder: Path = FOLDER) -> bool:
    """Fetches the library with npm, unless it is there already.

    Args:
        folder: where it is put.

    Returns:
        Whether it was fetched now.

    Raises:
        LibraryError: npm is missing, offline or fails; the archive is another one; the folder
            cannot be written.
    """
    if present(folder):
        return False
    npm = shutil.which("npm")
    if npm is None:
        raise LibraryError(
            "npm is not on PATH, and the viewer needs it once to fetch OpenSeadragon: install "
            f"Node.js with npm and run `{COMMAND}`"
        )
    with tempfile.TemporaryDirectory() as place:
        archive = _pack(npm, Path(place))
        _check_archive(archive)
        try:
            _unpack(archive, folder)
        except OSError as error:
            raise LibraryError(
                f"OpenSeadragon could not be written to {folder} ({error.strerror or error}): run "
                f"`{COMMAND}` as somebody who may"
            ) from None
    return True


def _pack(npm: str, place: Path) -> Path:
    command = [npm, "pack", f"openseadragon@{VERSION}", "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        said = (done.stderr or done.stdout).strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"no answer within {TIMEOUT_S} s"]
    except OSError as error:
        said = [str(error)]
    archives = list(place.glob("*.tgz"))
    if len(archives) != 1:
        raise LibraryError(
            f"npm could not fetch OpenSeadragon {VERSION} ({said[-1] if said else 'no message'}): "
            f"is there a network? Run `{COMMAND}` when there is"
        )
    return archives[0]


def _check_archive(archive: Path) -> None:
    digest = hashlib.sha512(archive.read_bytes()).digest()
    found = "sha512-" + base64.b64encode(digest).decode()
    if found != INTEGRITY:
        raise LibraryError(
            f"npm fetched another archive than that of OpenSeadragon {VERSION} ({found[:23]}..., "
            f"expected {INTEGRITY[:23]}...): check npm's registry setting and run `{COMMAND}`"
        )


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member, name in _MEMBERS.items():
            file = tar.extractfile(member)
            assert file is not None  # the checksum vouches for the archive's members
            _write(folder / name, file.read())
    _write(folder / _STAMP, f"{VERSION}\n".encode())  # last: it vouches for the others


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main() -> int:
    """Fetches the library into this installation."""
    try:
        fetched = fetch()
    except LibraryError as error:
        print(f"ssldiff: {error}", file=sys.stderr)
        return 2
    print(f"OpenSeadragon {VERSION} is {'now' if fetched else 'already'} in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
