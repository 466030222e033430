"""The plan of a GPU, in which convolutions take over the norms around them, on CPU tensors: the reference's kernels run
the same ops, and these take moments as they are handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepzero as dz
import dzkernels
from deepzero.fusion import Step, policy, table
from dzkernels import backends
from exactness.small import chain, cross_entropy, images
from helpers import assert_exact
from judge import WideCGE, judge, plain_quotients, sampled, tolerance


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(policy, "NORMS_AROUND_CONVOLUTIONS", frozenset({"reference"}))
    with dzkernels.use_backend("reference"):
        yield


def kernels(model: nn.Module, data: tuple[Tensor, Tensor]) -> list[str]:
    """Of the regions with norms and convolutions after the first parameter, in order."""
    engine = dz.CGE(model, cross_entropy).engine
    with engine.prepared(data) as ready:
        assert ready.base is not None
        first = next(name for name, _ in model.named_parameters())
        return [
            step.kernel
            for step in engine.planner.route(ready.base, first).steps
            if "conv" in step.kernel or "norm" in step.kernel
        ]


@pytest.mark.usefixtures("fused")
def test_resnet20_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = dz.models.resnet20().train(), images(3, 3, 8)
    mask = sampled(model, cross_entropy, data, 0)
    wanted = plain_quotients(model, cross_entropy, data, mask, 5e-3)
    given = []
    norm = dzkernels.dense_batch_norm
    monkeypatch.setattr(dzkernels, "dense_batch_norm", lambda *a, **k: (given.append(k["moments"]), norm(*a, **k))[1])
    for precision in ("float32", "bfloat16"):
        ours = WideCGE(model, cross_entropy, precision=precision, strict=True)
        judge(ours.estimate(data, mask).grads, wanted).check(tolerance(precision, 5e-3))
    assert sum(moments is not None for moments in given) > len(given) / 2
    found = kernels(model, data)
    assert found.count("batch_norm+relu+conv2d+moments") == 9  # the inner region of every residual block
    assert found.count("conv2d+moments") == 9  # after the sum, which is written because two read it
    assert found.count("batch_norm+residual+relu") == 9
    shown = str(ours.plan(data, {"layer1.0.conv1.weight": mask["layer1.0.conv1.weight"]}))
    assert "batch_norm+relu+conv2d+moments (Dense)" in shown
    assert "\nconv2d+moments (Dense)" in shown


@pytest.mark.usefixtures("fused")
def test_wrong_moments_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = chain().train(), images(3, 3, 8)
    mask = sampled(model, cross_entropy, data, 1)
    wanted = plain_quotients(model, cross_entropy, data, mask, 5e-3)
    judge(dz.CGE(model, cross_entropy).estimate(data, mask).grads, wanted).check(tolerance("float32", 5e-3))
    convolve = dzkernels.batch_norm_conv2d

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, moments = convolve(*args, **kwargs)
        return out, moments * (1 + 2.0**-10)

    monkeypatch.setattr(dzkernels, "batch_norm_conv2d", wrong)
    with pytest.raises(AssertionError):
        judge(dz.CGE(model, cross_entropy).estimate(data, mask).grads, wanted).check(tolerance("float32", 5e-3))


class Residual(nn.Module):
    """The sum feeds one convolution only: it goes into the region."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (3, 4, 4))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        moved = self.conv2(torch.relu(self.bn1(first)))
        return self.head(self.conv3(torch.relu(self.bn2(moved) + first)).mean((2, 3)))


INNER, LAST = "batch_norm+relu+conv2d+moments", "batch_norm+relu"
PLANS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "chain": (lambda: chain().train(), [INNER, INNER, LAST]),
    "running statistics": (lambda: chain().eval(), ["batch_norm+relu+conv2d", "batch_norm+relu+conv2d", LAST]),
    "the sum feeds one convolution": (lambda: Residual().train(), [INNER, "batch_norm+residual+relu+conv2d"]),
    # three strips read the input as often as norm and convolution do; moments save a reading of the output
    "192 outputs": (lambda: chain(192).train(), [INNER, INNER, LAST]),
    "192 outputs, no norm after them": (
        lambda: nn.Sequential(*chain(192)[:7], *chain(192)[8:]).train(),
        [INNER, LAST],
    ),
    "groups": (lambda: chain(groups=2).train(), [INNER, LAST, LAST]),
    "a pool between": (
        lambda: nn.Sequential(*chain()[:6], nn.MaxPool2d(2), *chain()[6:]).train(),
        [INNER, "batch_norm+relu+pool", "conv2d+moments", LAST],
    ),
}


@pytest.mark.parametrize("id", PLANS)
def test_what_is_fused(id: str, fused: None) -> None:
    build, wanted = PLANS[id]
    model, data = build(), images(3, 3, 8)
    assert kernels(model, data) == wanted
    mask = sampled(model, cross_entropy, data, 1)
    reference = plain_quotients(model, cross_entropy, data, mask, 5e-3)
    for precision in ("float32", "bfloat16"):
        grads = WideCGE(model, cross_entropy, precision=precision, strict=True).estimate(data, mask).grads
        judge(grads, reference).check(tolerance(precision, 5e-3))


def test_on_a_cpu_convolutions_take_the_norm_after_them() -> None:
    model, data = dz.models.resnet20().train(), images(2, 3, 8)
    found = kernels(model, data)
    assert found.count("conv2d+batch_norm+relu") == 10  # the first one, and the first of every residual block
    assert found.count("batch_norm+residual+relu") == 9
    assert len(found) == 19
    assert sum(bool(step.parts) for step in _steps(model, data)) == 10


NORM = "conv2d+batch_norm"
RELU, MEAN, POOL = f"{NORM}+relu", f"{NORM}+relu+mean", f"{NORM}+relu+pool"
ON_A_CPU: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "chain": (lambda: chain().train(), [RELU, RELU, MEAN]),
    "running statistics": (lambda: chain().eval(), [RELU, RELU, MEAN]),
    "groups": (lambda: chain(groups=2).train(), [RELU, RELU, MEAN]),
    "stride and dilation": (lambda: chain(stride=2, padding=2, dilation=2).train(), [RELU, RELU, MEAN]),
    "pools": (lambda: dz.models.paper_cnn(depth=2, width=4), [POOL, f"{POOL}+mean"]),
    "no activation": (lambda: nn.Sequential(*chain()[:2], *chain()[3:]).train(), [NORM, RELU, MEAN]),
    "no weight in the norm": (
        lambda: nn.Sequential(chain()[0], nn.BatchNorm2d(4, affine=False), *chain()[2:]),
        [RELU, RELU, MEAN],
    ),
    "the mean keeps the images": (
        lambda: nn.Sequential(*chain()[:9], nn.AdaptiveAvgPool2d((None, 1)), nn.Flatten(), nn.LazyLinear(10)),
        [RELU, RELU, RELU],
    ),
    "the sum is no norm's": (lambda: Residual().train(), ["batch_norm+relu", "batch_norm+residual+relu"]),
}  # fmt: skip


@pytest.mark.parametrize("id", ON_A_CPU)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_cpu(id: str, precision: str) -> None:
    build, wanted = ON_A_CPU[id]
    model, data = build(), images(3, 3, 8)
    model(data[0])
    assert kernels(model, data) == wanted
    mask = sampled(model, cross_entropy, data, 1)
    reference = plain_quotients(model, cross_entropy, data, mask, 5e-3)
    grads = WideCGE(model, cross_entropy, precision=precision, strict=True).estimate(data, mask).grads
    judge(grads, reference).check(tolerance(precision, 5e-3))


def test_on_a_cpu_the_mean_of_everything_is_not_that_of_images() -> None:
    model, data = chain()[:6].train(), images(3, 3, 8)

    def whole(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return m(batch[0]).mean(dim=None)

    mask = sampled(model, whole, data, 1)
    reference = plain_quotients(model, whole, data, mask, 5e-3)
    judge(WideCGE(model, whole, strict=True).estimate(data, mask).grads, reference).check(tolerance("float32", 5e-3))


def test_memory_is_planned_for_what_runs() -> None:
    """The third convolution is reached by a whole value: its parts run, and what they hold counts."""
    model, data = chain(64).train(), images(3, 3, 8)
    engine = dz.CGE(model, cross_entropy).engine
    with engine.prepared(data) as ready:
        assert ready.base is not None
        graph = ready.base.graph
        names = [name for name, _ in model.named_parameters()]
        first, last = (engine.planner.route(ready.base, name) for name in ("0.weight", "6.weight"))
        # The convolution's values and the norm's temporary: 64 channels of 4 x 4 pixels of three images, two times.
        assert first.bytes >= 2 * 4 * 64 * 4 * 4 * 3
        assert last.bytes < 2 * 4 * 64 * 4 * 4 * 3
        assert engine.planner.joint_steps(graph, names)


def test_on_a_cpu_a_wrong_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two kernels is what the quotients come from."""
    model, data = chain().train(), images(3, 3, 8)
    mask = sampled(model, cross_entropy, data, 1)
    wanted = plain_quotients(model, cross_entropy, data, mask, 5e-3)
    for name in ("conv2d_tap_batch_norm", "channel_conv2d_batch_norm"):
        right = getattr(dzkernels, name)
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(dzkernels, name, lambda *a, right=right, **k: right(*a, **{**k, "var": k["var"] * 1.001}))
            judge(dz.CGE(model, cross_entropy).estimate(data, mask).grads, wanted).check(tolerance("float32", 5e-3))


def test_on_a_cpu_where_everything_moves_the_parts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = chain().train(), images(3, 3, 8)
    options: dict[str, Any] = {"queries": 3, "seed": 0}
    got = dz.RGE(model, cross_entropy, **options).estimate(data).grads
    assert any(step.parts for step in _steps(model, data))
    monkeypatch.setattr(table, "PATTERNS", tuple(p for p in table.PATTERNS if not p.encloses))
    wanted = dz.RGE(model, cross_entropy, **options).estimate(data).grads
    for name in wanted:
        assert_exact(got[name], wanted[name])


def _steps(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Step, ...]:
    engine = dz.CGE(model, cross_entropy).engine
    with engine.prepared(data) as ready:
        assert ready.base is not None
        return engine.planner.joint_steps(ready.base.graph, [name for name, _ in model.named_parameters()])


@pytest.mark.usefixtures("fused")
def test_where_everything_moves_the_parts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random directions move weights and norms: no region fits, and the plan without them gives the same bits."""
    model, data = chain().train(), images(3, 3, 8)
    options: dict[str, Any] = {"queries": 3, "seed": 0}
    got = dz.RGE(model, cross_entropy, **options).estimate(data).grads
    assert any(step.parts for step in _steps(model, data))
    monkeypatch.setattr(policy, "NORMS_AROUND_CONVOLUTIONS", frozenset())
    wanted = dz.RGE(model, cross_entropy, **options).estimate(data).grads
    for name in wanted:
        assert_exact(got[name], wanted[name])


def test_the_backend_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, device = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: None)
    assert policy.norms_around_convolutions(device, torch.float32)
    assert not policy.norms_around_convolutions(cpu, torch.float32)
    with dzkernels.use_backend("reference"):
        assert not policy.norms_around_convolutions(device, torch.float32)
    with dzkernels.use_backend("triton"):
        assert policy.norms_around_convolutions(cpu, torch.float32)
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: "no compiler")
    assert not policy.norms_around_convolutions(device, torch.float32)


def test_a_strip_is_triton_s() -> None:
    pytest.importorskip("triton")
    from dzkernels.triton import _conv2d

    assert policy.STRIP == _conv2d.STRIP
