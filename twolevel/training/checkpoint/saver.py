"""Writing checkpoints while training goes on."""

import threading
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from twolevel import durable
from twolevel.distributed.agreement import together
from twolevel.errors import NotFinite, UserError
from twolevel.training.checkpoint import folders
from twolevel.training.checkpoint.retention import Retention
from twolevel.training.checkpoint.write import write

# Of what ranks say to each other while they write. A rank that is gone ends it at once; a slow disk must not.
PATIENCE = timedelta(days=1)


class Saver:
    """Writes the checkpoints of a run under `root`, one at a time, in a thread that talks to those of other ranks.

    Every rank makes the same calls. Training waits for a copy of the tensors in host memory, and for the checkpoint
    before where that is still being written. One that cannot be written is warned of, and the run goes on; `finish`
    raises where that was the last.
    """

    def __init__(self, root: Path, retention: Retention):
        self.root, self.retention = root, retention
        self._device = root.parent.stat().st_dev
        self._thread: threading.Thread | None = None
        self._not_finite: NotFinite | None = None
        self._failed: Exception | None = None
        self._group: dist.ProcessGroup | None = None
        if dist.get_world_size() > 1:
            # Of its own: collectives of two threads must not meet in one.
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            assert isinstance(group, dist.ProcessGroup)  # of all ranks, so of this one
            self._group = group

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write the checkpoint of a step, once the one before is written.

        Raises NotFinite, on every rank, where weights or momentum in the one before were not finite.
        """
        self._wait()
        copies = {name: _on_host(tensor) for name, tensor in tensors.items()}
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, state), name="twolevel checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises UserError, on every rank, where it could not be, and NotFinite where weights or momentum in it were not
        finite.
        """
        self._wait(last=True)

    def close(self) -> None:
        """Wait for what is being written, whatever becomes of it."""
        self._join()
        self._not_finite = self._failed = None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _wait(self, *, last: bool = False) -> None:
        self._join()
        if self._not_finite is not None:
            error, self._not_finite = self._not_finite, None
            raise error
        failed, self._failed = self._failed, None
        if failed is None:
            return
        if last or not isinstance(failed, UserError):
            raise failed
        warnings.warn(f"{failed}; the run goes on and tries again", stacklevel=2)

    def _check_place(self) -> None:
        """Raise UserError where a checkpoint would be written to another file system than the run's."""
        run = self.root.parent
        there = durable.existing(run)
        if there.stat().st_dev != self._device and not (run / "config.json").exists():
            raise UserError(f"cannot write to {run}: its file system is gone; mount it again")

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            try:
                with together(group=self._group):
                    _require_finite(step, tensors)
            except UserError as error:
                self._not_finite = NotFinite(str(error))
                return
            with together(group=self._group):
                if dist.get_rank() == 0:
                    self._check_place()
            write(folders.folder(self.root, step), tensors, state, group=self._group)
            if dist.get_rank() == 0:
                self.retention.prune(self.root, step)
        except Exception as error:  # a rank that is gone, and what `write` says
            self._failed = error


def _on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy, which the next step leaves as it is."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()


def _require_finite(step: int, tensors: dict[str, Tensor]) -> None:
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in floating.values()]
    # By NumPy, in this thread alone: torch would start a pool of threads for it, beside that of the training.
    bad = [name for name, part in zip(floating, parts, strict=True) if not np.isfinite(part.numpy()).all()]
    if bad:
        raise UserError(
            f"{len(bad)} tensors are not finite after step {step}, {bad[0]} among them, and were not saved; "
            "try a lower --learning-rate, a --warmup-epochs, or a --clip-norm"
        )
