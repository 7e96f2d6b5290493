"""All checks, one after the other."""

from collections.abc import Callable, Iterable
from pathlib import Path

from twolevel.distributed.agreement import all_gather, together
from twolevel.distributed.environment import World
from twolevel.training import trackers
from twolevel.training.config import MeshConfig, TrainConfig
from twolevel.training.context import join
from twolevel.training.doctor import cores, dataset, folder, limits, links, machine, past_run, room
from twolevel.training.doctor.finding import Finding, from_ranks, gather, guarded
from twolevel.training.preflight import check_kernels

Check = tuple[str, Callable[[], Iterable[Finding]]]


def examine(config: TrainConfig, *, planned: bool, machine: str | None) -> list[Finding]:
    """What is here, and with `planned` whether the run of `config` can be. Every rank calls this and gets the same.

    `machine` is what the planner knows of the links, by name or file; one measured here or a preset unless given.

    Raises UserError, on every rank, for ranks that do not meet or do not have the same settings, and for settings
    that no run can have.
    """
    context = join(config.mesh, config.flat() | {"planned": planned, "machine": machine})
    try:
        checks = _of_machine(context.world, config, machine)
        if planned:
            with together():
                check_kernels(config, context.device)
                if context.first:
                    trackers.create(config.run.trackers)
                context.strategy(config.run.precision).check_batch(
                    config.data.batch, config.optimiser.accumulate
                )
                one = room.checkpoint_bytes(config)
            checks += _of_run(context.world, config, one)
        return _findings(checks)
    finally:
        context.close()


def examine_past(path: Path, mesh: MeshConfig) -> list[Finding]:
    """What a run, a checkpoint or an exported file holds; the same on every rank, all of which call it.

    Raises UserError, on every rank, where `path` is none of these.
    """
    context = join(mesh, {"path": str(path)})
    try:
        return _from_rank_0([*past_run.check(context.world, path)])
    finally:
        context.close()


def _of_machine(world: World, config: TrainConfig, planner: str | None) -> list[Check]:
    checks: list[Check] = [
        ("machine", lambda: machine.facts(world)),
        ("devices", lambda: cores.check(gather(lambda: cores.report(world, config)))),
        ("limits", lambda: from_ranks(lambda: limits.check(world, config))),
        ("/dev/shm", lambda: from_ranks(lambda: room.check_shm(config, world))),
    ]
    if world.size > 1:
        checks += [
            ("link", lambda: links.check_link(world, planner, config.mesh.exchange)),
            ("pairs of ranks", lambda: links.check_pairs(world)),
            ("speed of a rank", lambda: links.check_speed(world)),
            ("clocks", links.check_clocks),
        ]
    return checks


def _of_run(world: World, config: TrainConfig, checkpoint: int) -> list[Check]:
    """`checkpoint` is the size of one, in bytes."""
    output = config.output
    resumed: list[Check] = (
        [("checkpoints", lambda: past_run.checkpoints(output))] if config.run.resume else []
    )
    return [
        *resumed,
        ("data", lambda: from_ranks(lambda: dataset.check(world, config.data))),
        ("room", lambda: from_ranks(lambda: room.check_room(config, checkpoint, world.size, output))),
        ("folder", lambda: folder.check(world, config, checkpoint)),
    ]


def _findings(checks: Iterable[Check]) -> list[Finding]:
    return _from_rank_0([finding for what, check in checks for finding in guarded(what, check)])


def _from_rank_0(findings: list[Finding]) -> list[Finding]:
    return [Finding(*values) for values in all_gather([[*vars(each).values()] for each in findings])[0]]
