# SPDX-License-Identifier: Apache-2.0
"""Claim: sampling a canvas costs what its network evaluations cost.

Random weights, since time does not depend on them: the U-Net and autoencoder of the bundled model,
or the published ones of the paper (400 M parameters).

    python benchmarks/sampler.py --device cuda [--size paper] [--cells 8] [--steps 10]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ssldiff_fast
from report import aim, save
from ssldiff_fast.canvas import CanvasDenoiser, GridField, LDMDenoiser, Preset, get_preset, sample
from ssldiff_fast.canvas.decode import decode_rows
from ssldiff_fast.canvas.noise import canvas_noise
from ssldiff_fast.models import LatentDiffusion
from timing import alternate, arguments

RECIPES = Path(ssldiff_fast.__file__).parent / "training" / "recipes"
CELLS = {"demo": 8, "paper": 4}  # along each side: 1024 pixels
EMBEDDING_WIDTH = 384
PAPER: dict[str, Any] = {
    "unet": {
        "image_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 192,
        "attention_resolutions": [8, 4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 5],
        "num_heads": 1,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 512,
    },
    "vae": {
        "type": "vq",
        "ddconfig": {"ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "z_channels": 3},
        "n_embed": 8192,
        "embed_dim": 3,
    },
    "window": [64, 64],
}


def configuration(size: str) -> dict[str, Any]:
    """The "demo" or "paper" model's configuration."""
    config = dict(PAPER)
    if size == "demo":
        ldm, vae = (
            yaml.safe_load((RECIPES / f"he-demo-{part}.yaml").read_text())
            for part in ("ldm", "vae")
        )
        autoencoder = {key: vae[key] for key in ("ddconfig", "n_embed", "embed_dim")}
        config = {key: ldm[key] for key in ("unet", "window", "prediction", "schedule")}
        config["vae"] = {"type": "vq", **autoencoder}
    conditioner = {"type": "patch", "width": EMBEDDING_WIDTH}
    config["conditioner"] = {**conditioner, "context_dim": config["unet"]["context_dim"]}
    return {"name": size, **config}


def random_model(size: str, device: str, dtype: torch.dtype) -> LatentDiffusion:
    model = LatentDiffusion.from_config(configuration(size))
    for parameter in model.unet.parameters():
        if not parameter.any():  # arithmetic on zeros takes less power, and clocks rise
            torch.nn.init.normal_(parameter, std=0.01)
    model.unet.to(dtype=dtype, memory_format=torch.channels_last)
    assert model.conditioner is not None
    model.conditioner.to(dtype)
    return model.to(device).eval()


class Timed(LDMDenoiser):
    """The network, which keeps how long each of its calls took on the device."""

    def __init__(self, model: LatentDiffusion, device: str) -> None:
        super().__init__(model)
        self.device = device
        self.calls: list[tuple[Any, Any]] = []
        self.windows = 0

    def mark(self) -> Any:
        """Now, on the device's own clock."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
        start = self.mark()
        output = super().__call__(x, t, state, index)
        self.calls.append((start, self.mark()))
        self.windows += output.shape[0] * output.shape[1]
        return output


def seconds_between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1e3


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of PyTorch's own matrix product in this dtype."""
    side = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = alternate({"product": lambda: a @ b}, rounds=10, device=device)
    return float(2 * side**3 / times["product"]["median_ms"] / 1e9)


def evaluation_flops(model: LatentDiffusion) -> int:
    """FLOPs of one evaluation of the U-Net on one window."""
    parameter = next(model.unet.parameters())
    like = {"device": parameter.device, "dtype": parameter.dtype}
    x = torch.randn(1, model.latent_channels, *model.window, **like)
    context = torch.randn(1, 1, model.unet.context_dim, **like)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.unet(x, torch.ones(1, device=parameter.device), context)
    return int(counter.get_total_flops())


def run(
    model: LatentDiffusion, preset: Preset, device: str, *, cells: int, steps: int, batch_size: int
) -> tuple[Timed, float, Tensor]:
    """Sample a canvas: the network with its times, seconds in all, and the canvas."""
    denoiser = Timed(model, device)
    size = (cells * model.window[0], cells * model.window[1])
    grid = torch.randn(cells, cells, 1, EMBEDDING_WIDTH)
    windows = preset.windows(*size, model.window, seed=0, steps=steps)
    on_canvas = CanvasDenoiser(
        denoiser,
        windows,
        GridField(grid, model.window, preset.interpolation),
        guidance_scale=preset.guidance_scale,
        batch_size=batch_size,
    )
    noise = canvas_noise(0, model.latent_channels, *size).to(device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = denoiser.mark()
    canvas = sample(
        on_canvas,
        noise,
        schedule=model.schedule,
        solver=preset.solver,
        steps=steps,
        spacing=preset.spacing,
        eta=preset.eta,
    )
    end = denoiser.mark()
    if device == "cuda":
        torch.cuda.synchronize()
    return denoiser, seconds_between(start, end), canvas


def measure(
    model: LatentDiffusion, preset: Preset, device: str, *, cells: int, steps: int, batch_size: int
) -> dict[str, Any]:
    """Figures of one preset, after a run of two steps that loads and chooses kernels."""
    options = {"cells": cells, "batch_size": batch_size}
    run(model, preset, device, steps=min(2, steps), **options)
    denoiser, total, canvas = run(model, preset, device, steps=steps, **options)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    network = sum(seconds_between(*call) for call in denoiser.calls)
    dtype = next(model.unet.parameters()).dtype
    rate = evaluation_flops(model) * denoiser.windows / network / 1e12
    figures = {
        "seconds": round(total, 3),
        "seconds_of_all_steps": round(total / steps * preset.steps, 2),
        "steps": steps,
        "evaluations": denoiser.windows,
        "windows_of_one_call": round(denoiser.windows / len(denoiser.calls), 1),
        "ms_of_one_evaluation": round(network / denoiser.windows * 1e3, 4),
        "share_outside_the_network": round(1 - network / total, 4),
        "tflops": {"network": round(rate, 2), "matrix": round(matrix_rate(device, dtype), 2)},
        "decode_seconds": round(decode_seconds(model, preset, canvas, batch_size), 3),
    }
    return figures if peak is None else {**figures, "peak_gigabytes": round(peak, 3)}


def decode_seconds(
    model: LatentDiffusion, preset: Preset, canvas: Tensor, batch_size: int
) -> float:
    """Seconds of the decoder on the whole canvas, the copy of the pixels included."""

    def decode(latent: Tensor) -> float:
        stride = preset.decode_stride(model.window)
        start = time.perf_counter()
        size = int(latent.shape[1]), int(latent.shape[2])
        options = {"stride": stride, "batch_size": batch_size}
        for _ in decode_rows(model, [latent], size, **options):
            pass
        return time.perf_counter() - start

    decode(canvas[:, : 2 * model.window[0]])
    return decode(canvas)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--size", default="demo", choices=["demo", "paper"])
    parser.add_argument("--cells", type=int, help="of the grid, along each side")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, help="16; on a GPU 64")
    parser.add_argument("--preset", action="append", choices=["paper", "fast"])
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    return parser.parse_args()


def main() -> None:
    chosen = parse()
    cells = chosen.cells or CELLS[chosen.size]
    batch_size = chosen.batch_size or (16 if chosen.device == "cpu" else 64)
    figures: dict[str, Any] = {"cells": [cells, cells], "batch_size": batch_size}
    aims = []
    for name in chosen.dtype or ["float32", "bfloat16"]:
        torch.manual_seed(0)
        model = random_model(chosen.size, chosen.device, getattr(torch, name))
        figures["parameters"] = sum(p.numel() for p in model.unet.parameters())
        figures["evaluation_gigaflops"] = round(evaluation_flops(model) / 1e9, 3)
        for preset in chosen.preset or ["paper", "fast"]:
            found = measure(
                model,
                get_preset(preset),
                chosen.device,
                cells=cells,
                steps=chosen.steps,
                batch_size=batch_size,
            )
            figures[f"{preset} {name}"] = found
            print(f"{chosen.size}, {preset}, {name}: {found}", flush=True)
            share = found["share_outside_the_network"]
            label = f"share of time outside the network, {preset}, {name}"
            aims.append(aim(label, share, 0.1, "at most"))
    result = "sampler" if chosen.size == "demo" else "sampler_paper"
    save(result, figures, aims, chosen.device)


if __name__ == "__main__":
    main()
