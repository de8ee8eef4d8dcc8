# SPDX-License-Identifier: Apache-2.0
"""Networks of the diffusers library as window denoisers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.adapters.network import NetworkDenoiser, window_pair
from ssldiff_fast.adapters.schedulers import check_scheduler
from ssldiff_fast.canvas.conditioning import Conditioning

_PREDICTION_TYPES = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
# Arguments of `forward` that we fill, besides the windows, which come first.
_FILLED = (
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "class_labels",
    "added_cond_kwargs",
)
# Settings of transformers that say how wide tokens are; the first that is set holds.
_TOKEN_WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
# What a UNet2DConditionModel wants in added_cond_kwargs, by its addition_embed_type.
_ADDED = {
    "text_time": ("text_embeds", "time_ids"),
    "image": ("image_embeds",),
    "text_image": ("image_embeds",),
    "image_hint": ("image_embeds", "hint"),
}


def from_diffusers(
    model: Any,
    *,
    window: int | Sequence[int] | None = None,
    prediction: str | None = None,
    scheduler: Any = None,
) -> DiffusersDenoiser:
    """A network of diffusers as a `WindowDenoiser`, for `CanvasDenoiser`.

    Takes UNet2DConditionModel, UNet2DModel, SD3Transformer2DModel, PixArtTransformer2DModel,
    Transformer2DModel, DiTTransformer2DModel, and others whose `forward` takes windows, timestep
    and any of cross-attention tokens, their mask, pooled embeddings, class labels and
    `added_cond_kwargs`. These come from the field: tokens [N, T, D], or a `Conditioning`.

    Args:
        model: the network, or a pipeline that has one (`pipe.unet` or `pipe.transformer`).
        window: (h, w) in latents, or one number; the network's own `sample_size` unless given.
        prediction: "eps", "v", "x0" or "flow"; read from the scheduler where there is one. Needed
            for our own `sample` and for k-diffusion's samplers; schedulers of diffusers have their
            own setting of it.
        scheduler: of the model, where `model` is no pipeline.

    Raises:
        TypeError: `model` is no network of diffusers, or needs inputs that are not listed above.
        ValueError: a window that the network cannot take, contradictory predictions, or a
            scheduler that is not pointwise (see `check_scheduler`).
    """
    call = "from_diffusers"
    network = getattr(model, "unet", None) or getattr(model, "transformer", None) or model
    scheduler = scheduler if scheduler is not None else getattr(model, "scheduler", None)
    # torch.compile hides a module's signature behind its own.
    plain = getattr(network, "_orig_mod", network)
    config = getattr(plain, "config", None)
    if not isinstance(plain, torch.nn.Module) or config is None:
        raise TypeError(
            f"{call}: model is a {type(model).__name__}, but a network of diffusers (UNet2DModel, "
            "SD3Transformer2DModel, ...) or a pipeline with a unet or transformer was expected."
        )
    accepted = _signature(plain)
    if scheduler is not None:
        # One that steps in another way than step(output, t, x) is the caller's to call.
        with contextlib.suppress(TypeError):
            check_scheduler(scheduler)
    if window is None:
        window = config.get("sample_size")
        if window is None:
            raise ValueError(
                f"{call}: window is None, and this {type(plain).__name__} has no sample_size; pass "
                "window=(h, w) in latents."
            )
    return DiffusersDenoiser(
        network,
        config,
        accepted,
        window=_check_window(window, plain, config),
        prediction=_prediction(plain, scheduler, prediction),
    )


class DiffusersDenoiser(NetworkDenoiser):
    """See `from_diffusers`."""

    def __init__(
        self,
        network: Any,
        config: Any,
        accepted: frozenset[str],
        *,
        window: tuple[int, int],
        prediction: str | None,
    ) -> None:
        super().__init__(
            network,
            window=window,
            channels=config["in_channels"],
            prediction=prediction,
            call="from_diffusers",
        )
        self.config = config
        self._accepted = accepted
        self._name = type(getattr(network, "_orig_mod", network)).__name__
        self._needs_added = self._added_names()
        outputs = config.get("out_channels") or self.channels
        self._learned_variance = outputs == 2 * self.channels
        if outputs != self.channels and not self._learned_variance:
            raise ValueError(
                f"from_diffusers: {self._name} takes {self.channels} channels and returns "
                f"{outputs}; a network that denoises windows has as many of both (inpainting and "
                "other networks with further inputs need a WindowDenoiser of your own)."
            )

    def _added_names(self) -> tuple[str, ...]:
        plain = getattr(self.network, "_orig_mod", self.network)
        if getattr(plain, "use_additional_conditions", False):
            return ("resolution", "aspect_ratio")  # PixArt, 1024 pixels
        return _ADDED.get(self.config.get("addition_embed_type") or "", ())

    def check(self, cond: Conditioning) -> None:
        """Raises a ValueError where conditioning is missing, unknown or of another width."""
        config = self.config
        self._check_given("tokens", "encoder_hidden_states", cond.tokens, self._needs_tokens())
        pooled = bool(config.get("pooled_projection_dim")) and "pooled_projections" in (
            self._accepted
        )
        by_added = {"text_embeds", "image_embeds"} & set(self._needs_added)
        self._check_given("pooled", "pooled_projections", cond.pooled, pooled, bool(by_added))
        classes = any(config.get(name) for name in ("class_embed_type", "num_class_embeds"))
        classes = classes or config.get("norm_type") == "ada_norm_zero"
        self._check_given("labels", "class_labels", cond.labels, classes)
        self._check_given("token_mask", "encoder_attention_mask", cond.token_mask, False)
        have = set(self._added(cond))
        for name in self._needs_added:
            if name not in have:
                where = "pooled" if name in by_added else f"added[{name!r}]"
                raise ValueError(
                    f"from_diffusers: {self._name} needs {name}, but the field gives none; put it "
                    f"into the Conditioning as {where}."
                )
        if cond.tokens is not None:
            self._check_width("tokens", cond.tokens, self._token_width())
        if cond.pooled is not None and pooled:
            self._check_width("pooled", cond.pooled, config.get("pooled_projection_dim"))

    def _needs_tokens(self) -> bool:
        config = self.config
        blocks = (*(config.get("down_block_types") or ()), *(config.get("up_block_types") or ()))
        if blocks:
            return any("CrossAttn" in name for name in blocks)
        return any(config.get(name) for name in _TOKEN_WIDTHS)

    def _token_width(self) -> int | None:
        names = (
            "encoder_hid_dim",
            "joint_attention_dim",
            "caption_channels",
            "cross_attention_dim",
        )
        if self._needs_tokens():
            for name in names:
                if isinstance(self.config.get(name), int):
                    return int(self.config[name])
        return None

    def _check_given(
        self, kind: str, argument: str, value: Tensor | None, needed: bool, other: bool = False
    ) -> None:
        if value is None and needed:
            raise ValueError(
                f"from_diffusers: {self._name} needs {argument}, but the field gives no {kind}; "
                f"use a field of Conditioning({kind}=...)."
            )
        if value is not None and argument not in self._accepted and not other:
            raise ValueError(
                f"from_diffusers: the field gives {kind}, but {self._name} takes no {argument}; "
                "leave it out."
            )

    def _check_width(self, kind: str, value: Tensor, width: int | None) -> None:
        if width is not None and value.shape[-1] != width:
            raise ValueError(
                f"from_diffusers: {kind} are {value.shape[-1]} wide, but {self._name} takes "
                f"{width}; use the embeddings that the model was trained with."
            )

    def _added(self, cond: Conditioning) -> dict[str, Tensor | None]:
        added: dict[str, Tensor | None] = dict(cond.added)
        if self.config.get("norm_type") == "ada_norm_single":
            # PixArt unpacks the two even where it uses neither.
            for name in ("resolution", "aspect_ratio"):
                if name not in self._needs_added:
                    added.setdefault(name, None)
        for name in ("text_embeds", "image_embeds"):
            if cond.pooled is not None and name in self._needs_added:
                added.setdefault(name, cond.pooled)
                break
        return added

    def evaluate(
        self,
        x: Tensor,  # [M, C, h, w]
        t: float,
        cond: Conditioning,  # of M windows
    ) -> Tensor:
        """The model output; of a network that learned the variance too, without the variance."""
        values = {
            "timestep": torch.full((len(x),), t, device=x.device),
            "encoder_hidden_states": cond.tokens,
            "encoder_attention_mask": cond.token_mask,
            "pooled_projections": cond.pooled if "pooled_projections" in self._accepted else None,
            "class_labels": cond.labels,
            "added_cond_kwargs": self._added(cond) or None,
        }
        passed = {k: v for k, v in values.items() if k in self._accepted}
        output = self.network(x, **passed, return_dict=False)[0]
        # As PixArt's and DiT's pipelines do: the second half is the learned variance.
        return output.chunk(2, dim=1)[0] if self._learned_variance else output


def _signature(network: Any) -> frozenset[str]:
    """Names that `forward` takes, of those we fill."""
    parameters = list(inspect.signature(network.forward).parameters.values())
    needed = [p.name for p in parameters[1:] if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    strange = [name for name in needed if name not in _FILLED]
    names = {p.name for p in parameters}
    # Networks of packed latents (FLUX, ...) say where tokens lie by ids that default to None.
    strange += [name for name in ("img_ids", "txt_ids", "num_frames") if name in names]
    if strange or "timestep" not in names or "return_dict" not in names:
        what = f"needs {strange[0]}" if strange else "does not take timestep and return_dict"
        raise TypeError(
            f"from_diffusers: the forward of {type(network).__name__} {what}, which has no place "
            "on a canvas of windows; write a WindowDenoiser for it (three members and two methods)."
        )
    return frozenset(names & set(_FILLED))


def _prediction(network: Any, scheduler: Any, given: str | None) -> str | None:
    known = None
    if scheduler is not None:
        name = scheduler.config.get("prediction_type")
        if name is None and "FlowMatch" in type(scheduler).__name__:
            name = "flow_prediction"
        known = _PREDICTION_TYPES.get(name)
    elif type(network).__name__.startswith("SD3"):
        known = "flow"
    if None not in (known, given) and known != given:
        raise ValueError(
            f"from_diffusers: prediction is {given!r}, but the scheduler says {known!r}; leave "
            "prediction out, or pass the scheduler that the model was trained with."
        )
    return given or known


def _check_window(window: Any, network: Any, config: Any) -> tuple[int, int]:
    h, w = window_pair(window, call="from_diffusers")
    name = type(network).__name__
    patch = config.get("patch_size") or 2 ** (len(config.get("block_out_channels") or "1") - 1)
    if h % patch or w % patch:
        raise ValueError(
            f"from_diffusers: window is {h} x {w} latents, but {name} takes multiples of {patch}."
        )
    largest = config.get("pos_embed_max_size")
    if largest and max(h, w) > largest * patch:
        raise ValueError(
            f"from_diffusers: window is {h} x {w} latents, but {name} has positions for "
            f"{largest * patch} at most."
        )
    return h, w
