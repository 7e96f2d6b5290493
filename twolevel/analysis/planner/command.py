"""The machine that a plan is for: a preset, one measured earlier, or this one, measured now."""

import sys
from pathlib import Path

import torch

from twolevel.analysis.planner import calibrate, presets
from twolevel.analysis.planner.calibrate_links import measure_link
from twolevel.analysis.planner.machine import Link, Machine, Table
from twolevel.distributed.environment import World, start, stop
from twolevel.distributed.mesh import init_mesh
from twolevel.distributed.mpi_axis import MPIAxis, exchange_of
from twolevel.errors import UserError
from twolevel.ops.store import cache_folder


def find_machine(name: str | None) -> Machine:
    """A preset, a file of `Machine.save`, or without a name the newest measurement of this machine.

    Raises UserError for a name that is neither, and where nothing was measured.
    """
    if name is None:
        files = sorted(cache_folder().glob("machine-*.json"), key=lambda path: path.stat().st_mtime)
        if not files:
            raise UserError(
                f"no machine given, and none measured in {cache_folder()}; use --calibrate, or --machine with one of "
                f"{', '.join(presets.MACHINES)}"
            )
        say(f"machine: {files[-1]}")
        return Machine.load(files[-1])
    if name.endswith(".json"):
        return Machine.load(Path(name))
    return presets.machine(name)


def measure(
    device: str, precision: str | None, *, threads: int | None = None, output: Path | None = None
) -> Machine | None:
    """Measure this machine and save it; the machine on the first rank, None on others.

    `precision` is bf16 on GPUs and float32 on CPUs unless given; `output` is the file, one in the cache unless given.
    """
    world = start(device)
    if threads is not None:
        torch.set_num_threads(threads)  # `start` divides the cores among ranks
    try:
        machine = _measure(world, precision or ("bf16" if world.device.type == "cuda" else "float32"))
    finally:
        stop(world)
    if world.rank:
        return None
    name = f"machine-{world.device.type}-{machine.precision}-{torch.get_num_threads()}.json"
    path = output or cache_folder() / name
    machine.save(path)
    say(f"wrote {path}")
    return machine


def _measure(world: World, precision: str) -> Machine:
    device = world.device.type
    calibration = calibrate.Calibration(device, precision)
    tables: dict[str, Table] = {}
    first = world.rank == 0
    for index, (name, table) in enumerate(calibration.run(), start=1):
        tables[name] = table
        if first:
            say(f"measured {index} of {calibration.num_tables}: {name}, {len(table.forward)} shapes")
    link, internode = _links(world)
    if first:
        say(f"link: {_described(link)}; between nodes: {_described(internode)}")
    return calibrate.measured(tables, device, precision, link, internode)


def _links(world: World) -> tuple[Link, Link]:
    """(within a node, between nodes): that of the ranks measured, by what carries their exchange; the other assumed."""
    link, internode = presets.link("loopback"), presets.link("ethernet-10g")
    if world.size == 1:
        return link, internode
    axis = exchange_of(init_mesh(device=world.device.type), "auto")
    carrier = "MPI" if isinstance(axis, MPIAxis) else world.backend
    if world.local_size < world.size:
        return link, measure_link(axis, world.device, f"{carrier} between nodes")
    return measure_link(axis, world.device, f"{carrier} on one node"), internode


def _described(link: Link) -> str:
    return f"{link.name}, {link.latency * 1e6:.0f} us, {link.bandwidth / 1e9:.2f} GB/s ({link.source})"


def say(text: str) -> None:
    """To standard error: standard output is the plan's."""
    print(text, file=sys.stderr, flush=True)
