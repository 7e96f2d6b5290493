"""Recipes: the settings of a run that are not given (imports no torch)."""

from dataclasses import asdict, replace
from typing import Any

from twolevel.data.config import DataConfig
from twolevel.data.registry import Recipe
from twolevel.errors import UserError
from twolevel.settings import RecipeName

# Huang et al., "CondenseNet", section 4: 0.1, to 0 by a cosine; on CIFAR batches of 64 and 300 epochs, on ImageNet 256
# and 120. Su et al., "Dynamic Group Convolution", section 4: the same, but 0.05 on MobileNetV2; they name 150 and 300
# epochs of CIFAR and 120 to 150 of ImageNet.
_COSINE = {"update": "nesterov", "lr_schedule": "cosine", "lr_milestones": None, "weight_decay": 1e-4}

# Settings that only one value of another has a use for.
ONLY_WITH = {"lr_milestones": ("lr_schedule", "multistep"), "lr_matrices": ("update", "muon")}

# What few epochs ask for: orthogonalised updates (Jordan et al., "Muon", 2024), a rate that rises and falls on straight
# lines (Smith and Topin, arXiv 1708.07120), smoothed labels, and flips that alternate (Jordan, arXiv 2404.00498).
# `twolevel grid fast-small` trains with and without each.
FAST = Recipe(
    epochs=12,
    batch_size=128,
    update="muon",
    learning_rate=0.1,
    lr_matrices=0.1,
    lr_schedule="linear",
    warmup_epochs=1.0,
    weight_decay=5e-4,
    label_smoothing=0.1,
    flip="alternating",
)


def recipe_of(name: RecipeName, data: DataConfig, model: str, conv: str) -> Recipe:
    """The recipe of this name for a network of such convolutions. Raises UserError where there is none."""
    published = data.data_set.recipe
    if name == "fast":
        if data.data_set.image_size != 32 or not model.startswith(("wrn-", "resnet")):
            raise UserError(
                f"recipe=fast is of WRN and ResNet on CIFAR, not of {model} on {data.data}; use paper"
            )
        return FAST
    if conv not in ("dgc", "lgc"):
        return published
    small = data.data_set.image_size == 32
    sizes = {"batch_size": 64, "epochs": 300} if small else {"batch_size": 256, "epochs": 120}
    rate = 0.05 if conv == "dgc" and model.startswith("mobilenetv2") else 0.1
    return replace(published, **_COSINE, **sizes, learning_rate=rate)


def fill_in(settings: Any, recipe: Recipe) -> None:
    """Give the settings of a section that are None the values that the recipe has for them."""
    for name, value in asdict(recipe).items():
        of, only = ONLY_WITH.get(name, (name, None))
        missing = hasattr(settings, name) and getattr(settings, name) is None
        if missing and getattr(settings, of) in (None, only):
            setattr(settings, name, value)
