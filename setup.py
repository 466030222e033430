"""Builds dzkernels._C, and dzkernels._cuda where there is a CUDA compiler. The only place that knows compiler flags.

DZ_CUDA=auto|0|1        build the CUDA kernels if nvcc works (default), never, or fail without them
DZ_CUDA_ARCHS="80;90"   compute capabilities; the last one is also stored in a form that newer GPUs can translate
CXX, NVCC               the compilers

Nothing here looks at whether this machine has a GPU, and nothing is downloaded.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent

# One stem per op: csrc/cpu/<op>.cpp, compiled once per instruction set level, and csrc/cuda/<op>.cuh if there is one.
OPS = tuple(sorted({path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} - {"dispatch"}))
CUDA_OPS = tuple(sorted({path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cuh")} - {"common", "warp"}))
PLAIN_SOURCES = ("module", "cpu/dispatch")

DEFAULT_ARCHS = "80;90"
_V4 = "-march=x86-64-v4 -mprefer-vector-width=512"
X86_LEVELS = {"base": "", "v3": "-march=x86-64-v3", "v4": _V4, "amx": f"{_V4} -mavx512bf16 -mamx-tile -mamx-bf16"}
WARNINGS = "-Wall -Wextra -Wno-psabi"  # psabi: vectors wider than a register are only passed to inlined functions


def is_x86(machine: str) -> bool:
    return machine in ("x86_64", "AMD64")


def isa_levels(machine: str) -> dict[str, str]:
    """Instruction set levels to compile for `machine`, with their compiler flags."""
    return dict(X86_LEVELS) if is_x86(machine) else {"base": ""}


def parse_archs(text: str) -> tuple[str, ...]:
    """'80;90' or '8.0, 9.0a' -> ('80', '90a')."""
    archs = tuple(part.strip().replace(".", "") for part in re.split(r"[;,\s]+", text.strip()) if part.strip())
    bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if bad or not archs:
        raise SetupError(f"DZ_CUDA_ARCHS must be a list such as '{DEFAULT_ARCHS}', got {text!r}")
    return archs


@dataclass(frozen=True)
class Cuda:
    """Whether to build the CUDA kernels: `nvcc` is None when not, `reason` says why or with what."""

    nvcc: str | None
    required: bool
    archs: tuple[str, ...]
    reason: str


def decide_cuda(environ: Mapping[str, str], nvcc: str | None) -> Cuda:
    """The CUDA decision from the environment and the path of nvcc (None if there is none)."""
    wish = environ.get("DZ_CUDA", "auto") or "auto"
    if wish not in ("auto", "0", "1"):
        raise SetupError(f"DZ_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return Cuda(None, False, (), "DZ_CUDA=0")
    if nvcc is None:
        if wish == "1":
            raise SetupError("DZ_CUDA=1 but nvcc was not found: put it on PATH, set NVCC, or use DZ_CUDA=auto")
        return Cuda(None, False, (), "nvcc not found")
    archs = parse_archs(environ.get("DZ_CUDA_ARCHS") or DEFAULT_ARCHS)
    return Cuda(nvcc, wish == "1", archs, f"built with {nvcc}")


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """NVCC, else nvcc on PATH, else in CUDA_HOME."""
    if environ.get("NVCC"):
        return shutil.which(environ["NVCC"])
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def gencode(archs: tuple[str, ...]) -> str:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def summary(levels: Mapping[str, str], cuda: Cuda) -> str:
    """The one line that a build prints."""
    archs = ", ".join(f"sm_{arch}" for arch in cuda.archs)
    return f"deepzero: CPU kernels for {', '.join(levels)}; " + (
        f"CUDA kernels for {archs}" if cuda.archs else f"no CUDA kernels ({cuda.reason})"
    )


def build_config(version: str, cuda: Cuda) -> str:
    """The header that lets dzkernels.build_info() report what happened here."""

    def text(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return (
        "#pragma once\n"
        f"#define DZ_VERSION {text(version)}\n"
        f"#define DZ_BUILT_CUDA {text(cuda.reason)}\n"
        f"#define DZ_BUILT_CUDA_ARCHS {text(';'.join(cuda.archs))}\n"
    )


def kernel_list(ops: Iterable[str]) -> str:
    """The header from which csrc/cpu/dispatch.cpp knows the kernels: DZ_KERNELS(KERNEL) is a KERNEL(op) for each."""
    return "#pragma once\n#define DZ_KERNELS(KERNEL) " + " ".join(f"KERNEL({op})" for op in ops) + "\n"


def cuda_list(ops: Iterable[str]) -> str:
    """The header that csrc/cuda/library.cu includes: the kernels of `ops`, and DZ_CUDA_KERNELS(KERNEL) likewise."""
    lines = ["#pragma once", *(f'#include "{op}.cuh"' for op in ops)]
    lines.append("#define DZ_CUDA_KERNELS(KERNEL) " + " ".join(f"KERNEL({op})" for op in ops))
    return "\n".join(lines) + "\n"


def ninja_file(
    root: Path,
    ops: Iterable[str],
    levels: Mapping[str, str],
    cuda: Cuda,
    includes: list[str],
    environ: Mapping[str, str],
) -> str:
    """build.ninja with the targets _C.so and, where wanted, _cuda.so."""
    csrc = str(root / "csrc").replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
    flags = f"-std=c++17 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast {WARNINGS} -I{csrc}"
    x86 = " -DDZ_X86=1" if "v3" in levels else ""
    lines = [
        f"cxx = {environ.get('CXX') or 'g++'}",
        "rule cxx",
        f"  command = $cxx -MMD -MF $out.d {flags}{x86} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -fopenmp -s $in -o $out",
    ]
    objects = []
    for source in PLAIN_SOURCES:
        objects.append(f"{Path(source).name}.o")
        lines += [
            f"build {objects[-1]}: cxx {csrc}/{source}.cpp",
            f"  flags = -O1 -I. {' '.join(f'-isystem {path}' for path in includes)}",
        ]
    for source in ops:
        for level, isa in levels.items():
            objects.append(f"{source}.{level}.o")
            lines += [f"build {objects[-1]}: cxx {csrc}/cpu/{source}.cpp", f"  flags = -O3 -DDZ_ISA={level} {isa}"]
    lines.append(f"build _C.so: link {' '.join(objects)}")
    if cuda.nvcc:
        headers = " ".join(f"{csrc}/cuda/{name}.cuh" for name in ("common", "warp", *CUDA_OPS))
        lines += [
            "rule nvcc",
            f"  command = {cuda.nvcc} -shared -O3 -std=c++17 -cudart static -Xcompiler -fPIC,-fvisibility=hidden "
            f"-I. -I{csrc}/cuda {gencode(cuda.archs)} $in -o $out",
            f"build _cuda.so: nvcc {csrc}/cuda/library.cu | cuda_list.h {headers}",
        ]
    return "\n".join(lines) + "\n"


class build_ext(_build_ext):
    """Runs ninja in build/, which is kept: a rebuild compiles only what changed."""

    def run(self) -> None:
        import pybind11

        self.folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.levels = isa_levels(platform.machine())
        self.cuda = decide_cuda(os.environ, find_nvcc(os.environ))
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        script = ninja_file(ROOT, OPS, self.levels, self.cuda, includes, os.environ)
        (self.folder / "build.ninja").write_text(script)
        self.header("kernel_list.h", kernel_list(OPS))
        self.header("cuda_list.h", cuda_list(CUDA_OPS))
        if self.cuda.nvcc and not self.ninja("_cuda.so"):
            if self.cuda.required:
                raise CompileError(f"DZ_CUDA=1 but {self.cuda.nvcc} could not compile the CUDA kernels")
            self.cuda = Cuda(None, False, (), f"{self.cuda.nvcc} could not compile them")
        if not self.cuda.nvcc:
            self.extensions = [ext for ext in self.extensions if ext.name != "dzkernels._cuda"]
            self.distribution.ext_modules = self.extensions
        self.header("build_config.h", build_config(self.distribution.get_version(), self.cuda))
        super().run()
        print(summary(self.levels, self.cuda))

    def header(self, name: str, text: str) -> None:
        """Written only where it changes, as what includes it is then compiled again."""
        path = self.folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)

    def ninja(self, target: str) -> bool:
        import ninja

        program = os.path.join(ninja.BIN_DIR, "ninja")
        return subprocess.run([program, "-C", str(self.folder), "--quiet", target]).returncode == 0

    def build_extension(self, ext: Extension) -> None:
        library = ext.name.rsplit(".", 1)[1] + ".so"
        if not self.ninja(library):
            raise CompileError(f"building {ext.name} failed")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")  # a process that has the old library open keeps it
        shutil.copyfile(self.folder / library, fresh)
        os.replace(fresh, target)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    setup(
        long_description=readme.read_text() if readme.exists() else "",
        long_description_content_type="text/markdown",
        packages=[*find_packages("python"), *find_packages(".", include=["dzkernels*"])],
        package_dir={"": "python", "dzkernels": "dzkernels"},
        package_data={"deepzero": ["py.typed"], "dzkernels": ["py.typed", "*.pyi"]},
        ext_modules=[Extension("dzkernels._C", []), Extension("dzkernels._cuda", [], optional=True)],
        cmdclass={"build_ext": build_ext},
    )
