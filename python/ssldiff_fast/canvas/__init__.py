# SPDX-License-Identifier: Apache-2.0
"""Large images: windows, the field, noise by coordinate, the sampler and tile decoding."""

from ssldiff_fast.canvas.conditioning import Conditioning
from ssldiff_fast.canvas.decode import DecodeSettings, decode_image, decode_rows, open_decoder
from ssldiff_fast.canvas.denoiser import CanvasDenoiser, WindowDenoiser
from ssldiff_fast.canvas.encode import encode_image, encode_rows
from ssldiff_fast.canvas.field import GridField, PromptField
from ssldiff_fast.canvas.glass import Glass
from ssldiff_fast.canvas.interrupt import Interrupted
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.canvas.mask import TissueMask
from ssldiff_fast.canvas.noise import canvas_noise
from ssldiff_fast.canvas.presets import PRESETS, Preset, get_preset
from ssldiff_fast.canvas.regions import RegionField
from ssldiff_fast.canvas.sampler import sample
from ssldiff_fast.canvas.stages import Rows
from ssldiff_fast.canvas.state import StateFolder
from ssldiff_fast.canvas.wavefront import sample_rows
from ssldiff_fast.canvas.windows import ShiftedWindows
from ssldiff_fast.ops import WindowPlan

__all__ = [
    "PRESETS",
    "CanvasDenoiser",
    "Conditioning",
    "DecodeSettings",
    "Glass",
    "GridField",
    "Interrupted",
    "LDMDenoiser",
    "Preset",
    "PromptField",
    "RegionField",
    "Rows",
    "ShiftedWindows",
    "StateFolder",
    "TissueMask",
    "WindowDenoiser",
    "WindowPlan",
    "canvas_noise",
    "decode_image",
    "decode_rows",
    "encode_image",
    "encode_rows",
    "get_preset",
    "open_decoder",
    "sample",
    "sample_rows",
]
