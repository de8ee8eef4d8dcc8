# SPDX-License-Identifier: Apache-2.0
"""The U-Net of CompVis latent diffusion, by the keyword names of its `UNetModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast.models.attention import AttentionBlock, SpatialTransformer, zeroed
from ssldiff_fast.models.group_norm import GROUPS, GroupNormSiLU
from ssldiff_fast.models.prepared import PreparedContext
from ssldiff_fast.models.unet_blocks import (
    Downsample,
    ResBlock,
    Stage,
    Upsample,
    timestep_embedding,
)

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


class UNet(nn.Module):
    """U-Net of CompVis latent diffusion; parameters have the published names.

    Args:
        kwargs: the keywords of CompVis' `UNetModel`, see `UNetConfig`.

    Raises:
        TypeError: an unknown or missing keyword.
        ValueError: a value that is unsupported or inconsistent.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        config = UNetConfig.from_kwargs(kwargs)
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.out_channels
        self.context_dim = config.context_dim
        self.embed_width = config.model_channels * 4
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, self.embed_width),
            nn.SiLU(),
            nn.Linear(self.embed_width, self.embed_width),
        )
        self.input_blocks, widths = self._build_down()
        channels = widths[-1]
        self.middle_block = Stage(
            self._res_block(channels, channels),
            self._attention(channels),
            self._res_block(channels, channels),
        )
        self.output_blocks, channels = self._build_up(widths)
        self.out = nn.Sequential(
            GroupNormSiLU(channels),
            nn.Identity(),  # holds the place of the published SiLU, which the norm does
            zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )
        count = 0
        for transformer in self._transformers():
            transformer.first_block = count
            count += len(transformer.transformer_blocks)

    def _transformers(self) -> list[SpatialTransformer]:
        """Those that take a context, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, SpatialTransformer)]

    def _res_block(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        return ResBlock(
            channels,
            out_channels,
            embed_width=self.embed_width,
            dropout=self.config.dropout,
            scale_shift=self.config.use_scale_shift_norm,
            resample=resample,
            use_checkpoint=self.config.use_checkpoint,
        )

    def _attention(self, channels: int, *, upward: bool = False) -> nn.Module:
        config = self.config
        heads = config.heads(channels, upward=upward)
        if config.context_dim is None:
            return AttentionBlock(channels, heads=heads, new_order=config.use_new_attention_order)
        return SpatialTransformer(
            channels,
            heads=heads,
            head_width=channels // heads,
            depth=config.transformer_depth,
            context_dim=config.context_dim,
            use_checkpoint=config.use_checkpoint,
        )

    def _resample(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return self._res_block(channels, channels, direction)
        kind = {"up": Upsample, "down": Downsample}[direction]
        return kind(channels, with_conv=self.config.conv_resample)

    def _build_down(self) -> tuple[nn.ModuleList, list[int]]:
        config = self.config
        channels = config.model_channels
        stages = [Stage(nn.Conv2d(config.in_channels, channels, 3, padding=1))]
        widths = [channels]
        for level, mult in enumerate(config.channel_mult):
            out_channels = config.model_channels * mult
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [self._res_block(channels, out_channels)]
                channels = out_channels
                if 2**level in config.attention_resolutions:
                    layers.append(self._attention(channels))
                stages.append(Stage(*layers))
                widths.append(channels)
            if level != len(config.channel_mult) - 1:
                stages.append(Stage(self._resample(channels, "down")))
                widths.append(channels)
        return nn.ModuleList(stages), widths

    def _build_up(self, widths: list[int]) -> tuple[nn.ModuleList, int]:
        config = self.config
        channels = widths[-1]
        skips = list(widths)
        stages: list[Stage] = []
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            out_channels = config.model_channels * mult
            for index in range(config.num_res_blocks + 1):
                layers: list[nn.Module] = [self._res_block(channels + skips.pop(), out_channels)]
                channels = out_channels
                if 2**level in config.attention_resolutions:
                    layers.append(self._attention(channels, upward=True))
                if level and index == config.num_res_blocks:
                    layers.append(self._resample(channels, "up"))
                stages.append(Stage(*layers))
        return nn.ModuleList(stages), channels

    def prepare(
        self,
        context: Tensor,  # [N, T, D]
    ) -> PreparedContext:
        """All that the blocks need of the conditioning tokens, once for every timestep.

        The result may be indexed by windows and be passed to `forward` in place of the tokens.

        Raises:
            ValueError: a shape that does not fit, or a network that takes no context.
        """
        self._check_context(context)
        context = context.to(next(self.time_embed.parameters()).dtype)
        return PreparedContext(
            tuple(vectors for t in self._transformers() for vectors in t.prepare(context))
        )

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
        t: Tensor,  # [B] or [], timesteps
        context: Tensor | PreparedContext | None = None,  # [B, T, D], or prepared
    ) -> Tensor:  # [B, out_channels, h, w], dtype of x
        """Model output for the noisy windows `x` at timesteps `t`.

        Raises:
            ValueError: a shape that does not fit; `context` missing, or given without need.
        """
        t = self._check_input(x, t, context)
        dtype = next(self.time_embed.parameters()).dtype
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))
        hidden = x.to(dtype)
        context = context.to(dtype) if isinstance(context, Tensor) else context
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            hidden = stage(hidden, emb, context)
            skips.append(hidden)
        hidden = self.middle_block(hidden, emb, context)
        for stage in self.output_blocks:
            hidden = stage(torch.cat([hidden, skips.pop()], dim=1), emb, context)
        return self.out(hidden).to(x.dtype)

    def _check_input(
        self, x: Tensor, t: Tensor, context: Tensor | PreparedContext | None
    ) -> Tensor:
        factor = 2 ** (len(self.config.channel_mult) - 1)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"UNet: x has shape {list(x.shape)}, expected [B, {self.in_channels}, h, w]."
            )
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"UNet: x is {x.shape[2]} x {x.shape[3]} latents, "
                f"expected sides that are multiples of {factor}."
            )
        t = torch.as_tensor(t, device=x.device)
        if t.ndim == 0:
            t = t.expand(x.shape[0])
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"UNet: t has shape {list(t.shape)}, expected [{x.shape[0]}] as x has windows."
            )
        self._check_context(context, x.shape[0])
        return t

    def _check_context(
        self, context: Tensor | PreparedContext | None, windows: int | None = None
    ) -> None:
        if (context is None) != (self.context_dim is None):
            wanted = "no context" if context is not None else f"[B, T, {self.context_dim}]"
            raise ValueError(
                f"UNet: context is {'missing' if context is None else 'given'}, expected {wanted}."
            )
        if isinstance(context, PreparedContext):
            blocks = sum(len(t.transformer_blocks) for t in self._transformers())
            if len(context.blocks) != blocks or len(context) != windows:
                raise ValueError(
                    f"UNet: context is prepared for {len(context)} windows and "
                    f"{len(context.blocks)} blocks, expected {windows} and {blocks}; prepare it "
                    "with this network's prepare, and index it by window."
                )
        elif context is not None:
            fits = context.ndim == 3 and context.shape[1] > 0 and windows in (None, len(context))
            if not fits or context.shape[2] != self.context_dim:
                raise ValueError(
                    f"UNet: context has shape {list(context.shape)}, expected "
                    f"[{'N' if windows is None else windows}, T, {self.context_dim}]."
                )
