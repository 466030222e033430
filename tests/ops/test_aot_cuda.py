"""The machine code of the CUDA C++ kernels (aot_cuda.py): nothing spilled, and as many products as were written."""

from __future__ import annotations

import re

import pytest

import dzkernels
from ops import aot_cuda

USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN2dz4gemmINS_9ConvBlockItLi32ELi16EEEtEEv:
  REG:96 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:472
 Function _ZN2dz4tapEPKf:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:472
"""
CODE = """
\tcode for sm_80
\t\tFunction : _ZN2dz4gemmINS_9ConvBlockItLi32ELi16EEEtEEv
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
{loads}{products}        /*6460*/              @!P0 BRA 0x10 ;                    /* 0x000000000820783b */
\t\tFunction : _ZN2dz4tapEPKf
        /*0000*/                   EXIT ;                        /* 0x000000000000794d */
"""
LOAD = "        /*63e0*/                   LDSM.16.M88.4 R32, [R8] ;     /* 0x000000000820783b */\n"
PRODUCT = (
    "        /*6450*/                   HMMA.16816.F32.BF16 R12, R36.reuse, R32, R12 ;  /* 0x00000020240c723c */\n"
)


def printed(stack: int = 0, loads: int = 45, products: int = 72) -> list[aot_cuda.Kernel]:
    return aot_cuda.parsed(USAGE.format(stack=stack), CODE.format(loads=LOAD * loads, products=PRODUCT * products))


def test_what_cuobjdump_prints() -> None:
    gemm, tap = printed()
    assert (gemm.capability, gemm.registers, gemm.stack, len(gemm.instructions)) == (80, 96, 0, 2 + 45 + 72)
    assert (gemm.instructions[0], gemm.instructions[-1], tap.instructions) == ("MOV", "BRA", ("EXIT",))
    assert aot_cuda.Block.of(gemm) == aot_cuda.Block(2, 32, 16)
    assert aot_cuda.Block.of(tap) is None
    assert aot_cuda.main_loop(gemm) == 45 + 72
    assert aot_cuda.problems([gemm, tap]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 16}, "keeps 16 bytes outside registers"),
        ({"products": 71}, "has 71 HMMA, not 72"),
        ({"loads": 90}, "has 90 LDSM, not 45"),
    ],
)
def test_spills_and_other_loops_are_refused(change: dict[str, int], message: str) -> None:
    (problem,) = aot_cuda.problems(printed(**change))
    assert problem.endswith(f"for 8.0 {message}")


@pytest.mark.skipif(not dzkernels.build_info()["cuda_archs"], reason="dzkernels was built without CUDA")
@pytest.mark.skipif(aot_cuda.cuobjdump() is None, reason="no cuobjdump")
def test_the_kernels_as_they_were_built(capsys: pytest.CaptureFixture[str]) -> None:
    aot_cuda.main()
    out = capsys.readouterr().out
    for arch in dzkernels.build_info()["cuda_archs"]:
        assert len(re.findall(rf"^dense_conv2d_kernel\S+ +{arch[:2]} ", out, re.M)) == 9
