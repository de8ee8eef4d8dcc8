# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor
from ssldiff_fast.ops import WindowPlan, philox_normal


def _index(plan, number):
    y, x = (
        plan.origins_y[number // len(plan.origins_x)],
        plan.origins_x[number % len(plan.origins_x)],
    )
    h, w = plan.window
    return (y + torch.arange(h)) % plan.height, (x + torch.arange(w)) % plan.width


def gather_windows(canvas, plan, index, *, first_row=0, dtype=None, memory_format=None):
    out = []
    for number in index.tolist():
        ys, xs = _index(plan, number)
        out.append(canvas[:, (ys - first_row)[:, None], xs])
    return torch.stack(out)


@dataclass(frozen=True)
class CanvasStep:
    canvas: Tensor
    x: float
    output: float
    noise: float = 0.0
    history: float = 0.0
    previous: Tensor | None = None
    denoised_x: float = 0.0
    denoised_output: float = 0.0
    seed: int = 0
    step: int = 0


def scatter_mean(
    windows,
    plan,
    index=None,
    *,
    rows=None,
    background=None,
    uncond=None,
    guidance_scale=1.0,
    step=None,
):
    if index is None:
        index = torch.arange(len(plan))
    begin, end = rows or (0, plan.height)
    c = windows.shape[1]
    wy, wx = torch.tensor(plan.weight_y), torch.tensor(plan.weight_x)
    weight = wy[:, None] * wx
    total = torch.zeros(c, end - begin, plan.width)
    norm = torch.zeros(end - begin, plan.width)
    given = {int(n): k for k, n in enumerate(index.tolist())}
    for number in range(len(plan)):
        if number not in given and background is None:
            continue
        ys, xs = _index(plan, number)
        u = ((ys >= begin) & (ys < end)).nonzero().flatten()
        if not len(u):
            continue
        at = ((ys[u] - begin)[:, None], xs)
        if number in given:
            k = given[number]
            win = windows[k].float()
            if uncond is not None:
                un = uncond[k].float()
                win = un + guidance_scale * (win - un)
            win = win[:, u]
        else:
            win = background[:, at[0], at[1]]
        total[:, at[0], at[1]] += weight[u] * win
        norm[at] += weight[u]
    assert bool((norm > 0).all())
    out = total / norm
    if step is None:
        return out
    nxt = step.x * step.canvas + step.output * out
    if step.history:
        nxt = nxt + step.history * step.previous
    if step.noise:
        nxt = nxt + step.noise * philox_normal(
            step.seed, c, (begin, end), plan.width, step=step.step
        )
    if step.denoised_x or step.denoised_output:
        return nxt, step.denoised_x * step.canvas + step.denoised_output * out
    return nxt
