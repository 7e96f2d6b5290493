"""A data set by name is a module and a line: help, checks and loading all follow it."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from twolevel.data import DataConfig, load, loading, prepare, registry
from twolevel.data.memory import LabelledImages, in_memory
from twolevel.data.registry import DATA_SETS, DataSet, Recipe, list_of_names
from twolevel.errors import UserError
from twolevel.training.config import TrainConfig


@pytest.fixture
def stripes(monkeypatch) -> list[str]:
    """Registers a data set `stripes` of two classes, whose module records what it is asked for."""
    calls = []
    module = types.ModuleType("twolevel.data.stripes")

    def images(number: int) -> LabelledImages:
        labels = torch.arange(number) % 2
        shown = (labels * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        return LabelledImages(shown.contiguous(), labels)

    def load(config, view):
        calls.append(f"load {view.data_rank} of {view.data_size}")
        classes, half = ["dark", "light"], (0.5, 0.5, 0.5)
        return in_memory(config, view, train=images(12), test=images(4), classes=classes, mean=half, std=half)

    module.prepare = lambda config: calls.append("prepare")
    module.load = load
    line = DataSet(
        module="stripes",
        about="two classes",
        num_classes=2,
        image_size=8,
        uses=(),
        recipe=Recipe(epochs=3, lr_milestones=(2,), weight_decay=0.0),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "DATA_SETS", {**DATA_SETS, "stripes": line})
    monkeypatch.setattr("twolevel.data.config.DATA_SETS", registry.DATA_SETS)
    return calls


def test_a_data_set_is_loaded_through_its_module(stripes):
    config = DataConfig("stripes", batch_size=4, augment=False)
    prepare(config)
    data = load(config, seed=0, device="cpu", data_rank=1, data_size=2)
    assert stripes == ["prepare", "load 1 of 2"]
    assert (data.num_classes, data.image_shape, data.train.steps_per_epoch) == (2, (3, 8, 8), 3)
    images, labels = next(iter(data.train.batches(0)))
    assert len(images) == 2  # this rank's half of the batch
    assert torch.equal(images[:, 0, 0, 0], labels * 2.0 - 1)  # (0 - 0.5) / 0.5 and (1 - 0.5) / 0.5


def test_a_line_that_says_something_else_than_the_module_loads_is_noticed(stripes, monkeypatch):
    wrong = replace(registry.DATA_SETS["stripes"], num_classes=3)
    monkeypatch.setattr("twolevel.data.config.DATA_SETS", {**DATA_SETS, "stripes": wrong})
    with pytest.raises(
        AssertionError, match=r"DATA_SETS\['stripes'\] says .* = \(3, 8\); loaded were \(2, 8\)"
    ):
        load(DataConfig("stripes", batch_size=4), seed=0, device="cpu")


def test_a_line_gives_checks_recipe_and_help(stripes):
    config = TrainConfig(data=DataConfig("stripes", workers=1))
    assert config.data.num_classes == 2 and config.data.image_shape == (3, 8, 8)
    assert config.data.ignored() == ["workers"]
    optimiser = config.optimiser
    assert (optimiser.epochs, optimiser.lr_milestones, optimiser.weight_decay) == (3, (2,), 0.0)
    assert list_of_names(about=True).endswith(" or stripes (two classes)")
    with pytest.raises(UserError, match="did you mean stripes"):
        DataConfig("stripe")


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_module_has_what_the_registry_asks_of_it(name):
    module = loading._module(DataConfig(name))
    assert callable(module.prepare) and callable(module.load)
