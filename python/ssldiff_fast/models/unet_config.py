# SPDX-License-Identifier: Apache-2.0
"""The keywords of CompVis' `UNetModel`, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssldiff_fast.models.group_norm import GROUPS

# Keywords of UNetModel with the only value that is supported, and what to do otherwise.
_FIXED: dict[str, tuple[object, str]] = {
    "dims": (2, "only two-dimensional networks are supported"),
    "num_classes": (None, "class embeddings are not supported; condition by context tokens"),
    "n_embed": (None, "prediction of codebook indices is not supported"),
}
# Published configurations set it, but it is no property of the model: precision is chosen with
# .to(dtype) or sf.load(..., dtype=).
_IGNORED = ("use_fp16",)


@dataclass(frozen=True)
class UNetConfig:
    """Keywords of CompVis' `UNetModel`, with its defaults.

    Args:
        image_size: side of the window in latents that the network was trained on (informative).
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which there is attention.
        channel_mult: width of each level in units of `model_channels`.
        num_heads, num_head_channels: one of them is given; the other is -1.
        num_heads_upsample: heads of the second half; as in CompVis, it counts only with `legacy`
            and without spatial transformer.
    """

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    image_size: int | tuple[int, ...] | None = None
    dropout: float = 0.0
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    use_checkpoint: bool = False
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    legacy: bool = True

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> UNetConfig:
        """Check CompVis keywords and turn lists into tuples.

        Raises:
            TypeError: a keyword is unknown or a required one is missing.
            ValueError: a value is unsupported or inconsistent.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in _FIXED:
                allowed, advice = _FIXED[name]
                if value != allowed:
                    raise ValueError(f"UNet: {name}={value!r}, expected {allowed!r}: {advice}.")
            elif name in _IGNORED:
                continue
            elif name not in fields:
                known = ", ".join(sorted([*fields, *_FIXED, *_IGNORED]))
                raise TypeError(f"UNet: unknown keyword {name!r}, expected one of {known}.")
            else:
                is_list = isinstance(value, Sequence) and not isinstance(value, str)
                values[name] = tuple(value) if is_list else value
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise TypeError(f"UNet: missing keyword {', '.join(missing)}; give it as CompVis does.")
        context_dim = values.get("context_dim")
        if isinstance(context_dim, tuple) and len(context_dim) == 1:
            values["context_dim"] = context_dim[0]
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        for name in ("in_channels", "model_channels", "out_channels", "num_res_blocks"):
            _check_positive(name, getattr(self, name))
        if not self.channel_mult:
            raise ValueError("UNet: channel_mult=() is empty, expected one number for each level.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"UNet: dropout={self.dropout!r}, expected a number in [0, 1).")
        for mult in self.channel_mult:
            width = self.model_channels * mult
            if mult < 1 or width % GROUPS:
                raise ValueError(
                    f"UNet: a level has model_channels * channel_mult = {self.model_channels} * "
                    f"{mult} channels, expected a positive multiple of {GROUPS}."
                )
        if self.use_spatial_transformer:
            if self.context_dim is None:
                raise ValueError(
                    "UNet: use_spatial_transformer=True without context_dim, "
                    "expected the width of the conditioning tokens."
                )
            _check_positive("context_dim", self.context_dim)
            _check_positive("transformer_depth", self.transformer_depth)
        elif self.context_dim is not None:
            raise ValueError(
                f"UNet: context_dim={self.context_dim} without use_spatial_transformer=True, "
                "expected both or neither."
            )
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("UNet: neither num_heads nor num_head_channels is given; give one.")

    def to_config(self) -> dict[str, Any]:
        """The keywords that differ from their defaults, as JSON values."""
        config: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                config[field.name] = list(value) if isinstance(value, tuple) else value
        return config

    @property
    def _has_upward_heads(self) -> bool:
        return self.num_heads_upsample != -1 and self.legacy and not self.use_spatial_transformer

    def heads(self, channels: int, *, upward: bool = False) -> int:
        """Number of heads of an attention over `channels`, by CompVis' rules."""
        if self.num_head_channels != -1:
            heads = channels // self.num_head_channels
        elif upward and self._has_upward_heads:
            heads = self.num_heads_upsample
        else:
            heads = self.num_heads
        if heads < 1 or channels % heads or channels // heads < 1:
            raise ValueError(
                f"UNet: {channels} channels do not divide into heads "
                f"(num_heads={self.num_heads}, num_head_channels={self.num_head_channels}); "
                "expected a divisor."
            )
        return heads


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"UNet: {name}={value!r}, expected a positive integer.")
