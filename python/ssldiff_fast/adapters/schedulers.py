# SPDX-License-Identifier: Apache-2.0
"""Whether a scheduler can denoise a canvas: its step must treat every position alike."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

# Steps that are tried: enough for the second order of multistep schedulers to set in.
_STEPS = 4
_SIDE = 6
_ADVICE = (
    "use DDIM, DDPM, Euler, Heun, DPMSolverMultistep or UniPC with thresholding=False, or our own "
    "sample(solver='ddim' or 'dpmpp_2m')"
)


def check_scheduler(scheduler: Any, *, channels: int = 4) -> None:
    """Raises unless a scheduler of diffusers keeps the canvas's shape and is pointwise.

    Averaging windows and then stepping the canvas equals stepping windows and averaging where a
    step moves every position by itself (see `diffusion.solvers`). So the scheduler is tried on a
    small canvas, a copy of it: the model output is changed at one position, and no other position
    may answer. Dynamic thresholding, for one, does not pass.

    Args:
        scheduler: with `step(output, t, x)`, `timesteps` and `set_timesteps`.
        channels: latent channels of the canvas.

    Raises:
        TypeError: it is no scheduler, or its step needs further arguments.
        ValueError: it changes the canvas's shape, or is not pointwise.
    """
    call = "check_scheduler"
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "set_timesteps"):
        raise TypeError(
            f"{call}: scheduler is a {name}, but a scheduler of diffusers with step and "
            "set_timesteps was expected."
        )
    config = getattr(scheduler, "config", {})
    if config.get("thresholding"):
        raise ValueError(
            f"{call}: scheduler {name} has thresholding=True, which scales every position by a "
            f"quantile of the whole canvas, so it is not pointwise; {_ADVICE}."
        )
    shape = (1, channels, _SIDE, _SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start, outputs = torch.randn(shape), torch.randn(_STEPS, *shape)
        changed = outputs.clone()
        changed[..., 2, 3] += 7.0
        try:
            plain, other = (_run(scheduler, start, given) for given in (outputs, changed))
        except _Refused as refused:
            raise ValueError(f"{call}: scheduler {name} {refused}; {_ADVICE}.") from None
        except Exception as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise TypeError(
                f"{call}: scheduler {name} cannot step a canvas by step(output, t, x) ({reason}); "
                f"{_ADVICE}."
            ) from None
    moved = ~torch.isclose(plain, other, rtol=1e-5, atol=1e-6).flatten(0, 1).all(0)
    moved[2, 3] = False
    if bool(moved.any()):
        raise ValueError(
            f"{call}: scheduler {name} is not pointwise: a change of the model output at one "
            f"position moved {int(moved.sum())} others, so windows cannot be averaged before its "
            f"step; {_ADVICE}."
        )


class _Refused(Exception):
    pass


def _run(scheduler: Any, x: Tensor, outputs: Tensor) -> Tensor:
    """A few steps of a copy, each with the same noise."""
    tried = copy.deepcopy(scheduler)
    shifted = getattr(tried, "config", {}).get("use_dynamic_shifting")
    tried.set_timesteps(_STEPS, **({"mu": 1.0} if shifted else {}))
    shape = x.shape
    x = x * float(getattr(tried, "init_noise_sigma", 1.0))
    for number, t in enumerate(tried.timesteps[:_STEPS]):
        if hasattr(tried, "scale_model_input"):
            scaled = tried.scale_model_input(x, t)
            if scaled.shape != shape:
                raise _Refused(f"makes {list(scaled.shape)} of a canvas {list(shape)}")
        torch.manual_seed(number)
        x = tried.step(outputs[number], t, x, return_dict=False)[0]
        if x.shape != shape:
            raise _Refused(f"steps a canvas {list(shape)} to {list(x.shape)}")
    return x
