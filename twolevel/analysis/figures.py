"""Pictures of a run."""

import math
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from twolevel.analysis.plots import (
    PALETTE,
    PAPER,
    Series,
    draw_lines,
    from_zero,
    looks_of,
    new_figure,
    one_legend,
    save,
)


def training_curve(steps: list[dict[str, Any]], epochs: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Draw loss and error over epochs, from the records of a run's steps and of at least one epoch."""
    figure, (left, right) = new_figure(1, 2, width=5.5, height=4, theme=PAPER)
    when = [e["epoch"] for e in epochs]
    steps_per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    by_step = [s["step"] / steps_per_epoch for s in steps], [s["loss"] for s in steps]
    left.plot(*by_step, color=PALETTE[0], lw=1, alpha=0.4, label="train, by step")
    names = {"train": "train", "test": "test", "ema_test": "test, moving average of the weights"}
    looks = looks_of(names.values())
    for axes, what in ((left, "loss"), (right, "error")):
        series = {
            name: Series(
                when, [math.nan if e[f"{key}_{what}"] is None else e[f"{key}_{what}"] for e in epochs]
            )
            for key, name in names.items()
            if f"{key}_{what}" in epochs[0]
        }
        draw_lines(axes, series, looks)
        from_zero(axes)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    right.set(xlabel="epoch", ylabel="error, %", title="Error")
    one_legend(figure, columns=4)
    figure.suptitle(title)
    return save(figure, path)
