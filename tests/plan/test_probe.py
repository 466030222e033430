"""The probing block of a route: it sees what blocks do, counts the bytes of one perturbation, and leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import deepzero as dz
from deepzero.base_pass import Base
from deepzero.carriers import Carrier, OneEntry, describe
from deepzero.errors import DeviceError
from deepzero.execute import planner
from deepzero.execute.probe import coordinate, probe
from deepzero.plan.memory import CPU_BUDGET, MAX_BLOCK, block_size, peak_bytes
from deepzero.plan.probe import Ran
from estimators.small import batch, network, objective
from exactness.small import chain, cross_entropy, images
from rules.cases import ROWS, readout, supervised
from rules.subject import Subject

CASES = {case.id: case for case in ROWS}
SEEN = ["linear", "layernorm", "embedding", "resnet-block", "transformer-encoder", "lstm", "act-softmax2d"]


def entries(shape: Sequence[int], like: Tensor, count: int) -> OneEntry:
    """Entry k of the flat parameter for perturbation k."""
    flat = torch.arange(count) % max(like.numel(), 1)
    index = torch.stack(torch.unravel_index(flat, tuple(shape)), 1) if len(shape) else torch.zeros((count, 0)).long()
    return OneEntry(tuple(shape), index, torch.full((count,), 0.01, dtype=torch.float32))


def seeds(base: Base, name: str, carrier: Carrier) -> dict[fx.Node, Carrier]:
    return dict.fromkeys(base.graph.placeholders(name), carrier)


@pytest.mark.parametrize("id", SEEN)
def test_bytes_grow_with_the_perturbations_and_blocks_do_what_was_seen(id: str) -> None:
    subject = Subject(CASES[id])
    engine = subject.estimator("float32").engine
    with engine.prepared(subject.batch) as ready:
        base = ready.base
        assert base is not None
        for name, parameter in subject.model.named_parameters():
            route = engine.planner.route(base, name)
            some = entries(parameter.shape, parameter, 3)
            three = probe(base, route.steps, seeds(base, name, some), count=3, operands=engine.operands)
            assert three == tuple(Ran(r.what, r.carrier, 3 * r.bytes, 3 * r.alive) for r in route.ran)
            seen: list[tuple[str, str]] = []

            def observe(nodes: Sequence[fx.Node], kernel: str, carrier: Any, seen: Any = seen) -> None:
                seen.append((kernel or f"rule {nodes[-1].target}", describe(carrier)))

            engine.run(base, route.steps, {name: some}, 3, observe)
            assert seen == [(r.what, r.carrier) for r in route.ran]


def test_what_is_seen_of_a_chain() -> None:
    """One channel of 3 images of 6 x 6 pixels, 4 bytes a value, then all 4 channels of the next convolution."""
    model, data = chain(8).train(), images(3, 3, 8)
    engine = dz.CGE(model, cross_entropy).engine
    with engine.prepared(data) as ready:
        assert ready.base is not None
        route = engine.planner.route(ready.base, "0.weight")
    first, second = route.ran[:2]
    assert (first.what, first.carrier) == ("conv2d+batch_norm+relu", "OneChannel")
    assert first.bytes == first.alive == 3 * 36 * 4  # the channel's number is in the seed's memory
    assert (second.carrier, second.bytes) == ("Dense", 4 * first.bytes)
    assert second.alive == first.bytes + second.bytes
    assert route.bytes == max(r.alive + r.bytes for r in route.ran)
    assert route.ran[-1].bytes <= 8


def test_two_uses_of_a_tied_weight_are_two_channels() -> None:
    """Coordinate (0, 0) of a square weight moves one channel of both h w and h w^T; nearly all others move two."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight + x @ self.weight.t()).tanh()

    engine = dz.CGE(Tied(), supervised(readout), strict=True).engine
    with engine.prepared(((torch.randn(4, 6),), ())) as ready:
        assert ready.base is not None
        ran = engine.planner.route(ready.base, "weight").ran
    assert next(r.carrier for r in ran if r.what == "rule aten.add.Tensor") == "Dense"


@pytest.mark.parametrize(
    ("shape", "index"), [((), []), ((1,), [0]), ((5,), [0]), ((4, 4), [0, 1]), ((3, 1, 2, 2), [0, 0, 1, 1])]
)
def test_the_coordinate(shape: tuple[int, ...], index: list[int]) -> None:
    found = coordinate(shape, torch.float32, torch.device("cpu"))
    assert found.index.tolist() == [index]
    assert found.step.tolist() == [0.0]


def state(model: nn.Module, data: Any) -> list[Tensor]:
    return [t.clone() for t in (*model.state_dict().values(), *data, torch.random.get_rng_state())]


def test_it_leaves_no_trace() -> None:
    model, data = network().train(), batch()
    engine = dz.CGE(model, objective).engine
    with engine.prepared(data) as ready:
        base = ready.base
        assert base is not None
        values = {node: v.clone() for node, v in base._exact.items() if isinstance(v, Tensor)}
        before = state(model, data)
        routes = [engine.planner.route(base, name) for name, _ in model.named_parameters()]
        engine.planner.joint_bytes(base, [name for name, _ in model.named_parameters()])
        assert all(route.ran for route in routes)
        assert all(map(torch.equal, state(model, data), before))
        assert all(torch.equal(base._exact[node], v) for node, v in values.items())
        assert [engine.planner.route(base, route.parameter) for route in routes] == routes  # kept, not probed again


def test_no_code_of_the_user_is_called() -> None:
    box = dz.blackbox(lambda t: t.sin() + 0 * torch.rand(()), batched=True)
    engine = dz.CGE(network().eval(), lambda m, b: box(m(b[0])).square().mean()).engine
    with engine.prepared(batch()) as ready:
        assert ready.base is not None
        calls, random = box.calls, torch.random.get_rng_state()
        ran = engine.planner.route(ready.base, "0.weight").ran
        assert box.calls == calls
        assert torch.equal(torch.random.get_rng_state(), random)
    assert [(r.carrier, r.bytes) for r in ran if "blackbox" in r.what] == [("Dense", 5 * 3 * 4)]


@pytest.mark.parametrize("strict", [False, True])
def test_an_op_without_a_rule_is_not_evaluated(strict: bool, recwarn: pytest.WarningsRecorder) -> None:
    engine = dz.CGE(nn.Linear(3, 2), lambda m, b: torch.special.i0e(m(b)).sum(), strict=strict).engine
    with engine.prepared(torch.ones(4, 3)) as ready:
        assert ready.base is not None
        ran = engine.planner.route(ready.base, "weight").ran
    assert [(r.carrier, r.bytes) for r in ran if "i0e" in r.what] == [("Dense", 4 * 2 * 4)]
    assert not [w for w in recwarn if "no difference rule" in str(w.message)]


def test_one_probe_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []

    def count(base: Base, steps: Any, moved: Mapping[fx.Node, Carrier], **kwargs: Any) -> tuple[Ran, ...]:
        probed.append(len(moved))
        return probe(base, steps, moved, **kwargs)

    monkeypatch.setattr(planner, "probe", count)
    model, ours = network().eval(), None
    names = [name for name, _ in model.named_parameters()]
    ours = dz.CGE(model, objective)
    for _ in range(3):
        ours.estimate(batch())
    assert probed == [1] * len(names)
    probed.clear()
    random = dz.RGE(model, objective, queries=4)
    for _ in range(3):
        random.estimate(batch())
    assert probed == [len(names)]


def test_no_memory_for_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> tuple[Ran, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 MiB.\nDetails")

    monkeypatch.setattr(planner, "probe", fails)
    for kind, what in ((dz.CGE, r"blocks of '0\.weight'"), (dz.RGE, "blocks of random directions")):
        with pytest.raises(DeviceError, match=what + r": the device has no memory for one perturbation \(CUDA .*9 MiB"):
            kind(network().eval(), objective).estimate(batch())


def test_blocks_follow_the_bytes() -> None:
    ran = (Ran("a", "OneChannel", 8, 8), Ran("b", "Dense", 100, 108), Ran("c", "Dense", 10, 118))
    assert peak_bytes(ran) == 208
    assert peak_bytes(()) == 0
    assert block_size(0, None) == block_size(208, None) == MAX_BLOCK
    assert block_size(CPU_BUDGET // 5, None) == 5
    assert block_size(2 * CPU_BUDGET, None) == 1
