# SPDX-License-Identifier: Apache-2.0
"""Conditioning of more than one kind: tensors of a window set that are indexed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssldiff_fast._checks import check_finite, check_shape, check_tensor

_KINDS = ("tokens", "pooled", "labels", "token_mask")


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a network is told of N windows, besides x and t; all tensors have N as first size.

    Args:
        tokens: [N, T, D] fp32 | bf16 | fp16, for cross-attention.
        pooled: [N, P], one vector a window: SDXL's `text_embeds`, SD3's `pooled_projections`.
        labels: [N] int64 classes, or [N, ...] what else the network takes for its class.
        token_mask: [N, T], 1 for tokens that count and 0 for padding.
        added: further tensors by the names that the network gives them, for example SDXL's
            `time_ids` [N, 6] or PixArt's `resolution` [N, 2] and `aspect_ratio` [N, 1].
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    token_mask: Tensor | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        call = "Conditioning"
        sizes: dict[str, int] = {}
        if self.tokens is not None:
            sizes = check_shape("tokens", self.tokens, "N T D", call=call)
        if self.pooled is not None:
            sizes = check_shape("pooled", self.pooled, "N P", sizes, call=call)
        if self.token_mask is not None:
            sizes = check_shape("token_mask", self.token_mask, "N T", sizes, call=call)
        for name, value in self._named():
            check_tensor(name, value, call=call)
            check_shape(name, value, " ".join("N" + "_" * (value.ndim - 1)), sizes, call=call)
            if value.is_floating_point():
                # Of an expanded tensor the one row that is there.
                check_finite(name, value[:1] if value.stride(0) == 0 else value, call=call)
            sizes.setdefault("N", value.shape[0])
        if not sizes:
            raise ValueError(
                f"{call}: tokens, pooled, labels and added are all empty; give at least one."
            )

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name in _KINDS:
            value = getattr(self, name)
            if value is not None:
                yield name, value
        yield from self.added.items()

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with every tensor changed."""

        def changed(value: Tensor | None) -> Tensor | None:
            return None if value is None else change(value)

        # Past the checks, which have been made: finding NaN waits for a GPU.
        other = object.__new__(Conditioning)
        for name in _KINDS:
            object.__setattr__(other, name, changed(getattr(self, name)))
        added = {name: change(value) for name, value in self.added.items()}
        object.__setattr__(other, "added", added)
        return other

    def __len__(self) -> int:
        return next(value.shape[0] for _, value in self._named())

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        """Some of the windows: `index` is [B] int64 or a slice."""
        return self.map(
            lambda value: value[index.to(value.device) if isinstance(index, Tensor) else index]
        )

    def expand(self, count: int) -> Conditioning:
        """One window's conditioning for `count` windows, without a copy."""
        return self.map(lambda value: value.expand(count, *value.shape[1:]))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """On another device and, for floating-point tensors, in another precision.

        What is the same for all windows stays one row.
        """

        def moved(value: Tensor) -> Tensor:
            kind = dtype if value.is_floating_point() else None
            if value.stride(0) == 0 and len(value) > 1:
                return value[:1].to(device, kind).expand(value.shape)
            return value.to(device, kind)

        return self.map(moved)

    def plain(self) -> Tensor | Conditioning:
        """The tokens alone where there is nothing else, as networks of embeddings take them."""
        alone = [name for name, _ in self._named()] == ["tokens"]
        return self.tokens if alone and self.tokens is not None else self

    @classmethod
    def join(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Several window sets as one, in order."""
        kinds = [{name for name, _ in part._named()} for part in parts]
        for kind in kinds:
            if kind != kinds[0]:
                odd = sorted(kind ^ kinds[0])[0]
                raise ValueError(
                    f"Conditioning.join: some parts have {odd} and some do not; give it to all or "
                    "to none."
                )
        values = [dict(part._named()) for part in parts]

        def joined(name: str) -> Any:
            if name not in values[0]:
                return None
            tensors = [value[name] for value in values]
            shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
            if len(shapes) > 1:
                raise ValueError(
                    f"Conditioning.join: {name} has shapes {sorted(shapes)} a window; they must be "
                    "equal, so pad the shorter ones."
                )
            return torch.cat(tensors)

        added = {name: joined(name) for name in parts[0].added}
        return cls(
            joined("tokens"), joined("pooled"), joined("labels"), joined("token_mask"), added
        )


# What fields return and window denoisers are prepared with: tokens [N, T, D], or all kinds.
Cond: TypeAlias = Any


def as_conditioning(cond: Tensor | Conditioning, *, call: str) -> Conditioning:
    """Tokens alone, or all kinds, as a `Conditioning`."""
    if isinstance(cond, Conditioning):
        return cond
    check_tensor("conditioning", cond, call=call)
    return Conditioning(tokens=cond)


def one_window(uncond: Tensor | Conditioning, *, call: str) -> Conditioning:
    """A prompt, with or without its first size of 1, as the conditioning of one window."""
    if isinstance(uncond, Tensor) and uncond.ndim == 2:
        uncond = uncond[None]
    one = as_conditioning(uncond, call=call)
    if len(one) != 1:
        raise ValueError(
            f"{call}: uncond is for {len(one)} windows, but one was expected: [T, D] or [1, T, D]."
        )
    return one


def join_conditioning(parts: Sequence[Cond]) -> Cond:
    """The conditioning of several window sets as that of one, whatever its kind."""
    if len(parts) == 1:
        return parts[0]
    kinds = {type(part) for part in parts}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(
            f"CanvasDenoiser: the fields return conditioning of different kinds ({names}); use one "
            "kind of field for all canvases."
        )
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else type(parts[0]).join(parts)
