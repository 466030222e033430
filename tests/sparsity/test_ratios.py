"""Layer ratios: exact counts from any scores, what is never pruned, the JSON file, and errors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from deepzero.errors import MaskError
from deepzero.sparsity import LayerRatios, LayerwiseRandom, Scores, best_mask, erk, layer_ratios, magnitude, uniform


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


def scores(**values):
    return Scores({name: torch.as_tensor(v, dtype=torch.float32) for name, v in values.items()})


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.955])
@pytest.mark.parametrize("protect", [None, (), ["4.weight"]])
def test_counts_are_exact(sparsity, protect):
    model = network()
    ratios = layer_ratios(magnitude(model), sparsity, protect=protect, least=1)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert ratios.shapes == shapes
    free = {n for n, s in shapes.items() if (n not in protect if protect is not None else len(s) > 1)}
    total = sum(shapes[n].numel() for n in free)
    assert sum(ratios.kept[n] for n in free) == round((1 - sparsity) * total)
    assert all(ratios.kept[n] == shapes[n].numel() for n in shapes.keys() - free)
    drawn = LayerwiseRandom(ratios).sample(0)
    assert {n: int(m.sum()) for n, m in drawn.items()} == ratios.kept


def test_the_kept_share_of_a_layer_is_its_share_of_the_best():
    found = scores(a=[[9.0, -8.0, 1.0]], b=[[-7.0, 2.0, 3.0]])
    assert layer_ratios(found, 0.5).kept == {"a": 2, "b": 1}
    assert layer_ratios(found, 0.5, keep="highest").kept == {"a": 1, "b": 2}
    assert layer_ratios(found, 0.5, keep="lowest").kept == {"a": 2, "b": 1}
    assert layer_ratios(found, 0.5, protect=["b"], least=2).kept == {"a": 2, "b": 3}


@pytest.mark.parametrize("keep", ["magnitude", "highest", "lowest"])
def test_the_best_mask_is_what_the_ratios_count(keep):
    torch.manual_seed(1)
    found = scores(a=torch.randn(5, 8), b=torch.randn(3, 4, 2), c=torch.randn(7))
    merits = {n: {"magnitude": v.abs(), "highest": v, "lowest": -v}[keep] for n, v in found.values.items()}
    threshold = torch.cat([merits["a"].flatten(), merits["b"].flatten()]).sort(descending=True).values[13 - 1]
    mask = best_mask(found, layer_ratios(found, 1 - 13 / 64, keep=keep), keep=keep)
    assert {n: m.shape for n, m in mask.items()} == {n: v.shape for n, v in found.values.items()}
    assert all(torch.equal(mask[n], merits[n] >= threshold) for n in "ab")
    assert bool(mask["c"].all())


def test_ties_of_the_best_mask_go_to_the_first():
    found = scores(a=[[1.0] * 10], b=[[0.0] * 10])
    mask = best_mask(found, layer_ratios(found, 0.4, least=1))
    assert mask["a"].all()
    assert mask["b"][0].tolist() == [True] * 2 + [False] * 8


def test_the_best_mask_refuses_what_cannot_be_ranked():
    found = scores(a=[[1.0, 2.0]])
    ratios = layer_ratios(found, 0.5)
    with pytest.raises(MaskError, match="keep must be one of 'magnitude', 'highest', 'lowest', got 'best'"):
        best_mask(found, ratios, keep="best")
    with pytest.raises(MaskError, match="the score of 'a' is not finite in 1 of 2 coordinates"):
        best_mask(scores(a=[[1.0, float("nan")]]), ratios)


def test_ties_and_floors_keep_counts_exact():
    found = scores(a=[[1.0] * 10], b=[[0.0] * 10], c=[[0.0] * 2])
    assert layer_ratios(found, 0.5, least=1).kept == {"a": 9, "b": 1, "c": 1}
    assert layer_ratios(found, 0.5, least=3).kept == {"a": 6, "b": 3, "c": 2}
    assert layer_ratios(found, 0.0).kept == {"a": 10, "b": 10, "c": 2}


@pytest.mark.parametrize("sparsity", [0.2, 0.9, 0.97])
def test_uniform_and_erk_give_their_densities(sparsity):
    model = nn.ModuleList([nn.Conv2d(16, 32, 3), nn.Conv2d(8, 8, 1), nn.Linear(100, 10)])
    shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() > 1}
    total = sum(s.numel() for s in shapes.values())
    for score, raw in (
        (uniform, dict.fromkeys(shapes, 1.0)),
        (erk, {n: sum(s) / s.numel() for n, s in shapes.items()}),
    ):
        kept = layer_ratios(score(model), sparsity).kept
        low, high = 0.0, 1e9  # the common factor by bisection, with densities capped at 1
        for _ in range(200):
            middle = (low + high) / 2
            reached = sum(min(1.0, middle * raw[n]) * s.numel() for n, s in shapes.items())
            low, high = (middle, high) if reached < (1 - sparsity) * total else (low, middle)
        for name, shape in shapes.items():
            assert abs(kept[name] - min(1.0, low * raw[name]) * shape.numel()) <= 1, (score.__name__, name)


def test_frozen_parameters_have_no_ratio():
    model = network()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in layer_ratios(magnitude(model), 0.5).pruned


def test_saved_ratios_come_back_bit_for_bit_and_read_well(tmp_path):
    model = network()
    ratios = layer_ratios(magnitude(model), 0.77)
    path = tmp_path / "ratios.json"
    ratios.save(path)
    assert LayerRatios.load(path, model) == ratios
    entry = json.loads(path.read_text())["4.weight"]
    assert entry == {"pruned": ratios.pruned["4.weight"], "shape": [5, 24], "kept": ratios.kept["4.weight"]}
    assert len(path.read_text().splitlines()) == 2 + len(ratios.pruned)


def test_ratios_of_another_model_are_refused_with_the_first_difference(tmp_path):
    path = tmp_path / "ratios.json"
    layer_ratios(magnitude(network()), 0.5).save(path)
    wider, deeper, other = network(), network(), network()
    wider[4] = nn.Linear(24, 7)
    deeper.append(nn.Linear(5, 5))
    other[4] = nn.Identity()
    for model, text in (
        (wider, r"for another model: '4.weight' has shape \[5, 24\] there and \[7, 24\] here"),
        (deeper, r"for another model: it has no ratio for '5.weight'"),
        (other, r"for another model: it names '4.weight', which is no parameter"),
    ):
        with pytest.raises(MaskError, match=text):
            LayerRatios.load(path, model)


@pytest.mark.parametrize("content", ["", "[1]", '{"0.weight": 0.5}', '{"0.weight": {"pruned": "x", "shape": [1]}}'])
def test_files_that_hold_no_ratios_are_refused(tmp_path, content):
    path = tmp_path / "ratios.json"
    path.write_text(content)
    with pytest.raises(MaskError, match=r"expected ratios as LayerRatios\.save writes them"):
        LayerRatios.load(path, network())
    with pytest.raises(MaskError, match=r"absent.json: expected ratios .* FileNotFoundError"):
        LayerRatios.load(tmp_path / "absent.json", network())


def test_ratios_outside_the_range_in_a_file_are_refused(tmp_path):
    path = tmp_path / "ratios.json"
    layer_ratios(magnitude(network()), 0.5).save(path)
    content = json.loads(path.read_text())
    for value, text in ((1.0, "must be the fraction left out"), (0.999, "prunes all 108 coordinates of '0.weight'")):
        content["0.weight"]["pruned"] = value
        path.write_text(json.dumps(content))
        with pytest.raises(MaskError, match=text):
            LayerRatios.load(path, network())


def test_errors_say_what_to_do():
    found = scores(a=[[9.0, -8.0, 1.0]], b=[[0.1, 0.0, 0.0]])
    for arguments, text in (
        ({"sparsity": -0.1}, "sparsity must be the fraction left out, 0 <= fraction < 1, got -0.1"),
        ({"sparsity": 1.0}, "0 <= fraction < 1, got 1.0"),
        ({"sparsity": float("nan")}, "0 <= fraction < 1, got nan"),
        ({"keep": "largest"}, "keep must be one of 'magnitude', 'highest', 'lowest', got 'largest'"),
        ({"least": -1}, "least must be a number of coordinates, 0 or more, got -1"),
        ({"least": 2}, r"sparsity=0.5 keeps 3 of 6 coordinates and least=2 asks for 4"),
        ({"protect": ["aa"]}, r"protect names 'aa', which is no parameter .* Did you mean 'a'\?"),
        ({}, r"prunes all 3 coordinates of 'b', whose best score is 0.1. Use .* least=1, or protect=\['b', ...\]"),
    ):
        with pytest.raises(MaskError, match=text):
            layer_ratios(found, **{"sparsity": 0.5, **arguments})
    with pytest.raises(MaskError, match="the score of 'a' is not finite in 1 of 3 coordinates"):
        layer_ratios(scores(a=[[9.0, float("nan"), 1.0]]), 0.5)
