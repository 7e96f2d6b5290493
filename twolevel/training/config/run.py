"""Settings of where results are written and how the run is executed."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from twolevel.errors import UserError
from twolevel.settings import (
    FIXED,
    FREE,
    KERNELS,
    NORMALISERS,
    SCHEDULES,
    STARTING,
    OnNotFinite,
    Precision,
    Recompute,
    TrackerName,
)
from twolevel.training.validation import check, check_least


@dataclass
class RunConfig:
    """Where results are written, and how the run is executed."""

    output: Path | None = field(default=None, metadata=FREE)
    """folder of the run: config.json, metrics, checkpoints, curve; runs/MODEL-CONV-GROUPS-DATA unless given"""

    resume: bool = field(default=False, metadata=STARTING)
    """go on from the newest checkpoint in the output folder; where there is none, begin"""

    start_from: Path | None = field(default=None, metadata=FREE)
    """weights with which a new run begins: a run, a checkpoint or an exported file, of the same network; gc, gc2l and
    bgc take the weights nearest to those of sc or gc. A run that goes on has its own"""

    dry_run: bool = field(default=False, metadata=STARTING)
    """print what the run would be and stop: layers, memory and time as far as they are known; nothing is written"""

    simulate: int | None = field(default=None, metadata=STARTING)
    """take steps of rank 0 of a run of so many ranks on this one device, and print their time and memory: nothing is
    sent or written, and losses mean nothing; --max-steps of them, 20 unless given; with parallel=group"""

    profile: int | None = field(default=None, metadata=STARTING)
    """record so many steps of an epoch, after three others, with torch's profiler: a trace of each rank and a table
    of where the time goes, in OUTPUT/profile; in a graph of torch.compile batch norms have no name"""

    seed: int = field(default=0, metadata=FIXED)
    """seed of initial weights, image order, crops and flips; the same for any number of ranks"""

    precision: Precision = "float32"
    """bf16 is autocast: weights and gradients stay float32"""

    compile: bool = field(default=False, metadata=FREE)
    """run the network through torch.compile"""

    cuda_graph: bool = field(default=False, metadata=FREE)
    """launch a whole training step at once, as a CUDA graph; on GPUs, with parallel=group"""

    recompute: Recompute = field(default="none", metadata=FREE)
    """activations that are computed again in backward instead of being stored: of blocks all but their inputs; the
    same bits in a third of the memory and 1.2 of the time, and nothing is sent twice; with parallel=group"""

    max_steps: int | None = field(default=None, metadata=FREE)
    """stop after this many steps in all, even in the middle of an epoch"""

    checkpoint_steps: int | None = field(default=None, metadata=FREE)
    """write a checkpoint every so many steps, besides the one after each epoch"""

    checkpoint_minutes: float | None = field(default=None, metadata=FREE)
    """write a checkpoint when so many minutes have passed since the last one"""

    fingerprint_steps: int | None = field(default=100, metadata=FREE)
    """steps after which ranks compare, by sums of bits, what they should have alike: step, images, parameters"""

    keep_checkpoints: int = field(default=2, metadata=FREE)
    """newest checkpoints to keep"""

    keep_best: bool = field(default=True, metadata=FREE)
    """also keep the checkpoint of the epoch with the least test error"""

    keep_epochs: int | None = field(default=None, metadata=FREE)
    """also keep the checkpoint after every so many epochs"""

    on_not_finite: OnNotFinite = field(default="stop", metadata=FREE)
    """where loss or gradients are not finite: stop, skip the step (looks at each, which waits for the device), or go
    back to the newest checkpoint and stop only where it comes again"""

    mirrored_test: bool = field(default=False, metadata=FREE)
    """also test with the mean of the outputs for each image and its mirror image; a test then takes twice the time"""

    log_steps: int = field(default=20, metadata=FREE)
    """steps between two records of loss and accuracy; reading them waits for the device"""

    trackers: tuple[TrackerName, ...] = field(default=("tensorboard",), metadata=FREE)
    """what else shows the records, one or several; all but tensorboard are extras: pip install twolevel[NAME]. Each
    takes its server, its key and its project from its own environment variables, as MLFLOW_TRACKING_URI"""

    remeasure: bool = field(default=False, metadata=STARTING)
    """gc2l: measure again which kernels are fastest for each layer, instead of using those that the run recorded"""

    forms: Annotated[dict[str, str], tyro.conf.Suppress] = field(default_factory=dict, metadata=FREE)
    """the form of each size of layer that has several ("schedule kernels"); of config.json, no option"""

    def __post_init__(self):
        self.output = self.output and Path(self.output).expanduser()
        self.start_from = self.start_from and Path(self.start_from).expanduser()
        check_least(
            self,
            1,
            "max_steps",
            "simulate",
            "profile",
            "checkpoint_steps",
            "keep_checkpoints",
            "keep_epochs",
            "log_steps",
            "fingerprint_steps",
        )
        if self.profile is not None and self.cuda_graph:
            raise UserError(
                f"profile={self.profile} is invalid with --cuda-graph, whose replays have no names; "
                "leave one of them out"
            )
        if self.simulate is not None:
            self._check_simulated()
        self.trackers = tuple(self.trackers)
        alone = "none" not in self.trackers or len(self.trackers) == 1
        check(
            self,
            "trackers",
            alone and len({*self.trackers}) == len(self.trackers),
            "each once, or none alone",
        )
        positive = self.checkpoint_minutes is None or 0 < self.checkpoint_minutes < math.inf
        check(self, "checkpoint_minutes", positive, "a positive number")
        for title, form in self.forms.items():
            schedule, _, kernels = form.partition(" ")
            of_norm = schedule == "normalise" and kernels in NORMALISERS
            if not of_norm and (schedule not in SCHEDULES or kernels not in KERNELS):
                raise UserError(
                    f"forms: {form!r} for layers of {title} is invalid; use a schedule and kernels, like "
                    "'overlapped grouped'"
                )

    def _check_simulated(self) -> None:
        """Raise UserError for what takes no step, goes on from a checkpoint, or writes."""
        for name in ("dry_run", "resume", "profile"):
            if getattr(self, name):
                raise UserError(
                    f"simulate={self.simulate} is invalid with --{name.replace('_', '-')}: it takes steps of its "
                    "own, and reads and writes nothing of a run; leave one of them out"
                )
