"""ForwardGE is what RGE tends to, direction by direction, and autograd's slope along each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import deepzero as dz
from deepzero.baselines import ForwardGE
from deepzero.errors import BudgetError, ObjectiveError
from deepzero.estimators.directions import DISTRIBUTIONS
from estimators.small import batch, network, objective, random_mask
from judge import autograd


def double(values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return values[0].double(), values[1]


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads.values()])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_quotients_at_a_tiny_step_are_forward_gradients(distribution: str, masked: bool) -> None:
    """Same seed, same directions, two estimates in a row. In float64 what is left of a forward quotient's error is its
    truncation, mu/2 u.Hu of a slope of the order of |g|: at mu = 1e-8 far below 1e-5."""
    model = network().double()
    mask = random_mask(model, 0.5, seed=4) if masked else None
    shared: dict[str, Any] = {"queries": 6, "distribution": distribution, "seed": 9}
    forward = ForwardGE(model, objective, **shared)
    quotients = dz.RGE(model, objective, mu=1e-8, precision="float64", strict=True, **shared)
    for step in range(2):
        torch.manual_seed(step)  # of dropout
        a, b = (e.estimate(double(batch(step)), mask) for e in (forward, quotients))
        assert abs(a.loss - b.loss) <= 1e-12 * abs(b.loss)
        assert a.grads.keys() == b.grads.keys()
        assert float((flat(a.grads) - flat(b.grads)).norm()) <= 1e-5 * float(flat(a.grads).norm())
        assert float(flat(a.grads).norm()) > 0


def test_orthogonal_directions_of_full_number_give_the_gradient() -> None:
    model = nn.Linear(4, 3).double()
    grads = ForwardGE(model, objective, queries=15, distribution="orthogonal").estimate(double(small())).grads
    wanted = autograd(model, objective, small())
    # 15 float32 directions, each off right angles by its rounding
    assert float((flat(grads) - flat(wanted)).norm()) <= 15 * 2.0**-24 * float(flat(wanted).norm())


def small() -> tuple[Tensor, Tensor]:
    return batch()[0][:, :4], batch()[1]


def test_tied_weights_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    shared: dict[str, Any] = {"queries": 4, "seed": 1}
    model, data = Tied().double(), double(small())
    forward = ForwardGE(model, objective, **shared).estimate(data).grads
    quotients = dz.RGE(model, objective, mu=1e-8, precision="float64", **shared).estimate(data).grads
    assert forward.keys() == quotients.keys()
    assert float((flat(forward) - flat(quotients)).norm()) <= 1e-5 * float(flat(forward).norm())


def test_attention_takes_its_plain_form() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)).square().mean()

    model, x = Attention(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    grads = ForwardGE(model, lambda m, b: m(b), queries=6, seed=2).estimate(x).grads
    wanted = dz.RGE(model, lambda m, b: m(b), queries=6, seed=2, mu=1e-6).estimate(x).grads
    # float32 of the model itself: some tens of roundings of a slope
    assert float((flat(grads) - flat(wanted)).norm()) <= 1e-4 * float(flat(wanted).norm())


def test_a_loss_without_the_weights_has_no_slope() -> None:
    grads = ForwardGE(nn.Linear(3, 2), lambda m, b: b.sum(), queries=2).estimate(torch.ones(2, 3)).grads
    assert not any(bool(g.any()) for g in grads.values())


def test_an_op_without_a_forward_derivative_is_named() -> None:
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(ObjectiveError, match=r"an op without a forward-mode derivative .*dz\.RGE needs none"):
        ForwardGE(nn.Linear(3, 2), lambda m, b: Custom.apply(m(b)).sum()).estimate(torch.ones(2, 3))


def test_resumes_and_counts_one_query_a_direction() -> None:
    model = network()
    first, second = (ForwardGE(model, objective, queries=3, budget=8) for _ in range(2))
    model.eval()
    first.backward(batch())
    second.load_state_dict(first.state_dict())
    a, b = first.estimate(batch()), second.estimate(batch())
    assert first.queries == second.queries == 6
    assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)
    with pytest.raises(BudgetError, match="needs 3 queries and 6 of the budget of 8"):
        first.estimate(batch())


def _enter() -> None:
    torch._C._enter_dual_level()
    raise KeyboardInterrupt


def _leave() -> None:
    torch._C._exit_dual_level(level=forward_ad._current_level)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("moment", "struck"), [("enter_dual_level", _enter), ("exit_dual_level", _leave)])
def test_ctrl_c_between_the_two_counts_of_levels(
    moment: str, struck: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch's own entering and leaving of a level, after it has counted in C++ and before it counts in Python."""
    estimator = ForwardGE(network(), objective, queries=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(forward_ad, moment, struck)
        estimator.estimate(batch())
    assert forward_ad._current_level == -1
    estimator.estimate(batch())
