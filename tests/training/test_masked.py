"""Steps under a mask: what it left out keeps its bits, what it selected moves as ever; also across a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepzero.baselines import Backprop
from deepzero.data import Loader
from deepzero.errors import MaskError
from deepzero.sparsity import Fixed, UniformRandom
from deepzero.training import Trainer
from deepzero.training.build import OPTIMIZERS
from deepzero.training.masked import masked_step

LR = {"lr": 0.05}
SETTINGS = {
    "SGD": (torch.optim.SGD, {**LR, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {**LR, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "SGD dampening": (torch.optim.SGD, {**LR, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD plain": (torch.optim.SGD, {**LR, "weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {**LR, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW foreach": (torch.optim.AdamW, {**LR, "foreach": True, "weight_decay": 0.1}),
} | {
    name: (kind, LR if name == "Rprop" else {**LR, "weight_decay": 0.1})
    for name, kind in OPTIMIZERS.items()
    if name not in ("SGD", "Adafactor", "Muon")  # Adafactor: see below; Muon mixes the coordinates of a matrix
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def give_gradients(model, generator, mask):
    for name, p in model.named_parameters():
        gradient = torch.randn(p.shape, generator=generator) * mask[name]
        p.grad = gradient if bool(mask[name].any()) else None  # as estimators leave it


def tensors(optimizer, parameter):
    return {
        name: value.clone()
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    }


@pytest.mark.parametrize(("kind", "options"), SETTINGS.values(), ids=SETTINGS)
def test_inside_as_ever_outside_bit_for_bit(kind, options):
    model = network()
    optimizer = kind(model.parameters(), **options)
    masks = UniformRandom(model, 0.5, seed=1)
    generator = torch.Generator().manual_seed(2)
    moved = 0
    for step in range(8):
        mask = masks.sample(step)
        give_gradients(model, generator, mask)
        twin, ordinary = copy.deepcopy((model, optimizer))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = copy.deepcopy(p.grad)
        before = {name: (p.detach().clone(), tensors(optimizer, p)) for name, p in model.named_parameters()}
        masked_step(optimizer, model, mask)
        ordinary.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            inside, outside = mask[name], ~mask[name]
            weights, state = before[name]
            assert torch.equal(p[outside], weights[outside])
            assert torch.equal(p[inside], q[inside])
            moved += int((p[inside] != weights[inside]).sum())
            for key, value in tensors(optimizer, p).items():
                assert torch.equal(value[inside], tensors(ordinary, q)[key][inside]), key
                if key in state:
                    assert torch.equal(value[outside], state[key][outside]), key
    assert moved > 50


def test_an_ordinary_step_moves_what_the_mask_leaves_out():
    """Both of its causes: momentum of an earlier step, and weight decay."""
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
        everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
        give_gradients(model, torch.Generator().manual_seed(2), everything)
        optimizer.step()
        before = model[0].weight.detach().clone()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        assert bool((model[0].weight != before).any())


def test_new_state_outside_starts_as_if_nothing_had_been_there():
    model = network()
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    mask["0.weight"][0] = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    model[0].weight.grad = torch.ones(3, 4)  # also outside the mask
    masked_step(optimizer, model, mask)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert bool((momentum[0] != 0).all())
    assert torch.equal(momentum[1:], torch.zeros(2, 4))
    assert torch.equal(model[0].weight.grad[1:], torch.zeros(2, 4))


def test_parameters_absent_from_the_mask_are_outside_it():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    masked_step(optimizer, model, {"2.bias": torch.tensor([True, False])})
    moved = [(p != b).flatten().tolist() for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [[False] * 12, [False] * 3, [False] * 6, [True, False]]


def test_state_of_no_single_coordinate_is_refused():
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters())
    mask = UniformRandom(model, 0.5).sample(0)
    give_gradients(model, torch.Generator().manual_seed(2), mask)
    with pytest.raises(MaskError, match=r"Adafactor keeps row_var of shape \[3, 1\] .* shape \[3, 4\].*such as SGD"):
        masked_step(optimizer, model, mask)


def test_a_step_that_fails_leaves_the_weights():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = UniformRandom(model, 0.5).sample(0)
    give_gradients(model, torch.Generator().manual_seed(2), mask)
    before = [p.detach().clone() for p in model.parameters()]

    def fail(*_):
        raise ZeroDivisionError

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        masked_step(optimizer, model, mask)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def trainer(kind, options, momentum, masks=None, epochs=3):
    model = network()
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 4, generator=generator), torch.randint(2, (12,), generator=generator)
    return Trainer(
        model,
        Backprop(model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])),
        kind(model.parameters(), **options),
        Loader(x, y, 4, seed=1),
        epochs=epochs,
        masks=masks or UniformRandom(model, 0.5, seed=4),
        momentum=momentum,
    )


CHECKED = {name: SETTINGS[name] for name in ("SGD", "Adam")}


@pytest.mark.parametrize(("kind", "options"), CHECKED.values(), ids=CHECKED)
class TestTrainer:
    def test_masked_holds_still_what_a_fixed_mask_leaves_out_and_dense_does_not(self, kind, options):
        mask = UniformRandom(network(), 0.5, seed=4).sample(0)
        start = dict(network().named_parameters())
        for momentum in ("masked", "dense"):
            run = trainer(kind, options, momentum, Fixed(mask))
            run.fit()
            found = [torch.equal(p[~mask[n]], start[n][~mask[n]]) for n, p in run.model.named_parameters()]
            assert found == [momentum == "masked"] * 4

    @pytest.mark.parametrize("momentum", ["dense", "masked"])
    def test_a_resumed_run_is_the_straight_one(self, kind, options, momentum):
        straight, first, second = (trainer(kind, options, momentum) for _ in range(3))
        straight.fit()
        first.epochs = 1
        first.fit()
        second.load_state_dict(first.state_dict())
        second.fit()
        assert straight.step == second.step == 9
        for p, q in zip(straight.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(p, q)
            ours, theirs = tensors(straight.optimizer, p), tensors(second.optimizer, q)
            assert ours.keys() == theirs.keys() != set()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_without_masks_both_are_the_same(self, kind, options):
        runs = []
        for momentum in ("dense", "masked"):
            run = trainer(kind, options, momentum)
            run.masks = None
            run.fit()
            runs.append([p.detach() for p in run.model.parameters()])
        assert all(map(torch.equal, *runs))


def test_momentum_is_one_of_two():
    with pytest.raises(ValueError, match="momentum must be 'dense' or 'masked', got 'sparse'"):
        trainer(torch.optim.SGD, LR, "sparse")
