"""Every mask policy and first-order method from the configuration: exact counts, shared masks, resume, refusals."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

from deepzero.errors import BudgetError, ConfigError
from deepzero.sparsity import LayerRatios, UniformRandom, snip
from deepzero.training import Config, checkpoint, load_config
from deepzero.training.build import (
    build_loader,
    build_masks,
    build_model,
    build_trainer,
    classification_loss,
    mask_inputs,
    prepare,
)
from deepzero.training.callbacks import read_metrics
from deepzero.training.launch import resume, start

pytest.importorskip("sklearn")

STEPS = 3  # an epoch of the digits in batches of 512
SMALL = (
    "model.options.depth=1",
    "model.options.width=4",  # 36 + 4 weights of a convolution, 4 + 4 of a norm, 40 + 10 of a linear layer
    "data.batch_size=512",
    "epochs=2",
    "tensorboard=false",
    "estimator.name=plain-loop",
    "first_order=false",
    "sparsity.fraction=0.8",
)
COSTS = {"0.weight": 4.0, "0.bias": 4.0, "1.weight": 4.0, "1.bias": 4.0, "6.weight": 1.0, "6.bias": 1.0}


def small(*overrides):
    return load_config(None, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def images():
    return prepare(Config())


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "my_costs.json"
    path.write_text(json.dumps(COSTS))
    return f"sparsity.costs={path}"


def queries(folder):
    """Spent in each step of a run."""
    total = [0, *(r["queries"] for r in read_metrics(folder / "metrics.jsonl") if r["event"] == "step")]
    return [later - earlier for earlier, later in itertools.pairwise(total)]


def last(folder):
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def kept(mask):
    return {name: int(m.sum()) for name, m in mask.items()}


RUNS = {
    "uniform": (["sparsity.policy=uniform"], [1 + 20] * 6),
    "always on": (['sparsity.always_on=["norm", "bias"]'], [1 + 22 + 15] * 6),
    "a pattern": (['sparsity.always_on=["6.*"]'], [1 + 50 + 10] * 6),
    "fixed": (["sparsity.policy=fixed", "sparsity.momentum=masked"], [1 + 20] * 6),
    "sparse weights": (["sparsity.policy=fixed", "sparsity.weights=sparse"], [1 + 22 + 15] * 6),
    "linear, every step": (
        ["sparsity.schedule.name=linear", "sparsity.schedule.start=0.2", "sparsity.schedule.epochs=1"],
        [1 + round(f * 98) for f in (0.8, 0.6, 0.4, 0.2, 0.2, 0.2)],
    ),
    "linear, every epoch": (
        ["sparsity.schedule.name=linear", "sparsity.every=epoch"],
        [1 + 98] * 3 + [1 + round(0.6 * 98)] * 3,
    ),
    "cosine, later": (
        ["sparsity.schedule.name=cosine", "sparsity.schedule.begin_epoch=1", "sparsity.schedule.epochs=1"],
        [1 + 98] * 4 + [1 + round((1 - 0.25 * 0.8) * 98), 1 + round((1 - 0.75 * 0.8) * 98)],
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), RUNS.values(), ids=RUNS)
def test_a_run_spends_exactly_what_its_masks_say(overrides, expected, tmp_path):
    (outcome,) = start(small(*overrides), tmp_path / "run")
    assert queries(tmp_path / "run") == expected
    assert outcome.record["queries"] == sum(expected)


def test_the_default_run_draws_as_ever(images, tmp_path):
    config = Config()
    trainer = build_trainer(config, images, tmp_path)
    old = UniformRandom(trainer.model, 0.9, 1, 0)
    assert trainer.momentum == "dense"
    for step in (0, 1, 700):
        ours, theirs = trainer.masks.sample(step), old.sample(step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_cost_aware_by_a_file(costs, images):
    config = small("sparsity.policy=cost-aware", "sparsity.fraction=0.75", costs)
    model = build_model(config, images)
    inputs = mask_inputs(config, images)
    assert inputs.costs == COSTS
    # 24 queries in proportion to n / sqrt(cost): three parameters get their least, one, the other 21 are divided as
    # 18 : 40 : 10, which is 5.56, 12.35 and 3.09
    found = kept(build_masks(config, model, STEPS, inputs).sample(0))
    assert found == {"0.weight": 6, "0.bias": 1, "1.weight": 1, "1.bias": 1, "6.weight": 12, "6.bias": 3}
    options = ("sparsity.options.budget=cost", "sparsity.options.exponent=2")
    found = kept(build_masks(small(*options, "sparsity.policy=cost-aware"), model, STEPS, inputs).sample(0))
    # of 0.2 * (4 * 48 + 50) = 48.4
    assert 47.4 < sum(COSTS[name] * count for name, count in found.items()) <= 48.4
    assert found["6.weight"] + found["6.bias"] > 24


def test_measured_costs_are_kept_with_the_run_and_shared(tmp_path):
    """The comparison, and a resumed run, draw by the same costs: they cannot be measured twice alike."""
    run = tmp_path / "run"
    config = small(
        "sparsity.policy=cost-aware", "estimator.name=cge", "first_order=true", "sparsity.momentum=masked", "epochs=1"
    )
    start(config, run)
    costs = json.loads((run / "costs.json").read_text())
    assert costs.keys() == COSTS.keys()
    assert queries(run) == [1 + 20] * STEPS
    assert last(run)["masks"] == last(run / "first-order")["masks"]
    assert last(run)["masks"]["costs"] == costs
    before = last(run / "first-order")["model"]
    shutil.rmtree(run / "first-order")
    resume(run)
    after = last(run / "first-order")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("score", "options", "spent"),
    [("erk", "{}", 0), ("data-free", "{}", 0), ("snip", "{least = 2}", 1), ("zo-snip", "{queries = 4, mu = 1e-4}", 5)],
)
def test_layerwise_by_a_score(score, options, spent, images, tmp_path):
    config = small(
        "sparsity.policy=layerwise", f"sparsity.ratios={score}", f"sparsity.score_options={options}", "epochs=1"
    )
    start(config, tmp_path / "run")
    model = build_model(config, images)
    ratios = LayerRatios.load(tmp_path / "run" / "ratios.json", model)
    assert sum(ratios.kept.values()) == 22 + round(0.2 * 76)  # vectors are left whole
    assert queries(tmp_path / "run") == [spent + 1 + 37, 38, 38]
    inputs = mask_inputs(config, images)
    assert inputs.ratios == ratios  # the same again
    assert kept(build_masks(config, model, STEPS, inputs).sample(1)) == ratios.kept


def test_ratios_serve_the_other_policies(images, costs):
    def found(*overrides):
        config = small("sparsity.ratios=uniform", *overrides)
        model = build_model(config, images)
        policy = build_masks(config, model, STEPS, mask_inputs(config, images))
        return [kept(policy.sample(step)) for step in range(6)]

    ratios = {"0.weight": 7, "0.bias": 4, "1.weight": 4, "1.bias": 4, "6.weight": 8, "6.bias": 10}
    assert found("sparsity.policy=layerwise") == [ratios] * 6
    assert found("sparsity.policy=fixed") == [ratios] * 6
    scheduled = found("sparsity.policy=layerwise", "sparsity.schedule.name=linear", "sparsity.schedule.epochs=1")
    weights = [mask["0.weight"] + mask["6.weight"] for mask in scheduled]
    assert weights == [76, 56, 35, 15, 15, 15]
    assert scheduled[-1] == ratios
    # 7 / 2 to 8 of 15
    assert found("sparsity.policy=cost-aware", costs)[0] == ratios | {"0.weight": 5, "6.weight": 10}


def test_ratios_from_a_file_and_kept_with_the_run(tmp_path, images):
    model = build_model(small(), images)
    path = tmp_path / "mine.json"
    LayerRatios.of(model, {"0.weight": 0.75, "6.weight": 0.8}).save(path)  # 27 and 32 of 76
    run = tmp_path / "run"
    own = ("sparsity.policy=layerwise", "sparsity.fraction=0.78", f"sparsity.ratios={path}")
    start(small(*own, "first_order=true", "epochs=1"), run)
    assert queries(run) == [1 + 22 + 9 + 8] * STEPS
    before = last(run / "first-order")["model"]
    path.unlink()
    shutil.rmtree(run / "first-order")
    resume(run)
    after = last(run / "first-order")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_masked_momentum_reaches_the_trainer(tmp_path, images):
    config = small("sparsity.policy=fixed", "sparsity.momentum=masked", 'sparsity.always_on=["norm"]')
    start(config, tmp_path)
    mask, found = last(tmp_path)["masks"]["mask"], last(tmp_path)["model"]
    for name, p in build_model(config, images).named_parameters():
        assert torch.equal(found[name][~mask[name]], p[~mask[name]])
        assert bool((found[name][mask[name]] != p[mask[name]]).all())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_first_order_methods(optimizer, tmp_path, images):
    options = {"SGD": "{lr = 0.1, momentum = 0.9, weight_decay = 5e-4}", "Adam": "{lr = 0.01, weight_decay = 5e-4}"}
    config = small(
        'first_order=["dense", "sparse-gradient", "sparse-weight"]',
        f"optimizer.name={optimizer}",
        f"optimizer.options={options[optimizer]}",
        "sparsity.momentum=masked",
    )
    run = tmp_path / "run"
    outcomes = start(config, run)
    labels = ["plain-loop", "first-order-dense", "first-order", "first-order-sparse-weight"]
    assert [o.label for o in outcomes] == labels
    assert [o.record["queries"] for o in outcomes] == [6 * 21, 6, 6, 6]
    initial = dict(build_model(config, images).named_parameters())
    # the masks of the run itself
    assert last(run / "first-order")["masks"] == last(run)["masks"]
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in initial.items()}
    policy = UniformRandom(build_model(config, images), 0.8, 1, 0)
    for step in range(6):
        touched = {name: touched[name] | m for name, m in policy.sample(step).items()}
    sparse_gradient, dense = last(run / "first-order")["model"], last(run / "first-order-dense")["model"]
    for name, p in initial.items():
        assert torch.equal(sparse_gradient[name][~touched[name]], p[~touched[name]])
        assert bool((dense[name] != p).any())
    assert sum(int((~m).sum()) for m in touched.values()) > 10
    # sparse weights
    state = last(run / "first-order-sparse-weight")
    mask, found = state["masks"]["mask"], state["model"]
    assert kept(mask) == kept(mask) | {"0.bias": 4, "1.weight": 4, "1.bias": 4, "6.bias": 10}
    assert kept(mask)["0.weight"] + kept(mask)["6.weight"] == round(0.2 * 76)
    for name in initial:
        assert not bool(found[name][~mask[name]].any())
        assert name.endswith("bias") or bool((found[name][mask[name]] != 0).all())
    steps = [
        [r["loss"] for r in read_metrics(run / label / "metrics.jsonl") if r["event"] == "step"]
        for label in labels[1:3]
    ]
    assert steps[0][0] == steps[1][0]
    assert steps[0][-1] != steps[1][-1]


def test_true_is_the_same_masks_also_with_sparse_weights(tmp_path):
    run = tmp_path / "run"
    outcomes = start(small("sparsity.policy=fixed", "sparsity.weights=sparse", "first_order=true", "epochs=1"), run)
    assert [o.label for o in outcomes] == ["plain-loop", "first-order-sparse-weight"]
    ours, theirs = last(run), last(run / "first-order-sparse-weight")
    assert all(torch.equal(ours["masks"]["mask"][n], theirs["masks"]["mask"][n]) for n in ours["masks"]["mask"])
    first = [read_metrics(place / "metrics.jsonl")[0]["loss"] for place in (run, run / "first-order-sparse-weight")]
    assert first[0] == first[1]


@pytest.mark.parametrize("policy", ["fixed", "layerwise"])
def test_sparse_weights_keep_what_the_score_ranks_best(policy, tmp_path, images):
    """As the run itself, and as the comparison of a run whose own masks are drawn by the score's ratios."""
    own = {"fixed": ["sparsity.weights=sparse"], "layerwise": ['first_order=["sparse-weight"]']}[policy]
    config = small(f"sparsity.policy={policy}", "sparsity.ratios=snip", "epochs=1", *own)
    model = build_model(config, images)
    scores = snip(model, classification_loss, next(iter(build_loader(config, images)))).values
    expected = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    weights = ("0.weight", "6.weight")
    threshold = (
        torch.cat([scores[name].flatten() for name in weights]).sort(descending=True).values[round(0.2 * 76) - 1]
    )
    expected |= {name: scores[name] >= threshold for name in weights}
    run = tmp_path / "run"
    start(config, run)
    place = run if policy == "fixed" else run / "first-order-sparse-weight"
    found = last(place)
    for name, mask in expected.items():
        assert torch.equal(found["masks"]["mask"][name], mask)
        assert not bool(found["model"][name][~mask].any())
    if policy == "layerwise":
        assert not torch.equal(
            build_masks(config, model, STEPS, mask_inputs(config, images)).sample(0)["0.weight"], mask
        )
        shutil.rmtree(place)
        resume(run)  # by the mask that the folder keeps
        assert all(torch.equal(last(place)["model"][name], found["model"][name]) for name in found["model"])


OTHER_MASKS = {
    "no mask": (lambda best: {}, r"it has no mask of '0.weight'\."),
    "a parameter less": (
        lambda best: {n: m for n, m in best.items() if n != "6.bias"},
        r"it has no mask of '6.bias'\.",
    ),
    "a parameter more": (lambda best: {**best, "7.bias": best["6.bias"]}, r"names '7.bias', which is no parameter"),
    "another shape": (
        lambda best: {**best, "6.weight": best["6.weight"].T},
        r"mask\['6.weight'\] must have the parameter's shape \[10, 4\], got \[4, 10\]",
    ),
    "another dtype": (
        lambda best: {**best, "6.weight": best["6.weight"].float()},
        r"mask\['6.weight'\] must be a bool tensor, got torch.float32",
    ),
}


@pytest.mark.parametrize(("change", "text"), OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_a_kept_mask_of_another_model_is_refused(change, text, tmp_path, images):
    config = small("sparsity.policy=fixed", "sparsity.weights=sparse", "sparsity.ratios=erk")
    inputs = mask_inputs(config, images)
    inputs.ratios.save(tmp_path / "ratios.json")
    checkpoint.save({"mask": inputs.best}, tmp_path / "best-mask.pt")
    kept_with_the_run = mask_inputs(config, images, tmp_path).best
    assert kept_with_the_run.keys() == inputs.best.keys()
    assert all(torch.equal(kept_with_the_run[name], mask) for name, mask in inputs.best.items())
    checkpoint.save({"mask": change(inputs.best)}, tmp_path / "best-mask.pt")
    with pytest.raises(ConfigError, match=rf"best-mask.pt is for another model: .*{text}.* Restore the file"):
        mask_inputs(config, images, tmp_path)


@pytest.mark.parametrize("policy", ["uniform", "layerwise", "fixed"])
def test_a_resumed_run_goes_on_with_its_masks_schedule_and_momentum(policy, tmp_path):
    own = [f"sparsity.policy={policy}", 'sparsity.always_on=["norm"]', "sparsity.momentum=masked", "sparsity.every=2"]
    own = own[:3] if policy == "fixed" else [*own, "sparsity.schedule.name=cubic", "sparsity.schedule.start=0.3"]
    own += ["sparsity.ratios=data-free"] if policy == "layerwise" else []
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    start(small(*own), straight)
    budget = sum(queries(straight)[:4]) + 3
    with pytest.raises(BudgetError, match="3 are left"):
        start(small(*own, f"estimator.budget={budget}"), stopped)
    path = stopped / "config.toml"
    path.write_text(path.read_text().replace(f"budget = {budget}", "budget = 100000"))
    resume(stopped)
    assert queries(stopped) == queries(straight)
    (ours, theirs) = last(stopped), last(straight)
    for name in ours["model"]:
        assert torch.equal(ours["model"][name], theirs["model"][name])
    momenta = [[s["momentum_buffer"] for s in run["optimizer"]["state"].values()] for run in (ours, theirs)]
    assert len(momenta[0]) == len(momenta[1]) == 6
    assert all(map(torch.equal, *momenta))


REFUSED = {
    "unknown policy": (
        ["sparsity.policy=unifrom"],
        r"sparsity.policy = 'unifrom' is unknown. Did you mean 'uniform'\? Known: uniform, ",
    ),
    "unknown option": (
        ["sparsity.policy=cost-aware", "sparsity.options.exponnent=1"],
        r"sparsity.options.exponnent is not an option of cost-aware. Did you mean 'exponent'\?",
    ),
    "an option too many": (["sparsity.options.exponent=1"], r"is not an option of uniform. Options: none"),
    "no ratios": (
        ["sparsity.policy=layerwise"],
        r"sparsity.policy = 'layerwise' draws by layer-wise ratios and sparsity.ratios gives none. Name a score",
    ),
    "ratios too many": (["sparsity.ratios=erk"], r"sparsity.ratios = 'erk' has no use in a draw over all coordinates"),
    "an unknown score": (
        ["sparsity.policy=layerwise", "sparsity.ratios=zo-graps"],
        r"sparsity.ratios = 'zo-graps' is unknown. Did you mean 'zo-grasp'\? Known: zo-grasp, ",
    ),
    "an unknown score option": (
        ["sparsity.policy=layerwise", "sparsity.ratios=zo-grasp", "sparsity.score_options.query=3"],
        r"sparsity.score_options.query is not an option of zo-grasp. Did you mean 'queries'\?",
    ),
    "an unusable score option": (
        ["sparsity.policy=layerwise", "sparsity.ratios=erk", "sparsity.score_options.keep=best"],
        r"sparsity.ratios = 'erk' does not suit the model: keep must be one of",
    ),
    "score options without a score": (
        ["sparsity.score_options.mu=1e-3"],
        r"sparsity.score_options are for a score, and sparsity.ratios names none",
    ),
    "no such ratios": (
        ["sparsity.policy=layerwise", "sparsity.ratios=absent.json"],
        r"sparsity.ratios: absent.json: expected ratios as LayerRatios.save writes them",
    ),
    "ratios of another sparsity": (
        ["sparsity.policy=layerwise", "RATIOS"],
        r"leave out 0.75 of the parameters that they prune, and sparsity.fraction = 0.8. Set sparsity.fraction = 0.75,",
    ),
    "costs too many": (
        ["sparsity.costs=c.json"],
        r"sparsity.costs = 'c.json' is for sparsity.policy = 'cost-aware', got 'uniform'. Leave costs out",
    ),
    "no costs": (
        ["sparsity.policy=cost-aware"],
        r"estimator.name = 'plain-loop' does not measure. Use estimator.name = 'cge', or give a file as sparsity.costs",
    ),
    "no such costs": (
        ["sparsity.policy=cost-aware", "sparsity.costs=absent.json"],
        r"absent.json: expected a JSON object of parameter name -> cost of a query, reading it failed with",
    ),
    "an unknown budget": (
        ["sparsity.policy=cost-aware", "sparsity.options.budget=time", "COSTS"],
        r"\[sparsity\] does not suit the model: budget is one of 'queries', 'cost', got 'time'",
    ),
    "an exponent that is none": (
        ["sparsity.policy=cost-aware", "sparsity.options.exponent=high", "COSTS"],
        r"\[sparsity\] does not suit the model: must be real number, not str",
    ),
    "fixed, redrawn": (
        ["sparsity.policy=fixed", "sparsity.every=epoch"],
        r"sparsity.every = 'epoch': a fixed mask is never drawn anew. Leave every out",
    ),
    "fixed, scheduled": (
        ["sparsity.policy=fixed", "sparsity.schedule.name=linear"],
        r"sparsity.schedule.name = 'linear': a fixed mask cannot follow a schedule",
    ),
    "sparse weights, redrawn": (
        ["sparsity.weights=sparse"],
        r"sparsity.weights = 'sparse' keeps .* sparsity.policy = 'uniform' draws new masks. Set sparsity.policy",
    ),
    "stale quotients held still": (
        ["estimator.name=stale", "sparsity.momentum=masked"],
        r"estimator.name = 'stale' moves what the mask leaves out .* sparsity.momentum = 'masked'",
    ),
    "constant with a start": (
        ["sparsity.schedule.start=0.1"],
        r"sparsity.schedule.name = 'constant' has no start, begin_epoch or epochs",
    ),
    "schedule too long": (
        ["sparsity.schedule.name=cubic", "sparsity.schedule.begin_epoch=1", "sparsity.schedule.epochs=1.5"],
        r"sparsity.schedule begins at epoch 1 and takes 1.5, the run only has 2 epochs",
    ),
    "schedule too late": (
        ["sparsity.schedule.name=cubic", "sparsity.schedule.begin_epoch=2"],
        r"sparsity.schedule begins at epoch 2 and takes the rest, the run only has 2 epochs",
    ),
    "unknown pattern": (
        ['sparsity.always_on=["nrom"]'],
        r"\[sparsity\] does not suit the model: 'nrom' matches no parameter .* Did you mean 'norm'",
    ),
    "nothing left to draw": (['sparsity.always_on=["*"]'], r"always_on names every parameter"),
    "too sparse": (["sparsity.fraction=0.999"], r"sparsity=0.999 leaves none of the model's 98 coordinates"),
    "an optimizer that cannot": (
        ["sparsity.momentum=masked", "optimizer.name=Adafactor", "optimizer.options={}"],
        r"sparsity.momentum does not suit optimizer.name: Adafactor keeps row_var",
    ),
    "a layer pruned to nothing": (
        ["sparsity.policy=fixed", "sparsity.weights=sparse", "sparsity.fraction=0.98"],  # 2 of 76, both of one layer
        r"sparsity.weights = 'sparse' does not suit the model: the mask prunes all 36 coordinates of '0.weight'",
    ),
}


@pytest.mark.parametrize(("overrides", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_any_work(overrides, text, tmp_path, costs, images):
    path = tmp_path / "r.json"
    LayerRatios.of(build_model(small(), images), {"0.weight": 0.75}).save(path)
    files = {"COSTS": costs, "RATIOS": f"sparsity.ratios={path}"}
    with pytest.raises(ConfigError, match=text):
        start(small(*(files.get(o, o) for o in overrides)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
