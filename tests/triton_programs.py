# SPDX-License-Identifier: Apache-2.0
"""Run by tests/ops/test_triton.py in processes of their own.

`interpret` needs TRITON_INTERPRET=1 from the start; `compile` and `gpu` need it unset. Prints one
JSON object: the name of each case and what was found.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
import triton

from operator_cases import KNOWN_WORDS
from parity_table import LAYOUTS, OPERATORS, difference, doubled, through_triton
from ssldiff_fast.kernels import gather_windows as gather_windows_kernels
from ssldiff_fast.kernels import geglu as geglu_kernels
from ssldiff_fast.kernels import group_norm_silu as group_norm_silu_kernels
from ssldiff_fast.kernels import group_norm_silu_backward as backward_kernels
from ssldiff_fast.kernels import interpolate_grid as interpolate_grid_kernels
from ssldiff_fast.kernels import map_statistics as map_kernels
from ssldiff_fast.kernels import philox_normal as philox_normal_kernels
from ssldiff_fast.kernels import rows as row_kernels
from ssldiff_fast.kernels import scatter_mean as scatter_mean_kernels
from ssldiff_fast.kernels import token_attention as token_attention_kernels
from ssldiff_fast.kernels import vq_nearest as vq_nearest_kernels
from ssldiff_fast.ops import philox4x32, philox_normal

ARCHITECTURES = (80, 90, 100)


def run(device: str) -> dict[str, str]:
    """Every kernel on a device against the reference on the CPU; "" where they agree."""
    found = {}
    for name, operator in OPERATORS.items():
        for case, make in operator.cases.items():
            # The interpreter is slow: one case with every dtype, and every layout.
            everything = case == operator.thorough
            for dtype in operator.dtypes if everything else operator.dtypes[:1]:
                call = make(dtype)
                expected = call.map(doubled).run(operator.reference)
                there = call.on(device)
                if name == "philox_normal":
                    there.options["device"] = device
                layouts = LAYOUTS if everything and dtype == operator.dtypes[0] else ["contiguous"]
                for layout in layouts:
                    with through_triton():
                        made = there.map(LAYOUTS[layout]).run(operator.run)
                    found[f"{name} {case} {dtype} {layout}"] = difference(made, expected)
    more = _run_words(device), _run_gated_products(device), _run_softmax(device)
    return {**found, **dict(itertools.chain(*(part.items() for part in more)))}


def _run_gated_products(device: str) -> dict[str, str]:
    """Of sizes that fill tiles and that do not; Triton's interpreter has no product of bfloat16."""
    found = {}
    for dtype in (torch.float16, torch.bfloat16)[: 1 if device == "cpu" else 2]:
        for rows, summands, width in ((130, 72, 72), (256, 64, 128), (3, 8, 8)):
            x, weight, bias = (
                torch.randn(*size).to(dtype)
                for size in ((rows, summands), (2 * width, summands), (2 * width,))
            )
            values, gates = F.linear(x.double(), weight.double(), bias.double()).chunk(2, -1)
            expected = values * F.gelu(gates)
            given = (part.to(device) for part in (x, weight, bias))
            out = geglu_kernels.geglu_linear(*given).cpu().double()
            away = float((out - expected).norm() / expected.norm())
            name = f"geglu_linear {rows} x {summands} x {width} {dtype}"
            found[name] = "" if away < torch.finfo(dtype).eps else f"{away:.1e} away"
    return found


def _run_words(device: str) -> dict[str, str]:
    """The generator's published words, and normals with the bits of the CPU's."""
    found = {}
    for counter, seed, words in KNOWN_WORDS:
        counters = torch.tensor([counter] * 3, device=device)
        with through_triton():
            made = philox4x32(counters, seed).tolist()
        found[f"philox4x32 {seed}"] = "" if made == [words] * 3 else f"words are {made[0]}"
    for seed, channels, rows, width, step in (
        (7, 3, (5, 18), 23, 4),
        (2**40, 2, (2**32 - 2, 2**32), 300, 2**32 - 1),
    ):
        expected = philox_normal(seed, channels, rows, width, step=step)
        with through_triton():
            out = philox_normal(seed, channels, rows, width, step=step, device=device).cpu()
        found[f"normals {seed}"] = "" if torch.equal(out, expected) else "the bits differ"
    return found


def _run_softmax(device: str) -> dict[str, str]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in ((3, 5, 130), (1, 7, 1024), (2, 1, 3000)):
            x = (4 * torch.randn(*size)).to(dtype)
            expected = x.double().softmax(-1)
            out = row_kernels.softmax_(x.to(device).clone()).cpu().double()
            bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            near = torch.allclose(out, expected, rtol=bound, atol=1e-7)
            worst = float((out - expected).abs().max())
            found[f"softmax {size} {dtype}"] = "" if near else f"{worst:.1e} away at most"
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
        **dict.fromkeys(("period", "width"), "i32"),
        **dict.fromkeys(("stride_c", "stride_y", "stride_x"), "i64"),
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
        flags = {"CHANNELS": 3, "HEIGHT": 64, "WIDTH": 64, "CHANNELS_LAST": True}
        flags |= {"ROWS": gather_windows_kernels.BLOCK // 256, "BLOCK_J": 256}
        kernel = gather_windows_kernels.gather_windows_kernel
        cases.append((f"gather_windows {dtype}", kernel, {**gather, **types}, flags))
    for kind, block_m in vq_nearest_kernels.BLOCK_M.items():
        dtype = {torch.float32: "fp32", torch.float64: "fp64"}[kind]
        types = {f"{name}_ptr": f"*{dtype}" for name in ("z", "codes", "vectors")}
        flags = {"WIDTH": 3, "BLOCK_M": block_m, "BLOCK_K": vq_nearest_kernels.BLOCK_K}
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
    cases += _norm_cases() + _map_cases()
    found = {}
    for name, kernel, types, given in cases:
        flags, options = dict(given), {"num_warps": given.get("num_warps", 4)}
        flags.pop("num_warps", None)
        signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=flags)
        # Every kernel for all architectures; its further dtypes and modes for the oldest.
        first = not any(key.startswith(f"{kernel.__name__} ") for key in found)
        for architecture in ARCHITECTURES if first else ARCHITECTURES[:1]:
            target = GPUTarget("cuda", architecture, 32)
            made = triton.compile(source, target=target, options=options)
            key = f"{kernel.__name__} {name} sm_{architecture}"
            found[key] = f"{' '.join(sorted(made.asm))}, {stack_bytes(made.asm['cubin'])} of stack"
        if first:
            found[f"{kernel.__name__} {name} of ones"] = _compile_for_ones(kernel, signature, flags)
    return found


def stack_bytes(cubin: bytes) -> int:
    """Bytes of memory that a thread uses where it has too few registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"STACK:(\d+)", listed))


def _compile_for_ones(kernel: Any, signature: dict[str, str], flags: dict[str, Any]) -> str:
    """Whole numbers that are 1 are constants to Triton, which have no methods of tensors."""
    from triton.backends.compiler import GPUTarget

    ones = {name: 1 for name, kind in signature.items() if kind in ("i32", "i64")}
    constants = signature | dict.fromkeys(ones, "constexpr")
    source = triton.compiler.ASTSource(kernel, constants, constexprs={**flags, **ones})
    made = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[0], 32))
    return " ".join(sorted(made.asm))


def _norm_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    kernels = group_norm_silu_kernels
    sizes = dict.fromkeys(("samples", "positions", "channels", "groups", "chunks"), "i32")
    sizes |= {f"stride_{which}{axis}": "i64" for which in "xgo" for axis in "ncl"}
    sizes["eps"] = "fp32"
    sums = ("mean", "rstd", "m2", "level", "curve", "sums", "centre", "spread")
    stored = ("x", "out", "grad", "grad_x", "weight", "bias", "add", "scale", "shift")
    block_l, block_c = kernels.TILES[True]
    flags = {"CHUNK": kernels.CHUNK, "BLOCK_L": block_l, "BLOCK_C": block_c}
    combine = {"CHUNK": kernels.CHUNK, "BLOCK_K": kernels.COMBINED, "BLOCK_W": 8, "RSTD": True}
    combine["num_warps"] = 1
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for dtype in ("fp32", "bf16"):
        types = {**sizes, **{f"{name}_ptr": "*fp32" for name in sums}}
        types |= {f"{name}_ptr": f"*{dtype}" for name in stored}
        silu = {**flags, "SILU": True}
        block_l, block_c = backward_kernels.TILES[True]
        back = {**silu, "BLOCK_L": block_l, "BLOCK_C": block_c}
        backward = backward_kernels.group_norm_silu_backward_kernel
        cases += [
            (f"statistics {dtype}", kernels.group_norm_statistics_kernel, types, flags),
            (f"combine {dtype}", kernels.group_norm_combine_kernel, types, combine),
            (f"forward {dtype}", kernels.group_norm_silu_kernel, types, silu),
            (f"sums {dtype}", backward, types, {**back, "REDUCE": True}),
            (f"gradient {dtype}", backward, types, {**back, "REDUCE": False}),
        ]
    return cases


def _map_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    sizes = ("positions", "channels", "width", "rows", "rest", "groups", "chunks", "blocks")
    types = dict.fromkeys((*sizes, "samples", "others", "added"), "i32") | {"eps": "fp32"}
    exact = ("mean", "m2", "other_mean", "other_m2", "add", "centre", "rstd")
    types |= {f"{name}_ptr": "*fp32" for name in exact}
    block = {"CHUNK": map_kernels.CHUNK, "BLOCK_C": map_kernels.BLOCK_C}
    combined = {"CHUNK": map_kernels.CHUNK, "BLOCK_K": map_kernels.COMBINED, "BLOCK_W": 8}
    combined["num_warps"] = 1
    rows = {"BLOCK_M": 8, "BLOCK_C": 512}
    attention = {"BLOCK_M": 4, "BLOCK_C": 1024}
    tile = {"SILU": True, "BLOCK_L": map_kernels.CHUNK, "BLOCK_C": map_kernels.BLOCK_C}
    tile["num_warps"] = map_kernels.NORM_WARPS
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for dtype in ("bf16", "fp32"):
        stored = ("x", "other", "out", "weight", "bias")
        these = types | {f"{name}_ptr": f"*{dtype}" for name in stored}
        cases += [
            (f"add_statistics {dtype}", map_kernels.add_statistics_kernel, these, block),
            (f"combine {dtype}", map_kernels.combine_kernel, these, combined),
            (f"norm {dtype}", map_kernels.norm_kernel, these, tile),
            (f"geglu {dtype}", geglu_kernels.geglu_kernel, these, {"BLOCK": 1024}),
            (f"layer_norm {dtype}", row_kernels.layer_norm_kernel, these, rows),
            (f"softmax {dtype}", row_kernels.softmax_kernel, these, attention),
        ]
    block_m, block_w, block_k = geglu_kernels.TILE
    product = {"BLOCK_M": block_m, "BLOCK_W": block_w, "BLOCK_K": block_k, "SUMMANDS": 384}
    tiles = {"x_tile": (block_m, block_k), "weight_tile": (block_w, block_k)}
    tiles["out_tile"] = (block_m, block_w)
    for dtype in ("bf16", "fp16"):
        types = {name: f"tensordesc<{dtype}{list(tile)}>" for name, tile in tiles.items()}
        types |= {"bias_ptr": f"*{dtype}", "rows": "i32", "width": "i32"}
        kernel = geglu_kernels.geglu_linear_kernel
        cases.append((f"geglu_linear {dtype}", kernel, types, {**product, "GROUP": 8}))
    return cases


if __name__ == "__main__":
    torch.manual_seed(0)
    programs = {
        "interpret": lambda: run("cpu"),
        "gpu": lambda: run("cuda"),
        "compile": compile_ahead,
    }
    print(json.dumps(programs[sys.argv[1]]()))
