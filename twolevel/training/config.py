"""A training run as nested dataclasses, whose fields are the options of `twolevel train` (imports no torch).

Each field is followed by its help text. Fields that default to None take the published recipe's value for
the data set; `TrainConfig` fills them in, so that the `config.json` of a run holds them all.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro

from twolevel.data.config import DataConfig
from twolevel.errors import UserError
from twolevel.training.validation import check, check_finite, check_least, from_dict

# What the ranks that data_parallel leaves can do, and the convolutions with which they can.
Parallel = Literal["group", "channel", "fsdp", "naive", "gpipe", "1f1b"]
PIPELINES = ("naive", "gpipe", "1f1b")
CONVS = {"channel": ("sc", "gc"), "fsdp": ("sc", "gc", "gc2l")}
CONVS |= dict.fromkeys(PIPELINES, ("sc", "gc", "gc2l", "shuffle"))

LONGEST_TIMEOUT = 1e9  # torch adds it to the time of day in nanoseconds, in 64 bits

# Settings that one kind of convolution alone has.
CONV_OPTIONS = {
    "gc2l": ["schedule", "kernels"],
    "shuffle": ["permutation_seed"],
    "dgc": ["xi", "threshold", "saliency_bound"],
}


@dataclass
class ModelConfig:
    """The network and its convolutions."""

    model: str = "wrn-28-10"
    """network: wrn-D-k, mobilenetv2, resnet18, resnext50, condensenet-50, ...; the README lists them all"""

    conv: str = "gc2l"
    """convolution: sc (standard), gc (group), gc2l (two-level group), shuffle, flgc, dgconv or dgc"""

    groups: int | None = None
    """channel groups, of dgc the heads; 4 unless given (32 for ResNeXt), 1 for sc; dgconv learns them"""

    schedule: Literal["auto", "overlapped", "fused", "dense"] = "auto"
    """gc2l: when its parts are computed, and when the exchange; auto: what is fastest, by a measurement kept on disk"""

    kernels: Literal["auto", "grouped", "products", "depthwise", "native", "narrow", "triton"] = "auto"
    """gc2l: by what its parts are computed: torch (the first three), C on CPUs (native, narrow), Triton"""

    permutation_seed: int | None = None
    """shuffle: a fixed random permutation of the channels from this seed, instead of the shuffle"""

    xi: float = 0.75
    """dgc: share of the input channels that each head drops in the end"""

    threshold: Literal["head", "global"] = "head"
    """dgc: at test time each head drops its least salient channels, or all heads those below one threshold"""

    saliency_bound: float | None = None
    """dgc: kept channels are multiplied by no more than this; the paper has no bound"""

    def __post_init__(self):
        if self.groups is None:
            default = 32 if self.model.startswith("resnext") else 4
            self.groups = 1 if self.conv in ("sc", "dgconv") else default
        check_finite(self)
        seed = self.permutation_seed
        check(self, "permutation_seed", seed is None or -(2**63) <= seed < 2**64, "an integer of 64 bits")
        bound = self.saliency_bound
        check(self, "saliency_bound", bound is None or bound > 0, "a positive number, such as 6")
        check(self, "xi", 0 <= self.xi < 1, "a number from 0 to below 1")
        for conv, names in CONV_OPTIONS.items():
            for name in names:
                value = getattr(self, name)
                if conv != self.conv and value != getattr(type(self), name):
                    raise UserError(
                        f"{name}={value} is of conv={conv}, not of conv={self.conv}; leave it out"
                    )

    def create_options(self) -> dict[str, Any]:
        """Arguments of `twolevel.models.create`, but for the number of classes."""
        options = {"name": self.model, "conv": self.conv, "groups": self.groups}
        return options | {name: getattr(self, name) for name in CONV_OPTIONS.get(self.conv, ())}


@dataclass
class OptimiserConfig:
    """SGD, its schedule, and what is done to loss and gradients."""

    epochs: int | None = None
    """passes over the training set; 200 on CIFAR, 90 on ImageNet"""

    learning_rate: float = 0.1
    """learning rate after the warm-up"""

    lr_schedule: Literal["multistep", "cosine"] = "multistep"
    """multistep: times lr_gamma at each milestone, by epoch; cosine: to 0 at the end, by step"""

    lr_milestones: tuple[int, ...] | None = None
    """epochs after which the rate drops; 60 120 160 on CIFAR, 30 60 on ImageNet"""

    lr_gamma: float = 0.1
    """factor of each drop"""

    warmup_epochs: float = 0.0
    """epochs over which the rate rises linearly from 0"""

    momentum: float = 0.9
    """momentum of SGD"""

    nesterov: bool = False
    """Nesterov's form of the momentum"""

    weight_decay: float | None = None
    """L2 penalty; 5e-4 on CIFAR, 1e-4 on ImageNet"""

    decay_norm: bool = True
    """apply the weight decay to batch norm and biases too"""

    label_smoothing: float = 0.0
    """share of the target that is spread over all classes"""

    accumulate: int = 1
    """parts in which a batch is computed, one after the other; batch norm sees one part"""

    clip_norm: float | None = None
    """scale gradients down to this norm, taken over all ranks"""

    ema_decay: float | None = None
    """also keep and test an exponential moving average of the weights, with this decay a step"""

    precise_batch_norm: int = 0
    """before each test take batch norm's statistics anew, over this many training batches; 0 keeps running averages"""

    def __post_init__(self):
        check_finite(self)
        check_least(self, 1, "epochs", "accumulate")
        check_least(self, 0, "precise_batch_norm")
        check(self, "learning_rate", self.learning_rate > 0, "a positive number")
        check(self, "lr_gamma", self.lr_gamma > 0, "a positive number")
        check(self, "warmup_epochs", self.warmup_epochs >= 0, "0 or more")
        check(self, "momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        check(self, "nesterov", not self.nesterov or self.momentum > 0, "momentum above 0")
        check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0 to below 1")
        check(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "a positive number")
        check(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")
        if self.lr_milestones is not None:
            self.lr_milestones = tuple(self.lr_milestones)
            if self.lr_schedule == "cosine":
                raise UserError(
                    "lr_milestones belong to lr_schedule=multistep; leave them out with cosine (--lr-milestones None)"
                )
            rising = [*self.lr_milestones] == sorted(self.lr_milestones)
            positive = all(milestone >= 1 for milestone in self.lr_milestones)
            check(self, "lr_milestones", rising and positive, "a rising list of epochs from 1 on")


@dataclass
class RuleConfig:
    """What DGC and DGConv add to the loss; other convolutions have no such settings."""

    lasso: float = 1e-5
    """dgc: weight of the saliencies' L1 norm"""

    lasso_form: Literal["paper", "public"] = "paper"
    """dgc: the norm summed over channels (paper) or their mean (the authors' code)"""

    threshold_steps: int = 50
    """dgc with threshold global: last steps of an epoch over which the threshold is taken"""

    complexity_divisor: float | None = None
    """dgconv: wanted complexity as a fraction of dense, 32 in public use; no budget unless given"""

    complexity_exponent: float = 0.02
    """dgconv: exponent of the excess over the wanted complexity"""

    def __post_init__(self):
        check_finite(self)
        check(self, "lasso", self.lasso >= 0, "0 or more")
        check_least(self, 1, "threshold_steps")
        divisor = self.complexity_divisor
        check(self, "complexity_divisor", divisor is None or divisor >= 1, "1 or more")
        check(self, "complexity_exponent", self.complexity_exponent > 0, "a positive number")


@dataclass
class MeshConfig:
    """The ranks: data_parallel x group_parallel of them."""

    parallel: Parallel = "group"
    """what ranks split: groups, filters of dense convolutions (channel), parameters (fsdp) or layers (others)"""

    data_parallel: int = 1
    """replicas, each with its share of the batch; with fsdp all ranks, which need not be said"""

    group_parallel: int | None = None
    """ranks over which each replica's groups, filters or layers are split; all that data_parallel leaves"""

    microbatches: int | None = None
    """gpipe, 1f1b: parts of a batch that follow each other through the layers; one a rank unless given"""

    sync_batch_norm: bool = False
    """take batch statistics over all replicas instead of each rank's own"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""

    exchange: Literal["auto", "group", "mpi"] = "auto"
    """what carries representatives: the ranks' process group (NCCL, Gloo) or mpi4py; auto: mpi under mpirun on CPUs"""

    timeout: float = 600.0
    """seconds after which a rank gives up waiting for the others"""

    def __post_init__(self):
        check_finite(self)
        check_least(self, 1, "data_parallel", "group_parallel", "microbatches")
        in_range = 0 < self.timeout <= LONGEST_TIMEOUT
        check(self, "timeout", in_range, f"a positive number of seconds, at most {LONGEST_TIMEOUT:g}")
        if self.microbatches is not None and self.parallel not in ("gpipe", "1f1b"):
            raise UserError(
                f"microbatches={self.microbatches} are of parallel=gpipe and 1f1b, not of "
                f"parallel={self.parallel}; leave them out"
            )
        if self.parallel == "fsdp" and self.group_parallel not in (None, 1):
            raise UserError(
                f"group_parallel={self.group_parallel} does not do with parallel=fsdp, which shards over all ranks; "
                "leave it out"
            )
        if self.parallel in PIPELINES and self.data_parallel > 1:
            raise UserError(
                f"data_parallel={self.data_parallel} does not do with parallel={self.parallel}, which has no replicas "
                "here; leave it out"
            )

    def check_conv(self, conv: str) -> None:
        """Raise UserError for a kind of convolution that this way to share a network cannot take."""
        convs = CONVS.get(self.parallel, (conv,))
        if conv not in convs:
            raise UserError(
                f"parallel={self.parallel} takes conv={' or '.join(convs)}, not conv={conv}; "
                "use one of these or parallel=group"
            )


@dataclass
class RunConfig:
    """Where results go, and how the run is carried out."""

    output: Path | None = None
    """folder of the run: config.json, metrics, checkpoints, curve; runs/MODEL-CONV-GROUPS-DATA unless given"""

    resume: bool = False
    """go on from the newest checkpoint in the output folder"""

    seed: int = 0
    """of initial weights, order, crops and flips; the same for any number of ranks"""

    precision: Literal["float32", "bf16", "float64"] = "float32"
    """bf16 is autocast: weights and gradients stay float32"""

    compile: bool = False
    """run the network through torch.compile"""

    cuda_graph: bool = False
    """launch a whole training step at once, as a CUDA graph; one replica on GPUs"""

    max_steps: int | None = None
    """stop after this many steps in all, in the middle of an epoch if need be"""

    checkpoint_steps: int | None = None
    """write a checkpoint every so many steps, besides the one after each epoch"""

    keep_checkpoints: int = 2
    """newest checkpoints to keep"""

    log_steps: int = 20
    """steps between two records of loss and accuracy; reading them waits for the device"""

    remeasure: bool = False
    """gc2l: measure again by what each layer is computed best, instead of taking what the run has recorded"""

    forms: Annotated[dict[str, str], tyro.conf.Suppress] = field(default_factory=dict)
    """by what each size of two-level layer is computed ("schedule kernels"); of config.json, no option"""

    def __post_init__(self):
        self.output = self.output and Path(self.output).expanduser()
        check_least(self, 1, "max_steps", "checkpoint_steps", "keep_checkpoints", "log_steps")


# Settings that say how a run is started, not what it is.
STARTING = ("resume", "remeasure")

# Epochs, milestones, weight decay: Lee, Park, Lee, "Two-level Group Convolution", section 4; the digits of
# the decay are not in the paper and are the conventional ones.
CIFAR_RECIPE = {"epochs": 200, "lr_milestones": (60, 120, 160), "weight_decay": 5e-4}
IMAGENET_RECIPE = {"epochs": 90, "lr_milestones": (30, 60), "weight_decay": 1e-4}


@dataclass
class TrainConfig:
    """Train a network, sharded over the ranks that torchrun, mpirun or srun has started, or on one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    rules: RuleConfig = field(default_factory=RuleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        recipe = IMAGENET_RECIPE if self.data.data == "imagenet" else CIFAR_RECIPE
        for name, value in recipe.items():
            belongs = name != "lr_milestones" or self.optimiser.lr_schedule == "multistep"
            if getattr(self.optimiser, name) is None and belongs:
                setattr(self.optimiser, name, value)
        if self.run.output is None:
            self.run.output = Path(
                "runs", f"{self.model.model}-{self.model.conv}-{self.model.groups}-{self.data.data}"
            )
        check(self.optimiser, "weight_decay", self.optimiser.weight_decay >= 0, "0 or more")
        if self.optimiser.warmup_epochs > self.optimiser.epochs:
            raise UserError(
                f"warmup_epochs={self.optimiser.warmup_epochs} is more than epochs={self.optimiser.epochs}"
            )
        self.mesh.check_conv(self.model.conv)
        if self.mesh.parallel == "fsdp" and self.optimiser.ema_decay is not None:
            raise UserError(
                f"ema_decay={self.optimiser.ema_decay} does not do with parallel=fsdp, whose parameters have no copy "
                "on a rank; leave it out or use --data-parallel"
            )
        parts = self.mesh.data_parallel * self.optimiser.accumulate
        if self.data.batch_size % parts:
            raise UserError(
                f"batch_size={self.data.batch_size} does not divide by data_parallel={self.mesh.data_parallel} x "
                f"accumulate={self.optimiser.accumulate}; use a multiple of {parts}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as `config.json` holds them: what the run is, not how it was started."""
        values = self._values()
        for name in STARTING:
            del values["run"][name]
        return values

    def flat(self) -> dict[str, Any]:
        """Every setting by its own name; names are unique across the sections."""
        return {name: value for section in self._values().values() for name, value in section.items()}

    def _values(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_dict(cls, sections: dict[str, Any], origin: str = "config") -> Self:
        """The inverse of `to_dict`. Raises UserError for a section or setting that does not exist."""
        return from_dict(cls, sections, origin)
