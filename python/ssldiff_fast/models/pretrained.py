# SPDX-License-Identifier: Apache-2.0
"""Our own format: a folder with config.json, model.safetensors and optionally README.md."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.models.ldm import (
    ENCODER_PREFIX,
    FORMAT,
    STATISTICS_PREFIX,
    LatentDiffusion,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Codes lie closer together than half precision resolves, and are few; statistics are fewer.
_ALWAYS_FULL = ("first_stage_model.quantize.embedding.weight", STATISTICS_PREFIX)
# An encoder's hash is taken over its weights in float16 (`encoders.encoder.weights_hash`), which
# bfloat16, having fewer digits, would change: the model would refuse its own encoder.
_NEVER_BFLOAT16 = ENCODER_PREFIX


def parse_dtype(dtype: torch.dtype | str, *, call: str, argument: str = "dtype") -> torch.dtype:
    """A floating dtype by its name.

    Raises:
        ValueError: none of those offered.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        names = [*DTYPES, "auto"] if (call, argument) == ("load", "dtype") else list(DTYPES)
        raise ValueError(f"{call}: {argument} is {name!r}, expected one of {', '.join(names)}.")
    return DTYPES[name]


def parse_device(device: torch.device | str, *, call: str) -> torch.device:
    """A device that exists here.

    Raises:
        ValueError: no such kind of device.
        RuntimeError: this machine or this build of PyTorch does not have it.
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"{call}: device is {device!r}, expected cpu, cuda, cuda:0 or the like."
        ) from None
    if parsed.type == "cpu":
        return parsed
    try:
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError):
        raise RuntimeError(
            f"{call}: device {str(device)!r} is not available here; use device='cpu' or see what "
            "`ssldiff doctor` finds."
        ) from None
    return parsed


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a config.json of ours.

    Raises:
        ValueError: it is no JSON, or not ours.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path} is not valid JSON ({error}).") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f'load: {path} is no configuration of this package (no "format": "{FORMAT}"); '
            "expected a folder written by save_pretrained."
        )
    return config


def save_pretrained(
    model: LatentDiffusion,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model to a folder that `load` reads.

    A new folder appears under its name only when it is whole; in an existing one each file is
    replaced only when the new one is whole, and other files stay.

    Args:
        model: what to write, with the weights of its encoder where it has them.
        folder: where to; parents are made.
        dtype: precision of the weights in the file, by default as they are.
        card: text of README.md, the model card.
        overwrite: replace the files of a model that is there already.

    Returns:
        The folder.

    Raises:
        FileExistsError: there is a model already and `overwrite` is false.
        ValueError: a weight does not fit in `dtype`.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"save_pretrained: {target} is a file; expected a folder.")
    present = [name for name in (CONFIG, WEIGHTS) if (target / name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"save_pretrained: {target} already holds {' and '.join(present)}; choose another "
            "folder or pass overwrite=True."
        )
    state = model.published_state_dict()
    if dtype is not None:
        state = _cast(state, parse_dtype(dtype, call="save_pretrained"))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(temporary, model.to_config(), state, card)
        if target.exists():
            for path in sorted(temporary.iterdir(), reverse=True):  # weights before config.json
                os.replace(path, target / path.name)
        else:
            temporary.chmod(0o777 & ~_umask())
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _umask() -> int:
    # mkdtemp makes folders that only their owner may read; a model is made for sharing.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        coarser = dtype is torch.bfloat16 and name.startswith(_NEVER_BFLOAT16)
        if not value.is_floating_point() or name.startswith(_ALWAYS_FULL) or coarser:
            result[name] = value
            continue
        result[name] = value.to(dtype)
        if not result[name].isfinite().all() and value.isfinite().all():
            raise ValueError(
                f"save_pretrained: {name} holds values up to {float(value.abs().max()):.3g}, more "
                f"than {dtype} can; use bfloat16 or float32."
            )
    return result


def _write(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], card: str | None
) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o666 & ~_umask())
        with path.open("rb") as file:
            os.fsync(file.fileno())
