"""TensorBoard: event files in the folder `tensorboard/` of the run, for `tensorboard --logdir`."""

import threading

from twolevel.training.trackers.base import Tracked


class TensorBoard:
    """Steps that are made again take the place of the old ones."""

    name = "tensorboard"
    rewinds = True

    def __init__(self):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.writer, self.board = SummaryWriter, None
        self._hook = threading.excepthook

    def begin(self, run: Tracked) -> None:
        self.folder = str(run.output / "tensorboard")
        self._hook, threading.excepthook = threading.excepthook, self._in_thread
        self._open(run.start)

    def _open(self, start: int) -> None:
        self.board = self.writer(self.folder, purge_step=start + 1 if start else None)

    def record(self, step: int, values: dict[str, float]) -> None:
        assert self.board is not None
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        assert self.board is not None
        self.board.close()
        self._open(step)

    def close(self, *, whole: bool) -> None:
        try:
            if self.board is not None:
                self.board.close()
        finally:
            if threading.excepthook == self._in_thread:
                threading.excepthook = self._hook

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's thread where a disk fails: the next `record` raises that."""
        of_board = type(failure.thread).__module__.startswith("tensorboard")
        if not (of_board and issubclass(failure.exc_type, OSError)):
            self._hook(failure)
