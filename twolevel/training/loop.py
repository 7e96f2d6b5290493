"""A run, from its settings to its final message; `epoch.py` has the epochs in between."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twolevel import durable
from twolevel.data import Data
from twolevel.distributed.agreement import together
from twolevel.errors import Stopped, UserError
from twolevel.terminal import program
from twolevel.training import checkpoint
from twolevel.training.checkpoint import Retention, Saver
from twolevel.training.config import TrainConfig
from twolevel.training.context import Context, join
from twolevel.training.cudnn import autotuned
from twolevel.training.curve import draw_curve
from twolevel.training.display import Display, waiting
from twolevel.training.epoch import Epochs
from twolevel.training.forms import ChosenForms, fix_forms
from twolevel.training.graphed import GraphedStep
from twolevel.training.job import Job
from twolevel.training.meter import make_meter
from twolevel.training.metrics import MetricsLog
from twolevel.training.optimiser import make_optimiser
from twolevel.training.output import claim
from twolevel.training.precise_batch_norm import check_number
from twolevel.training.preflight import apply_recompute, check_resumable, check_run
from twolevel.training.profiling import Profiling
from twolevel.training.rehearsal import rehearse
from twolevel.training.rules import rules_for
from twolevel.training.simulation import Simulation, announce, interruptible
from twolevel.training.state import TrainState, seed_ranks
from twolevel.training.step import TrainStep
from twolevel.training.stopping import StopRequest
from twolevel.training.trackers.aside import Aside
from twolevel.training.trackers.base import Tracker
from twolevel.training.watchdog import Watchdog
from twolevel.training.weights import start_from
from twolevel.training.whereabouts import Finder


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Train as configured; every rank calls it with the same configuration.

    Leaves in the output folder `config.json`, `metrics.jsonl`, `epochs.csv`, `checkpoints/`, `curve.png`, and what
    `trackers` write there. Returns the record of the last epoch, None where `max_steps` ends the run
    before the end of one. With `dry_run` it says what the run would be, with `simulate` what steps of one of its ranks
    take: it writes nothing and returns None.

    Raises UserError for what cannot be honoured, and Stopped where a signal asked for an end; both on every rank. On a
    rank that was a spare with mesh=auto it raises SpareEnded in the end.
    """
    context = join(config.mesh, config.flat())
    finder = Finder(replicas=context.mesh["data"].size() > 1)
    try:
        if config.run.dry_run:
            return rehearse(config, context)
        if config.run.simulate is not None:
            return _simulate(config, context)
        with context.watch(finder) as watchdog:
            return _train(config, context, watchdog, finder)
    finally:
        context.close()


def _train(
    config: TrainConfig, context: Context, watchdog: Watchdog | None, finder: Finder
) -> dict[str, Any] | None:
    with together(context.device):
        tracking = check_run(config, context.world, context.mesh)
    job, first, device = Job.of(context.device), context.first, context.device
    restarted = job.goes_on_in(config.output)
    resume = config.run.resume or restarted
    if restarted and first:
        print("restarted by torchrun: going on from the newest checkpoint", flush=True)
    claimed = claim(config.output, resume=resume, first=first, device=device, restarted=restarted)
    with claimed as start, autotuned(device):
        trainer = Trainer(config, context, start, job, watchdog, tracking)
        finder.follow(trainer.placed.model)
        return trainer.run()


def _simulate(config: TrainConfig, context: Context) -> None:
    check_run(config, context.world, context.mesh)
    with interruptible(), autotuned(context.device):
        announce(context)
        trainer = Trainer(config, context, None, Job.of(context.device), None, ())
        parts = (trainer.data, trainer.state, trainer.train_step, trainer.rules, trainer.meter)
        Simulation(context, trainer.placed, *parts, trainer.all_steps).run()


class Trainer:
    """One run on this rank, which goes on from the checkpoint `start` unless that is None."""

    def __init__(
        self,
        config: TrainConfig,
        context: Context,
        start: Path | None,
        job: Job,
        watchdog: Watchdog | None,
        tracking: Sequence[Tracker],
    ):
        self.config, self.context, self.job, self.watchdog = config, context, job, watchdog
        self.tracking = tracking
        recorded = self._recorded_forms(start)
        run, optimiser = config.run, config.optimiser
        dtype = torch.float64 if run.precision == "float64" else torch.float32
        self.data: Data = context.load_data(config.data, run.seed, dtype)
        check_number(optimiser.precise_batch_norm, self.data.train.steps_per_epoch)
        self.strategy = context.strategy(run.precision)
        self.strategy.check_batch(config.data.batch, optimiser.accumulate)
        options = config.model.create_options(self.data.num_classes)
        sync = config.mesh.sync_batch_norm
        self.placed = context.build(
            self.strategy,
            options,
            run.seed,
            self.data.image_shape,
            sync_batch_norm=sync,
            compile=run.compile,
        )
        model = self.placed.model
        apply_recompute(config, model)
        self.transfer = None
        if start is None and run.start_from is not None:
            self.transfer = start_from(run.start_from, model, options, run.seed, context.device)
        self.chosen = self._choose_forms({} if run.remeasure else recorded)
        run.forms = recorded | self.chosen.forms
        self.meter = make_meter(self.placed, options, self.data.image_shape, first=context.first)
        self.state = self._make_state(model)
        seed_ranks(run.seed, 0)
        if start is not None:
            self.state.load(start)
        self.rules = rules_for(model, config.rules)
        skip = run.on_not_finite == "skip"
        step = TrainStep(self.placed, self.state.optimiser, optimiser, self.rules, skip=skip)
        self.train_step = GraphedStep(step) if run.cuda_graph else step
        self.all_steps = config.epochs * self.state.steps_per_epoch
        self.last_step = min(self.all_steps, run.max_steps or self.all_steps)

    def _recorded_forms(self, start: Path | None) -> dict[str, str]:
        """The forms that the run's settings or its checkpoint hold; makes sure that the run may go on from that."""
        if start is None:
            return self.config.run.forms
        with together(self.context.device):
            written = checkpoint.read_state(start)
            check_resumable(self.config, written, self.context.world.size)
            return written["config"]["run"].get("forms", {})

    def _choose_forms(self, recorded: dict[str, str]) -> ChosenForms:
        images = self.config.data.batch // self.context.mesh["data"].size()
        batch = images // self.config.optimiser.accumulate // self.strategy.microbatches
        with waiting("choosing kernels", shown=self.context.first):
            return fix_forms(self.placed, batch, self.data.image_shape, recorded)

    def _make_state(self, model: nn.Module) -> TrainState:
        decay, ema = self.config.optimiser.ema_decay, None
        if decay is not None:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        updates = make_optimiser(model, self.config.optimiser)
        steps = self.data.train.steps_per_epoch
        return TrainState(self.config, model, updates, self.context.mesh, steps, self.data.num_classes, ema)

    def run(self) -> dict[str, Any] | None:
        """Run all epochs that are left; returns the record of the last one, None if no epoch ends."""
        state, run, first = self.state, self.config.run, self.context.first
        kept = Retention(run.keep_checkpoints, run.keep_best, run.keep_epochs)
        saver = Saver(self.config.output / "checkpoints", kept)
        self.display = Display(self.last_step, state.step, shown=first)
        metrics_log = None
        profiling = self._profiling()
        with together(self.context.device):
            if first:
                metrics_log = self._begin_records()
        try:
            with self.display, StopRequest(self._save_seconds()) as stop:
                self._opening_words()
                epochs = Epochs(
                    config=self.config,
                    data=self.data,
                    placed=self.placed,
                    state=state,
                    saver=saver,
                    watchdog=self.watchdog,
                    train_step=self.train_step,
                    rules=self.rules,
                    display=self.display,
                    meter=self.meter,
                    metrics=metrics_log,
                    stop=stop,
                    all_steps=self.all_steps,
                    last_step=self.last_step,
                    profiling=profiling,
                )
                last = epochs.run()
        except Stopped:
            if state.saved != state.step:
                state.save(saver)
            saver.finish()
            raise
        finally:
            saver.close()
            if profiling is not None:
                profiling.close()
            if metrics_log is not None:
                metrics_log.close(whole=state.step >= self.all_steps and not state.untested)
        if first:
            self._closing_words(last)
        return last

    def _profiling(self) -> Profiling | None:
        run, context = self.config.run, self.context
        if run.profile is None:
            return None
        rank = context.world.rank
        return Profiling(run.profile, self.config.output, context.device, rank, compiled=run.compile)

    def _begin_records(self) -> MetricsLog:
        """Write what is known before the first step. Raises UserError where the folder takes nothing more."""
        try:
            return self._write_settings()
        except OSError as error:
            raise UserError(f"output={self.config.output} cannot be written: {error.strerror}") from error

    def _write_settings(self) -> MetricsLog:
        output = self.config.output
        durable.write_text(output / "config.json", json.dumps(self.config.to_dict(), indent=1) + "\n")
        self.job.record(output)
        if self.chosen.why:
            durable.write_text(output / "forms.json", json.dumps(self.chosen.why, indent=1) + "\n")
        tracking = [Aside(tracker, output, self.config.to_dict()) for tracker in self.tracking]
        return MetricsLog(output, self.state.step, tracking)

    def _save_seconds(self) -> float | None:
        minutes = self.config.run.checkpoint_minutes
        return None if minutes is None else 60 * minutes

    def _opening_words(self) -> None:
        self.display.say(self._headline())
        if self.transfer is not None:
            self.display.say(f"started from {self.config.run.start_from}: {self.transfer}")
        if self.chosen.measured:
            self.display.say(
                f"chose kernels for {len(self.chosen.forms)} sizes of layers in {self.chosen.seconds:.0f} s "
                f"({self.config.output / 'forms.json'})"
            )

    def _headline(self) -> str:
        config, state = self.config, self.state
        going_on = f", from step {state.step}" if state.step else ""
        return (
            f"{config.model.model} {config.model.conv} groups={config.model.groups} on {config.data.data}: "
            f"{self.strategy} on {self.context.device.type} ({self.context.carriers(state.model)}), "
            f"{self.placed.num_parameters():,} parameters on this one, "
            f"{config.epochs} epochs of {state.steps_per_epoch} steps by the {config.optimiser.recipe} recipe{going_on}"
        )

    def _closing_words(self, last: dict[str, Any] | None) -> None:
        output = self.config.output
        if self.state.step < self.all_steps:
            self.display.say(f"stopped at step {self.state.step} of {self.all_steps}; go on with --resume")
        if last is None:
            if self.state.step >= self.all_steps:
                self.display.say(
                    f"{output} is complete: {self.config.epochs} epochs; raise --epochs to go on"
                )
            return
        curve = draw_curve(output)
        run, file = shlex.quote(str(output)), shlex.quote(f"{output}/model.safetensors")
        self.display.say(
            f"test accuracy {100 - last['test_error']:.2f} % after epoch {last['epoch']}\n"
            + (f"curve       {curve}\n" if curve else "")
            + f"evaluate    {program()} evaluate {run}\n"
            f"export      {program()} export {run} {file}"
        )
