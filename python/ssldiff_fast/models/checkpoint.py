# SPDX-License-Identifier: Apache-2.0
"""Weights in: safetensors and pickled checkpoints, read without executing code from them."""

from __future__ import annotations

import logging
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.ldm import (
    ENCODER_PREFIX,
    PREFIXES,
    STATISTICS_PREFIX,
    LatentDiffusion,
)
from ssldiff_fast.models.local_autoencoder import statistics_from_tensors
from ssldiff_fast.models.unet import UNet

logger = logging.getLogger(__name__)

EMA_PREFIX = "model_ema."
# What a file of ours has beside the weights of a model's modules.
_NO_MODULES = ("encoder", "statistics")


class _Inert:
    """Stands for an object of the file that is not weights; keeps nothing, does nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _empty_mapping(*_: object) -> OrderedDict[Any, Any]:
    """Stands for the constructor of a mapping that is not weights."""
    return OrderedDict()


# What training programs store beside the weights. None of it is imported: each name becomes a
# stand-in, whether or not its library is installed.
_HARMLESS = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.object",
    "builtins.str",
    "builtins.tuple",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "typing.Any",
)
# These are filled after they are made, so their stand-in is a real mapping.
_HARMLESS_MAPPINGS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def _stand_ins() -> list[Any]:
    result: list[Any] = [(type("_Inert", (_Inert,), {}), name) for name in _HARMLESS]
    result += [(OrderedDict, name) for name in _HARMLESS_MAPPINGS]
    return [*result, (_empty_mapping, "collections.defaultdict")]


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names, on the CPU.

    Reads safetensors, Lightning checkpoints (their "state_dict") and bare state dicts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, not a checkpoint, without weights, or holding a class that is not
            known to be harmless.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load: no checkpoint at {path.absolute()}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"load: {path} holds a {type(content).__name__}, expected a dictionary of weights."
        )
    weights = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    if not weights:
        raise ValueError(f"load: {path} holds no weights; expected a state dict.")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"load: {path} is not a whole safetensors file ({error}); it may be truncated, fetch "
            "or copy it again."
        ) from None


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:  # missing rights show here, as the OSError that they are
        file.read(1)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins()):
            warnings.simplefilter("ignore")
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        # Damaged files fail in many ways: UnpicklingError, EOFError, RuntimeError, KeyError, ...
        refused = re.search(r"\bGLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"load: {path} was not read, because it holds {refused[1]}, which may execute "
                "code; save its state_dict alone, or as safetensors."
            ) from None
        raise ValueError(
            f"load: {path} is no whole checkpoint ({type(error).__name__}); it may be truncated "
            "or of another kind, expected a PyTorch state dict or safetensors."
        ) from None


@dataclass
class Parts:
    """Weights of a checkpoint sorted by the part they belong to, by names within the part."""

    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)  # by full names
    ema: dict[str, Tensor] = field(default_factory=dict)  # by names without dots


def split_parts(weights: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Parts:
    """Sort weights into the parts of a model.

    Whole models are sorted by prefix; the bare weights of one part go to the part that has most
    of their names.

    Args:
        weights: all tensors of a file.
        parts: the parts by their names as in `PREFIXES`.
    """
    result = Parts()
    for name, value in weights.items():
        name = name.removeprefix("module.")  # data-parallel training wraps models in this
        if name.startswith(EMA_PREFIX):
            result.ema[name.removeprefix(EMA_PREFIX)] = value
        else:
            result.other[name] = value
    prefixes = dict(PREFIXES)
    if not any(name.startswith(tuple(prefixes.values())) for name in result.other):
        prefixes = {"unet": "diffusion_model."}
        if not any(name.startswith("diffusion_model.") for name in result.other):
            prefixes = {_best_part(result.other, parts): ""}
    else:
        prefixes["encoder"], prefixes["statistics"] = ENCODER_PREFIX, STATISTICS_PREFIX
    for part, prefix in prefixes.items():
        names = [name for name in result.other if name.startswith(prefix)]
        if names:
            found = {name.removeprefix(prefix): result.other.pop(name) for name in names}
            result.weights[part] = found
    return result


def _best_part(weights: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> str:
    def common(part: str) -> int:
        return sum(name in weights for name in parts[part].state_dict())

    return max(parts, key=common)


def _take_averages(found: Parts, part: str, module: nn.Module) -> None:
    """Put averaged weights in the place of a part's weights, where the checkpoint has them.

    They are stored without the dots of their names: CompVis averages the wrapper of the U-Net
    (`diffusion_model...`), or a whole autoencoder.
    """
    prefix = "diffusion_model." if part == "unet" else ""
    averaged = {
        name: found.ema[key]
        for name in module.state_dict()
        if (key := (prefix + name).replace(".", "")) in found.ema
    }
    if averaged:
        found.weights.setdefault(part, {}).update(averaged)


# What checkpoints hold besides the parameters of the model: buffers of the schedule, the losses
# of the autoencoder's training, running averages. Leaving them out loses nothing.
_IGNORED = re.compile(
    r"^(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|logvar"
    r"|lvlb_weights|scale_factor|cond_ids|(first_stage_model\.)?(loss|model_ema)\..*"
    r"|(first_stage_model\.)?colorize)$"
)


@dataclass
class Match:
    """Which names of a checkpoint and of a model found each other."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)  # of the model, by full name
    left_out: list[str] = field(default_factory=list)  # of the checkpoint, by full name


def match_parts(found: Parts, parts: Mapping[str, nn.Module], *, source: str) -> Match:
    """Compare names and shapes of a checkpoint with those of a model.

    Raises:
        ValueError: a shape differs, or nothing matches.
    """
    whole = len(parts) > 1  # else one part is picked, and it is no loss that the rest stays
    match = Match()
    if whole:
        match.left_out += [name for name in found.other if not _IGNORED.match(name)]
    for part, module in parts.items():
        prefix = PREFIXES[part] if whole else ""
        weights = found.weights.get(part, {})
        expected = module.state_dict()
        match.missing += [prefix + name for name in expected if name not in weights]
        for name, value in weights.items():
            if name not in expected:
                if not _IGNORED.match(prefix + name):
                    match.left_out.append(prefix + name)
                continue
            if value.shape != expected[name].shape:
                raise ValueError(
                    f"load: {prefix}{name} has shape {list(value.shape)} in {source}, but the "
                    f"configuration makes it {list(expected[name].shape)}; they belong to "
                    "different models."
                )
            match.loaded += 1
    for part in sorted(set(found.weights) - set(parts) - set(_NO_MODULES)) if whole else ():
        match.left_out += [PREFIXES[part] + name for name in found.weights[part]]
    if not match.loaded:
        some = ", ".join(_all_names(found)[:3])
        raise ValueError(
            f"load: {source} matches no parameter of the model (it holds {some}, ...); expected "
            "the published names, see the README."
        )
    return match


def _all_names(found: Parts) -> list[str]:
    names = [name for weights in found.weights.values() for name in weights]
    return [*names, *found.other]


def report(match: Match, *, source: str) -> None:
    """Print what was left out, if anything was."""
    said = []
    if match.left_out:
        said.append(f"{_some(match.left_out)} of the file are not used")
    if match.missing:
        said.append(f"{_some(match.missing)} of the model keep their initial values")
    if said:
        logger.warning("%s matches the model only in part: %s", source, "; ".join(said))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} entries ({shown})"


def copy_others(found: Parts, model: LatentDiffusion) -> None:
    """Give the model what the checkpoint has beside the weights of its modules.

    Raises:
        ValueError: statistics that are damaged or of another autoencoder.
    """
    model.encoder_weights = found.weights.get("encoder", model.encoder_weights)
    if "statistics" in found.weights:
        model.set_statistics(statistics_from_tensors(found.weights["statistics"]))


def copy_weights(found: Parts, parts: Mapping[str, nn.Module]) -> None:
    """Copy matched weights into the modules, in the precision of the modules."""
    with torch.no_grad():
        for part, module in parts.items():
            expected = module.state_dict()
            for name, value in found.weights.get(part, {}).items():
                if name in expected:
                    expected[name].copy_(value)


def place(found: Parts, parts: Mapping[str, nn.Module], *, source: str, ema: bool = True) -> Match:
    """Put averaged weights first, and match; the modules are not changed yet.

    Raises:
        ValueError: a shape differs, or nothing matches.
    """
    if ema and found.ema:
        for part, module in parts.items():
            if part == "unet" or len(parts) == 1:
                _take_averages(found, part, module)
    return match_parts(found, parts, source=source)


def load_weights(module: nn.Module, path: str | Path, *, use_ema: bool = True) -> Match:
    """Load a checkpoint into a model, or into one part of one.

    Args:
        module: a `LatentDiffusion`, or a bare U-Net, autoencoder or conditioner.
        path: .ckpt, .pt, .pth or .bin (read without executing code) or .safetensors.
        use_ema: take the averaged weights where the checkpoint has them.

    Returns:
        What matched; a partial match is logged as a warning too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or foreign, has another shape, or matches nothing.
    """
    path = Path(path)
    parts = model_parts(module)
    found = split_parts(read_weights(path), parts)
    match = place(found, parts, source=str(path), ema=use_ema)
    copy_weights(found, parts)
    if isinstance(module, LatentDiffusion):
        copy_others(found, module)
    report(match, source=str(path))
    return match


def model_parts(module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model by their names as in `PREFIXES`; a bare part is its own."""
    if isinstance(module, LatentDiffusion):
        parts = {part: getattr(module, part) for part in PREFIXES}
        return {part: value for part, value in parts.items() if value is not None}
    if isinstance(module, UNet):
        return {"unet": module}
    if isinstance(module, VQModel | AutoencoderKL):
        return {"vae": module}
    return {"conditioner": module}
