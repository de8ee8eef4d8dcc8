# SPDX-License-Identifier: Apache-2.0
"""Tensors to a safetensors file with a checksum, piece by piece.

The library's own functions touch all tensors, so that rows that wait in a file (`canvas.wide`)
would all come into memory at once. What is written here the library reads too.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssldiff_fast.canvas.wide import Memory

_PIECE_BYTES = 2**22
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NO_CHECKSUM = "0" * 32


def save(path: Path, tensors: Mapping[str, Tensor], header: str, wide: Memory) -> None:
    """Writes a new file.

    Args:
        path: the file.
        tensors: by name.
        header: text that goes with them, under the same checksum.
        wide: where the tensors are.
    """
    entries: dict[str, Any] = {"__metadata__": {"checksum": _NO_CHECKSUM, "header": header}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.nbytes
        kind = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        entries[name] = {**kind, "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    digest = _digest(header)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, tensor in sorted(tensors.items()):
            digest.update(_about(name, tensor))
            for piece in _pieces(tensor.detach().cpu().contiguous()):
                digest.update(piece.data)
                file.write(piece.data)
                wide.release(tensor)
        file.seek(8 + head.index(_NO_CHECKSUM.encode()))  # the first of it, whatever else there is
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def load(path: Path, wide: Memory) -> tuple[dict[str, Tensor], str]:
    """The tensors, made in `wide`, and the text.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its head is longer than the file")
            entries = json.loads(file.read(length))
            about = entries.pop("__metadata__")
            kinds = {name: dtype for dtype, name in _DTYPES.items()}
            tensors, digest = {}, _digest(about["header"])
            for name, entry in sorted(entries.items()):
                begin, end = entry["data_offsets"]
                like = torch.empty(0, dtype=kinds[entry["dtype"]])
                shape = [int(side) for side in entry["shape"]]
                count = like.element_size() * int(np.prod([*shape, 1], dtype=object))
                if count != end - begin or min(shape, default=0) < 0 or length + end > size:
                    raise ValueError(f"{name} has another size than its place")
                tensors[name] = made = wide.empty(*shape, like=like)
                digest.update(_about(name, made))
                for piece in _pieces(made):
                    if file.readinto(piece.data) != piece.nbytes:
                        raise ValueError("it is truncated")
                    digest.update(piece.data)
                    wide.release(made)
            if digest.hexdigest() != about["checksum"]:
                raise ValueError("its checksum is another")
        except (KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"it is no state ({error!r})") from None
    return tensors, about["header"]


def _digest(header: str) -> Any:
    return hashlib.blake2b(header.encode(), digest_size=16)


def _about(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {list(tensor.shape)}".encode()


def _pieces(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Views of a contiguous tensor's bytes."""
    flat: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    for begin in range(0, len(flat), _PIECE_BYTES):
        yield flat[begin : begin + _PIECE_BYTES]
