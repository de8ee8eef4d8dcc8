# SPDX-License-Identifier: Apache-2.0
"""A picture of reference, tissue mask and result side by side."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .output import atomic, check_output
from .slide import RGB, fit

PANEL_PX = 1024
_MARGIN = 24
_INK, _QUIET, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)
_TISSUE = np.array([0, 121, 107])
# A scale bar of about a fifth of the panel reads well; these lengths are easily said.
_BAR_SHARE = 0.2
_BAR_STEPS = (1, 2, 5)


def write_preview(
    path: str | os.PathLike[str],
    reference: RGB,  # [h, w, 3] uint8
    mask: NDArray[np.bool_] | None,  # [any, any] bool over the same region
    result: RGB,  # [h, w, 3] uint8
    *,
    mpp: float,
    title: str = "",
    captions: tuple[str, str, str] = ("reference", "tissue mask", "synthetic"),
    overwrite: bool = False,
) -> None:
    """Writes a PNG with the panels side by side, captions and a scale bar.

    Args:
        path: the output, .png.
        reference: the region that the grid was made from.
        mask: its tissue (bool, or the grid's `valid`), any size; None for no panel.
        result: the synthetic image of the same region; other sizes are fitted to the panel.
        mpp: micrometres per pixel of `result`.
        title: a line above the panels.
        captions: of the three panels.
        overwrite: replace an existing file.
    """
    path = check_output(path, overwrite=overwrite)
    images = [_rgb(reference, "reference"), _rgb(result, "result")]
    size = fit(images[1].width, images[1].height, PANEL_PX)
    panels = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    named = [(captions[0], panels[0]), (captions[2], panels[1])]
    if mask is not None:
        named.insert(1, (captions[1], _overlay(panels[0], np.asarray(mask, bool))))
    for _, panel in named:
        _scale_bar(panel, mpp * images[1].width / size[0])
    sheet = _sheet(named, title)
    with atomic(path) as part:
        sheet.save(part, format="PNG")


def _rgb(pixels: Any, name: str) -> Image.Image:
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 [h, w, 3], not {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(pixels)


def _font(px: int) -> Any:
    return ImageFont.load_default(size=px)


def _overlay(panel: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    """Background greyed and paled, tissue outlined."""
    inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        panel.size, Image.Resampling.NEAREST
    )
    tissue = np.asarray(inside) > 127
    pixels = np.asarray(panel).astype(np.float32)
    grey = 0.25 * pixels.mean(-1, keepdims=True) + 0.75 * 225
    mixed = np.where(tissue[..., None], 0.8 * pixels + 0.2 * _TISSUE, grey)
    # The border is found at the distance of the line's width, so that it shows at any scale.
    reach = max(1, round(max(panel.size) / 500))
    edge = np.zeros_like(tissue)
    for axis in (0, 1):
        for shift in (-reach, reach):
            edge |= tissue & ~np.roll(tissue, shift, axis)
    mixed[edge] = _TISSUE
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _bar_length(width_um: float) -> float:
    """The largest of 1, 2, 5, 10, ... um within the bar's share of the width."""
    want = width_um * _BAR_SHARE
    decade = 10.0 ** math.floor(math.log10(want))
    return max(step * decade for step in _BAR_STEPS if step * decade <= want * 1.0001)


def _scale_bar(panel: Image.Image, mpp: float) -> None:
    length = _bar_length(panel.width * mpp)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    unit = max(panel.size) / PANEL_PX
    font = _font(max(11, round(22 * unit)))
    draw = ImageDraw.Draw(panel, "RGBA")
    bar = length / mpp
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad, thick = max(4, round(10 * unit)), max(2, round(5 * unit))
    box_w = max(bar, right - left) + 2 * pad
    box_h = bottom - top + thick + 3 * pad
    x, y = pad, panel.height - box_h - pad
    draw.rounded_rectangle((x, y, x + box_w, y + box_h), radius=pad // 2, fill=(255, 255, 255, 215))
    middle = x + box_w / 2
    draw.text((middle - (left + right) / 2, y + pad - top), text, fill=_INK, font=font)
    line = y + box_h - pad - thick
    draw.rectangle((middle - bar / 2, line, middle + bar / 2, line + thick), fill=_INK)


def _sheet(named: list[tuple[str, Image.Image]], title: str) -> Image.Image:
    width, height = named[0][1].size
    unit = max(0.5, min(1.0, width / 768))
    big, small = round(30 * unit), round(24 * unit)
    head = big + _MARGIN if title else 0
    top = _MARGIN + head
    total = (
        _MARGIN + (width + _MARGIN) * len(named),
        top + height + small + _MARGIN + round(0.4 * _MARGIN),
    )
    sheet = Image.new("RGB", total, _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN - 4), title, fill=_INK, font=_font(big))
    for index, (caption, panel) in enumerate(named):
        x = _MARGIN + index * (width + _MARGIN)
        sheet.paste(panel, (x, top))
        draw.rectangle((x - 1, top - 1, x + width, top + height), outline=(218, 220, 224))
        draw.text((x, top + height + 8), caption, fill=_QUIET, font=_font(small))
    return sheet
