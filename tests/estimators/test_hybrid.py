"""HybridGE is CGE on its coordinates and RGE on the others, bit for bit, from one base pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepzero.estimators import CGE, RGE, HybridGE, Mask
from estimators.small import batch, network, objective, random_mask
from judge import FLOAT32, judge, plain_quotients

CHOICES: dict[str, tuple[Any, set[str]]] = {
    "default": (None, {"1.bias", "4.bias"}),
    "name": ("1.weight", {"1.weight"}),
    "patterns": (["0.*", "*.bias"], {"0.weight", "1.bias", "4.bias"}),
}


def every(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}


def assert_is_cge_and_rge(coordinates: Any, inside: Mask, mask: Mask | None, **options: Any) -> None:
    """``inside``: what ``coordinates`` mean."""
    model = network()
    whole = mask or every(model)
    chosen = {name: m & inside[name] for name, m in whole.items()}
    others = {name: m & ~inside[name] for name, m in whole.items()}
    shared = {key: value for key, value in options.items() if key in ("mu", "scheme", "precision")}
    hybrid = HybridGE(
        model, objective, queries=7, seed=5, **options, **({} if coordinates is None else {"coordinates": coordinates})
    )
    cge = CGE(model, objective, **shared)
    rge = RGE(model, objective, queries=7, seed=5, **options)
    for _ in range(2):  # the second estimate has directions of its own
        got = hybrid.estimate(batch(), mask)
        exact = cge.estimate(batch(), chosen)
        random = rge.estimate(batch(), others)
        assert got.loss == exact.loss
        assert got.queries == exact.queries + random.queries - 1
        assert got.grads.keys() == exact.grads.keys() | random.grads.keys()
        for name, grad in got.grads.items():
            zero = torch.zeros_like(grad)
            wanted = torch.where(inside[name], exact.grads.get(name, zero), random.grads.get(name, zero))
            assert torch.equal(grad, wanted), name
            assert bool((grad[whole[name]] != 0).all()), name
            assert not bool(grad[~whole[name]].any()), name


@pytest.mark.parametrize(("coordinates", "names"), CHOICES.values(), ids=CHOICES)
def test_by_name(coordinates: Any, names: set[str]) -> None:
    inside = {name: torch.full_like(m, name in names) for name, m in every(network()).items()}
    assert_is_cge_and_rge(coordinates, inside, None)


@pytest.mark.parametrize("options", [{"scheme": "central", "distribution": "orthogonal"}, {"precision": "bfloat16"}])
def test_by_mask_within_a_mask(options: dict[str, Any]) -> None:
    """Some coordinates of a tensor by CGE, others of it by RGE, others not at all."""
    model = network()
    inside = random_mask(model, 0.4, seed=2)
    assert_is_cge_and_rge(inside, inside, random_mask(model, 0.7, seed=3), **options)


@pytest.mark.parametrize(("names", "part"), [({"1.bias"}, CGE), ({"0.weight"}, RGE)])
def test_a_mask_that_leaves_one_part_empty(names: set[str], part: type[CGE | RGE]) -> None:
    model = network()
    mask = {name: m for name, m in every(model).items() if name in names}
    options = {"queries": 7} if part is RGE else {}
    got = HybridGE(model, objective, queries=7).estimate(batch(), mask)
    alone = part(model, objective, **options).estimate(batch(), mask)
    assert got.queries == alone.queries
    assert all(torch.equal(got.grads[name], alone.grads[name]) for name in names)


def test_quotients_are_float64_quotients() -> None:
    """The coordinate-wise part against plain float64, with the same step, while the other part runs beside it."""
    model = network()
    biases = {name: m for name, m in every(model).items() if name.endswith("bias")}
    grads = HybridGE(model, objective, queries=3, strict=True).estimate(batch()).grads
    wanted = plain_quotients(model, objective, batch(), biases, 5e-3)
    judge({name: grads[name] for name in biases}, wanted).check(FLOAT32)


def test_resumes_with_the_next_directions() -> None:
    model = network()
    first, second = (HybridGE(model, objective, queries=3) for _ in range(2))
    first.estimate(batch())
    second.load_state_dict(first.state_dict())
    a, b = first.estimate(batch()), second.estimate(batch())
    assert first.queries == second.queries
    assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)
