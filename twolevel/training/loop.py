"""The training loop."""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twolevel.data import Data
from twolevel.distributed import sync_buffers
from twolevel.distributed.agreement import require_equal, together
from twolevel.errors import UserError
from twolevel.training import checkpoint, metrics
from twolevel.training.config import TrainConfig
from twolevel.training.display import Display
from twolevel.training.evaluate import evaluate
from twolevel.training.graphed import GraphedStep, check_capturable
from twolevel.training.metrics import MetricsLog
from twolevel.training.optimiser import learning_rate, make_sgd
from twolevel.training.rules import copy_choices, rules_for
from twolevel.training.setup import (
    Context,
    check_kernels,
    check_resumable,
    claim_output,
    join,
    warn_of_ignored,
)
from twolevel.training.state import TrainState, seed_ranks
from twolevel.training.step import TrainStep
from twolevel.training.stopping import StopRequest


def train(config: TrainConfig) -> dict | None:
    """Carry out a run; every rank calls it with the same configuration.

    Leaves in the output folder `config.json`, `metrics.jsonl`, `epochs.csv`, `tensorboard/`,
    `checkpoints/` and `curve.png`. Returns the record of the last epoch, None where the run stopped
    before the end of one.
    """
    ranks = join(config.mesh, config.flat())
    try:
        return Trainer(config, ranks).run()
    finally:
        ranks.close()


class Trainer:
    """One run on this rank."""

    def __init__(self, config: TrainConfig, ranks: Context):
        self.config, self.ranks = config, ranks
        mesh, run, rule = ranks.mesh, config.run, config.optimiser
        start = checkpoint.newest(run.output / "checkpoints") if run.resume else None
        require_equal("checkpoints to go on from", {"checkpoint": str(start)}, ranks.device)
        with together(ranks.device):
            check_kernels(config, ranks.device)
            if run.cuda_graph:
                check_capturable(config, ranks.device, ranks.world.backend)
            if ranks.first:
                claim_output(config, start)
            if start is not None:
                check_resumable(config, checkpoint.read_state(start)["config"])
            warn_of_ignored(config)

        dtype = torch.float64 if run.precision == "float64" else torch.float32
        self.data: Data = ranks.load_data(config.data, run.seed, dtype)
        self.strategy = ranks.strategy(run.precision)
        self.strategy.check_batch(config.data.batch_size, rule.accumulate)
        options = config.model.create_options() | {"num_classes": self.data.num_classes}
        sync = config.mesh.sync_batch_norm
        model = ranks.build(self.strategy, options, run.seed, self.data.image_shape, sync_batch_norm=sync)
        ema = None
        if rule.ema_decay is not None:
            average = get_ema_multi_avg_fn(rule.ema_decay)
            ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        steps = self.data.train.steps_per_epoch
        self.state = TrainState(config, model, make_sgd(model, rule), mesh, steps, self.data.num_classes, ema)
        seed_ranks(run.seed, 0)
        if start is not None:
            self.state.load(start)
        self.rules = rules_for(model, config.rules)
        if run.compile:
            self.strategy.compile_(model)
        self.train_step = TrainStep(self.strategy, model, self.state.optimiser, rule, self.rules)
        if run.cuda_graph:
            self.train_step = GraphedStep(self.train_step)
        self.alone = ranks.world.size == 1  # asks nobody, so it can at every step
        self.all_steps = rule.epochs * steps
        self.last_step = min(self.all_steps, run.max_steps or math.inf)
        self.sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)

    def run(self) -> dict | None:
        state, run = self.state, self.config.run
        self.display = Display(self.last_step, state.step, shown=self.ranks.first)
        self.metrics = None
        with together(self.ranks.device):
            if self.ranks.first:
                (run.output / "config.json").write_text(json.dumps(self.config.to_dict(), indent=1) + "\n")
                self.metrics = MetricsLog(run.output, state.step)
        last = None
        with self.display as display, StopRequest(self.ranks.device) as self.stop:
            display.say(self._headline())
            while state.step < self.last_step:
                last = self._epoch() or last
        if self.ranks.first:
            self.metrics.close()
            self._closing_words(last)
        return last

    def _epoch(self) -> dict | None:
        """Train to the end of the epoch, test, and write a checkpoint; or stop at the last step before."""
        state, run = self.state, self.config.run
        epoch, began = state.epoch, time.perf_counter()
        self.interval_began = began
        images_before = state.epoch_sums[2]
        state.model.train()
        for images, labels in self.data.train.batches(epoch, state.position):
            rate = self._step(images, labels)
            state.step += 1
            saving = run.checkpoint_steps is not None and state.step % run.checkpoint_steps == 0
            stopping = state.step == self.last_step
            ending = state.position == 0
            logging = saving or stopping or ending or state.step % run.log_steps == 0
            asked = (logging or self.alone) and self.stop.agreed()
            if logging or asked:
                self._log(epoch, rate)
            if ending:
                break
            if saving or stopping or asked:
                state.save()
            if asked:
                raise KeyboardInterrupt
            if stopping:
                return None
        loss, right, number = state.epoch_sums
        seconds = time.perf_counter() - began
        record = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": state.step,
            "train_loss": loss / number,
            "train_error": 100 * (1 - right / number),
            "learning_rate": rate,
            "images_per_second": (number - images_before) / seconds,
            "seconds": seconds,
        }
        state.epoch_sums = [0.0, 0.0, 0.0]
        for r in self.rules:
            record |= r.end_epoch()
        if state.ema is not None:
            copy_choices(state.model, state.ema.module)
        for prefix, model in (("", state.model), ("ema_", state.ema)):
            if model is not None:
                sync_buffers(model, state.mesh)
                tested = evaluate(model, self.data.test, self.strategy)
                record[f"{prefix}test_loss"], record[f"{prefix}test_error"] = tested
        if self.ranks.first:
            self.metrics.write(record)
            self.display.epoch(record, self.config.optimiser.epochs)
        state.save()
        if state.step < self.last_step and self.stop.agreed():
            raise KeyboardInterrupt
        return record

    def _step(self, images: Tensor, labels: Tensor) -> float:
        """One optimiser step on this rank's share of a batch; returns the learning rate. No host wait."""
        state = self.state
        rate = learning_rate(self.config.optimiser, state.step, state.steps_per_epoch)
        self.train_step.set_rate(rate)
        for r in self.rules:
            r.begin_step(state.step / self.all_steps)
        self.sums += self.train_step(images, labels)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
            copy_choices(state.model, state.ema.module)
        return rate

    def _log(self, epoch: int, rate: float) -> None:
        """Read the sums since the last record; waits for the device."""
        state = self.state
        sums = self.strategy.total(self.sums)
        self.sums.zero_()
        loss, right, number = sums
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {state.step} with learning_rate={rate:g}; "
                "try a lower --learning-rate, a --warmup-epochs, or a --clip-norm"
            )
        state.epoch_sums = [a + b for a, b in zip(state.epoch_sums, sums, strict=True)]
        now = time.perf_counter()
        record = {
            "kind": "step",
            "epoch": epoch + 1,
            "step": state.step,
            "loss": loss / number,
            "error": 100 * (1 - right / number),
            "learning_rate": rate,
            "images_per_second": number / (now - self.interval_began),
        }
        self.interval_began = now
        if self.ranks.first:
            self.metrics.write(record)
            self.display.step(record)

    def _headline(self) -> str:
        config, state = self.config, self.state
        going_on = f", from step {state.step}" if state.step else ""
        return (
            f"{config.model.model} {config.model.conv} groups={config.model.groups} on {config.data.data}: "
            f"{self.strategy} on {self.ranks.device.type} ({self.ranks.world.backend}), "
            f"{self.strategy.held(state.model):,} parameters on this one, "
            f"{config.optimiser.epochs} epochs of {state.steps_per_epoch} steps{going_on}"
        )

    def _closing_words(self, last: dict | None) -> None:
        output: Path = self.config.run.output
        if self.state.step < self.all_steps:
            self.display.say(f"stopped at step {self.state.step} of {self.all_steps}; go on with --resume")
        if last is None:
            if self.state.step >= self.all_steps:
                self.display.say(
                    f"{output} is complete: {self.config.optimiser.epochs} epochs; raise --epochs to go on"
                )
            return
        from twolevel.analysis.figures import training_curve  # matplotlib takes a second to import

        steps, epochs = list(metrics.read(output, "step")), list(metrics.read(output, "epoch"))
        curve = training_curve(steps, epochs, output.name, output / "curve.png")
        self.display.say(
            f"test accuracy {100 - last['test_error']:.2f} % after epoch {last['epoch']}\n"
            f"curve       {curve}\n"
            f"evaluate    twolevel evaluate {output}\n"
            f"export      twolevel export {output} {output}/model.safetensors"
        )
