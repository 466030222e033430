"""A plan is plain data: it can be printed, compared and saved."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import deepzero as dz
from deepzero.fusion import LAUNCHES, PATTERNS
from deepzero.plan.route import Route
from exactness.small import chain, cross_entropy, images


def routes(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Route]:
    engine = dz.CGE(model, cross_entropy).engine
    with engine.prepared(data) as ready:
        assert ready.base is not None
        return {name: engine.planner.route(ready.base, name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("make", [chain, dz.models.resnet20, dz.models.vit], ids=["chain", "resnet", "vit"])
def test_two_plans_of_one_model_are_equal_as_json(make: type[nn.Module]) -> None:
    data = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1])) if make is dz.models.vit else images(3, 3, 8)
    one, two = (routes(make().train(), data) for _ in range(2))
    for name, route in one.items():
        saved = json.loads(json.dumps(route.plain()))
        assert saved == route.plain() == two[name].plain()
        assert saved["parameter"] == name
        assert [n for step in saved["steps"] for n in step["nodes"]]
    first, *_, last = one
    assert one[first].plain()["steps"] != one[last].plain()["steps"]


def test_a_schedule_prints_what_runs() -> None:
    shown = [str(step) for step in routes(chain().train(), images(3, 3, 8))["0.weight"].steps]
    assert shown[0].startswith("conv2d+batch_norm+relu")
    assert "linear+cross_entropy" in shown or any(text.startswith("rule aten.") for text in shown)


def test_every_pattern_has_a_name_of_its_own_and_a_launch() -> None:
    assert len(LAUNCHES) == len(PATTERNS) == len({p.name for p in PATTERNS})
    assert all(LAUNCHES[p.name] is p.launch for p in PATTERNS)
