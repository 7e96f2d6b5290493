"""Configuration: the published recipe, round trips, and one line for what cannot be honoured."""

import math
from dataclasses import asdict, fields
from typing import get_args

import pytest

from twolevel.data.config import DataConfig
from twolevel.errors import UserError
from twolevel.training.config import (
    MeshConfig,
    ModelConfig,
    OptimiserConfig,
    RuleConfig,
    RunConfig,
    TrainConfig,
)


def test_cifar_gets_the_papers_recipe():
    rule = TrainConfig(data=DataConfig(data="cifar10")).optimiser
    assert (rule.epochs, rule.lr_milestones, rule.weight_decay) == (200, (60, 120, 160), 5e-4)
    assert (rule.learning_rate, rule.momentum, rule.lr_gamma) == (0.1, 0.9, 0.1)


def test_imagenet_gets_its_own():
    rule = TrainConfig(data=DataConfig(data="imagenet")).optimiser
    assert (rule.epochs, rule.lr_milestones, rule.weight_decay) == (90, (30, 60), 1e-4)


def test_dgc_gets_its_papers():
    rules = [
        TrainConfig(data=DataConfig(data=data), model=ModelConfig(model=model, conv="dgc"))
        for data, model in (("cifar10", "condensenet-50"), ("imagenet", "mobilenetv2"))
    ]
    assert [rule.data.batch_size for rule in rules] == [64, 256]
    assert [rule.optimiser.learning_rate for rule in rules] == [0.1, 0.05]
    for rule in rules:
        assert (rule.optimiser.update, rule.optimiser.lr_schedule) == ("nesterov", "cosine")
        assert (rule.optimiser.lr_milestones, rule.optimiser.weight_decay) == (None, 1e-4)


@pytest.mark.parametrize(
    ("data", "model", "sizes"),
    [
        ("cifar10", "condensenet-86", (64, 300)),
        ("imagenet", "condensenet-74", (256, 120)),
        ("imagenet", "mobilenetv2", (256, 120)),
    ],
)
def test_lgc_gets_its_papers(data, model, sizes):
    rule = TrainConfig(data=DataConfig(data=data), model=ModelConfig(model=model, conv="lgc"))
    assert (rule.data.batch_size, rule.optimiser.epochs) == sizes
    assert (rule.optimiser.update, rule.optimiser.lr_schedule) == ("nesterov", "cosine")
    assert (rule.optimiser.learning_rate, rule.optimiser.weight_decay) == (0.1, 1e-4)


def test_the_fast_recipe_is_a_start_that_settings_change():
    fast = TrainConfig(optimiser=OptimiserConfig(recipe="fast"))
    assert (fast.optimiser.update, fast.optimiser.lr_schedule, fast.data.flip) == (
        "muon",
        "linear",
        "alternating",
    )
    changed = OptimiserConfig(recipe="fast", update="nesterov", lr_schedule="multistep", lr_milestones=(3,))
    rule = TrainConfig(data=DataConfig(flip="random"), optimiser=changed)
    assert (rule.optimiser.lr_matrices, rule.optimiser.lr_milestones, rule.data.flip) == (
        None,
        (3,),
        "random",
    )


def test_a_file_from_before_updates_had_names_is_read():
    sections = TrainConfig().to_dict()
    sections["optimiser"] |= {"nesterov": True}
    del sections["optimiser"]["update"]
    assert TrainConfig.from_dict(sections).optimiser.update == "nesterov"


def test_what_is_given_is_kept():
    given = OptimiserConfig(epochs=7, lr_milestones=(2,), weight_decay=0.0)
    rule = TrainConfig(optimiser=given).optimiser
    assert (rule.epochs, rule.lr_milestones, rule.weight_decay) == (7, (2,), 0.0)


def test_a_configuration_survives_its_file():
    config = TrainConfig(
        model=ModelConfig(model="wrn-16-2", conv="gc", groups=8),
        optimiser=OptimiserConfig(lr_schedule="cosine", ema_decay=0.999, clip_norm=1.0),
        mesh=MeshConfig(data_parallel=2),
        run=RunConfig(seed=3, precision="bf16"),
    )
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_setting_names_are_unique_across_sections():
    sections = asdict(TrainConfig())
    assert len(TrainConfig().flat()) == sum(len(section) for section in sections.values())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimiserConfig(learning_rate=0), "learning_rate=0 is invalid; use a positive number"),
        (lambda: OptimiserConfig(momentum=1.0), "momentum=1.0"),
        (lambda: OptimiserConfig(momentum=0, update="nesterov"), "update=nesterov"),
        (lambda: OptimiserConfig(ema_decay=1.5), "ema_decay=1.5"),
        (lambda: OptimiserConfig(update="nesterov", lr_matrices=0.1), "lr_matrices=0.1 is of update=muon"),
        (
            lambda: TrainConfig(optimiser=OptimiserConfig(update="muon")),
            "update=muon needs --lr-matrices",
        ),
        (
            lambda: TrainConfig(optimiser=OptimiserConfig(recipe="fast", lr_schedule="multistep")),
            "needs --lr-milestones",
        ),
        (
            lambda: TrainConfig(data=DataConfig(data="imagenet"), optimiser=OptimiserConfig(recipe="fast")),
            "recipe=fast is of WRN and ResNet on CIFAR, not of wrn-28-10 on imagenet",
        ),
        (
            lambda: DataConfig(data="imagenet", flip="alternating"),
            "flip=alternating is not for data=imagenet",
        ),
        (lambda: OptimiserConfig(accumulate=0), "accumulate=0"),
        (lambda: OptimiserConfig(precise_batch_norm=-1), "precise_batch_norm=-1"),
        (lambda: OptimiserConfig(lr_milestones=(5, 3)), "lr_milestones"),
        (lambda: OptimiserConfig(lr_schedule="cosine", lr_milestones=(3,)), "leave them out with cosine"),
        (
            lambda: OptimiserConfig(lr_milestones=(-3, 5)),
            "lr_milestones=(-3, 5) is invalid; use a rising list",
        ),
        (lambda: OptimiserConfig(lr_gamma=-1), "lr_gamma=-1 is invalid; use a positive number"),
        (lambda: OptimiserConfig(lr_gamma=0), "lr_gamma=0 is invalid; use a positive number"),
        (
            lambda: MeshConfig(timeout=0),
            "timeout=0 is invalid; use a positive number of seconds, at most 1e+09",
        ),
        (lambda: MeshConfig(timeout=1e300), "timeout=1e+300 is invalid; use a positive number of seconds"),
        (lambda: MeshConfig(data_parallel=0), "data_parallel=0 is invalid; use 1 or more"),
        (lambda: MeshConfig(group_parallel=-2), "group_parallel=-2 is invalid; use 1 or more"),
        (lambda: ModelConfig(conv="shuffle", permutation_seed=2**64), "use an integer of 64 bits"),
        (lambda: RunConfig(log_steps=0), "log_steps=0"),
        (lambda: RunConfig(forms={"a layer": "overlapped"}), "'overlapped' for layers of a layer is invalid"),
        (
            lambda: RunConfig(forms={"a layer": "dense magic"}),
            "'dense magic' for layers of a layer is invalid",
        ),
        (lambda: ModelConfig(conv="gc", schedule="fused"), "schedule=fused"),
        (lambda: ModelConfig(conv="gc", saliency_bound=6.0), "saliency_bound=6.0 is of conv=dgc"),
        (lambda: ModelConfig(conv="gc", condensation=4), "condensation=4 is of conv=lgc"),
        (lambda: OptimiserConfig(momentum_coarse=1.0), "momentum_coarse=1.0 is invalid"),
        (lambda: OptimiserConfig(momentum=0, momentum_coarse=0.5), "needs momentum above 0"),
        (lambda: ModelConfig(conv="lgc", condensation=0), "condensation=0 is invalid; use 1 or more"),
        (lambda: RuleConfig(group_lasso=-1.0), "group_lasso=-1.0 is invalid; use 0 or more"),
        (lambda: ModelConfig(conv="dgc", saliency_bound=0.0), "saliency_bound=0.0"),
        (lambda: ModelConfig(conv="dgc", saliency_bound=float("inf")), "saliency_bound=inf"),
        (lambda: TrainConfig(optimiser=OptimiserConfig(epochs=2, warmup_epochs=3)), "warmup_epochs=3"),
        (lambda: TrainConfig(optimiser=OptimiserConfig(accumulate=3)), "batch_size=128 does not divide"),
        (lambda: TrainConfig.from_dict({"model": {"modle": "x"}}), "'modle'"),
        (lambda: TrainConfig.from_dict({"model": 3}), "3"),
    ],
)
def test_what_cannot_be_honoured_is_named(build, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        build()
    assert message in str(raised.value)


SECTIONS = {"model": ModelConfig, "optimiser": OptimiserConfig, "rules": RuleConfig, "mesh": MeshConfig}
NUMBERS = [
    (s, f.name) for s, cls in SECTIONS.items() for f in fields(cls) if float in (f.type, *get_args(f.type))
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_every_number_is_finite(section, name, value):
    conv = {"conv": "dgc"} if section == "model" else {}
    with pytest.raises(UserError, match=f"^{name}={value} is invalid; use a finite number$"):
        SECTIONS[section](**{name: value}, **conv)


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("optimiser", "lr_schedule", "step", "'multistep' or 'cosine'"),
        ("optimiser", "epochs", 1.5, "int"),
        ("optimiser", "learning_rate", "0.1", "float"),
        ("optimiser", "momentum", None, "float"),
        ("optimiser", "accumulate", True, "int"),
        ("optimiser", "lr_milestones", [1, "2"], "tuple"),
        ("run", "precision", "fp16", "'float32'"),
        ("data", "download", "yes", "bool"),
    ],
)
def test_a_file_with_a_value_of_another_type_is_refused(section, name, value, words):
    sections = TrainConfig().to_dict()
    sections[section][name] = value
    with pytest.raises(UserError, match=name) as raised:
        TrainConfig.from_dict(sections, "run.json")
    assert str(raised.value).startswith(f"run.json: {name}={value!r}") and words in str(raised.value)
