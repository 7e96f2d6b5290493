"""What shows the records of a run beside its own files: TensorBoard, MLflow, Weights & Biases, Trackio.

A tracker is a file. It may fail and be slow: `aside.py` tells it in a thread of its own. Rank 0 alone has any.
"""

from collections.abc import Callable, Iterable

from twolevel.training.trackers.base import Tracker
from twolevel.training.trackers.mlflow import MLflow
from twolevel.training.trackers.tensorboard import TensorBoard
from twolevel.training.trackers.trackio import Trackio
from twolevel.training.trackers.wandb import WeightsAndBiases

TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def create(names: Iterable[str]) -> list[Tracker]:
    """The trackers of these names of `twolevel.settings.TRACKERS`; nothing is told yet, and nothing written.

    Raises UserError where a package is missing, or what it needs to begin, in one line that names what to do.
    """
    return [TRACKERS[name]() for name in names if name != "none"]
