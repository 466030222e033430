"""The decisions of setup.py, all cases, and what the installed build says about itself."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from setuptools.errors import SetupError

import dzkernels
from dzkernels import _load
from dzkernels._op import DECLARED

ROOT = Path(__file__).resolve().parents[1]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepzero_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_setup()
NVCC = "/usr/local/cuda/bin/nvcc"


@pytest.mark.parametrize(
    ("environ", "nvcc", "wanted"),
    [
        ({}, None, (None, False, (), "nvcc not found")),
        ({}, NVCC, (NVCC, False, ("80", "90"), f"built with {NVCC}")),
        ({"DZ_CUDA": "auto"}, None, (None, False, (), "nvcc not found")),
        ({"DZ_CUDA": ""}, None, (None, False, (), "nvcc not found")),
        ({"DZ_CUDA": "auto"}, NVCC, (NVCC, False, ("80", "90"), f"built with {NVCC}")),
        ({"DZ_CUDA": "0"}, None, (None, False, (), "DZ_CUDA=0")),
        ({"DZ_CUDA": "0"}, NVCC, (None, False, (), "DZ_CUDA=0")),
        ({"DZ_CUDA": "0", "DZ_CUDA_ARCHS": "nonsense"}, NVCC, (None, False, (), "DZ_CUDA=0")),
        ({"DZ_CUDA": "1"}, NVCC, (NVCC, True, ("80", "90"), f"built with {NVCC}")),
        ({"DZ_CUDA": "1", "DZ_CUDA_ARCHS": "90a"}, NVCC, (NVCC, True, ("90a",), f"built with {NVCC}")),
        ({"DZ_CUDA_ARCHS": ""}, NVCC, (NVCC, False, ("80", "90"), f"built with {NVCC}")),
    ],
)
def test_cuda_decision(environ: dict[str, str], nvcc: str | None, wanted: tuple[Any, ...]) -> None:
    assert build.decide_cuda(environ, nvcc) == build.Cuda(*wanted)


@pytest.mark.parametrize(
    ("environ", "nvcc", "message"),
    [
        ({"DZ_CUDA": "1"}, None, "DZ_CUDA=1 but nvcc was not found"),
        ({"DZ_CUDA": "yes"}, NVCC, "DZ_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"DZ_CUDA_ARCHS": "sm_90"}, NVCC, "DZ_CUDA_ARCHS must be a list such as '80;90', got 'sm_90'"),
        ({"DZ_CUDA_ARCHS": " ; "}, NVCC, "DZ_CUDA_ARCHS must be a list such as '80;90', got ' ; '"),
    ],
)
def test_cuda_refusals(environ: dict[str, str], nvcc: str | None, message: str) -> None:
    with pytest.raises(SetupError, match=re.escape(message)):
        build.decide_cuda(environ, nvcc)


@pytest.mark.parametrize(
    ("text", "archs"),
    [("80;90", ("80", "90")), ("8.0, 9.0a", ("80", "90a")), (" 75 ", ("75",)), ("100f 120", ("100f", "120"))],
)
def test_archs(text: str, archs: tuple[str, ...]) -> None:
    assert build.parse_archs(text) == archs


def test_newer_gpus_get_the_last_arch_as_ptx() -> None:
    flags = build.gencode(("80", "90"))
    assert flags.split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("machine", "levels"),
    [
        ("x86_64", ["base", "v3", "v4", "amx"]),
        ("AMD64", ["base", "v3", "v4", "amx"]),
        ("aarch64", ["base"]),
        ("ppc64le", ["base"]),
    ],
)
def test_isa_levels(machine: str, levels: list[str]) -> None:
    assert list(build.isa_levels(machine)) == levels
    assert build.isa_levels(machine)["base"] == ""


def test_finding_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.find_nvcc({}) is None
    assert build.find_nvcc({"CUDA_HOME": str(tmp_path)}) == str(program)
    assert build.find_nvcc({"CUDA_PATH": str(tmp_path)}) == str(program)
    assert build.find_nvcc({"NVCC": str(program)}) == str(program)
    assert build.find_nvcc({"NVCC": "/nonexistent/nvcc", "CUDA_HOME": str(tmp_path)}) is None
    monkeypatch.setenv("PATH", str(program.parent))
    assert build.find_nvcc({}) == str(program)


def test_summary_is_one_line() -> None:
    levels = build.isa_levels("x86_64")
    without = build.summary(levels, build.decide_cuda({"DZ_CUDA": "0"}, None))
    assert without == "deepzero: CPU kernels for base, v3, v4, amx; no CUDA kernels (DZ_CUDA=0)"
    with_cuda = build.summary(levels, build.decide_cuda({}, NVCC))
    assert with_cuda == "deepzero: CPU kernels for base, v3, v4, amx; CUDA kernels for sm_80, sm_90"


def test_build_config_survives_quotes() -> None:
    header = build.build_config("1.0", build.Cuda(None, False, (), 'path "with" \\ in it'))
    assert '#define DZ_BUILT_CUDA "path \\"with\\" \\\\ in it"' in header
    assert '#define DZ_BUILT_CUDA_ARCHS ""' in header


@pytest.mark.parametrize("nvcc", [None, NVCC])
def test_ninja_file_names_every_source_once_per_level(nvcc: str | None) -> None:
    levels = build.isa_levels("x86_64")
    text = build.ninja_file(ROOT, build.OPS, levels, build.decide_cuda({}, nvcc), ["/include"], {"CXX": "c++"})
    assert "cxx = c++" in text
    for source in build.OPS:
        assert (ROOT / "csrc" / "cpu" / f"{source}.cpp").exists()
        for level in levels:
            assert len(re.findall(rf"^build {source}\.{level}\.o:", text, re.M)) == 1
    for source in build.PLAIN_SOURCES:
        assert (ROOT / "csrc" / f"{source}.cpp").exists()
    assert ("build _cuda.so" in text) == (nvcc is not None)
    assert "-march=native" not in text
    assert "-ffast-math" not in text


def test_a_space_in_the_path_is_escaped() -> None:
    text = build.ninja_file(Path("/a b"), [], {"base": ""}, build.decide_cuda({}, None), [], {})
    assert "build dispatch.o: cxx /a$ b/csrc/cpu/dispatch.cpp" in text


def test_setup_finds_the_ops() -> None:
    assert set(build.OPS) <= set(dzkernels.OPS)
    assert tuple(op for op in dzkernels.OPS if "cuda" in DECLARED[op].kernels) == build.CUDA_OPS


def test_the_list_of_kernels_is_what_was_built() -> None:
    assert build.kernel_list(["a", "b"]) == "#pragma once\n#define DZ_KERNELS(KERNEL) KERNEL(a) KERNEL(b)\n"
    cuda = '#include "a.cuh"\n#include "b.cuh"\n#define DZ_CUDA_KERNELS(KERNEL) KERNEL(a) KERNEL(b)\n'
    assert build.cuda_list(["a", "b"]) == "#pragma once\n" + cuda
    assert tuple(_load.native().kernels()) == build.OPS


def test_a_kernel_takes_what_its_signature_says() -> None:
    kernel = _load.kernel("softmax_difference")
    one = torch.zeros(1, 1, 1)
    with pytest.raises(TypeError, match="softmax_difference takes 7 arguments, got 2"):
        kernel(one, one)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        kernel(one, one, one, 1.0, 1, 1, False)
    with pytest.raises(AttributeError, match="data_ptr"):
        kernel(one, one, "one", 1, 1, 1, False)
    kernel(one, one, one, 0, 0, 0, False)
    with pytest.raises(ValueError, match="no kernel is named 'hardmax_difference'"):
        _load.kernel("hardmax_difference")


def test_build_info_of_this_installation() -> None:
    info = dzkernels.build_info()
    assert info["native_error"] is None
    assert info["compiler"].startswith("gcc ")
    assert info["isa_built"] == list(build.isa_levels(os.uname().machine))
    assert info["isa"] in info["isa_built"]
    assert info["isa_refusals"][info["isa"]] is None
    assert bool(info["isa_reason"])
    assert bool(info["cuda_archs"]) == info["cuda_reason"].startswith("built with")
    assert re.match(r"\d+\.\d+", info["version"])


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: levels and libraries are chosen once per process. It sees the build that is tested here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DZ_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dzkernels.__file__).parents[1]), **environ},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("level", [k for k, refusal in dzkernels.build_info()["isa_refusals"].items() if not refusal])
def test_dz_isa_forces_a_level(level: str) -> None:
    result = python("import dzkernels; print(dzkernels.build_info()['isa'])", DZ_ISA=level)
    assert result.stdout.strip() == level, result.stderr


def test_dz_isa_that_cannot_run_is_an_error_that_says_why() -> None:
    code = """
import torch, dzkernels
info = dzkernels.build_info()
print(info["isa"], info["native_error"], sep="|")
try:
    with dzkernels.use_backend("cpu"):
        dzkernels.softmax_difference(torch.zeros(1, 1, 2), torch.full((1, 2), 0.5))
except dzkernels.BackendError as error:
    print(error)
"""
    result = python(code, DZ_ISA="v9")
    first, second = result.stdout.splitlines()
    assert first.startswith("None|DZ_ISA='v9' was requested but 'v9' is not one of the levels built: base"), (
        result.stderr
    )
    assert second.startswith("dz::softmax_difference: backend 'cpu' was requested but DZ_ISA='v9' was requested but")
    assert second.endswith("Available here: reference")


def test_a_library_that_does_not_load_warns_once_and_falls_back() -> None:
    """A stand-in for a broken build: the import of dzkernels._C fails."""
    code = """
import sys
sys.modules["dzkernels._C"] = None
import warnings, logging, torch, dzkernels
logging.basicConfig(format="LOG %(message)s")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    info = dzkernels.build_info()
    for _ in range(3):
        dzkernels.softmax_difference(torch.zeros(1, 1, 2), torch.full((1, 2), 0.5))
print(len(seen), seen[0].message)
print(info["isa"], info["native_error"])
print(dzkernels.available_backends())
"""
    result = python(code)
    warned, kept, available = result.stdout.splitlines()
    assert warned.startswith("1 dzkernels._C could not be loaded: "), result.stderr
    assert kept.startswith("None dzkernels._C could not be loaded: ")
    assert available == "('reference',)"
    assert result.stderr.count("LOG dz::softmax_difference runs on backend 'reference' because better ones cannot") == 1


def test_use_isa_refuses_and_restores() -> None:
    before = dzkernels.build_info()["isa"]
    with (
        pytest.raises(dzkernels.BackendError, match="use_isa: level 'v9' was requested but 'v9' is not one of"),
        dzkernels.use_isa("v9"),
    ):
        pass
    with dzkernels.use_isa("base"):
        info = dzkernels.build_info()
        assert info["isa"] == "base"
        if before != "base":
            assert info["isa_reason"] == f"forced by DZ_ISA or use_isa; this CPU also runs {before}"
    assert dzkernels.build_info()["isa"] == before


def test_the_default_dtype_does_not_leak_in() -> None:
    code = """
import torch, dzkernels
torch.set_default_dtype(torch.float64)
one = torch.ones(1, 1, 3, 3, dtype=torch.float32)
print(dzkernels.channel_conv2d(one, torch.zeros(1, dtype=torch.int64), one).flatten().tolist())
"""
    result = python(code)
    assert result.stdout.strip() == "[9.0]", result.stderr
    assert torch.get_default_dtype() == torch.float32
