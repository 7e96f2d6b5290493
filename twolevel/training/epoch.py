"""One epoch of a run after the other: train, test, record, save."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twolevel.data import Data
from twolevel.distributed import sync_buffers
from twolevel.distributed.strategies import Placed
from twolevel.errors import NotFinite, Stopped
from twolevel.training.checkpoint import Saver, newest_good
from twolevel.training.config import TrainConfig
from twolevel.training.display import Display
from twolevel.training.evaluate import evaluate
from twolevel.training.fingerprint import fingerprint
from twolevel.training.graphed import GraphedStep
from twolevel.training.meter import Meter
from twolevel.training.metrics import MetricsLog
from twolevel.training.precise_batch_norm import recompute_statistics
from twolevel.training.profiling import Profiling
from twolevel.training.rules import Rule, copy_choices
from twolevel.training.run_step import take_step
from twolevel.training.state import TrainState
from twolevel.training.step import TrainStep
from twolevel.training.stopping import StopRequest
from twolevel.training.watchdog import Watchdog

# A batch of test images is a unit of work between two steps; of both tests of an epoch there are fewer than this.
UNITS = 1 << 20


@dataclass
class Epochs:
    """The epochs of a run on this rank. `metrics` is None on all ranks but the first.

    `last_step` is the number of steps after which the run ends, at most `all_steps`, those of all its epochs.
    """

    config: TrainConfig
    data: Data
    placed: Placed
    state: TrainState
    saver: Saver
    watchdog: Watchdog | None
    train_step: TrainStep | GraphedStep
    rules: list[Rule]
    display: Display
    meter: Meter
    metrics: MetricsLog | None
    stop: StopRequest
    all_steps: int
    last_step: int
    profiling: Profiling | None = None
    began: float = field(default=0.0, init=False)
    """When the steps began that are not recorded yet."""
    rate: float = field(default=0.0, init=False)
    """The learning rate of the last step."""

    gone_back_to: set[Path] = field(default_factory=set, init=False)

    def __post_init__(self):
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.placed.device)

    def run(self) -> dict[str, Any] | None:
        """Run all epochs that are left, until the last checkpoint is written; returns the record of the last one.

        That is None if no epoch ends.
        """
        last = None
        while True:
            try:
                while self.state.untested or self.state.step < self.last_step:
                    if self.state.untested or self.train():
                        last = self.test()
                self.saver.finish()
                return last
            except NotFinite as error:
                self.go_back(error)

    def go_back(self, error: NotFinite) -> None:
        """Load the newest checkpoint instead of what is not finite; raises `error` where that is not to be done.

        A fault of the hardware does not come again. What does is a matter of the settings.
        """
        state, root = self.state, self.config.output / "checkpoints"
        if self.config.run.on_not_finite != "back":
            raise error
        self.saver.close()
        start = newest_good(root)
        if start is None:
            raise NotFinite(f"{error}; there is no checkpoint to go back to") from error
        if start in self.gone_back_to:
            raise NotFinite(f"{error}; it came again after going back to step {state.saved}") from error
        self.gone_back_to.add(start)
        state.load(start)
        self.sums.zero_()
        if self.metrics is not None:
            self.metrics.rewind(state.step)
        self.display.say(f"{str(error).partition(';')[0]}: went back to step {state.step}")

    def train(self) -> bool:
        """Train to the end of the epoch, or to the last step if that comes first; returns whether the epoch ended."""
        state, run = self.state, self.config.run
        epoch = state.epoch
        self.began = time.perf_counter()
        self.meter.begin()
        state.model.train()
        recorded = True
        for images, labels in self.data.train.batches(epoch, state.position):
            unit = state.step * UNITS
            stopping, saving = self.stop.due(unit), self.stop.save_due(unit)
            if (stopping or saving) and not recorded:
                self.record_steps(epoch)
            if stopping:
                raise self.stopped()
            if saving and state.saved != state.step:
                self.save()
            elif saving:  # written for another reason meanwhile
                self.stop.saved(unit)
            if self.profiling is not None:
                self.say(self.profiling.before_step())
            self.rate = self.step(images, labels)
            state.step += 1
            state.test_error = None
            if (
                self.watchdog is not None
                and run.fingerprint_steps
                and state.step % run.fingerprint_steps == 0
            ):
                self.leave_fingerprint(images, labels)
            saving = run.checkpoint_steps is not None and state.step % run.checkpoint_steps == 0
            stopping = state.step == self.last_step
            ending = state.position == 0
            recorded = saving or stopping or ending or state.step % run.log_steps == 0
            if recorded:
                self.record_steps(epoch)
            if ending:
                break
            if saving or stopping:
                self.save()
            if stopping:
                self.end_profile()
                return False
        self.end_profile()
        self.finish(epoch)
        return True

    def end_profile(self) -> None:
        """A profile is of the steps of one epoch: a test would be in it."""
        if self.profiling is not None:
            self.say(self.profiling.end())

    def say(self, text: str | None) -> None:
        if text is not None:
            self.display.say(text)

    def leave_fingerprint(self, *batch: Tensor) -> None:
        state, parallel = self.state, self.config.mesh.parallel
        assert self.watchdog is not None
        shared = parallel in ("group", "channel")
        numbers = fingerprint(state.model, state.mesh, state.step, batch, shared=shared)
        self.watchdog.leave_fingerprint(state.step, numbers)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One optimiser step on this rank's share of a batch; returns the learning rate. No host wait."""
        sums, rate = take_step(images, labels, self.state, self.train_step, self.rules, self.all_steps)
        self.sums += sums
        if isinstance(self.train_step, TrainStep) and self.train_step.skipped:
            self.display.say(f"step {self.state.step + 1} is skipped: its loss or gradients are not finite")
        return rate

    def record_steps(self, epoch: int) -> None:
        """Record the steps since the last record; waits for the device."""
        state = self.state
        sums = self.placed.total(self.sums)
        self.sums.zero_()
        loss, right, number = sums
        if not math.isfinite(loss):
            raise NotFinite(
                f"the loss is {loss} at step {state.step} with learning_rate={self.rate:g}; "
                "try a lower --learning-rate, a --warmup-epochs, or a --clip-norm"
            )
        state.epoch_sums = [a + b for a, b in zip(state.epoch_sums, sums, strict=True)]
        now = time.perf_counter()
        state.epoch_seconds += now - self.began
        record = {
            "kind": "step",
            "epoch": epoch + 1,
            "step": state.step,
            "loss": loss / number if number else math.nan,  # all steps were skipped
            "error": 100 * (1 - right / number) if number else math.nan,
            "learning_rate": self.rate,
            "images_per_second": number / (now - self.began),
            **self.meter.steps(number, now - self.began),
        }
        self.began = now
        if self.metrics is not None:
            self.metrics.write(record)
            self.display.step(record)

    def finish(self, epoch: int) -> None:
        """Keep a trained epoch's record until it is tested."""
        state = self.state
        loss, right, number = state.epoch_sums
        if not number:
            raise NotFinite(f"every step of epoch {epoch + 1} was skipped: nothing has been learned in it")
        state.untested = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": state.step,
            "train_loss": loss / number,
            "train_error": 100 * (1 - right / number),
            "learning_rate": self.rate,
            "images_per_second": number / state.epoch_seconds,
            "seconds": state.epoch_seconds,
            **self.meter.epoch(number, state.epoch_seconds),
        }
        state.epoch_sums, state.epoch_seconds = [0.0, 0.0, 0.0], 0.0
        for rule in self.rules:
            state.untested |= rule.end_epoch()
        if state.ema is not None:
            copy_choices(state.model, state.ema.module)

    def test(self) -> dict[str, Any]:
        """Test the network that the epoch has trained and its moving average, record the epoch, write a checkpoint."""
        state = self.state
        assert state.untested is not None
        record = dict(state.untested)
        unit = (state.step - 1) * UNITS  # of the epoch's last step
        record |= self.test_network(state.model, record["epoch"] - 1, unit + 1)
        if state.ema is not None:
            record |= self.test_network(state.ema, record["epoch"] - 1, unit + 1 + UNITS // 2, "ema_")
        if self.metrics is not None:
            self.metrics.write(record)
            self.display.epoch(record, self.config.epochs)
        state.untested, state.test_error = None, record["test_error"]
        self.save()
        return record

    def save(self) -> None:
        """Begin to write a checkpoint of this step, with the records that lead to it."""
        if self.metrics is not None:
            self.metrics.sync()
        self.state.save(self.saver)
        self.stop.saved(self.state.step * UNITS)

    def test_network(self, network: nn.Module, epoch: int, first: int, prefix: str = "") -> dict[str, Any]:
        """Test one network; returns its part of the record of `epoch`. `first` is its first batch as a unit of work."""
        sync_buffers(network, self.state.mesh)
        number = self.config.optimiser.precise_batch_norm

        def pause(batch: int) -> None:
            if self.stop.due(first + min(batch, UNITS // 2 - 2)):  # ALL_BATCHES is the last
                raise self.stopped()

        def pause_in_test(batch: int) -> None:
            pause(number + batch)

        if number:
            recompute_statistics(
                self.placed, network, self.data.train, epoch=epoch, number=number, pause=pause
            )
        mirrored = self.config.run.mirrored_test
        tested = evaluate(self.placed, self.data.test, network, mirrored=mirrored, pause=pause_in_test)
        if tested.not_finite == tested.images:
            raise NotFinite(
                f"no output of the network is finite for any of {tested.images} test images after step "
                f"{self.state.step}; nothing of this epoch was saved; try a lower --learning-rate or a --clip-norm"
            )
        return tested.record(prefix)

    def stopped(self) -> Stopped:
        return Stopped(
            f"stopped at step {self.state.step} of {self.all_steps}, which is saved in {self.config.output}; "
            "go on with --resume"
        )
