"""The training loop."""

import json
import math
import shlex
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twolevel.data import Data
from twolevel.distributed import sync_buffers
from twolevel.distributed.agreement import together
from twolevel.errors import Stopped, UserError
from twolevel.terminal import program
from twolevel.training import checkpoint, metrics
from twolevel.training.config import TrainConfig
from twolevel.training.context import Context, join
from twolevel.training.display import Display, waiting
from twolevel.training.evaluate import evaluate
from twolevel.training.forms import ChosenForms, fix_forms
from twolevel.training.graphed import GraphedStep, check_capturable
from twolevel.training.metrics import MetricsLog
from twolevel.training.optimiser import learning_rate, make_sgd
from twolevel.training.output import claim
from twolevel.training.precise_batch_norm import check_number, recompute_statistics
from twolevel.training.preflight import check_kernels, check_resumable, warn_of_ignored
from twolevel.training.rules import copy_choices, rules_for
from twolevel.training.state import TrainState, seed_ranks
from twolevel.training.step import TrainStep
from twolevel.training.stopping import StopRequest

# A batch of test images is a unit of work between two steps; of both tests of an epoch there are fewer than this.
UNITS = 1 << 20


def train(config: TrainConfig) -> dict | None:
    """Carry out a run; every rank calls it with the same configuration.

    Leaves in the output folder `config.json`, `metrics.jsonl`, `epochs.csv`, `tensorboard/`,
    `checkpoints/` and `curve.png`. Returns the record of the last epoch, None where `max_steps` ends the run
    before the end of one.

    Raises UserError for what cannot be honoured, and Stopped where a signal asked for an end; both on every rank.
    """
    ranks = join(config.mesh, config.flat())
    try:
        with together(ranks.device):
            check_kernels(config, ranks.device)
            if config.run.cuda_graph:
                check_capturable(config, ranks.device, ranks.world.backend)
            warn_of_ignored(config, ranks.mesh)
        run = config.run
        with claim(run.output, resume=run.resume, first=ranks.first, device=ranks.device) as start:
            return Trainer(config, ranks, start).run()
    finally:
        ranks.close()


class Trainer:
    """One run on this rank, which goes on from the checkpoint `start` unless that is None."""

    def __init__(self, config: TrainConfig, ranks: Context, start: Path | None):
        self.config, self.ranks = config, ranks
        mesh, run, rule = ranks.mesh, config.run, config.optimiser
        recorded = run.forms
        if start is not None:
            with together(ranks.device):
                written = checkpoint.read_state(start)
                check_resumable(config, written, ranks.world.size)
                recorded = written["config"]["run"].get("forms", {})

        dtype = torch.float64 if run.precision == "float64" else torch.float32
        self.data: Data = ranks.load_data(config.data, run.seed, dtype)
        check_number(rule.precise_batch_norm, self.data.train)
        self.strategy = ranks.strategy(run.precision)
        self.strategy.check_batch(config.data.batch_size, rule.accumulate)
        options = config.model.create_options() | {"num_classes": self.data.num_classes}
        sync = config.mesh.sync_batch_norm
        model = ranks.build(self.strategy, options, run.seed, self.data.image_shape, sync_batch_norm=sync)
        self.chosen = self._choose_forms(model, {} if run.remeasure else recorded)
        run.forms = recorded | self.chosen.forms
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
        self.all_steps = rule.epochs * steps
        self.last_step = min(self.all_steps, run.max_steps or math.inf)
        self.sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)

    def _choose_forms(self, model: nn.Module, recorded: dict[str, str]) -> ChosenForms:
        batch = (
            self.config.data.batch_size // self.ranks.mesh["data"].size() // self.config.optimiser.accumulate
        )
        with waiting("choosing kernels", shown=self.ranks.first):
            return fix_forms(
                model, self.strategy, batch // self.strategy.microbatches, self.data.image_shape, recorded
            )

    def run(self) -> dict | None:
        state, run = self.state, self.config.run
        self.display = Display(self.last_step, state.step, shown=self.ranks.first)
        self.metrics = None
        with together(self.ranks.device):
            if self.ranks.first:
                (run.output / "config.json").write_text(json.dumps(self.config.to_dict(), indent=1) + "\n")
                if self.chosen.why:
                    (run.output / "forms.json").write_text(json.dumps(self.chosen.why, indent=1) + "\n")
                self.metrics = MetricsLog(run.output, state.step)
        last = None
        try:
            with self.display as display, StopRequest() as self.stop:
                display.say(self._headline())
                if self.chosen.measured:
                    display.say(
                        f"chose kernels for {len(self.chosen.forms)} sizes of layers in {self.chosen.seconds:.0f} s "
                        f"({run.output / 'forms.json'})"
                    )
                while state.untested or state.step < self.last_step:
                    last = self._epoch() or last
        except Stopped:
            if state.saved != state.step:
                state.save()
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()
        if self.ranks.first:
            self._closing_words(last)
        return last

    def _epoch(self) -> dict | None:
        """Go on to the end of the epoch and test, or to the last step where that comes before."""
        if not self.state.untested:
            self._train()
            if self.state.position:
                return None
        return self._test()

    def _train(self) -> None:
        state, run = self.state, self.config.run
        epoch, began = state.epoch, time.perf_counter()
        self.interval_began = began
        images_before = state.epoch_sums[2]
        state.model.train()
        logged, rate = True, 0.0
        for images, labels in self.data.train.batches(epoch, state.position):
            if self.stop.due(state.step * UNITS):
                if not logged:
                    self._log(epoch, rate)
                raise self._stopped()
            rate = self._step(images, labels)
            state.step += 1
            saving = run.checkpoint_steps is not None and state.step % run.checkpoint_steps == 0
            stopping = state.step == self.last_step
            ending = state.position == 0
            logged = saving or stopping or ending or state.step % run.log_steps == 0
            if logged:
                self._log(epoch, rate)
            if ending:
                break
            if saving or stopping:
                state.save()
            if stopping:
                return
        loss, right, number = state.epoch_sums
        seconds = time.perf_counter() - began
        state.untested = {
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
            state.untested |= r.end_epoch()
        if state.ema is not None:
            copy_choices(state.model, state.ema.module)

    def _test(self) -> dict:
        """Test what the epoch has trained, record it, and write a checkpoint."""
        state = self.state
        record = dict(state.untested)
        unit = (state.step - 1) * UNITS  # of the epoch's last step
        for index, (prefix, model) in enumerate((("", state.model), ("ema_", state.ema))):
            if model is None:
                continue
            sync_buffers(model, state.mesh)
            if number := self.config.optimiser.precise_batch_norm:
                recompute_statistics(model, self.data.train, record["epoch"] - 1, number, self.strategy)
            first = unit + 1 + index * UNITS // 2

            def pause(batch: int, first: int = first) -> None:
                if self.stop.due(first + min(batch, UNITS // 2 - 2)):  # ALL_BATCHES is the last
                    raise self._stopped()

            tested = evaluate(model, self.data.test, self.strategy, pause)
            if tested.not_finite == tested.images:
                raise UserError(
                    f"no output of the network is finite for any of {tested.images} test images after step "
                    f"{state.step}; nothing of this epoch was saved; try a lower --learning-rate or a --clip-norm"
                )
            record |= tested.record(prefix)
        if self.ranks.first:
            self.metrics.write(record)
            self.display.epoch(record, self.config.optimiser.epochs)
        state.untested = None
        state.save()
        return record

    def _stopped(self) -> Stopped:
        return Stopped(
            f"stopped at step {self.state.step} of {self.all_steps}, which is saved in {self.config.run.output}; "
            "go on with --resume"
        )

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
            f"{self.strategy} on {self.ranks.device.type} ({self.ranks.carriers(state.model)}), "
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
        run, file = shlex.quote(str(output)), shlex.quote(f"{output}/model.safetensors")
        self.display.say(
            f"test accuracy {100 - last['test_error']:.2f} % after epoch {last['epoch']}\n"
            f"curve       {curve}\n"
            f"evaluate    {program()} evaluate {run}\n"
            f"export      {program()} export {run} {file}"
        )
