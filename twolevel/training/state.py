"""Everything that a run needs to go on where it stopped."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import AveragedModel

from twolevel import __version__
from twolevel.distributed import sync_buffers
from twolevel.nn import layout_of
from twolevel.streams import stream
from twolevel.training import checkpoint
from twolevel.training.config import TrainConfig


@dataclass
class TrainState:
    """The network and the state of its training. `step` counts from the start of the run.

    Batches, crops and learning rate are functions of the step, so the position in the epoch is all that
    has to be kept of them. `epoch_sums` are the sums (loss, correct, images) of the epoch so far, `epoch_seconds` how
    long it took, in all processes, and `untested` the record of an epoch that was trained and not tested yet.
    """

    config: TrainConfig
    model: nn.Module
    optimiser: torch.optim.Optimizer
    mesh: DeviceMesh
    steps_per_epoch: int
    num_classes: int
    ema: AveragedModel | None = None
    step: int = 0
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    epoch_seconds: float = 0.0
    untested: dict[str, Any] | None = None
    test_error: float | None = None
    """Percent, after this very step; None where it was not tested."""
    saved: int | None = None
    """The step of the checkpoint that this process began to write, or read, last: all of this state is in it."""

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def position(self) -> int:
        return self.step % self.steps_per_epoch

    def tensors(self) -> dict[str, Tensor]:
        """Parts of `model.*`, `momentum.*`, `ema.*` by their single-process names, and this rank's random state."""
        parts = named_parts("model", self.model, self.mesh)
        momentum = {
            name: self.optimiser.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if "momentum_buffer" in self.optimiser.state.get(parameter, ())
        }
        layout = layout_of(self.model)
        parts |= {f"momentum.{k}": checkpoint.as_part(k, t, layout, self.mesh) for k, t in momentum.items()}
        if self.ema is not None:
            parts |= named_parts("ema", self.ema.module, self.mesh)
        return parts | {f"random.{dist.get_rank()}.{k}": t for k, t in self._random_states().items()}

    def save(self, saver: checkpoint.Saver) -> None:
        """Begin to write a checkpoint of this step; every rank calls it. Raises as `Saver.save` does."""
        for model in (self.model, self.ema):
            if model is not None:
                sync_buffers(model, self.mesh)
        state = {
            "version": __version__,
            "config": self.config.to_dict(),
            "num_classes": self.num_classes,
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "epoch_sums": self.epoch_sums,
            "epoch_seconds": self.epoch_seconds,
            "untested": self.untested,
            "test_error": self.test_error,
            "ranks": dist.get_world_size(),
        }
        saver.save(self.step, self.tensors(), state)
        self.saved = self.step

    def load(self, path: Path) -> None:
        """Load the state of a checkpoint, whatever the number of ranks that wrote it."""
        state = checkpoint.read_state(path)
        if self.config.optimiser.momentum:
            for parameter in self.model.parameters():
                self.optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        tensors = self.tensors()
        random = {k for k in tensors if k.startswith("random.")}
        same_ranks = state["ranks"] == dist.get_world_size() and random <= checkpoint.shapes(path).keys()
        if not same_ranks:
            # Ranks, or their devices, are other ones now: each starts a stream of its own.
            tensors = {k: t for k, t in tensors.items() if k not in random}
            seed_ranks(self.config.run.seed, state["step"])
        checkpoint.load(path, tensors)
        if same_ranks:
            self._restore_random(tensors)
        if self.ema is not None:
            self.ema.n_averaged.fill_(state["step"])
        self.step = self.saved = state["step"]
        self.epoch_sums = state["epoch_sums"]
        self.epoch_seconds = state.get("epoch_seconds", 0.0)
        self.untested = state.get("untested")

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _random_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device().type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device())
        return states

    def _restore_random(self, tensors: dict[str, Tensor]) -> None:
        torch.set_rng_state(tensors[f"random.{dist.get_rank()}.cpu"])
        if self._device().type == "cuda":
            torch.cuda.set_rng_state(tensors[f"random.{dist.get_rank()}.cuda"], self._device())


def named_parts(prefix: str, model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """A network's parameters and buffers as parts of the whole, under `prefix.`."""
    layout = layout_of(model)
    return {f"{prefix}.{k}": checkpoint.as_part(k, t, layout, mesh) for k, t in model.state_dict().items()}


def seed_ranks(seed: int, step: int) -> None:
    """Give every rank its own stream for what must differ between ranks, such as dropout."""
    torch.manual_seed(stream("rank", seed, step, dist.get_rank()).initial_seed())
