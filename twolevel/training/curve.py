"""The picture of a run's losses and errors."""

import warnings
from pathlib import Path

from twolevel import durable
from twolevel.training import metrics


def draw_curve(output: Path) -> Path | None:
    """The curve of the run in `output`; None where its records or the room for it are gone, of which it warns."""
    from twolevel.analysis.figures import training_curve  # matplotlib takes a second to import

    path = output / "curve.png"
    steps, epochs = list(metrics.read(output, "step")), list(metrics.read(output, "epoch"))
    try:
        if not epochs:
            raise FileNotFoundError(2, f"{metrics.LINES} has no epoch")
        with durable.replacing(path) as made:
            training_curve(steps, epochs, output.name, made)
    except OSError as error:
        warnings.warn(f"{path} is not drawn: {error.strerror or error}", stacklevel=2)
        return None
    return path
