# SPDX-License-Identifier: Apache-2.0
"""Run folders of CompVis latent diffusion: their YAML to our configuration.

`target:` strings are looked up in tables here and never imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MODELS = ("ldm.models.diffusion.ddpm.LatentDiffusion",)
_UNETS = ("ldm.modules.diffusionmodules.openaimodel.UNetModel",)
_VAES = {
    "ldm.models.autoencoder.VQModel": "vq",
    "ldm.models.autoencoder.VQModelInterface": "vq",
    "ldm.models.autoencoder.AutoencoderKL": "kl",
}
_CONDITIONERS = {
    "ldm.modules.encoders.modules.PatchEmbedder": "patch",
    "ldm.modules.encoders.modules.SSLEmbedder": "patch_region",
}
_UNCONDITIONED = "__is_unconditional__"

# Names of CompVis' beta schedules; its "linear" is linear in the square root of beta.
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}

# Settings of the U-Net that matter to training alone, or say where it was trained from.
_UNET_TRAINING = ("use_checkpoint", "use_fp16", "ckpt_path", "ignore_keys")
# The keywords of an autoencoder that its arithmetic depends on.
_VAE_KEYS = {"vq": ("ddconfig", "n_embed", "embed_dim"), "kl": ("ddconfig", "embed_dim")}


@dataclass(frozen=True)
class CompVisConfig:
    """A CompVis configuration in our terms.

    Args:
        config: what `LatentDiffusion.from_config` takes.
        vae_path: where the configuration says that the autoencoder's own checkpoint is.
    """

    config: dict[str, Any]
    vae_path: str | None


def read_compvis(path: Path, *, name: str) -> CompVisConfig:
    """Read the YAML of a run.

    Raises:
        ValueError: it is no such YAML, or describes a model of a kind that is not supported.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"load: {path} is not valid YAML ({reason}).") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f'load: {path} has no "model", expected the configuration of a run.')
    params = _section(path, "model", model, _MODELS)
    unet = _unet(path, params)
    vae, vae_path = _vae(path, params)
    config = {
        "name": name,
        "unet": unet,
        "vae": vae,
        "conditioner": _conditioner(path, params),
        "schedule": _schedule(path, params),
        "prediction": params.get("parameterization", "eps"),
        "scale_factor": float(params.get("scale_factor", 1.0)),
        "window": _window(params, unet),
    }
    return CompVisConfig(config, vae_path)


def _section(path: Path, name: str, section: object, targets: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(section, Mapping) or "target" not in section:
        raise ValueError(f"load: {path} gives no target for {name}, expected {targets[0]}.")
    if section["target"] not in targets:
        raise ValueError(
            f"load: {path} has {section['target']} for {name}, which is not supported; expected "
            f"{' or '.join(targets)}."
        )
    return dict(section.get("params") or {})


def _unet(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    unet = _section(path, "unet_config", params.get("unet_config"), _UNETS)
    key = params.get("conditioning_key")
    if key not in (None, "crossattn"):
        raise ValueError(
            f"load: {path} has conditioning_key {key!r}, which is not supported; expected "
            "crossattn, or none."
        )
    return {k: v for k, v in unet.items() if k not in _UNET_TRAINING}


def _vae(path: Path, params: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    section: Any = params.get("first_stage_config")
    vae = _section(path, "first_stage_config", section, tuple(_VAES))
    kind = _VAES[section["target"]]
    keys = _VAE_KEYS[kind]
    missing = [key for key in keys if key not in vae]
    if missing:
        raise ValueError(f"load: {path} lacks {missing[0]} in first_stage_config.")
    vae_path = vae.get("ckpt_path")
    return {"type": kind, **{key: vae[key] for key in keys}}, None if not vae_path else str(
        vae_path
    )


def _conditioner(path: Path, params: Mapping[str, Any]) -> dict[str, Any] | None:
    section = params.get("cond_stage_config")
    if section is None or section == _UNCONDITIONED:
        return None
    options = _section(path, "cond_stage_config", section, tuple(_CONDITIONERS))
    kind = _CONDITIONERS[section["target"]]
    # Defaults are those of the published classes.
    result: dict[str, Any] = {"type": kind, "normalize": bool(options.get("normalize_ssl", False))}
    if kind == "patch":
        result["width"] = options.get("patch_embed_dim", 768)
        result["context_dim"] = options.get("target_dim", 512)
    else:
        result["width"] = options.get("patch_embed_dim", 384)
        result["region_width"] = options.get("region_embed_dim", 768)
        result["context_dim"] = 512
    return result


def _schedule(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    betas = params.get("beta_schedule", "linear")
    if betas not in _BETAS or params.get("given_betas") is not None:
        raise ValueError(
            f"load: {path} has beta_schedule {betas!r} or given_betas, which are not supported; "
            f"expected beta_schedule {', '.join(_BETAS)}."
        )
    # float(): YAML reads 1e-4, without a point, as text.
    return {
        "betas": _BETAS[betas],
        "beta_start": float(params.get("linear_start", 1e-4)),
        "beta_end": float(params.get("linear_end", 2e-2)),
        "num_train_timesteps": int(params.get("timesteps", 1000)),
    }


def _window(params: Mapping[str, Any], unet: Mapping[str, Any]) -> list[int]:
    size = params.get("image_size", unet.get("image_size", 64))
    return [int(size)] * 2 if isinstance(size, int | float) else [int(side) for side in size]


@dataclass(frozen=True)
class Run:
    """Where the parts of a run are."""

    yaml: Path
    checkpoint: Path


def find_run(folder: Path) -> Run:
    """Configuration and checkpoint of a run folder: configs/*-project.yaml, checkpoints/*.ckpt.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    places = [folder / "configs", folder]
    yaml = next((found for place in places if (found := _newest_yaml(place))), None)
    if yaml is None:
        raise FileNotFoundError(
            f"load: {folder.absolute()} holds neither config.json with model.safetensors nor a "
            "run (configs/*-project.yaml with checkpoints/*.ckpt)."
        )
    for place in (folder / "checkpoints", folder):
        candidates = sorted([*place.glob("*.ckpt"), *place.glob("*.safetensors")])
        if candidates:
            preferred = [p for p in candidates if p.stem in ("last", "model")]
            return Run(yaml, (preferred or candidates[-1:])[0])
    raise FileNotFoundError(
        f"load: {folder.absolute()} has {yaml.name}, but no .ckpt or .safetensors in "
        f"{folder.absolute() / 'checkpoints'} or beside it."
    )


def find_yaml(checkpoint: Path) -> Path:
    """The YAML that belongs to a checkpoint: of its name, beside it, or of its run folder.

    Raises:
        FileNotFoundError: there is none.
    """
    own = checkpoint.with_suffix(".yaml")
    if own.is_file():
        return own
    places = [checkpoint.parent, checkpoint.parent.parent / "configs"]
    for place in places:
        found = _newest_yaml(place)
        if found is not None:
            return found
    looked = ", ".join(str(place.absolute()) for place in places)
    raise FileNotFoundError(
        f"load: no configuration for {checkpoint}: looked for {own.name} or *-project.yaml or "
        f"another .yaml in {looked}; put the .yaml of its run beside it."
    )


def _newest_yaml(folder: Path) -> Path | None:
    """The last project file of a folder by name (names begin with the date), or its one YAML."""
    project = sorted(folder.glob("*-project.yaml"))
    if project:
        return project[-1]
    every = [
        path
        for path in sorted(folder.glob("*.yaml"))
        if not path.name.startswith(".") and not path.name.endswith("-lightning.yaml")
    ]
    return every[0] if len(every) == 1 else None
