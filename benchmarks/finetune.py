"""The error of networks that start from the weights nearest to those of a dense one, against starting anew.

    python -m benchmarks finetune --data-root ROOT

For each seed a dense network is trained, then two networks of another kind for fewer or as many epochs, by the same
recipe: one with `--start-from` the dense one, one drawn anew. All are ordinary runs of `twolevel train` in a folder; a
run that is complete there is not repeated, and one that was stopped goes on.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from twolevel.training import metrics

COMMAND = "python -m benchmarks finetune"


@dataclass
class Settings:
    """Fine-tune from nearest weights and anew, on CIFAR-10."""

    data_root: Path
    """folder of the data set"""

    model: str = "wrn-16-2"
    """network, as for `twolevel train`"""

    conv: str = "gc2l"
    """its convolutions: gc, gc2l or bgc"""

    groups: int = 4
    """channel groups"""

    data: str = "cifar10"
    """data set"""

    recipe: str = "fast"
    """recipe of every run"""

    dense_epochs: int = 3
    """of the dense network"""

    epochs: int = 3
    """of the others"""

    seeds: tuple[int, ...] = (0, 1, 2)
    """one run of each peer a seed"""

    folder: Path = Path("runs", "finetune")
    """where the runs are"""

    output: Path = report.RESULTS / "finetune.json"
    """file to write"""


def train(settings: Settings, name: str, *options: object) -> list[dict[str, Any]]:
    """The records of the epochs of a run, which is trained unless it is complete."""
    folder = settings.folder / name
    if not (folder / "complete").exists():
        shared = ["--model", settings.model, "--data", settings.data, "--data-root", settings.data_root]
        words = [*shared, "--recipe", settings.recipe, *options, "--output", folder, "--trackers", "none"]
        resume = ["--resume"] if (folder / "config.json").exists() else []
        command = [sys.executable, "-m", "twolevel", "train", *map(str, words), *resume]
        subprocess.run(command, check=True)
        (folder / "complete").touch()
    return list(metrics.read(folder, "epoch"))


def measure(settings: Settings) -> dict[str, Any]:
    """Test errors after every epoch of each peer, by seed."""
    errors: dict[str, dict[int, list[float]]] = {"dense": {}, "nearest": {}, "anew": {}}
    other = ["--conv", settings.conv, "--groups", settings.groups, "--epochs", settings.epochs]
    for seed in settings.seeds:
        dense = f"dense-{seed}"
        runs = {
            "dense": ["--conv", "sc", "--epochs", settings.dense_epochs],
            "nearest": [*other, "--start-from", settings.folder / dense],
            "anew": other,
        }
        for peer, options in runs.items():
            epochs = train(settings, f"{peer}-{seed}", *options, "--seed", seed)
            errors[peer][seed] = [epoch["test_error"] for epoch in epochs]
        print(table(errors), flush=True)
    return {"errors": errors, "difference": summary([[b[-1] - a[-1]] for a, b in pairs(errors)])}


def pairs(errors: dict[str, dict[int, list[float]]]) -> list[tuple[list[float], list[float]]]:
    """Of each seed the errors from nearest weights and anew."""
    return [(errors["nearest"][seed], errors["anew"][seed]) for seed in errors["nearest"]]


def summary(of_seeds: list[list[float]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the last value."""
    last = [values[-1] for values in of_seeds]
    return {"mean": statistics.fmean(last), "deviation": statistics.stdev(last) if len(last) > 1 else None}


def table(errors: dict[str, dict[int, list[float]]]) -> str:
    """The mean test error after every epoch, and its deviation after the last."""
    rows = [["test error, %", "seeds", "after each epoch", "", "", ""]]
    for peer, by_seed in errors.items():
        means = [statistics.fmean(of_one) for of_one in zip(*by_seed.values(), strict=True)]
        found = summary([*by_seed.values()])
        spread = "" if found["deviation"] is None else f" +- {found['deviation']:.2f}"
        rows.append(
            [peer, str(len(by_seed)), *(f"{mean:.2f}" for mean in means[:-1]), f"{means[-1]:.2f}{spread}"]
        )
    return report.table(rows, first=14)


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "finetune", argv)
    facts = report.machine()
    found = measure(settings)
    said = asdict(settings) | {"data_root": "ROOT", "folder": settings.folder.name}
    report.save(
        settings.output,
        f"{COMMAND} --data-root ROOT",
        facts,
        json.loads(json.dumps(said, default=str)),
        found,
    )
