# SPDX-License-Identifier: Apache-2.0
"""The U-Net of CompVis latent diffusion, by the keyword names of its `UNetModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast.models.attention import AttentionBlock, SpatialTransformer, zeroed
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors
from ssldiff_fast.models.products import twice, widened
from ssldiff_fast.models.unet_blocks import (
    Downsample,
    ResBlock,
    Stage,
    Upsample,
    timestep_embedding,
)
from ssldiff_fast.models.unet_config import UNetConfig


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
        for number, block in enumerate(self._res_blocks()):
            block.number = number

    @property
    def deep_width(self) -> int:
        """Channels of what the lower levels hand to the outermost one."""
        return self.config.model_channels * self.config.channel_mult[:2][-1]

    def _transformers(self) -> list[SpatialTransformer]:
        """Those that take a context, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, SpatialTransformer)]

    def _res_blocks(self) -> list[ResBlock]:
        """Those that take the timestep, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, ResBlock)]

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
        return PreparedContext(
            tuple(vectors for t in self._transformers() for vectors in t.prepare(context))
        )

    def prepare_time(
        self,
        t: Tensor,  # [S] or [], timesteps
    ) -> TimeVectors:
        """All that the blocks need of timesteps; may be passed to `forward` in place of them.

        In float32 for networks of half precision too.
        """
        first, activation, second = self.time_embed
        emb = timestep_embedding(t.reshape(-1), self.config.model_channels)
        if next(first.parameters()).dtype == torch.float64:
            emb = emb.double()
        emb = widened(second, activation(widened(first, emb)))
        return TimeVectors(tuple(block.time_vectors(emb) for block in self._res_blocks()))

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
        t: Tensor | TimeVectors,  # [B] or [], timesteps, or prepared
        context: Tensor | PreparedContext | None = None,  # [B or 2 B, T, D], or prepared
    ) -> Tensor:  # [B or 2 B, out_channels, h, w], dtype of x
        """Model output for the noisy windows `x` at timesteps `t`.

        A `context` of twice as many windows is a guided pair of each, all conditionals first. What
        comes before the first attention to the context is then computed once for both.

        Raises:
            ValueError: a shape that does not fit; `context` missing, or given without need.
        """
        return self.with_deep(x, t, context)[0]

    def with_deep(
        self,
        x: Tensor,  # [B, C, h, w]
        t: Tensor | TimeVectors,  # [B] or [], timesteps, or prepared
        context: Tensor | PreparedContext | None = None,  # [B or 2 B, T, D], or prepared
        deep: Tensor | None = None,  # [B or 2 B, width, h, w]
    ) -> tuple[Tensor, Tensor]:  # [B or 2 B, out_channels, h, w], and like `deep`
        """What `forward` returns, and what the lower levels hand to the outermost one.

        With such a map, of the same windows at another timestep, only the outermost level is
        evaluated (Ma et al., "DeepCache: accelerating diffusion models for free", CVPR 2024).

        Raises:
            ValueError: as `forward`; a map of another number of windows.
        """
        self._check_input(x, t, context)
        self._check_deep(x, context, deep)
        time = (
            t if isinstance(t, TimeVectors) else self.prepare_time(torch.as_tensor(t).to(x.device))
        )
        dtype = next(self.time_embed.parameters()).dtype
        # Channels-last throughout: positions are then the rows of products, with no transposes.
        hidden = x.to(dtype, memory_format=torch.channels_last)
        outer = self.config.num_res_blocks + 1  # stages of the outermost level on either side
        down, up = list(self.input_blocks), list(self.output_blocks)
        skips: list[Tensor] = []
        for stage in down if deep is None else down[:outer]:
            hidden = stage(hidden, time, context)
            skips.append(hidden)
        if deep is None:
            hidden = self.middle_block(hidden, time, context)
            deep = _upwards(up[:-outer], hidden, skips, time, context)
        hidden = _upwards(up[-outer:], deep, skips, time, context)
        return self.out(hidden).to(x.dtype), deep

    def _check_input(
        self, x: Tensor, t: Tensor | TimeVectors, context: Tensor | PreparedContext | None
    ) -> None:
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
        steps = [len(t)] if isinstance(t, TimeVectors) else list(torch.as_tensor(t).shape)
        if steps not in ([], [len(x)]) and not (isinstance(t, TimeVectors) and steps == [1]):
            raise ValueError(
                f"UNet: t has shape {steps}, expected [{x.shape[0]}] as x has windows, or []."
            )
        self._check_context(context, x.shape[0])

    def _check_deep(
        self, x: Tensor, context: Tensor | PreparedContext | None, deep: Tensor | None
    ) -> None:
        windows = len(x) if context is None else len(context)
        if deep is not None and (len(deep), *deep.shape[2:]) != (windows, *x.shape[2:]):
            raise ValueError(
                f"UNet: deep has shape {list(deep.shape)}, expected [{windows}, width, "
                f"{x.shape[2]}, {x.shape[3]}], as with_deep returned it for the same windows."
            )

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
            if len(context.blocks) != blocks or not _is_one_or_a_pair(len(context), windows):
                raise ValueError(
                    f"UNet: context is prepared for {len(context)} windows and "
                    f"{len(context.blocks)} blocks, expected {windows} and {blocks}; prepare it "
                    "with this network's prepare, and index it by window."
                )
        elif context is not None:
            fits = context.ndim == 3 and context.shape[1] > 0
            fits = fits and _is_one_or_a_pair(len(context), windows)
            if not fits or context.shape[2] != self.context_dim:
                raise ValueError(
                    f"UNet: context has shape {list(context.shape)}, expected "
                    f"[{'N' if windows is None else windows}, T, {self.context_dim}]."
                )


def _upwards(
    stages: list[nn.Module],
    hidden: Tensor,
    skips: list[Tensor],  # of which the last ones are taken
    time: TimeVectors,
    context: Tensor | PreparedContext | None,
) -> Tensor:
    """Stages that take a map of the way down beside the one from below."""
    for stage in stages:
        skip = skips.pop()
        if len(skip) != len(hidden):
            skip = twice(skip)
        hidden = stage(torch.cat([hidden, skip], dim=1), time, context)
    return hidden


def _is_one_or_a_pair(given: int, windows: int | None) -> bool:
    return windows is None or given in (windows, 2 * windows)
