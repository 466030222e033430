"""The judge fails when it should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from judge import (
    MUS,
    Promoted,
    Verdict,
    autograd,
    judge,
    ours,
    plain_quotients,
    restored,
    sampled,
    tolerance,
)


def vectors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(50, generator=g, dtype=torch.float64) for name in ("a", "b", "c", "d")}


def moved(name: str, by: float) -> dict[str, torch.Tensor]:
    """vectors() with one tensor moved by ``by`` times its norm."""
    out = vectors()
    step = torch.zeros(50, dtype=torch.float64)
    step[0] = by * out[name].norm()
    out[name] = out[name] + step
    return out


def test_equal_is_zero_and_passes_any_tolerance():
    verdict = judge(vectors(), vectors())
    assert verdict == Verdict(0.0, "", 0.0)
    verdict.check(0.0)


def test_an_error_in_one_tensor_is_seen_and_named():
    verdict = judge(moved("c", 2e-5), vectors())
    assert verdict.worst == "c"
    assert 1.9e-5 < verdict.error < 2e-5
    with pytest.raises(AssertionError, match=r"c is 1\.9"):
        verdict.check(1e-5)
    judge(moved("c", 0.9e-5), vectors()).check(1e-5)


def test_a_small_tensor_is_not_hidden_by_large_ones():
    """One vector alone would forgive a tensor that is wrong altogether: here it is 1e-6 of the whole."""
    wanted = vectors()
    wanted["b"] *= 1e-1
    got = {k: v.clone() for k, v in wanted.items()}
    got["b"] = got["b"] * (1 + 1e-3)
    with pytest.raises(AssertionError, match="b is"):
        judge(got, wanted).check(1e-5)


def test_the_slack_of_a_tensor_with_zero_gradient_is_as_stated():
    wanted = vectors()
    wanted["a"] = torch.zeros(50, dtype=torch.float64)
    slack = 1e-2 * math.sqrt(sum(float(q.norm()) ** 2 for q in wanted.values())) / 2
    for factor, passes in ((0.99, True), (1.01, False)):
        got = {**wanted, "a": torch.zeros(50, dtype=torch.float64)}
        got["a"][3] = factor * 1e-5 * slack
        assert (judge(got, wanted).error <= 1e-5) is passes


def test_the_whole_vector_must_point_the_same_way():
    """The angle sees a rotation that the rule's slack would forgive, and is not fooled by a cosine of 1 - 1e-17."""
    verdict = judge(moved("a", 1e-9), vectors())
    assert 1e-10 < verdict.angle < 1e-9
    with pytest.raises(AssertionError, match="turned"):
        Verdict(0.0, "", 2e-5).check(1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_fail(bad):
    for name in ("a", "d"):
        got = vectors()
        got[name][7] = bad
        with pytest.raises(AssertionError, match=f"{name} is"):
            judge(got, vectors()).check(1e9)
        with pytest.raises(AssertionError, match="not finite"):
            judge(vectors(), got)
    with pytest.raises(AssertionError, match="turned"):
        Verdict(0.0, "", math.nan).check(1.0)


def test_nothing_may_be_missing():
    short = vectors()
    del short["b"]
    with pytest.raises(AssertionError, match="differ"):
        judge(short, vectors())
    with pytest.raises(AssertionError, match="differ"):
        judge(vectors(), short)
    with pytest.raises(AssertionError, match="nothing"):
        judge({}, {})
    with pytest.raises(AssertionError, match="shape"):
        judge({**vectors(), "a": torch.zeros(1)}, vectors())


def test_zero_against_zero_passes_and_anything_against_zero_fails():
    zeros = {name: torch.zeros(50, dtype=torch.float64) for name in "abcd"}
    judge(zeros, zeros).check(0.0)
    with pytest.raises(AssertionError):
        judge(vectors(), zeros).check(1e9)
    with pytest.raises(AssertionError):
        judge(zeros, vectors()).check(0.5)


def test_a_bias_before_a_norm_is_allowed_rounding_of_the_whole_gradient():
    wanted = {"w": torch.tensor([1.0], dtype=torch.float64), "b": torch.tensor([0.0], dtype=torch.float64)}
    judge({"w": wanted["w"], "b": torch.tensor([6e-8]).double()}, wanted).check(1e-5)
    with pytest.raises(AssertionError, match="b is"):
        judge({"w": wanted["w"], "b": torch.tensor([8e-8]).double()}, wanted).check(1e-5)


def test_the_noise_of_the_reference_is_allowed_and_no_more():
    wanted, got = vectors(), vectors()
    got["b"] = got["b"] + 1e-3
    judge(got, wanted, 1.01e-3).check(0.0)
    with pytest.raises(AssertionError, match="b is"):
        judge(got, wanted, 0.99e-3).check(1e-7)
    got["b"][3] = math.nan
    with pytest.raises(AssertionError, match="b is"):
        judge(got, wanted, 1e3).check(1e9)
    zeros = {name: torch.zeros(50, dtype=torch.float64) for name in "abcd"}
    judge({name: q + 1e-9 for name, q in zeros.items()}, zeros, 1e-9 * (1 + 1e-12)).check(0.0)


def test_the_bars():
    assert [tolerance("float32", mu) for mu in MUS] == [1e-5] * 5 + [5e-5]
    assert {tolerance("bfloat16", mu) for mu in MUS} == {2e-2}


# --- references


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(7, 6, generator=g), torch.randint(3, (7,), generator=g)


def cross_entropy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def everything(model: nn.Module) -> list[bytes]:
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    return [t.detach().numpy().tobytes() for t in tensors]


def test_references_touch_nothing_and_repeat():
    model = network()
    before = everything(model)
    mask = sampled(model, cross_entropy, batch(), 2)
    first = plain_quotients(model, cross_entropy, batch(), mask, 1e-3)
    again = plain_quotients(model, cross_entropy, batch(), mask, 1e-3)
    slope = autograd(model, cross_entropy, batch(), mask)
    assert everything(model) == before
    judge(first, again).check(0.0)
    assert all(p.grad is None for p in model.parameters())
    assert all(q.dtype is torch.float64 for q in (*first.values(), *slope.values()))


def test_references_agree_with_each_other_at_a_small_step():
    """Forward quotients differ from the slope by mu/2 times a curvature of order one."""
    model = network()
    mask = sampled(model, cross_entropy, batch(), 3)
    quotients = plain_quotients(model, cross_entropy, batch(), mask, 1e-6)
    judge(quotients, autograd(model, cross_entropy, batch(), mask)).check(1e-5)


def test_the_sample_covers_every_tensor_and_a_live_weight_of_each():
    model = network()
    mask = sampled(model, cross_entropy, batch(), 2)
    slope = autograd(model, cross_entropy, batch())
    assert mask.keys() == dict(model.named_parameters()).keys()
    for name, chosen in mask.items():
        assert 2 <= int(chosen.sum()) <= 3
        assert float((slope[name] * chosen).abs().max()) == float(slope[name].abs().max())


def test_the_dropout_draw_is_the_engines():
    """At another draw the quotients are altogether different: the rule would see it."""
    model = network()
    mask = sampled(model, cross_entropy, batch(), 4)
    torch.manual_seed(5)
    mine = ours(model, cross_entropy, batch(), mask, 1e-2)
    judge(mine, plain_quotients(model, cross_entropy, batch(), mask, 1e-2)).check(1e-5)
    torch.manual_seed(6)
    assert judge(mine, plain_quotients(model, cross_entropy, batch(), mask, 1e-2)).error > 1e-1


def test_restored_undoes_buffers_and_random_state():
    model = network()
    before = everything(model)
    with restored(model):
        model(batch()[0])
        assert everything(model) != before
    assert everything(model) == before


def test_casts_inside_the_model_do_not_cap_the_reference():
    narrow = torch.tensor(0.1)  # float32, closed over

    def objective(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(model(x).float() * narrow, -1, dtype=torch.float32).square().sum()

    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 5).double().requires_grad_(False)
    with Promoted():
        loss = objective(model, x)
    assert loss.dtype is torch.float64
    want = torch.softmax(model(x) * narrow.double(), -1).square().sum()
    assert abs(float(loss - want)) < 1e-14
    assert abs(float(objective(model, x).double() - want)) > 1e-10


def test_a_broken_estimate_is_caught():
    """The plain float32 quotient at 1e-4 is what the judge exists to refuse."""
    model = network().eval()
    mask = sampled(model, cross_entropy, batch(), 2)
    wanted = plain_quotients(model, cross_entropy, batch(), mask, 1e-4)
    with torch.no_grad():
        base = float(cross_entropy(model, batch()))
        got = {}
        for name, p in model.named_parameters():
            got[name] = torch.zeros_like(p, dtype=torch.float64, requires_grad=False)
            for at in map(tuple, mask[name].nonzero().tolist()):
                before = p[at].clone()
                p[at] = before + 1e-4
                got[name][at] = (float(cross_entropy(model, batch())) - base) / 1e-4
                p[at] = before
    with pytest.raises(AssertionError):
        judge(got, wanted).check(1e-5)


def test_drawn_numbers_are_those_of_the_model():
    """torch.rand draws other numbers in float64 than in float32."""

    def draw() -> torch.Tensor:
        torch.manual_seed(0)
        return torch.cat([torch.rand(4), torch.rand_like(torch.zeros(3)), torch.empty(3).bernoulli_(0.5)])

    with torch.random.fork_rng(devices=[]):
        with Promoted(torch.float32):
            wide = draw()
        assert wide.dtype is torch.float64
        assert torch.equal(wide, draw().double())
