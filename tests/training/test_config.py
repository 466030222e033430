"""Configuration: TOML round trip, overrides, and errors that name the nearest key."""

from __future__ import annotations

import pytest

from deepzero.errors import ConfigError
from deepzero.training import Config, load_config
from deepzero.training.config import to_toml


def test_defaults_are_written_and_read_back(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config()))
    assert load_config(path) == Config()


def test_values_of_every_kind_survive_the_file(tmp_path):
    config = load_config(
        None,
        [
            "estimator.budget=12",
            'data.folder="a \\"quoted\\" path\\\\"',
            "data.flip=true",
            "model.options.hidden=[3, 4]",
            "estimator.options.mu=1e-8",
            "optimizer.options.betas=[0.9, 1e20]",
            "model.name=mlp",
            'first_order=["dense", "sparse-weight"]',
            "sparsity.every=epoch",
            'sparsity.always_on=["norm", "head.*"]',
            "sparsity.schedule.name=cubic",
            "sparsity.schedule.start=0.25",
        ],
    )
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "c.toml") == config
    assert config.data.folder == 'a "quoted" path\\'
    assert config.model.options["hidden"] == [3, 4]
    assert config.estimator.options["mu"] == 1e-8
    assert config.model.name == "mlp"
    assert config.first_order == ["dense", "sparse-weight"]
    assert (config.sparsity.every, config.sparsity.always_on) == ("epoch", ["norm", "head.*"])
    assert (config.sparsity.schedule.name, config.sparsity.schedule.start) == ("cubic", 0.25)


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("epochs = 3\n[sparsity]\nfraction = 0.5\nevery = 7\n")
    config = load_config(tmp_path / "c.toml", ["sparsity.fraction=0.25"])
    assert (config.epochs, config.sparsity.fraction, config.sparsity.every) == (3, 0.25, 7)


UNUSABLE = {
    "unknown section": (
        "[modle]\n",
        [],
        r"c.toml: modle is not a key. Did you mean 'model'\? Keys here: seed, epochs, ",
    ),
    "unknown key": (
        "[data]\nbatchsize = 3\n",
        [],
        r"data.batchsize is not a key. Did you mean 'data.batch_size'\? Keys here: data.name,",
    ),
    "unknown override": (
        "",
        ["sparsity.fractoin=0.5"],
        r"sparsity.fractoin is not a key. Did you mean 'sparsity.fraction'\?",
    ),
    "wrong type": ("epochs = 'many'\n", [], r"epochs = 'many': input should be a valid integer"),
    "out of range": ("[sparsity]\nfraction = 1.0\n", [], r"sparsity.fraction = 1.0: input should be less than 1"),
    "no steps": (
        "[sparsity]\nevery = 0\n",
        [],
        r"sparsity.every = 0: expected a number of steps, at least 1, or 'epoch'",
    ),
    "no epoch": ("", ["sparsity.every=epochs"], r"sparsity.every = 'epochs': expected a number of steps"),
    "not a number": ("", ["sparsity.every=true"], r"sparsity.every = True: expected a number of steps"),
    "schedule": (
        "[sparsity.schedule]\nnmae = 'cubic'\n",
        [],
        r"sparsity.schedule.nmae is not a key. Did you mean 'sparsity.schedule.name'\? Keys here: sparsity.schedule",
    ),
    "no method": (
        "first_order = ['sparse']\n",
        [],
        r"first_order = \['sparse'\]: expected true, false or a list of different ones of 'sparse-gradient', 'dense', ",
    ),
    "a method twice": ("first_order = ['dense', 'dense']\n", [], r"expected true, false or a list of different ones"),
    "wrong choice": (
        "[schedule]\nname = 'cosin'\n",
        [],
        r"schedule.name = 'cosin': input should be 'cosine' or 'constant'",
    ),
    "not TOML": ("epochs: 3\n", [], r"c.toml: expected a TOML file, reading it failed with"),
    "no value": ("", ["epochs"], r"--set epochs: expected section.key=value"),
    "no key": ("", ["sparsity.=3"], r"--set sparsity.=3: expected section.key=value"),
    "no section": ("epochs = 3\n", ["epochs.x=3"], r"--set epochs.x=3: epochs is a value, not a section"),
}


@pytest.mark.parametrize(("content", "overrides", "text"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_configurations(content, overrides, text, tmp_path):
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ConfigError, match=text):
        load_config(tmp_path / "c.toml", overrides)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.toml: there is no such file"):
        load_config(tmp_path / "absent.toml")
