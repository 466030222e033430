"""Replay and what a device may refuse, on a device made of CPU tensors (fake_device.py)."""

from __future__ import annotations

import gc
import importlib
import logging
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import deepzero as dz
import dzkernels
from deepzero import carriers, engine
from deepzero.errors import DeviceError
from deepzero.execute.pieces import in_pieces
from deepzero.execute.run_block import run_block
from deepzero.fusion import policy
from deepzero.objective import Mask
from deepzero.plan.memory import CPU_BUDGET, DEVICE_FRACTION, MAX_BLOCK
from estimators.fake_device import FakeDevice, Tape
from estimators.small import batch, network, objective
from exactness.small import chain, cross_entropy, images
from helpers import assert_bounded, assert_exact
from rules.cases import ROWS

CASES = {case.id: case for case in ROWS}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """Every model lies on it, and nothing looks at values, as where looking would mean waiting."""
    fake = FakeDevice()
    monkeypatch.setattr(engine, "device_for", lambda where: fake)
    for name in ("norm", "pointwise", "reduce", "softmax"):
        monkeypatch.setattr(importlib.import_module(f"deepzero.rules.{name}"), "occurs", lambda rare: True)
    monkeypatch.setattr("dzkernels._check.in_range", lambda *args: None)
    with dzkernels.use_backend("reference"):
        yield fake


def without_replay(monkeypatch: pytest.MonkeyPatch, estimator: dz.CGE, batch: Any, mask: Mask | None = None) -> Any:
    with monkeypatch.context() as patch:
        patch.setenv("DZ_REPLAY", "0")
        return estimator.estimate(batch, mask).grads


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_exact(got[name], wanted[name])


def changed(value: Any) -> Any:
    """Other numbers of the same form."""
    return pytree.tree_map_only(Tensor, lambda t: 0.9 * t + 0.05 if t.is_floating_point() else t.flip(0), value)


@pytest.mark.parametrize("id", ["linear", "batchnorm1d-train", "layernorm", "embedding", "act-gelu"])
def test_replays_what_it_recorded(id: str, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[id]
    torch.manual_seed(0)
    model, first = case.model().train(case.train), case.batch()
    ours = dz.CGE(model, case.objective, block=16)
    grads = ours.estimate(first).grads
    recorded = device.log.count("record")
    assert recorded >= len(grads)
    assert device.log.count("play") >= recorded
    device.log.clear()
    second = ours.estimate(changed(first)).grads
    assert set(device.log) == {"play"}  # other base values, same recordings
    assert_same(grads, without_replay(monkeypatch, ours, first))
    assert_same(second, without_replay(monkeypatch, ours, changed(first)))
    assert not all(torch.equal(grads[name], second[name]) for name in grads)


def test_replays_fused_convolutions(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments go from a convolution to the next norm inside a recording."""
    monkeypatch.setattr(policy, "NORMS_AROUND_CONVOLUTIONS", frozenset({"reference"}))
    model, first, mask = chain().train(), images(3, 3, 8), {"1.weight": torch.ones(4, dtype=torch.bool)}
    ours = dz.CGE(model, cross_entropy, block=4)
    grads = [ours.estimate(data, mask).grads for data in (first, changed(first))]
    assert device.log == ["warm up", "record", "play", "play"]
    for data, got in zip((first, changed(first)), grads, strict=True):
        assert_same(got, without_replay(monkeypatch, ours, data, mask))
    assert not torch.equal(grads[0]["1.weight"], grads[1]["1.weight"])


def test_the_last_block_is_filled_up(device: FakeDevice) -> None:
    """7 of 48 coordinates are 4 + 3, the latter filled up to 4; the reference is the same block sizes in float64."""
    model = network().train()
    mask = {"0.weight": torch.zeros(8, 6, dtype=torch.bool)}
    mask["0.weight"][:7, 2] = True
    ours, wide = dz.CGE(model, objective, block=4), dz.CGE(model, objective, precision="float64")
    torch.manual_seed(3)
    got = ours.estimate(batch(), mask).grads["0.weight"]
    assert device.log == ["warm up", "record", "play", "play"]
    torch.manual_seed(3)
    wanted = wide.estimate(batch(), mask).grads["0.weight"]
    assert_bounded(got, wanted, 1e-5 * float(wanted.norm()))
    assert bool((got[:7, 2] != 0).all()) and int(got.count_nonzero()) == 7


def test_both_signs_play_one_recording(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = dz.CGE(network().eval(), objective, scheme="central", block=64)
    grads = ours.estimate(batch()).grads
    assert device.log.count("record") == len(grads)
    assert device.log.count("play") == 2 * len(grads)
    assert_same(grads, without_replay(monkeypatch, ours, batch()))


def test_weights_that_change_and_move(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings read copies of the weights, which every step renews: neither asks for new ones."""
    model = network().eval()
    ours = dz.CGE(model, objective, block=64)
    before = ours.estimate(batch()).grads
    device.log.clear()
    with torch.no_grad():
        model[4].weight.mul_(1.5)
        model[0].weight.data = torch.flip(model[0].weight.data, [0]).clone()
        model[1].running_mean += 0.1
    grads = ours.estimate(batch()).grads
    assert set(device.log) == {"play"}
    assert_same(grads, without_replay(monkeypatch, ours, batch()))
    assert not torch.equal(grads["0.weight"], before["0.weight"])


def test_another_batch_size_is_another_recording_and_both_stay(device: FakeDevice) -> None:
    ours = dz.CGE(network().eval(), objective, block=64)
    small = tuple(t[:3] for t in batch())
    first = [ours.estimate(batch()).grads, ours.estimate(small).grads]
    assert device.log.count("record") == 2 * len(first[0])
    device.log.clear()
    again = [ours.estimate(batch()).grads, ours.estimate(small).grads]
    assert set(device.log) == {"play"}
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)


def test_a_number_that_the_host_read_starts_anew(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an ignored label the loss has a scale for each sample, and without it none."""
    ours = dz.CGE(network().eval(), objective, block=64)
    x, y = batch()
    ours.estimate((x, y))
    device.log.clear()
    ignored = y.clone()
    ignored[0] = -100
    grads = ours.estimate((x, ignored)).grads
    assert device.log.count("record") == len(grads)
    assert_same(grads, without_replay(monkeypatch, ours, (x, ignored)))


def test_a_tensor_of_another_device_is_a_number(device: FakeDevice) -> None:
    """A recording holds its value: a changed one starts anew."""
    held = importlib.import_module("deepzero.execute.replay").HeldBase
    base = dz.CGE(network().eval(), objective).engine
    with base.prepared(batch()) as ready:
        assert ready.base is not None
        stays = held(ready.base, torch.device("meta"))
        assert stays.refresh(ready.base)
        moved = held(ready.base, torch.device("meta"))
        moved._exact[moved.graph.batch[0]] += 1
        assert not stays.refresh(moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_writes_nothing_of_the_callers(dtype: torch.dtype, device: FakeDevice) -> None:
    model = network().eval().to(dtype)
    ours = dz.CGE(model, objective, precision="float64", block=64)
    x, y = batch()
    x = x.to(dtype)
    before = [t.clone() for t in (x, y, *model.state_dict().values())]
    ours.estimate((x, y))
    ours.estimate((changed(x), y))
    for old, new in zip(before, (x, y, *model.state_dict().values()), strict=True):
        assert_exact(new, old)


def test_a_black_box_is_called_and_the_rest_replayed(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    box = dz.blackbox(lambda t: t.sin(), batched=True)
    ours = dz.CGE(network().eval(), lambda m, b: box(m(b[0])).square().mean() + m[4].bias.square().sum(), block=64)
    grads = ours.estimate(batch()).grads
    calls = box.calls
    again = ours.estimate(batch()).grads
    assert box.calls > calls
    assert "record" not in device.log
    assert_same(again, grads)
    assert_same(grads, without_replay(monkeypatch, ours, batch()))
    said = [r.getMessage() for r in caplog.records if "not replayed" in r.getMessage()]
    assert len(said) == len(set(said)) == len(grads)
    assert all("a black box is called on the way" in text for text in said)


def test_an_op_without_a_rule_is_not_recorded(device: FakeDevice, caplog: pytest.LogCaptureFixture) -> None:
    ours = dz.CGE(nn.Linear(3, 2), lambda m, b: torch.special.i0e(m(b)).sum())
    with pytest.warns(UserWarning, match="has no difference rule"):
        ours.estimate(torch.ones(2, 3))
    assert device.log == []
    assert re.search(r"'weight' are launched one op at a time.*: no rule for aten\.special_i0e", caplog.text)


def test_where_the_host_waits_nothing_is_recorded(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deepzero.rules.norm.occurs", lambda rare: bool(rare.any()))
    ours = dz.CGE(network().train(), objective, block=64)
    grads = ours.estimate(batch()).grads
    ours.estimate(batch())
    assert device.log.count("record") == len(grads) - 1  # moments change before the norm only
    said = [r.getMessage() for r in caplog.records if "not replayed" in r.getMessage()]
    assert len(said) == 1
    assert re.search(r"'0\.weight' are launched .*: it waits for the device", said[0])
    assert_same(grads, without_replay(monkeypatch, ours, batch()))


def test_the_tape_refuses_to_wait() -> None:
    with pytest.raises(Exception, match="waits for the device"), Tape():
        bool(torch.ones(2).any())


def test_graphs_that_are_asked_for_no_more_are_forgotten(device: FakeDevice) -> None:
    scale = {"by": 1.0}
    ours = dz.CGE(network().eval(), lambda m, b: objective(m, b) * scale["by"], block=64)
    with ours.engine.prepared(batch()) as ready:
        assert ready.base is not None
        graph = weakref.ref(ready.base.graph)
    del ready
    ours.estimate(batch())
    scale["by"] = 2.0
    ours.estimate(batch())
    gc.collect()
    assert graph() is None


# --- rare cases and channels, where looking means waiting


def test_nothing_looks_at_values_off_the_cpu() -> None:
    assert carriers.occurs(torch.zeros(2, dtype=torch.bool, device="meta"))
    assert not carriers.occurs(torch.zeros(2, dtype=torch.bool))
    channel = torch.zeros(3, dtype=torch.int64, device="meta")
    one = carriers.OneChannel((4,), 0, channel, torch.zeros(3, device="meta"))
    other = carriers.OneChannel((4,), 0, channel[:2], torch.zeros(2, device="meta"))
    assert carriers.same_channel(one, one)
    assert not carriers.same_channel(one, other)


# --- memory


def test_blocks_fit_the_memory_of_the_device(device: FakeDevice) -> None:
    def block(memory: int) -> tuple[int, int]:
        device.memory = memory
        ours = dz.CGE(network().eval(), objective)
        with ours.engine.prepared(batch()) as ready:
            assert ready.base is not None
            route = ours.engine.planner.route(ready.base, "0.weight")
        return route.block, route.bytes

    assert block(1 << 30)[0] == MAX_BLOCK
    for fits in (1, 2, 8, 64):
        need = block(1 << 30)[1]
        assert block(int(fits * need / DEVICE_FRACTION))[0] == fits
        assert block(int((2 * fits - 0.5) * need / DEVICE_FRACTION))[0] == fits  # powers of two
    assert block(0)[0] == 1
    assert dz.CGE(network(), objective).engine.budget() == CPU_BUDGET


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """More than ``most`` perturbations at once do not fit. The sizes that were tried."""
    tried = []

    def run(base: Any, steps: Any, seeds: Any, count: int, **kwargs: Any) -> Tensor:
        tried.append(count)
        if count > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {count} MiB.\nDetails")
        return run_block(base, steps, seeds, count, **kwargs)

    monkeypatch.setattr(engine, "run_block", run)
    return tried


@pytest.mark.parametrize("replays", [True, False])
def test_out_of_memory_halves_the_blocks(
    replays: bool, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not replays:
        monkeypatch.setenv("DZ_REPLAY", "0")
    mask = {"0.weight": torch.ones(8, 6, dtype=torch.bool)}
    wanted = dz.CGE(network().eval(), objective, block=8).estimate(batch(), mask).grads
    tried = short_of_memory(monkeypatch, 8)
    ours = dz.CGE(network().eval(), objective, block=32)
    assert_same(ours.estimate(batch(), mask).grads, wanted)
    assert tried[:3] == [32, 16, 8] and set(tried[3:]) == {8}
    tried.clear()
    assert_same(ours.estimate(batch(), mask).grads, wanted)
    assert set(tried) <= {8}  # remembered
    said = [r.getMessage() for r in caplog.records if "no memory" in r.getMessage()]
    assert said == [
        "blocks of '0.weight': no memory for 32 perturbations at once (CUDA out of memory. Tried to allocate 16 MiB.); "
        "going on with 8"
    ]


def test_random_directions_halve_their_blocks(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = short_of_memory(monkeypatch, 3)
    ours = dz.RGE(network().eval(), objective, queries=10).estimate(batch()).grads
    assert tried == [10, 5, 2, 2, 2, 2, 2]
    monkeypatch.undo()
    for name, wanted in dz.RGE(network().eval(), objective, queries=10).estimate(batch()).grads.items():
        assert_bounded(ours[name], wanted, 1e-5 * float(wanted.norm()))


@pytest.mark.parametrize("kind", [dz.CGE, dz.RGE])
def test_no_memory_for_one_perturbation(kind: Any, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 0)
    with pytest.raises(
        DeviceError, match=r"no memory for one perturbation \(CUDA out of memory\. Tried .*smaller batch"
    ):
        kind(network().eval(), objective).estimate(batch())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def fails(start: int, stop: int) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_pieces(4, 2, fails, "blocks")


# --- what a device refuses


def test_bfloat16_on_a_device_without_it(device: FakeDevice) -> None:
    device.has_bfloat16 = False
    with pytest.raises(DeviceError, match=r"precision='bfloat16' needs a device that multiplies in bfloat16, and cpu"):
        dz.CGE(network(), objective, precision="bfloat16").estimate(batch())
    dz.CGE(network().eval(), objective).estimate(batch())


def test_model_and_batch_on_different_devices() -> None:
    x, y = batch()
    with pytest.raises(
        DeviceError, match=r"model on cpu and the batch on cpu, meta: .*Move both to one device"
    ) as error:
        dz.CGE(network(), objective).estimate((x.to("meta"), y))
    assert isinstance(error.value.__cause__, RuntimeError)


def test_an_objective_may_move_the_batch_itself() -> None:
    """A batch elsewhere is no error as such: meta stands for the device that the objective fetches it from."""
    x, y = batch()
    ours = dz.CGE(network().eval(), lambda m, b: objective(m, (torch.ones(b[0].shape), b[1])))
    assert ours.estimate((x.to("meta"), y)).loss > 0


def test_an_error_of_the_model_stays_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as error:
        dz.CGE(network(), objective).estimate((torch.ones(5, 7), batch()[1]))
    assert not isinstance(error.value, DeviceError)
