"""Which device wants which fused kernel."""

from __future__ import annotations

import pytest
import torch

import dzkernels
from deepzero.fusion import patterns_for, policy
from dzkernels import backends


def test_fused_linear_layers_are_not_for_devices_on_which_the_reference_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def has(kind: str, op: str = "linear_difference") -> bool:
        return policy.has_fused_kernel(op, torch.device(kind))

    monkeypatch.setitem(backends._REFUSALS, "cuda", lambda device, dtype: "no driver")
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: None)
    assert [has("cpu"), has("cuda"), has("cuda", "mlp_difference")] == [True] * 3
    assert has("cuda", "self_attention_difference")
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: "no compiler")
    assert [has("cpu"), has("cuda")] == [True, False]
    with dzkernels.use_backend("triton"):
        assert not has("cuda")
    with dzkernels.use_backend("reference"):
        assert has("cuda")


def test_convolutions_take_the_norms_around_them_or_the_one_after(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(kind: str, dtype: torch.dtype = torch.float32) -> set[str]:
        return {pattern.name for pattern in patterns_for(torch.device(kind), dtype) if pattern.encloses}

    around = {"norm and convolution", "convolution and moments"}
    monkeypatch.setitem(backends._REFUSALS, "cuda", lambda device, dtype: "no driver")
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: None)
    assert names("cpu") == {"convolution and norm"}
    assert names("cuda") == around
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: "no compiler")
    assert names("cuda") == set()
