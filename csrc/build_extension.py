# SPDX-License-Identifier: Apache-2.0
"""How setup.py compiles csrc/: one plain shared library for the CPU, and one more for CUDA.

The operators use PyTorch's stable ABI alone, and neither library is a Python module: there is no
PyInit function, Python's headers are not needed, and `_C.py` loads them with
`torch.ops.load_library`. (pybind11 would tie a build to one Python version.) So a single wheel
serves every Python from 3.10 on and every torch from 2.10 on.

Environment variables, read here and nowhere else:
    SSLDIFF_CUDA        0: never build the CUDA sources; 1: fail if they cannot be built.
    SSLDIFF_CUDA_ARCHS  compute capabilities, default "80 90"; the last one is kept as PTX too.
    CUDA_HOME           where nvcc lies, if neither on PATH nor in /usr/local/cuda.
    CXX                 the C++ compiler; CXXFLAGS and LDFLAGS come after our own flags.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
TORCH_TARGET = (2, 10)
CPU_LIBRARY = "ssldiff_fast.libssldiff_cpu"
CUDA_LIBRARY = "ssldiff_fast.libssldiff_cuda"
CPU_SOURCES = [
    "csrc/library.cpp",
    *sorted(f"csrc/cpu/{p.name}" for p in (ROOT / "csrc/cpu").glob("*.cpp")),
]
CUDA_SOURCES = sorted(f"csrc/cuda/{p.name}" for p in (ROOT / "csrc/cuda").glob("*.cu"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
# What both libraries must have been built from to work together.
COMMON = ["csrc/library.cpp", *CUDA_SOURCES, *(h for h in HEADERS if "/cpu/" not in h)]
# No contraction into fused multiply-adds: every instruction set then gives the same bits.
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"  # NVIDIA's installers leave it off PATH
NO_COMPILER = (
    "No C++ compiler was found (looked for {looked}): install one (Debian or Ubuntu: "
    "`apt install g++`, Fedora: `dnf install gcc-c++`, macOS: `xcode-select --install`, conda: "
    "`conda install cxx-compiler`), or name yours in CXX, and run the same command again."
)


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"ssldiff_fast: {sentence}")


def common_sources() -> str:
    """A name for the present text of `COMMON`."""
    digest = hashlib.sha256()
    for source in COMMON:
        digest.update((ROOT / source).read_bytes())
    return f"s{digest.hexdigest()[:16]}"


def find_torch() -> tuple[Path, str, str | None]:
    """Folder, version and CUDA version of the torch to build against, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "building needs torch >= 2.10 for its headers: install torch and run the same command "
            "again."
        )
    folder = Path(spec.origin).parent
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__\s*=\s*'([^']+)'", text)
    cuda = re.search(r"^cuda(?::[^=]*)?\s*=\s*'([^']+)'", text, re.MULTILINE)
    number = version.group(1) if version else "0.0"
    if tuple(int(part) for part in number.split(".")[:2]) < TORCH_TARGET:
        raise BuildError(f"torch {number} is installed, but torch >= 2.10 is needed to build.")
    return folder, number, cuda.group(1) if cuda else None


def find_compiler() -> list[str]:
    """Command of the C++ compiler: CXX, or the first of the usual names."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]):
            return command
        raise BuildError(NO_COMPILER.format(looked=f"CXX={os.environ['CXX']}"))
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError(NO_COMPILER.format(looked="c++, g++ and clang++"))


def find_nvcc(torch_cuda: str | None) -> tuple[str | None, str]:
    """Path of a usable nvcc or None, and one clause for build_info that says why."""
    choice = os.environ.get("SSLDIFF_CUDA", "")
    if choice == "0":
        return None, "not built: SSLDIFF_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or USUAL_NVCC
    reason = ""
    if not Path(nvcc).exists():
        reason = f"no nvcc on PATH, in CUDA_HOME or at {USUAL_NVCC}"
    elif torch_cuda is None:
        reason = "this torch is built without CUDA"
    else:
        found = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"], quiet=True))
        number = f"{found.group(1)}.{found.group(2)}" if found else "unknown"
        if number.split(".")[0] != torch_cuda.split(".")[0]:
            reason = f"nvcc is of CUDA {number}, but torch of CUDA {torch_cuda}"
        else:
            return nvcc, f"CUDA {number}"
    if choice == "1":
        raise BuildError(f"SSLDIFF_CUDA=1 asks for the CUDA operators, but {reason}.")
    return None, f"not built: {reason}"


def _run(command: list[str], *, quiet: bool = False) -> str:
    if not quiet:
        print(shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not quiet and (done.stdout or done.stderr):
        print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise BuildError(f"{command[0]} failed; its messages are above.")
    return done.stdout


def _arch_flags() -> list[str]:
    archs = re.findall(r"\d+", os.environ.get("SSLDIFF_CUDA_ARCHS", "80 90").replace(".", ""))
    if not archs:
        raise BuildError(
            'SSLDIFF_CUDA_ARCHS names no compute capability; write for example "80 90".'
        )
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildOperators(build_ext):
    """Compiles in parallel, straight with the compiler: faster than importing torch's helper."""

    def get_ext_filename(self, ext_name: str) -> str:
        return ext_name.replace(".", os.sep) + ".so"

    def run(self) -> None:
        nvcc, cuda_note = find_nvcc(find_torch()[2])
        if nvcc is None:
            print(f"ssldiff_fast: CUDA operators {cuda_note}.", flush=True)
            # Left in the list, an editable install would look for the library that is not made.
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_LIBRARY]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        torch, torch_version, torch_cuda = find_torch()
        nvcc, cuda_note = find_nvcc(torch_cuda)
        cxx = find_compiler()
        target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
        shared = [f"-I{torch / 'include'}", f"-DTORCH_TARGET_VERSION={target}ULL"]
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        if ext.name == CPU_LIBRARY:
            info = {
                "compiler": _run([*cxx, "--version"], quiet=True).splitlines()[0],
                "torch": torch_version,
                "torch_target": ".".join(map(str, TORCH_TARGET)),
                "cuda": cuda_note,
                "sources": common_sources(),
                "machine": platform.machine(),
            }
            define = f"-DSSLDIFF_BUILD_INFO={json.dumps(json.dumps(info))}"
            extra = shlex.split(os.environ.get("CXXFLAGS", ""))
            compile_one = [*cxx, *CXX_FLAGS, *extra, define, *shared]
        else:
            assert nvcc is not None
            defines = ["-DUSE_CUDA", f"-DSSLDIFF_SOURCES={common_sources()}"]
            compile_one = [nvcc, *NVCC_FLAGS, *_arch_flags(), *defines, *shared]

        def compile_source(source: str) -> str:
            made = objects / (source.replace("/", "_") + ".o")
            _run([*compile_one, "-c", str(ROOT / source), "-o", str(made)])
            return str(made)

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            made = list(pool.map(compile_source, ext.sources))
        self._link(ext, cxx, nvcc, torch, made)

    def _link(
        self, ext: Extension, cxx: list[str], nvcc: str | None, torch: Path, objects: list[str]
    ) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # torch is loaded before these libraries, so they need no path to it.
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        if ext.name == CUDA_LIBRARY:
            # A static runtime, so that torch's own minor version of CUDA does not matter.
            libraries += ["-ltorch_cuda"]
            command = [str(nvcc), "-shared", "-cudart=static", *_arch_flags()]
        else:
            command = [*cxx, "-shared", "-fPIC", *shlex.split(os.environ.get("LDFLAGS", ""))]
        _run([*command, *objects, "-o", str(output), *libraries])


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: what is compiled in it knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extension_arguments() -> dict[str, Any]:
    """Arguments of setuptools.setup that build the operators."""
    extensions = [
        Extension(CPU_LIBRARY, CPU_SOURCES, depends=HEADERS, language="c++"),
        Extension(CUDA_LIBRARY, CUDA_SOURCES, depends=HEADERS, optional=False),
    ]
    return {
        "ext_modules": extensions if CUDA_SOURCES else extensions[:1],
        "cmdclass": {"build_ext": BuildOperators, "bdist_wheel": AnyPythonWheel},
    }
