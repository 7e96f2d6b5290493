"""Pictures of a run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def training_curve(steps: list[dict[str, Any]], epochs: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Draw loss and error over epochs, from the records of a run's steps and of at least one epoch."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    when = [e["epoch"] for e in epochs]
    steps_per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    by_step = [s["step"] / steps_per_epoch for s in steps], [s["loss"] for s in steps]
    left.plot(*by_step, color="tab:blue", lw=1, alpha=0.4, label="train, by step")
    for axes, what in ((left, "loss"), (right, "error")):
        for split, color in (("train", "tab:blue"), ("test", "tab:orange")):
            axes.plot(when, [e[f"{split}_{what}"] for e in epochs], marker=".", color=color, label=split)
        if f"ema_test_{what}" in epochs[0]:
            averaged = [e[f"ema_test_{what}"] for e in epochs]
            axes.plot(
                when, averaged, marker=".", color="tab:green", label="test, moving average of the weights"
            )
        axes.grid(alpha=0.3)
        axes.legend()
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    right.set(xlabel="epoch", ylabel="error, %", title="Error", ylim=(0, None))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path
