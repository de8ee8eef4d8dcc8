# SPDX-License-Identifier: Apache-2.0
"""`load`: a whole model from a bundled name, a folder or a checkpoint; never from a network."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssldiff_fast.models.checkpoint import (
    Parts,
    copy_others,
    copy_weights,
    model_parts,
    place,
    read_weights,
    report,
    split_parts,
)
from ssldiff_fast.models.compvis import Run, find_run, find_yaml, read_compvis
from ssldiff_fast.models.execution import check_execution
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.precision import choose_dtype
from ssldiff_fast.models.pretrained import (
    CONFIG,
    WEIGHTS,
    parse_device,
    parse_dtype,
    read_config,
)

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent.parent / "data"


def bundled_names() -> list[str]:
    """Names of the models that travel inside the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    decoder_dtype: torch.dtype | str = "float32",
    execution: str = "auto",
    use_ema: bool = True,
) -> LatentDiffusion:
    """Load a model for inference.

    Args:
        name_or_path: the name of a bundled model; a folder with config.json and
            model.safetensors; a CompVis run folder (configs/*-project.yaml and
            checkpoints/*.ckpt); a .ckpt with its YAML beside it or in its run folder; a
            .safetensors with its config.json or YAML beside it.
        device: where to put it.
        dtype: precision of U-Net and conditioner; "auto" takes bfloat16 where it is the faster by a
            short measurement, and float32 otherwise, and the log says which.
        decoder_dtype: precision of the autoencoder's decoder. bfloat16 changes its pixels by 0.2
            grey levels on average. The rest of the autoencoder, which chooses codes, stays in
            float32.
        execution: how the U-Net is run: "eager" (layer after layer), "graph" (all launches of an
            evaluation at once, as a CUDA graph, to the same bits), "compile" (`torch.compile`,
            which rounds differently and takes a minute at first) or "auto" ("graph" on a GPU,
            "eager" elsewhere). Where a graph or compiling fails, the log says so and layers are
            called one by one.
        use_ema: take the averaged weights of a published checkpoint where it has them.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: nothing is there, or a part is missing.
        ValueError: a file is damaged, foreign or of another model, or an argument is unknown.
        RuntimeError: the device is not available.
    """
    precision = None if dtype == "auto" else parse_dtype(dtype, call="load")
    of_decoder = parse_dtype(decoder_dtype, call="load", argument="decoder_dtype")
    target = parse_device(device, call="load")
    check_execution(execution, target, call="load")
    path = _locate(name_or_path)
    if path.is_dir() and (path / CONFIG).is_file():
        model = _load_own(path / CONFIG, path / WEIGHTS, use_ema=use_ema)
    elif path.is_dir():
        model = _load_run(find_run(path), name=path.name, use_ema=use_ema)
    elif path.suffix == ".safetensors" and (path.parent / CONFIG).is_file():
        model = _load_own(path.parent / CONFIG, path, use_ema=use_ema)
    else:
        model = _load_run(Run(find_yaml(path), path), name=path.stem, use_ema=use_ema)
    # Channels-last convolutions are a tenth faster on CPUs, and what tensor cores want.
    model.unet.to(memory_format=torch.channels_last)
    model.to(target).eval()
    if precision is None:
        precision = choose_dtype(model.unet, model.window)
    model.unet.to(precision)
    if model.conditioner is not None:
        model.conditioner.to(precision)
    model.vae.decoder.to(of_decoder)
    model.execution = execution
    return model


def _locate(name_or_path: str | os.PathLike[str]) -> Path:
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"load: name_or_path is a {type(name_or_path).__name__}, but the name of a bundled "
            "model or a path was expected."
        )
    names = bundled_names()
    path = Path(name_or_path).expanduser()
    if isinstance(name_or_path, str) and name_or_path in names:
        if (path / CONFIG).is_file():
            logger.warning(
                "the bundled model %s is loaded; write ./%s for the folder of that name here",
                name_or_path,
                name_or_path,
            )
        return BUNDLED / name_or_path
    if not path.exists():
        bundled = ", ".join(names) if names else "none"
        raise FileNotFoundError(
            f"load: {str(name_or_path)!r} is neither a file or folder (looked for "
            f"{path.absolute()}) nor a bundled model (bundled: {bundled})."
        )
    return path


def _load_own(config_path: Path, weights_path: Path, *, use_ema: bool) -> LatentDiffusion:
    config = read_config(config_path)
    if not weights_path.is_file():
        raise FileNotFoundError(
            f"load: {config_path.parent.absolute()} has {CONFIG}, but no {weights_path.name}."
        )
    weights = read_weights(weights_path)
    empty = _empty_model(config, config_path)
    found = split_parts(weights, model_parts(empty))
    model = _fill(empty, config, found, source=weights_path, use_ema=use_ema)
    model.source = weights_path
    return model


def _load_run(run: Run, *, name: str, use_ema: bool) -> LatentDiffusion:
    described = read_compvis(run.yaml, name=name)
    weights = read_weights(run.checkpoint)
    empty = _empty_model(described.config, run.yaml)
    parts = model_parts(empty)
    found = split_parts(weights, parts)
    if "vae" not in found.weights and described.vae_path is not None:
        _find_vae(found, empty, described.vae_path, run)
    model = _fill(empty, described.config, found, source=run.checkpoint, use_ema=use_ema)
    if "scale_factor" in found.other:  # measured in training (scale_by_std) and kept there
        model.scale_factor = float(found.other["scale_factor"])
    _check_schedule(model, found, run)
    return model


def _empty_model(config: Mapping[str, Any], source: Path) -> LatentDiffusion:
    try:
        return LatentDiffusion.from_config(config, empty=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"load: {source} does not describe a model: {error}") from None


def _fill(
    empty: LatentDiffusion,
    config: Mapping[str, Any],
    found: Parts,
    *,
    source: Path,
    use_ema: bool,
) -> LatentDiffusion:
    match = place(found, model_parts(empty), source=str(source), ema=use_ema)
    # Initial values are drawn only where some will stay: they cost seconds at the paper's size.
    model = LatentDiffusion.from_config(config) if match.missing else empty.to_empty(device="cpu")
    copy_weights(found, model_parts(model))
    copy_others(found, model)
    report(match, source=str(source))
    return model


def _find_vae(found: Parts, empty: LatentDiffusion, vae_path: str, run: Run) -> None:
    """Take the autoencoder from its own checkpoint, where the configuration's path leads to one."""
    folders = [Path(), run.checkpoint.parent, run.yaml.parent.parent]
    for path in (folder / vae_path for folder in folders):
        if path.is_file():
            parts = split_parts(read_weights(path), {"vae": empty.vae})
            found.weights.update({k: v for k, v in parts.weights.items() if k == "vae"})
            return


def _check_schedule(model: LatentDiffusion, found: Parts, run: Run) -> None:
    stored = found.other.get("alphas_cumprod")
    if stored is None:
        return
    ours = model.schedule.alphas_cumprod
    if stored.shape != ours.shape or not torch.allclose(
        stored.double(), ours, rtol=1e-3, atol=1e-5
    ):
        raise ValueError(
            f"load: the noise schedule stored in {run.checkpoint} is not that of {run.yaml} "
            f"({model.schedule.to_config()}); give the YAML of the run that made the checkpoint."
        )
