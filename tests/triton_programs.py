# SPDX-License-Identifier: Apache-2.0
"""Run by tests/ops/test_triton.py in processes of their own.

`interpret` needs TRITON_INTERPRET=1 from the start; `compile` and `gpu` need it unset. Prints one
JSON object: the name of each case and what was found.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
import triton

from operator_cases import (
    GRIDS,
    KNOWN_WORDS,
    PLANS,
    TOKENS,
    assert_close,
    grid_points,
    in_float64,
    token_case,
)
from ssldiff_fast.kernels import interpolate_grid as interpolate_grid_kernels
from ssldiff_fast.kernels import philox_normal as philox_normal_kernels
from ssldiff_fast.kernels import scatter_mean as scatter_mean_kernels
from ssldiff_fast.kernels import token_attention as token_attention_kernels
from ssldiff_fast.kernels import vq_nearest as vq_nearest_kernels
from ssldiff_fast.ops import (
    WindowPlan,
    interpolate_grid_reference,
    philox_normal,
    scatter_mean_reference,
    token_attention_reference,
    vq_nearest_reference,
)

ARCHITECTURES = (80, 90, 100)


def run(device: str) -> dict[str, str]:
    """Every kernel on a device against the reference on the CPU; "" where they agree."""
    found = {}
    plain = (torch.float32, torch.contiguous_format)
    halves = [(dtype, torch.channels_last) for dtype in (torch.bfloat16, torch.float16)]
    every = [plain, *halves, (torch.float64, torch.channels_last)]
    for name, case in PLANS.items():
        for dtype, layout in every if name == "odd-overlap" else [plain]:
            windows = case.windows(dtype).contiguous(memory_format=layout)
            out = scatter_mean_kernels.scatter_mean(windows.to(device), *raw_plan(case.plan)).cpu()
            expected = scatter_mean_reference(windows.double(), case.plan)
            found[f"scatter_mean {name} {dtype} {layout}"] = _difference(out, expected)
    for m, k, d in ((1, 1, 1), (19, 7, 3), (64, 128, 3), (65, 257, 4), (0, 5, 3)):
        z, codes = ((torch.randn(n, d) * 8).round() / 8 for n in (m, k))
        vectors, indices = (
            made.cpu() for made in vq_nearest_kernels.vq_nearest(z.to(device), codes.to(device))
        )
        expected_vectors, expected_indices = vq_nearest_reference(z, codes)
        same = torch.equal(indices, expected_indices) and torch.equal(vectors, expected_vectors)
        found[f"vq_nearest {m} x {k} x {d}"] = "" if same else "indices or vectors differ"
    return {**found, **_run_philox(device), **_run_grids(device), **_run_tokens(device)}


def raw_plan(plan: WindowPlan) -> list[Any]:
    """What the registered operator takes of a plan."""
    axes = [plan.origins_y, plan.origins_x, plan.weight_y, plan.weight_x]
    return [*(list(values) for values in axes), plan.height, plan.width]


def _run_grids(device: str) -> dict[str, str]:
    """Grids with and without missing cells, in every mode."""
    found = {}
    for name, mode in itertools.product(GRIDS, interpolate_grid_kernels.MODES):
        for masked in (False, True):
            cells, points = torch.randn(GRIDS[name]), grid_points(GRIDS[name])[::7]
            valid = torch.rand(cells.shape[:2]) < 0.6 if masked else None
            there = valid.to(device) if valid is not None else None
            out = interpolate_grid_kernels.interpolate_grid(
                cells.to(device), points.to(device), there, mode
            )
            expected = interpolate_grid_reference(cells.double(), points, mode=mode, valid=valid)
            found[f"interpolate_grid {name} {mode} {masked}"] = _difference(out.cpu(), expected)
    return found


def _run_tokens(device: str) -> dict[str, str]:
    """One and several tokens, and rows that are no vectors in memory."""
    found = {}
    halves = (torch.bfloat16, torch.float16, torch.float64)
    for name, shape in TOKENS.items():
        for dtype in (torch.float32, *(halves if name in ("one-token", "heads") else ())):
            case = token_case(shape, dtype)
            vectors = ("values", "keys", "offsets")
            there = {k: v.to(device) for k, v in case.items() if isinstance(v, torch.Tensor)}
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            there |= {k: there[k].to(exact) if k in there else None for k in vectors}
            there["x"] = there["x"].mT.contiguous().mT
            made = token_attention_kernels.token_attention(**there, heads=shape[3], eps=1e-5)
            expected = token_attention_reference(**in_float64(case))
            for which, out, right in zip("yz", made, expected):
                difference = _difference(out.cpu(), right)
                found[f"token_attention {name} {dtype} {which}"] = difference
    return found


def _run_philox(device: str) -> dict[str, str]:
    """The published words, and normals with the bits of the CPU's."""
    found = {}
    for counter, seed, words in KNOWN_WORDS:
        counters = torch.tensor([counter] * 3, device=device)
        signed = seed - 2**64 if seed >= 2**63 else seed
        made = philox_normal_kernels.philox4x32(counters, signed).tolist()
        found[f"philox4x32 {seed}"] = "" if made == [words] * 3 else f"words are {made[0]}"
    for seed, shape, first, step in (
        (0, (1, 1, 1), 0, 0),
        (7, (3, 13, 23), 5, 4),
        (2**40, (2, 2, 300), 2**32 - 2, 2**32 - 1),
    ):
        out = torch.full(shape, torch.nan, device=device)
        philox_normal_kernels.philox_normal(out, seed, first, step)
        rows = (first, first + shape[1])
        expected = philox_normal(seed, shape[0], rows, shape[2], step=step)
        same = torch.equal(out.cpu(), expected)
        found[f"philox_normal {seed} {shape}"] = "" if same else "the bits differ"
    return found


def compile_ahead() -> dict[str, str]:
    """Every kernel to machine code for GPUs that need not be here; the names of what came out."""
    from triton.backends.compiler import GPUTarget

    scatter = {
        **{f"{name}_ptr": "*i64" for name in ("origins_x", "first_y", "last_y", "origins_y")},
        **{f"{name}_ptr": "*i64" for name in ("first_q", "last_q")},
        **dict.fromkeys(("height", "width", "window_width", "count_x", "blocks_x"), "i32"),
        **dict.fromkeys(("stride_n", "stride_c", "stride_y", "stride_x"), "i64"),
    }
    nearest = {"indices_ptr": "*i64", "count": "i32", "code_count": "i32"}
    philox = dict.fromkeys(("count", "rows", "width"), "i32")
    philox |= dict.fromkeys(("seed", "first_row", "step"), "i64")
    cases: list[tuple[str, Any, dict[str, str], dict[str, int]]] = [
        (
            "philox_normal fp32",
            philox_normal_kernels.philox_normal_kernel,
            {"out_ptr": "*fp32", **philox},
            {"BLOCK": 256},
        ),
        (
            "philox4x32",
            philox_normal_kernels.philox4x32_kernel,
            {"counters_ptr": "*i64", "words_ptr": "*i64", **philox},
            {"BLOCK": 256},
        ),
    ]
    for dtype, total in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        types = {"windows_ptr": f"*{dtype}", "canvas_ptr": f"*{total}"}
        types |= {f"weight_{axis}_ptr": f"*{total}" for axis in "yx"}
        kernel = scatter_mean_kernels.scatter_mean_kernel
        cases.append((f"scatter_mean {dtype}", kernel, {**scatter, **types}, {"BLOCK": 256}))
    for dtype in ("fp32", "fp64"):
        types = {f"{name}_ptr": f"*{dtype}" for name in ("z", "codes", "vectors")}
        flags = {"WIDTH": 3, "BLOCK_M": 64, "BLOCK_K": 128}
        kernel = vq_nearest_kernels.vq_nearest_kernel
        cases.append((f"vq_nearest {dtype}", kernel, {**nearest, **types}, flags))
    grid = {"points_ptr": "*fp64", "valid_ptr": "*u8"}
    grid |= dict.fromkeys(("rows", "columns", "tokens", "width"), "i32")
    for mode, number in interpolate_grid_kernels.MODES.items():
        types = {"grid_ptr": "*fp32", "out_ptr": "*fp32"}
        flags = {"HAS_VALID": True, "MODE": number, "BLOCK_D": interpolate_grid_kernels.BLOCK_D}
        kernel = interpolate_grid_kernels.interpolate_grid_kernel
        cases.append((f"interpolate_grid {mode}", kernel, {**grid, **types}, flags))
    tokens = dict.fromkeys(("length", "width", "heads", "tokens", "blocks"), "i32")
    tokens |= {"eps": "fp32", **dict.fromkeys(("stride_xn", "stride_xl", "stride_xc"), "i64")}
    tokens |= {f"{name}_ptr": "*fp32" for name in ("values", "keys", "offsets")}
    for keys, dtype in itertools.product((False, True), ("bf16", "fp32")):
        types = {f"{name}_ptr": f"*{dtype}" for name in ("x", "norm_weight", "norm_bias", "y", "z")}
        flags = {"HAS_KEYS": keys, "BLOCK_L": 8, "BLOCK_C": 512}
        kernel = token_attention_kernels.token_attention_kernel
        cases.append((f"token_attention {keys} {dtype}", kernel, {**tokens, **types}, flags))
    found = {}
    for name, kernel, types, flags in cases:
        signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=flags)
        for architecture in ARCHITECTURES if name.endswith("fp32") else ARCHITECTURES[:1]:
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            found[f"{name} sm_{architecture}"] = " ".join(sorted(made.asm))
    return found


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> str:
    try:
        assert_close(actual, expected)
    except AssertionError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.manual_seed(0)
    programs = {
        "interpret": lambda: run("cpu"),
        "gpu": lambda: run("cuda"),
        "compile": compile_ahead,
    }
    print(json.dumps(programs[sys.argv[1]]()))
