# SPDX-License-Identifier: Apache-2.0
"""`ssldiff doctor`: what was built and what was found; the first part of a bug report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import click

from .. import __version__, settings
from ..viewer import library

OPTIONAL = {
    "train": ("lightning", "pydantic"),
    "view": ("starlette", "uvicorn"),
    "quality": ("clean-fid",),
    "bench": ("pytest-benchmark", "matplotlib"),
    "test": ("pytest", "hypothesis", "diffusers", "pyvips"),
}
OPENSLIDE_MINIMUM = 4  # older ones give no mpp for the generic TIFF that we write

Facts = dict[str, str]


def package_facts() -> Facts:
    """Versions and machine."""
    return {
        "ssldiff_fast": f"{__version__} in {Path(__file__).parent.parent}",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": _memory(),
    }


def torch_facts() -> Facts:
    """PyTorch, its devices, and Triton."""
    import torch

    devices = [
        f"{torch.cuda.get_device_name(i)} (compute {'.'.join(map(str, capability))})"
        for i in range(torch.cuda.device_count())
        if (capability := torch.cuda.get_device_capability(i))
    ]
    return {
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "threads": str(torch.get_num_threads()),
        "torch's CPU path": torch.backends.cpu.get_cpu_capability(),
        "GPUs": "; ".join(devices) or "none found",
        "Triton": _version("triton"),
    }


def operator_facts() -> Facts:
    """The compiled operators."""
    from .. import _C

    if _C.CPU_PROBLEM is not None:
        return {"CPU operators": f"NOT USABLE: {_C.CPU_PROBLEM}; {_C.HOW_TO_BUILD}"}
    info = _C.build_info()
    return {
        "CPU operators": f"built for {info['machine']}, running the {info['cpu_path']} path",
        "CUDA operators": info["cuda"] + (f" ({_C.CUDA_PROBLEM})" if _C.CUDA_PROBLEM else ""),
        "compiler": info["compiler"],
        "built against": f"torch {info['torch']}, for torch >= {info['torch_target']}",
    }


def slide_facts() -> Facts:
    """Libraries that read and write slides."""
    facts = {name: _version(name) for name in ("tifffile", "imagecodecs", "pillow", "h5py")}
    try:
        import openslide

        number = str(openslide.__library_version__)
    except Exception as error:  # a broken library raises OSError, ImportError or its own error
        return {"OpenSlide": f"DOES NOT LOAD: {error}; install openslide-bin", **facts}
    note = ""
    if int(number.split(".")[0]) < OPENSLIDE_MINIMUM:
        note = " TOO OLD: it gives no mpp for generic TIFF; install openslide-bin >= 4.0"
    return {"OpenSlide": f"{number}{note} (openslide-python {openslide.__version__})", **facts}


def optional_facts() -> Facts:
    """Optional parts, by the extra that installs them."""
    facts = {}
    for extra, names in OPTIONAL.items():
        missing = [name for name in names if _version(name) == "not installed"]
        advice = f"; pip install 'ssldiff_fast[{extra}]'"
        facts[extra] = f"without {', '.join(missing)}{advice}" if missing else "complete"
    return facts


def folder_facts() -> Facts:
    """Bundled models and the cache."""
    data = Path(__file__).parent.parent / "data"
    models = sorted(p.parent for p in data.glob("*/config.json"))
    sizes = [
        f"{m.name} ({sum(f.stat().st_size for f in m.glob('*.safetensors')) / 1e6:.1f} MB)"
        for m in models
    ]
    cache = settings.cache_dir()
    state = "" if cache.is_dir() else " (not made yet)"
    return {
        "bundled models": ", ".join(sizes) or "none",
        "cache": f"{cache}{state}",
        "viewer's library": _viewer_library(),
    }


SECTIONS: dict[str, Callable[[], Facts]] = {
    "package": package_facts,
    "operators": operator_facts,
    "torch": torch_facts,
    "slides": slide_facts,
    "optional parts": optional_facts,
    "folders": folder_facts,
}


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show what was built and found; put it into bug reports."""
    report = {title: _facts(section) for title, section in SECTIONS.items()}
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    width = max(len(name) for facts in report.values() for name in facts)
    for title, facts in report.items():
        click.echo(title)
        for name, value in facts.items():
            click.echo(f"  {name:<{width}}  {value}")


def _facts(section: Callable[[], Facts]) -> Facts:
    try:
        return section()
    except Exception as error:  # whatever is broken here is what the report must show
        return {"FAILED": f"{type(error).__name__}: {error}"}


def _viewer_library() -> str:
    if library.present():
        return f"OpenSeadragon {library.VERSION}"
    return f"not there; install Node.js with npm, then {library.COMMAND}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    text = cpuinfo.read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
    found = " ".join(flag for flag in wanted if flag in flags)
    return f"{fields.get('model name', platform.machine())} ({found or 'no vector flags listed'})"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"
