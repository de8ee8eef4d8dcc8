# SPDX-License-Identifier: Apache-2.0
"""Models with the `apply_model(x, t, cond)` of the CompVis code as window denoisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.adapters.network import NetworkDenoiser
from ssldiff_fast.canvas.conditioning import Conditioning

# What `apply_model` is given, by the model's conditioning_key. Those that concatenate images to
# the latent (concat, hybrid) are conditioned on pixels, which no field has.
_KEYS: dict[str | None, Callable[[Conditioning], Any]] = {
    None: lambda cond: _first(cond.tokens, cond.labels, cond.pooled),
    "crossattn": lambda cond: cond.tokens,
    "adm": lambda cond: _first(cond.labels, cond.pooled),
    "crossattn-adm": lambda cond: (
        None
        if cond.tokens is None or cond.pooled is None
        else {"c_crossattn": [cond.tokens], "c_adm": cond.pooled}
    ),
}


def from_compvis(
    model: Any,
    *,
    window: int | Sequence[int] | None = None,
    channels: int | None = None,
    prediction: str | None = None,
    conditioner: Callable[[Tensor], Tensor] | None = None,
) -> CompVisDenoiser:
    """Any model with `apply_model(x, t, cond)` as a `WindowDenoiser`, for `CanvasDenoiser`.

    A run of the CompVis code whose U-Net this package knows loads faster and runs faster with
    `sf.load`; this is for all others, and for models that have been changed.

    Args:
        model: a `LatentDiffusion` of the CompVis kind, or anything with its `apply_model`.
        window: (h, w) in latents, or one number; `model.image_size` unless given.
        channels: latent channels; `model.channels` unless given.
        prediction: "eps", "v" or "x0"; `model.parameterization` unless given.
        conditioner: applied to the field's tokens [N, T, D] once per window set, usually
            `model.get_learned_conditioning`; None where the field holds finished tokens.

    Raises:
        TypeError: the model has no `apply_model`.
        ValueError: the model does not say its window or channels, or is conditioned on images.
    """
    call = "from_compvis"
    if not callable(getattr(model, "apply_model", None)):
        raise TypeError(
            f"{call}: model is a {type(model).__name__} without apply_model(x, t, cond); pass the "
            "whole LatentDiffusion, not its U-Net."
        )
    window = getattr(model, "image_size", None) if window is None else window
    channels = getattr(model, "channels", None) if channels is None else channels
    for name, value, of in (("window", window, "image_size"), ("channels", channels, "channels")):
        if value is None:
            raise ValueError(f"{call}: {name} is None, and the model has no {of}; pass {name}=.")
    known = getattr(model, "parameterization", None)
    key = getattr(getattr(model, "model", None), "conditioning_key", None)
    if key not in _KEYS:
        raise ValueError(
            f"{call}: the model's conditioning_key is {key!r}, but a field can give one of "
            f"{', '.join(str(name) for name in _KEYS if name)}; such a model is conditioned on "
            "images, so write a WindowDenoiser that has them."
        )
    if window is None or channels is None:  # said above; for the type checker
        raise ValueError(f"{call}: window and channels are needed.")
    return CompVisDenoiser(
        model,
        key,
        conditioner,
        window=window,
        channels=channels,
        prediction=prediction or known,
        call=call,
    )


class CompVisDenoiser(NetworkDenoiser):
    """See `from_compvis`."""

    def __init__(
        self,
        model: Any,
        key: str | None,
        conditioner: Callable[[Tensor], Tensor] | None,
        **shared: Any,
    ) -> None:
        super().__init__(model, **shared)
        self._key = key
        self._conditioner = conditioner

    def check(self, cond: Conditioning) -> None:
        """Raises a ValueError where the field gives nothing that the model is conditioned on."""
        if _KEYS[self._key](cond) is None:
            need = {
                "crossattn": "tokens",
                "adm": "labels or pooled",
                "crossattn-adm": "tokens and pooled",
            }.get(self._key or "", "tokens, labels or pooled")
            raise ValueError(
                f"from_compvis: the model is conditioned by {self._key!r}, but the field gives no "
                f"{need}; use a field of Conditioning with them."
            )

    def prepare(self, cond: Any, uncond: Any) -> Any:
        """Conditions the tokens of all windows, and of the unconditional one."""
        return super().prepare(self._conditioned(cond), self._conditioned(uncond))

    @torch.no_grad()
    def _conditioned(self, cond: Any) -> Any:
        if self._conditioner is None or cond is None:
            return cond
        tokens = cond.tokens if isinstance(cond, Conditioning) else cond
        if tokens is None:
            return cond
        made = self._conditioner(tokens)
        if not isinstance(made, Tensor) or made.ndim != 3 or len(made) != len(tokens):
            got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"from_compvis: conditioner returned {got} for tokens {list(tokens.shape)}, but "
                f"[{len(tokens)}, T, D] was expected."
            )
        if not isinstance(cond, Conditioning):
            return made
        return Conditioning(made, cond.pooled, cond.labels, cond.token_mask, cond.added)

    def evaluate(
        self,
        x: Tensor,  # [M, C, h, w]
        t: float,
        cond: Conditioning,  # of M windows
    ) -> Tensor:
        """`apply_model` at t, in whole timesteps where t is whole, as the CompVis samplers do."""
        whole = float(t).is_integer()
        time = torch.full(
            (len(x),),
            int(t) if whole else t,
            device=x.device,
            dtype=torch.int64 if whole else torch.float32,
        )
        output: Tensor = self.network.apply_model(x, time, _KEYS[self._key](cond))
        return output


def _first(*values: Tensor | None) -> Tensor | None:
    return next((value for value in values if value is not None), None)
