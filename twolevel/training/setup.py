"""From a configuration to a network on its ranks."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import DeviceMesh

from twolevel import data, models
from twolevel.data.config import DataConfig
from twolevel.distributed import init_mesh
from twolevel.distributed.agreement import require_equal, together
from twolevel.distributed.environment import World, start, stop
from twolevel.distributed.mpi_axis import MPIAxis
from twolevel.errors import UserError
from twolevel.ops.kernels import native
from twolevel.training.config import PIPELINES, MeshConfig, TrainConfig
from twolevel.training.strategies import STRATEGIES, Strategy

# Settings without which a checkpoint's state means something else.
FIXED_ON_RESUME = ("model", "conv", "groups", "data", "batch_size", "seed")
# Settings that a resumed run may change without a word.
FREE_ON_RESUME = (
    "output",
    "resume",
    "forms",
    "max_steps",
    "checkpoint_steps",
    "keep_checkpoints",
    "log_steps",
    "device",
    "compile",
    "cuda_graph",
)
FREE_ON_RESUME += (
    "timeout",
    "data_root",
    "download",
    "workers",
    "parallel",
    "data_parallel",
    "group_parallel",
    "exchange",
    "schedule",
    "kernels",
)


@dataclass
class Context:
    """The ranks of a command, which agree on what they were asked to do."""

    world: World
    mesh: DeviceMesh
    config: MeshConfig

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def first(self) -> bool:
        return self.world.rank == 0

    def load_data(self, config: DataConfig, seed: int, dtype: torch.dtype = torch.float32) -> data.Data:
        """The data set as this rank sees it; fetched and verified by one rank of a node first."""
        with together(self.device):
            if self.world.local_rank == 0:
                data.prepare(config)
        with together(self.device):
            place = {"data_rank": self.mesh.get_local_rank("data"), "data_size": self.mesh["data"].size()}
            return data.load(config, seed=seed, device=self.device, dtype=dtype, **place)

    def strategy(self, precision: str) -> Strategy:
        """The way in which these ranks share a network that computes in `precision`."""
        return STRATEGIES[self.config.parallel](self.config, self.mesh, self.device, precision)

    def build(
        self,
        strategy: Strategy,
        options: dict,
        seed: int,
        image_shape: tuple[int, int, int],
        *,
        sync_batch_norm: bool = False,
    ) -> nn.Module:
        """This rank's part of `models.create(**options)`, drawn from `seed`; no rank builds the whole."""
        with together(self.device), torch.device("meta"):
            self.config.check_conv(options["conv"])
            network = models.create(**options)
        # Outside `together`: it may hold a collective, and it fails on all ranks or on none.
        return strategy.place(network, seed, image_shape, sync_batch_norm=sync_batch_norm)

    def carriers(self, network: nn.Module) -> str:
        """What carries tensors between these ranks: over MPI go those of layers that have its axis."""
        over_mpi = any(isinstance(v, MPIAxis) for module in network.modules() for v in vars(module).values())
        if not over_mpi:
            return self.world.backend
        return "mpi" if self.mesh["data"].size() == 1 else f"mpi, {self.world.backend} between replicas"

    def close(self) -> None:
        stop(self.world)


def join(mesh: MeshConfig, settings: dict) -> Context:
    """Meet the other ranks, make sure that all have the same settings, and lay out the mesh."""
    world = start(mesh.device, mesh.timeout)
    try:
        require_equal("configurations", settings, world.device)
        data, group = mesh.data_parallel, mesh.group_parallel
        if mesh.parallel == "fsdp":
            data, group = (world.size if data == 1 else data), 1
        return Context(world, init_mesh(data, group, device=mesh.device, timeout_s=mesh.timeout), mesh)
    except BaseException:
        stop(world)
        raise


def check_kernels(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError where the kernels that were asked for cannot compute on this device in this precision."""
    asked, precision = config.model.kernels, config.run.precision
    why = None
    if asked in ("native", "narrow"):
        fits = device.type == "cpu" and precision == "float32"
        why = native.available() if fits else "it computes in float32 on CPUs"
    elif asked == "triton" and (device.type != "cuda" or precision == "float64"):
        why = "it computes in float32 or bf16 on GPUs"
    if why is not None:
        raise UserError(
            f"kernels={asked} does not do for precision={precision} on {device.type}: {why}; use auto"
        )


def check_resumable(config: TrainConfig, state: dict, ranks: int) -> None:
    """Raise UserError where a checkpoint's run differs in what cannot change; warn of what did change.

    `state` is the checkpoint's, `ranks` the number of those that go on.
    """
    before = {k: v for section in state["config"].values() for k, v in section.items()}
    changed = {k: v for k, v in config.flat().items() if k in before and before[k] != v}
    for name in FIXED_ON_RESUME:
        if name in changed:
            raise UserError(
                f"{name}={changed[name]!r} but the checkpoint in {config.run.output} is of a run with "
                f"{name}={before[name]!r}; go on with that, or name another --output"
            )
    for name, what in (("ema_decay", "moving average of the weights"), ("momentum", "momentum")):
        if config.flat()[name] and not before.get(name):
            raise UserError(
                f"{name}={changed[name]!r} but the checkpoint keeps no {what}; leave --{name.replace('_', '-')} out"
            )
    for name, value in changed.items():
        if name not in FREE_ON_RESUME:
            warnings.warn(f"resumed with {name}={value!r}; it was {before[name]!r} before", stacklevel=2)
    now = _normalised_together(config.flat(), ranks)
    then = _normalised_together(config.flat() | before, state["ranks"])
    if now != then:
        warnings.warn(
            f"resumed with batch norm over {now} images at a time; it was {then} before; to keep that, use as many "
            "replicas and parts of a batch as then (--sync-batch-norm counts all replicas as one)",
            stacklevel=2,
        )


def _normalised_together(settings: dict, ranks: int) -> int:
    """The number of images over which batch norm takes its statistics in training."""
    parallel, parts = settings["parallel"], settings["accumulate"]
    if not settings["sync_batch_norm"]:
        parts *= ranks if parallel == "fsdp" else settings["data_parallel"]
    if parallel in ("gpipe", "1f1b"):
        parts *= settings["microbatches"] or ranks
    return settings["batch_size"] // parts


RULE_OF = {
    "dgc": ("lasso", "lasso_form", "threshold_steps"),
    "dgconv": ("complexity_divisor", "complexity_exponent"),
}


def warn_of_ignored(config: TrainConfig, mesh: DeviceMesh) -> None:
    """Warn of settings that differ from their default but have no effect on this run."""
    for section, name, why in _without_effect(config, mesh):
        value = getattr(section, name)
        if value != getattr(type(section), name):
            warnings.warn(f"{name}={value} is ignored: {why}", stacklevel=2)


def _without_effect(config: TrainConfig, mesh: DeviceMesh) -> Iterator[tuple[object, str, str]]:
    """(section, setting, why) of what this run does not ask for, at its default or not."""
    model, rule, rules, ranks = config.model, config.optimiser, config.rules, config.mesh
    for conv, names in RULE_OF.items():
        if conv != model.conv:
            yield from ((rules, name, f"conv={model.conv} has no such rule") for name in names)
    if model.conv == "dgc" and model.threshold == "head":
        yield rules, "threshold_steps", "threshold=head takes none over steps; use --threshold global"
    if model.conv == "dgconv" and rules.complexity_divisor is None:
        yield rules, "complexity_exponent", "there is no budget without --complexity-divisor"
    if model.schedule == "dense":
        yield model, "kernels", "schedule=dense is one convolution of torch"
    if rule.lr_schedule == "cosine":
        yield rule, "lr_gamma", "lr_schedule=cosine has no milestones"
    elif all(milestone >= rule.epochs for milestone in rule.lr_milestones):
        yield rule, "lr_gamma", f"no milestone comes before epochs={rule.epochs}"
    if mesh["data"].size() == 1:
        yield ranks, "sync_batch_norm", "there is one replica"
    if ranks.parallel in ("fsdp", *PIPELINES):
        yield ranks, "exchange", f"parallel={ranks.parallel} has no such exchange"
    elif mesh["group"].size() == 1:
        yield ranks, "exchange", "every rank holds all groups"
