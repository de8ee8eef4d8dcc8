# SPDX-License-Identifier: Apache-2.0
"""What a network predicts (eps, v or x0), and how one prediction follows from another.

With x = sqrt(abar) x0 + sqrt(1 - abar) eps, each of the three is an affine function of x and of
any other, so solvers can work with the two coefficients alone.
"""

from __future__ import annotations

import math

from torch import Tensor

PREDICTIONS = ("eps", "v", "x0")


def check_prediction(prediction: str, *, call: str) -> None:
    """Raise a ValueError unless `prediction` is one of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"{call}: prediction is {prediction!r}; expected one of {', '.join(PREDICTIONS)}."
        )


def denoised_coefficients(prediction: str, abar: float) -> tuple[float, float]:
    """(a, b) of x0 = a x + b output."""
    check_prediction(prediction, call="denoised_coefficients")
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "v":
        return math.sqrt(abar), -math.sqrt(1.0 - abar)
    if abar == 0.0:
        raise ValueError(
            "denoised_coefficients: prediction is 'eps' where alpha-bar is 0, which leaves x0 "
            "undetermined; use a model that predicts v or x0 with zero terminal SNR."
        )
    return 1.0 / math.sqrt(abar), -math.sqrt((1.0 - abar) / abar)


def noise_coefficients(prediction: str, abar: float) -> tuple[float, float]:
    """(a, b) of eps = a x + b output."""
    check_prediction(prediction, call="noise_coefficients")
    if prediction == "eps":
        return 0.0, 1.0
    if prediction == "v":
        return math.sqrt(1.0 - abar), math.sqrt(abar)
    if abar == 1.0:
        raise ValueError(
            "noise_coefficients: prediction is 'x0' where alpha-bar is 1, which leaves eps "
            "undetermined; take a timestep with noise."
        )
    return 1.0 / math.sqrt(1.0 - abar), -math.sqrt(abar / (1.0 - abar))


def to_x0(prediction: str, x: Tensor, output: Tensor, abar: float) -> Tensor:
    """The clean image that `output` implies at `x`."""
    a, b = denoised_coefficients(prediction, abar)
    return a * x + b * output


def to_eps(prediction: str, x: Tensor, output: Tensor, abar: float) -> Tensor:
    """The noise that `output` implies at `x`."""
    a, b = noise_coefficients(prediction, abar)
    return a * x + b * output


def to_v(prediction: str, x: Tensor, output: Tensor, abar: float) -> Tensor:
    """The velocity sqrt(abar) eps - sqrt(1 - abar) x0 that `output` implies at `x`."""
    if prediction == "v":
        return output
    # v is fixed by x and either of the others alone, which keeps both ends of the schedule exact.
    if prediction == "x0" and abar < 1.0:
        return (math.sqrt(abar) * x - output) / math.sqrt(1.0 - abar)
    check_prediction(prediction, call="to_v")
    if abar == 0.0 or prediction == "x0":
        raise ValueError(
            f"to_v: v is undetermined by {prediction} where alpha-bar is {abar:g}; "
            "take another timestep."
        )
    return (output - math.sqrt(1.0 - abar) * x) / math.sqrt(abar)
