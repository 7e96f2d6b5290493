"""What `twolevel plan` does: find or measure the machine, then plan, print and draw."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from twolevel.analysis.planning import calibrate, presets
from twolevel.analysis.planning.calibrate_links import measure_link
from twolevel.analysis.planning.cost import Setting
from twolevel.analysis.planning.machine import Link, Machine
from twolevel.analysis.planning.plan import Request, plan
from twolevel.analysis.planning.plan_report import draw_study, plan_json, print_plan, print_study, study_json
from twolevel.analysis.planning.scaling import study
from twolevel.distributed.environment import World, start, stop
from twolevel.distributed.mesh import init_mesh
from twolevel.distributed.mpi_axis import MPIAxis, exchange_of
from twolevel.errors import UserError
from twolevel.ops.store import cache_folder

if TYPE_CHECKING:
    from twolevel.commands import PlanConfig


def run(config: "PlanConfig") -> None:
    """Plan as asked; with `calibrate`, measure this machine first, on all ranks that a launcher started."""
    _check(config)
    if config.calibrate:
        machine = measure(config)
        if machine is None:  # another rank than the first
            return
    else:
        machine = find_machine(config.machine)
    link = presets.link(config.link) if config.link else None
    internode = presets.link(config.internode) if config.internode else None
    machine = machine.with_links(link, internode, config.ranks_per_node)
    precision = config.precision or machine.precision or "float32"
    request = Request(
        config.model,
        config.conv,
        config.ranks,
        Setting(machine, config.batch_size, precision),
        config.groups,
        config.num_classes,
        config.image_size,
        config.epoch_images,
        config.wide_stem,
    )
    if config.scaling:
        points = study(request)
        print(study_json(request, points)) if config.json else print_study(request, points)
    else:
        made = plan(request)
        print(plan_json(made)) if config.json else print_plan(made)
    if config.figure:
        points = points if config.scaling else study(request)
        say(f"wrote {draw_study(request, points, config.figure)}")


def _check(config: "PlanConfig") -> None:
    for option in ("threads", "ranks_per_node"):
        value = getattr(config, option)
        if value is not None and value < 1:
            raise UserError(f"{option}={value} is not positive; use 1 or more")
    if config.calibrate:
        for option in ("machine", "link", "internode"):
            if getattr(config, option) is not None:
                raise UserError(
                    f"{option}={getattr(config, option)!r} and calibrate exclude each other; leave one out"
                )
        return
    for option, default in (("output", None), ("threads", None), ("device", "auto")):
        value = getattr(config, option)
        if value != default:
            raise UserError(f"{option}={value} is of calibrate; leave it out, or add --calibrate")


def find_machine(name: str | None) -> Machine:
    """A preset, a file of `Machine.save`, or without a name what was measured here last.

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


def measure(config: "PlanConfig") -> Machine | None:
    """Measure this machine and save it; the machine on the first rank, None on others."""
    world = start(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # `start` divides the cores among ranks
    try:
        machine = _measure(world, config.precision or ("bf16" if world.device.type == "cuda" else "float32"))
    finally:
        stop(world)
    if world.rank:
        return None
    precision = f"{machine.precision}-{torch.get_num_threads()}"
    path = config.output or cache_folder() / f"machine-{world.device.type}-{precision}.json"
    machine.save(path)
    say(f"wrote {path}")
    return machine


def _measure(world: World, precision: str) -> Machine:
    device = world.device.type
    calibration = calibrate.Calibration(device, precision)
    tables, first = {}, world.rank == 0
    for index, (name, table) in enumerate(calibration.run(), start=1):
        tables[name] = table
        if first:
            say(f"measured {index} of {calibration.number}: {name}, {len(table.forward)} shapes")
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
