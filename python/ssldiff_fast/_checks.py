# SPDX-License-Identifier: Apache-2.0
"""Checks of what a caller passes; each raises one sentence that says what to do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor


def check_tensor(name: str, value: object, *, call: str) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{call}: {name} must be a torch.Tensor, but a {type(value).__name__} was given."
        )


def check_shape(
    name: str,
    tensor: Tensor,
    pattern: str,
    sizes: dict[str, int] | None = None,
    *,
    call: str,
) -> dict[str, int]:
    """Check the shape of `tensor` against a pattern of shape letters.

    Args:
        name: the argument's name, for the message.
        tensor: what was passed.
        pattern: one word per dimension: a shape letter (bound on first use), a number, or `_` for
            any size, for example "N C h w" or "N 3 _ _".
        sizes: letters bound by earlier checks of the same call; a letter found there must agree.
        call: the public call that the message names.

    Returns:
        `sizes` with the letters of this pattern added.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if rank or a size disagrees with the pattern.
    """
    check_tensor(name, tensor, call=call)
    words = pattern.split()
    bound = dict(sizes or {})
    shape = tuple(tensor.shape)
    fits = len(shape) == len(words)
    for word, size in zip(words, shape):
        if not fits or word == "_":
            continue
        fits = size == (int(word) if word.isdigit() else bound.setdefault(word, size))
    if not fits:
        given = {k: v for k, v in (sizes or {}).items() if k in words}
        known = f" with {', '.join(f'{k} = {v}' for k, v in given.items())}" if given else ""
        raise ValueError(
            f"{call}: {name} has shape {list(shape)}, but [{', '.join(words)}]{known} was expected."
        )
    return bound


def check_dtype(name: str, tensor: Tensor, allowed: Iterable[torch.dtype], *, call: str) -> None:
    """Raise TypeError unless the dtype of `tensor` is among `allowed`."""
    allowed = tuple(allowed)
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(
            f"{call}: {name} is {str(tensor.dtype).removeprefix('torch.')}, but {wanted} was "
            f"expected; convert it with .to(torch.{str(allowed[0]).removeprefix('torch.')})."
        )


def check_same_device(call: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all `tensors` (by argument name) are on one device."""
    (first, reference), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != reference.device:
            raise ValueError(
                f"{call}: {name} is on {tensor.device}, but {first} is on {reference.device}; "
                f"move both to one device."
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # One of these makes the sum so too, which is found in a small part of the time; a sum may
    # overflow by itself.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_finite(name: str, tensor: Tensor, *, call: str) -> None:
    """Raise ValueError if `tensor` holds NaN or infinity."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{call}: {name} holds {bad} values that are NaN or infinite; every value must be "
            f"finite."
        )


def check_positive(name: str, value: int | float, *, call: str) -> None:
    """Raise ValueError unless `value` is above zero."""
    if not value > 0:
        raise ValueError(f"{call}: {name} is {value}, but it must be above zero.")


def check_count(name: str, value: int, *, call: str) -> int:
    """`value` as an int; raise unless it is a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{call}: {name} is {value!r}, but it must be a whole number.")
    check_positive(name, int(value), call=call)
    return int(value)


def check_number(name: str, value: float, *, call: str) -> float:
    """`value` as a float; raise unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{call}: {name} is {value!r}, but it must be a number.")
    if not math.isfinite(value):
        raise ValueError(f"{call}: {name} is {value}, but it must be a finite number.")
    return float(value)


def check_choice(name: str, value: str, choices: Iterable[str], *, call: str) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    names = sorted(choices)
    if value not in names:
        raise ValueError(f"{call}: {name} is {value!r}, but it must be one of {', '.join(names)}.")
