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
    raw_plan,
    token_case,
)
from scatter_cases import ASKED, GATHERS, make_call
from ssldiff_fast.kernels import gather_windows as gather_windows_kernels
from ssldiff_fast.kernels import interpolate_grid as interpolate_grid_kernels
from ssldiff_fast.kernels import philox_normal as philox_normal_kernels
from ssldiff_fast.kernels import scatter_mean as scatter_mean_kernels
from ssldiff_fast.kernels import token_attention as token_attention_kernels
from ssldiff_fast.kernels import vq_nearest as vq_nearest_kernels
from ssldiff_fast.ops import (
    gather_windows_reference,
    interpolate_grid_reference,
    philox_normal,
    scatter_mean,
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
            out = scatter_mean_kernels.scatter_mean(
                windows.to(device), *[None] * 4, *raw_plan(case.plan), 1.0, True
            ).cpu()
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
    return {
        **found,
        **_run_windows(device),
        **_run_philox(device),
        **_run_grids(device),
        **_run_tokens(device),
    }


def _run_windows(device: str) -> dict[str, str]:
    """scatter_mean with everything that it can be asked for, and gather_windows."""
    found = {}
    for name in ASKED:
        dtypes = (torch.float32, torch.bfloat16) if name == "everything" else (torch.float32,)
        for dtype in dtypes:
            call = make_call(name, dtype)
            expected = call.double().run(scatter_mean_reference)
            made = call.map(lambda tensor: tensor.to(device)).run(_scatter_in_triton)
            wrong = [_difference(a.cpu(), b) for a, b in zip(made, expected, strict=True)]
            found[f"scatter_mean {name} {dtype}"] = "".join(wrong)
    for name, case in GATHERS.items():
        for dtype, channels_last in ((torch.float32, False), (torch.float16, True)):
            canvas, index = case.canvas(), torch.tensor(case.index, dtype=torch.int64)
            plan = case.case.plan
            geometry = [plan.height, plan.width, *map(int, plan.wrap), *plan.window]
            axes = [list(plan.origins_y), list(plan.origins_x), [*geometry, case.first_row]]
            out = gather_windows_kernels.gather_windows(
                canvas.to(device), index, *axes, dtype, channels_last
            )
            layout = torch.channels_last if channels_last else torch.contiguous_format
            expected_windows = gather_windows_reference(
                canvas, plan, index, first_row=case.first_row, dtype=dtype, memory_format=layout
            )
            same = torch.equal(out.cpu(), expected_windows)
            same = same and out.stride() == expected_windows.stride()
            found[f"gather_windows {name} {dtype}"] = "" if same else "windows differ"
    return found


def _scatter_in_triton(*arguments: Any, **options: Any) -> Any:
    """scatter_mean with its operators taken from the kernels."""
    operators = torch.ops.ssldiff
    torch.ops.ssldiff = scatter_mean_kernels
    try:
        return scatter_mean(*arguments, **options)
    finally:
        torch.ops.ssldiff = operators


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

    names = ("height", "width", "window_height", "window_width", "count_y", "count_x", "blocks_x")
    scatter = {
        **dict.fromkeys(names, "i32"),
        **dict.fromkeys(("stride_n", "stride_c", "stride_y", "stride_x"), "i64"),
        **dict.fromkeys(("first_row", "seed", "step"), "i64"),
        **dict.fromkeys(("guidance_scale", "of_canvas", "of_output", "of_noise"), "fp64"),
        **dict.fromkeys(("of_history", "denoised_of_canvas", "denoised_of_output"), "fp64"),
        "lattice_ptr": "*i64",
    }
    flags_of_scatter = {
        **dict.fromkeys(("HAS_BACKGROUND", "NORMALISE", "HAS_STEP", "HAS_NOISE"), True),
        **dict.fromkeys(("HAS_HISTORY", "HAS_DENOISED"), True),
        "GUIDANCE": scatter_mean_kernels.OF_PIXEL,
        "BLOCK": scatter_mean_kernels.BLOCK,
    }
    gather = {
        **dict.fromkeys(("period", "width", "channels", "window_height", "window_width"), "i32"),
        **dict.fromkeys(("stride_c", "stride_y", "stride_x"), "i64"),
        "blocks": "i32",
        "origins_ptr": "*i64",
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
        types = {f"{name}_ptr": f"*{dtype}" for name in ("windows", "uncond")}
        others = ("scale", "background", "canvas", "previous", "out", "denoised", "weight")
        types |= {f"{name}_ptr": f"*{total}" for name in others}
        kernel = scatter_mean_kernels.scatter_mean_kernel
        cases.append((f"scatter_mean {dtype}", kernel, {**scatter, **types}, flags_of_scatter))
        types = {"canvas_ptr": f"*{total}", "windows_ptr": f"*{dtype}"}
        flags = {"CHANNELS_LAST": True, "BLOCK": gather_windows_kernels.BLOCK}
        kernel = gather_windows_kernels.gather_windows_kernel
        cases.append((f"gather_windows {dtype}", kernel, {**gather, **types}, flags))
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
