"""Recorded calls (record.py) replayed by csrc/tests/replay.cpp: right ones pass, and nothing wrong does.

One kernel, the shortest one, without sanitizers; .ci/run replays all of them, with sanitizers."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ops import record
from ops.record import Call, Memory, Output

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or "g++"
SOURCES = record.sources("cpu")
OP = min(SOURCES, key=lambda op: SOURCES[op].stat().st_size)

pytestmark = pytest.mark.skipif(shutil.which(COMPILER.split()[0]) is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """replay with the kernel of OP, at one level."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "kernel_list.h").write_text(f"#define DZ_KERNELS(KERNEL) KERNEL({OP})\n")
    sources = [SOURCES[OP], ROOT / "csrc" / "cpu" / "dispatch.cpp", ROOT / "csrc" / "tests" / "replay.cpp"]
    command = [*COMPILER.split(), "-std=c++17", "-O0", "-fopenmp", "-Wno-psabi", "-DDZ_ISA=base", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, f"-I{folder}", *sources, "-o", folder / "replay"], check=True)
    return folder / "replay"


@pytest.fixture(scope="module")
def recorded() -> list[Call]:
    return list(record.calls("cpu", OP))


@pytest.fixture
def replay(program: Path, tmp_path: Path) -> Callable[[list[Call]], subprocess.CompletedProcess[str]]:
    def run(calls: list[Call]) -> subprocess.CompletedProcess[str]:
        with (tmp_path / "calls").open("wb") as file:
            for call in calls:
                call.write(file)
        return subprocess.run([program, tmp_path / "calls"], capture_output=True, text=True, check=False)

    return run


def outputs(call: Call) -> list[Output]:
    return [value for value in call.arguments if isinstance(value, Output)]


def test_what_was_recorded_passes(
    replay: Callable[..., subprocess.CompletedProcess[str]], recorded: list[Call]
) -> None:
    result = replay(recorded)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{len(recorded)} calls replayed at 1 levels\n"


@pytest.mark.parametrize("move", [2.0, torch.nan, -torch.inf])
def test_a_wrong_value_fails(
    move: float, replay: Callable[..., subprocess.CompletedProcess[str]], recorded: list[Call]
) -> None:
    calls = copy.deepcopy(recorded)
    call = max(calls, key=lambda call: outputs(call)[0].wanted.numel())
    (output,) = outputs(call)
    wanted, bound = output.wanted.view(-1), output.bound.view(-1)
    wanted[-1] += move * (bound[-1] + wanted[-1].abs())
    result = replay(calls)
    assert result.returncode == 1
    assert f"{OP}, case '{call.case}', level base: element {wanted.numel() - 1} is " in result.stderr


def test_nan_fails_where_a_number_is_wanted(
    replay: Callable[..., subprocess.CompletedProcess[str]], recorded: list[Call]
) -> None:
    call = copy.deepcopy(next(call for call in recorded if outputs(call)[0].wanted.numel()))
    for value in call.arguments:
        if isinstance(value, Memory) and value.values.is_floating_point():
            value.values.fill_(torch.nan)
    result = replay([call])
    assert result.returncode == 1
    assert "element 0 is " in result.stderr
    assert "nan, wanted " in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: call.arguments.pop(), r"the kernel takes \d+ arguments, the call has \d+"),
        (lambda call: call.arguments.__setitem__(0, 1), "argument 0 is a number where the kernel takes a pointer"),
        (lambda call: call.arguments.__setitem__(-1, None), "is a pointer where the kernel takes a number"),
        (lambda call: call.arguments.__setitem__(-1, 0.5), "is a real number where the kernel takes an integer"),
    ],
)
def test_another_signature_fails(
    change: Callable[[Call], object], message: str, replay: Callable[..., subprocess.CompletedProcess[str]],
    recorded: list[Call],
) -> None:  # fmt: skip
    call = Call(OP, recorded[0].case, list(recorded[0].arguments))
    change(call)
    result = replay([call])
    assert result.returncode == 1
    assert re.search(message, result.stderr)


def test_a_kernel_without_a_call_fails(replay: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = replay([])
    assert result.returncode == 1
    assert result.stderr == f"no call of {OP} was recorded\n"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_every_kernel_has_calls(backend: str) -> None:
    """At least one of which has something to do."""
    for op in record.sources(backend):
        assert any(outputs(call)[0].wanted.numel() for call in record.calls(backend, op)), op
