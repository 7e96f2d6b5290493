"""The ranks of a command, and the network that they build from its settings."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from twolevel import data, models
from twolevel.data.config import DataConfig
from twolevel.distributed import strategies
from twolevel.distributed.agreement import require_equal, together
from twolevel.distributed.collectives import axes_of
from twolevel.distributed.environment import World, simulate, start, stop
from twolevel.distributed.mesh import lay_out
from twolevel.distributed.mpi_axis import MPIAxis
from twolevel.distributed.strategies import Placed, Strategy
from twolevel.training.config import MeshConfig
from twolevel.training.config.shape import Shape, largest_shape
from twolevel.training.watchdog import Watchdog
from twolevel.training.whereabouts import Finder

# Of the time-out of collectives, after which torch would say less.
PATIENT = 0.9


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
        return strategy_for(self.config, self.mesh, self.device, precision)

    def build(
        self,
        strategy: Strategy,
        options: dict[str, Any],
        seed: int,
        image_shape: tuple[int, int, int],
        *,
        sync_batch_norm: bool = False,
        compile: bool = False,
    ) -> Placed:
        """This rank's part of `models.create(**options)`, drawn from `seed`; no rank builds the whole."""
        with together(self.device), torch.device("meta"):
            self.config.check_conv(options["conv"])
            network = models.create(**options)
        # Outside `together`: it may hold a collective, and it fails on all ranks or on none.
        return strategy.place(network, seed, image_shape, sync_batch_norm=sync_batch_norm, compile=compile)

    def carriers(self, network: nn.Module) -> str:
        """What carries tensors between these ranks: MPI for the layers that have its axis."""
        if not any(isinstance(axis, MPIAxis) for axis in axes_of(network)):
            return self.world.backend
        return "mpi" if self.mesh["data"].size() == 1 else f"mpi, {self.world.backend} between replicas"

    def watch(self, finder: Finder) -> AbstractContextManager[Watchdog | None]:
        """A watchdog of these ranks, if they are several and met by a store; `finder` says where this one is."""
        if self.world.store is None or self.world.size == 1:
            return nullcontext()
        return Watchdog(
            self.world.store,
            (self.mesh["data"].size(), self.mesh["group"].size()),
            finder.find,
            silence=self.config.silence,
            patience=PATIENT * self.config.timeout,
        )

    def close(self) -> None:
        stop(self.world)


def strategy_for(
    config: MeshConfig, mesh: DeviceMesh, device: torch.device | str, precision: str
) -> Strategy:
    """The strategy that settings name."""
    return strategies.create(
        config.parallel,
        mesh,
        device,
        precision=precision,
        exchange=config.exchange,
        timeout_s=config.timeout,
        microbatches=config.microbatches,
    )


def join(mesh: MeshConfig, settings: dict[str, Any]) -> Context:
    """Meet the other ranks, make sure that all have the same settings, and lay out the mesh.

    With mesh=auto, and with `simulate`, `settings` are those of a run. A spare stays here until the others have ended:
    see `start`. Ranks that are simulated do not come, so that nobody is met.
    """
    auto, simulated = mesh.mesh == "auto", settings.get("simulate")
    workers = (lambda came: largest_shape(settings, came).ranks) if auto else None
    if simulated:
        world = simulate(simulated if workers is None else workers(simulated), mesh.device)
    else:
        world = start(mesh.device, mesh.timeout, workers)
    try:
        require_equal("configurations", settings, world.device)
        data, group = mesh.data_parallel, mesh.group_parallel
        if mesh.parallel == "fsdp":
            data, group = (world.size if data == 1 else data), 1
        if auto:
            data, group = shape = largest_shape(settings, world.size)
            if world.rank == 0 and not simulated:
                print(_taken(shape, world.spares.number if world.spares else 0), flush=True)
        return Context(world, lay_out(world, data, group, mesh.timeout), mesh)
    except BaseException:
        stop(world)
        raise


def _taken(shape: Shape, spares: int) -> str:
    """What became of the ranks that came."""
    first, last = shape.ranks, shape.ranks + spares - 1
    came = f"{last + 1} rank{'s' if last else ''} came: mesh data={shape.data} x group={shape.group}"
    if not spares:
        return came
    if spares == 1:
        return f"{came}; rank {first} waits as a spare and joins at the next change"
    return f"{came}; ranks {first} to {last} wait as spares and join at the next change"
