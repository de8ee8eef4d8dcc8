# SPDX-License-Identifier: Apache-2.0
"""k-diffusion, both ways: its samplers on our canvas, and its models as window denoisers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast._checks import check_dtype, check_tensor
from ssldiff_fast.adapters.network import NetworkDenoiser
from ssldiff_fast.adapters.sigmas import Sigmas
from ssldiff_fast.canvas.conditioning import Conditioning
from ssldiff_fast.diffusion.prediction import denoised_coefficients


class DenoisedPrediction:
    """The denoised canvas as a function of (x, sigma), which k-diffusion's samplers call.

    Their x is x0 + sigma noise. With abar = 1 / (1 + sigma^2), sqrt(abar) x is what the model was
    trained on, and the model output gives x0 (see `diffusion.prediction`). For "flow" models x is
    (1 - sigma) x0 + sigma noise as it is, and x0 = x - sigma output; use samplers that draw no
    noise for those.

        denoised = sf.adapters.DenoisedPrediction(canvas, schedule)
        x = canvas_noise(0, 4, 128, 256) * denoised.sigma_max
        x = k_diffusion.sampling.sample_dpmpp_2m(denoised, x, denoised.get_sigmas(20))

    Args:
        canvas: a `CanvasDenoiser`, or anything with `prediction` that is called (x, t).
        schedule: what the model was trained with: a `Schedule`, a scheduler of diffusers or
            alphas_cumprod [steps]. None for a canvas of `from_kdiffusion` without a schedule.
        flow_steps: training timesteps of a "flow" model, whose t is sigma times these.
    """

    def __init__(self, canvas: Any, schedule: Any = None, *, flow_steps: int = 1000) -> None:
        call = "DenoisedPrediction"
        self.canvas = canvas
        self.prediction: str = canvas.prediction
        self._flow_steps = flow_steps
        window_denoiser = getattr(canvas, "denoiser", None)
        self._by_sigma = bool(getattr(window_denoiser, "by_sigma", False))
        self._sigmas: Sigmas | None = None
        if self.prediction != "flow" and not self._by_sigma:
            if schedule is None:
                raise ValueError(
                    f"{call}: schedule is None, but this model counts in timesteps; pass the "
                    "schedule that it was trained with (model.schedule, or its scheduler)."
                )
            self._sigmas = Sigmas(schedule, call=call)
        elif schedule is not None:
            kind = "is a flow model" if self.prediction == "flow" else "counts in sigma itself"
            raise ValueError(f"{call}: schedule is given, but this model {kind}; leave it out.")

    @property
    def sigma_min(self) -> float:
        """The smallest noise level of the schedule."""
        return self._schedule.at(0)

    @property
    def sigma_max(self) -> float:
        """The largest noise level of the schedule; noise times this is where sampling starts."""
        return self._schedule.at(len(self._schedule) - 1)

    @property
    def _schedule(self) -> Sigmas:
        if self._sigmas is None:
            raise ValueError(
                "DenoisedPrediction: this model has no schedule, so its sigmas are yours to choose "
                "(for example k_diffusion.sampling.get_sigmas_karras)."
            )
        return self._sigmas

    def get_sigmas(self, steps: int) -> Tensor:
        """Noise levels of timesteps spread evenly from last to first, and 0: [steps + 1] fp32."""
        times = torch.linspace(len(self._schedule) - 1, 0, steps, dtype=torch.float64)
        return torch.tensor([*(self._schedule.at(float(t)) for t in times), 0.0])

    def __call__(
        self,
        x: Tensor,  # [C, H, W] or [B, C, H, W] fp32
        sigma: Tensor | float,  # one level; a tensor of any shape, all values equal
        **extra: Any,
    ) -> Tensor:
        """The denoised canvas, of x's shape.

        Raises:
            TypeError: `extra_args` were given: conditioning belongs to the canvas's field.
            ValueError: sigma differs between canvases, or is not above 0.
        """
        call = "DenoisedPrediction"
        check_tensor("x", x, call=call)
        check_dtype("x", x, [torch.float32], call=call)
        if extra:
            raise TypeError(
                f"{call}: extra_args has {sorted(extra)[0]!r}, but the canvas's field is the "
                "conditioning and its guidance_scale the guidance; leave extra_args out."
            )
        level = _one_level(sigma)
        if self._by_sigma:
            return self.canvas(x, level)
        if self.prediction == "flow":
            return x - level * self.canvas(x, level * self._flow_steps)
        abar = 1.0 / (1.0 + level * level)
        scaled = x * math.sqrt(abar)
        output = self.canvas(scaled, self._schedule.time(level))
        of_x, of_output = denoised_coefficients(self.prediction, abar)
        return of_x * scaled + of_output * output


def _one_level(sigma: Tensor | float) -> float:
    values = torch.as_tensor(sigma, dtype=torch.float64).flatten()
    level = float(values[0]) if len(values) else math.nan
    if not (level > 0 and math.isfinite(level) and bool((values == level).all())):
        raise ValueError(
            f"DenoisedPrediction: sigma is {values.tolist()[:4]}, but one finite level above 0 for "
            "the whole canvas was expected."
        )
    return level


def from_kdiffusion(
    denoiser: Any,
    *,
    window: int | Sequence[int],
    channels: int,
    names: Mapping[str, str] | None = None,
    schedule: Any = None,
) -> KDiffusionDenoiser:
    """A denoiser of the k-diffusion kind, `(x, sigma, **extra) -> denoised`, for `CanvasDenoiser`.

    Args:
        denoiser: for example `k_diffusion.Denoiser(model, sigma_data)` or
            `k_diffusion.external.CompVisDenoiser(model)`.
        window: (h, w) in latents, or one number.
        channels: latent channels.
        names: what the denoiser calls the conditioning: of "tokens", "pooled", "labels" and
            "token_mask" to its keyword; {"tokens": "cond"} unless given.
        schedule: with one (a `Schedule`, a scheduler, alphas_cumprod), the canvas is what
            diffusers' schedulers and our `sample` work on and its t are timesteps. Without one it
            is k-diffusion's x0 + sigma noise, and t is sigma: see `DenoisedPrediction`.

    Raises:
        TypeError: the denoiser cannot be called.
        ValueError: names has a kind that there is not.
    """
    call = "from_kdiffusion"
    if not callable(denoiser):
        raise TypeError(
            f"{call}: denoiser is a {type(denoiser).__name__}, but a callable (x, sigma, **extra) "
            "that returns the denoised x was expected."
        )
    chosen = {"tokens": "cond"} if names is None else dict(names)
    known = ("tokens", "pooled", "labels", "token_mask")
    for kind in chosen:
        if kind not in known:
            raise ValueError(f"{call}: names has {kind!r}, but it must be of {', '.join(known)}.")
    sigmas = None if schedule is None else Sigmas(schedule, call=call)
    return KDiffusionDenoiser(denoiser, chosen, sigmas, window=window, channels=channels)


class KDiffusionDenoiser(NetworkDenoiser):
    """See `from_kdiffusion`."""

    def __init__(
        self,
        denoiser: Any,
        names: Mapping[str, str],
        sigmas: Sigmas | None,
        *,
        window: int | Sequence[int],
        channels: int,
    ) -> None:
        super().__init__(
            denoiser, window=window, channels=channels, prediction="x0", call="from_kdiffusion"
        )
        self._names = dict(names)
        self._sigmas = sigmas

    @property
    def by_sigma(self) -> bool:
        """Whether t is sigma, and the canvas x0 + sigma noise."""
        return self._sigmas is None

    def check(self, cond: Conditioning) -> None:
        """Raises a ValueError where the field gives something that has no name, or lacks some."""
        for kind in ("tokens", "pooled", "labels", "token_mask"):
            given = getattr(cond, kind) is not None
            if given and kind not in self._names:
                raise ValueError(
                    f"from_kdiffusion: the field gives {kind}, but names does not say what the "
                    f"denoiser calls it; pass names={{{kind!r}: ...}}."
                )
            if not given and kind in self._names:
                raise ValueError(
                    f"from_kdiffusion: the denoiser needs {self._names[kind]!r}, but the field "
                    f"gives no {kind}; use a field of Conditioning({kind}=...)."
                )
        if cond.added:
            raise ValueError(
                "from_kdiffusion: the field gives added tensors, which no name stands for; use "
                "tokens, pooled or labels."
            )

    def evaluate(
        self,
        x: Tensor,  # [M, C, h, w]
        t: float,
        cond: Conditioning,  # of M windows
    ) -> Tensor:
        """The denoised windows."""
        sigma = t if self._sigmas is None else self._sigmas.at(t)
        if self._sigmas is not None:
            x = x * math.sqrt(1.0 + sigma * sigma)
        values = {name: getattr(cond, kind) for kind, name in self._names.items()}
        output: Tensor = self.network(x, torch.full((len(x),), sigma, device=x.device), **values)
        return output
