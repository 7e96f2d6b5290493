"""Test errors that were published, in percent: single runs, by data set, network, convolution and groups."""

from twolevel.data.config import DataConfig
from twolevel.grids.cases import Case
from twolevel.training.config.recipes import recipe_of

# Lee, Park, Lee, "Two-level Group Convolution" (arXiv 2110.05060), sections 4.1 to 4.3.
_WRN = {
    "cifar10": {
        "sc": {1: 4.19},
        "gc": {2: 4.61, 4: 5.32, 8: 6.54, 16: 8.33},
        "shuffle": {2: 4.00, 4: 4.21, 8: 4.73, 16: 5.28},
        "flgc": {2: 4.62, 4: 6.16, 8: 9.81, 16: 11.26},
        "gc2l": {2: 4.12, 4: 4.34, 8: 4.79, 16: 4.95},
    },
    "cifar100": {
        "sc": {1: 18.95},
        "gc": {2: 20.77, 4: 24.31, 8: 26.89, 16: 30.81},
        "shuffle": {2: 19.51, 4: 20.38, 8: 21.91, 16: 24.20},
        "flgc": {2: 21.68, 4: 26.33, 8: 30.78, 16: 37.49},
        "gc2l": {2: 19.80, 4: 20.90, 8: 22.32, 16: 23.49},
    },
}
_IMAGENET = {
    "wrn-34-2": {
        "sc": {1: 24.10},
        "gc": {2: 26.75, 4: 30.48, 8: 36.36, 16: 43.18},
        "shuffle": {2: 25.12, 4: 26.84, 8: 29.03, 16: 32.27},
        "flgc": {2: 30.43, 4: 38.30, 8: 45.54, 16: 62.02},
        "gc2l": {2: 25.36, 4: 27.17, 8: 28.43, 16: 29.31},
    },
    "mobilenetv2": {
        "sc": {1: 30.61},
        "gc": {2: 36.96, 4: 42.63, 8: 50.36},
        "shuffle": {2: 36.67, 4: 38.14, 8: 42.75},
        "flgc": {2: 37.98, 4: 44.37, 8: 49.28},
        "gc2l": {2: 33.56, 4: 36.88, 8: 39.16},
    },
}
ERRORS: dict[tuple[str, str], dict[str, dict[int, float]]] = {
    **{(data, "wrn-28-10"): errors for data, errors in _WRN.items()},
    **{("imagenet", model): errors for model, errors in _IMAGENET.items()},
    # WRN-28-k with 200 epochs on 1, 2 and 4 GPUs, Table 2.
    ("cifar10", "wrn-28-40"): {"sc": {1: 3.64}, "gc2l": {2: 3.58, 4: 3.73}},
    ("cifar10", "wrn-28-60"): {"sc": {1: 3.51}, "gc2l": {2: 3.68, 4: 3.91}},
    ("cifar10", "wrn-28-80"): {"sc": {1: 3.77}, "gc2l": {2: 3.75, 4: 4.08}},
    # Huang et al., "CondenseNet" (arXiv 1711.09224), condensation 4.
    ("cifar10", "condensenet-86"): {"lgc": {4: 5.00}},
    ("imagenet", "condensenet-74"): {"lgc": {4: 26.2}},
}
# Su et al., "Dynamic Group Convolution" (arXiv 2007.04242), four heads: the share of channels dropped, and the error.
DGC = {
    ("imagenet", "resnet18"): (0.55, 31.22),
    ("imagenet", "condensenet-74"): (0.75, 25.4),
    ("cifar10", "condensenet-50"): (1 / 3, 5.83),
    ("cifar10", "mobilenetv2-cifar"): (0.65, 5.17),
}


def error_of(case: Case, xi: float | None = None, condensation: int | None = None) -> float | None:
    """The published test error of a case in percent; None where there is none of such a training.

    Of DGC only for the share `xi` of its table, of LGC only for a `condensation` of as many as groups; each by default
    that of the case.
    """
    published = recipe_of("paper", DataConfig(data=case.data), case.model, case.conv)
    whole = case.recipe == "paper" and case.epochs == published.epochs and case.representatives == 1
    varied = dict(case.variant)
    if not whole or varied.keys() - {"xi", "condensation", "recipe", "epochs"}:
        return None
    if varied.get("condensation", condensation) not in (None, case.groups):
        return None
    if case.conv == "dgc":
        share, error = DGC.get((case.data, case.model), (None, None))
        asked = varied.get("xi", xi)
        return error if share is not None and asked is not None and abs(asked - share) < 1e-9 else None
    return ERRORS.get((case.data, case.model), {}).get(case.conv, {}).get(case.groups)
