"""The error of networks that start from the weights nearest to those of a dense one, against starting anew.

    python -m benchmarks finetune --data-root ROOT

For each seed a dense network is trained, then two networks of another kind for fewer or as many epochs, by the same
recipe: one with `--start-from` the dense one, one drawn anew. All are ordinary runs of `twolevel train` in a folder; a
run that has all its epochs there is not repeated, and one that was stopped goes on.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from twolevel.grids.cases import spread
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


def errors_of(settings: Settings, name: str, epochs: int, *options: object) -> list[float]:
    """The test errors of a run after each of its epochs; it is trained unless it has them all."""
    folder = settings.folder / name
    if len(list(metrics.read(folder, "epoch"))) < epochs:
        shared = ["--model", settings.model, "--data", settings.data, "--data-root", settings.data_root]
        words = [*shared, "--recipe", settings.recipe, "--epochs", epochs, *options]
        words += ["--output", folder, "--trackers", "none"]
        resume = ["--resume"] if (folder / "config.json").exists() else []
        command = [sys.executable, "-m", "twolevel", "train", *map(str, words), *resume]
        subprocess.run(command, check=True)
    return [epoch["test_error"] for epoch in metrics.read(folder, "epoch")]


def measure(settings: Settings) -> dict[str, Any]:
    """Test errors after every epoch of each peer, by seed."""
    errors: dict[str, dict[int, list[float]]] = {"dense": {}, "nearest": {}, "anew": {}}
    other = ["--conv", settings.conv, "--groups", settings.groups]
    for seed in settings.seeds:
        runs = {
            "dense": (settings.dense_epochs, ["--conv", "sc"]),
            "nearest": (settings.epochs, [*other, "--start-from", settings.folder / f"dense-{seed}"]),
            "anew": (settings.epochs, other),
        }
        for peer, (epochs, options) in runs.items():
            errors[peer][seed] = errors_of(settings, f"{peer}-{seed}", epochs, *options, "--seed", seed)
        print(table(errors), flush=True)
    saved = [errors["anew"][seed][-1] - errors["nearest"][seed][-1] for seed in settings.seeds]
    mean, deviation = spread(saved)
    return {
        "errors": errors,
        "difference": {"mean": mean, "deviation": deviation if len(saved) > 1 else None},
    }


def table(errors: dict[str, dict[int, list[float]]]) -> str:
    """The mean test error after every epoch, and its deviation after the last."""
    rows = [["test error, %", "seeds", "after each epoch", "", "", ""]]
    for peer, by_seed in errors.items():
        *_, last = found = [spread(list(of_one)) for of_one in zip(*by_seed.values(), strict=True)]
        cells = [f"{mean:.2f}" for mean, _ in found]
        if len(by_seed) > 1:
            cells[-1] += f" +- {last[1]:.2f}"
        rows.append([peer, str(len(by_seed)), *cells])
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
