"""`twolevel plan`: list the ways to train a network on so many ranks, their cost, and which to take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from twolevel.cli.options import parse
from twolevel.errors import UserError
from twolevel.settings import Device, PlanPrecision, Recompute
from twolevel.training.validation import check_least


@dataclass
class PlanConfig:
    """List every way to train a network on so many ranks, with memory, communication and time, and choose one."""

    model: str = "wrn-28-10"
    """network, as for train"""

    conv: Literal["gc2l", "gc"] = "gc2l"
    """convolution that group parallelism splits; its rivals train the dense one"""

    groups: tuple[int, ...] | None = None
    """numbers of groups; all powers of two that divide the channels unless given"""

    representatives: int = 1
    """gc2l: of a group, as for train"""

    batch_size: int = 128
    """images a step, over all data-parallel ranks together"""

    ranks: int = 4
    """processors"""

    precision: PlanPrecision | None = None
    """bf16 is autocast; that of a measured machine, else float32, unless given"""

    recompute: Recompute = "none"
    """blocks: as `train --recompute blocks`, where the network is replicated or split by group"""

    machine: str | None = None
    """titan-rtx, v100, a100-40, a100-80, h100, h200, rtx-4090, or a file of --calibrate; the newest measurement
    of this machine unless given"""

    link: str | None = None
    """link within a node: nvlink-v100, nvlink-a100, nvlink-h100, pcie3, pcie4, loopback; the machine's unless given"""

    internode: str | None = None
    """link between nodes: infiniband-200g, infiniband-400g, infiniband-8x400g, ethernet-1g, -10g, -25g or -100g"""

    ranks_per_node: int | None = None
    """processors of a node; 8 unless given"""

    num_classes: int | None = None
    """classes; 10 for 32 x 32 images and 1000 for 224 x 224 unless given"""

    image_size: int | None = None
    """height and width of the images; that for which the network is made unless given"""

    epoch_images: int = 50_000
    """images of an epoch; CIFAR has 50,000, ImageNet 1,281,167"""

    scaling: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """time against processors, 1 to ranks, instead of one number of ranks"""

    wide_stem: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """wrn-D-k, on paper only: a stem of max(16, G) channels, so that more than 16 groups divide the network"""

    figure: Path | None = None
    """draw time against processors, 1 to ranks, into this file"""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print JSON"""

    calibrate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """measure this machine first, in a minute or two; its links too where a launcher started two ranks or more"""

    output: Path | None = None
    """calibrate: the file to write; one in the user's cache unless given"""

    device: Device = "auto"
    """calibrate: what to measure"""

    threads: int | None = None
    """calibrate: threads of torch on a CPU; as train has them unless given"""

    def __post_init__(self):
        check_least(self, 1, "num_classes", "image_size")


def run(argv: list[str]) -> None:
    """Plan as asked; with `calibrate`, measure this machine first, on all ranks that a launcher started."""
    config = parse(PlanConfig, "plan", argv)
    _check(config)
    from twolevel.analysis.planner import presets
    from twolevel.analysis.planner.command import find_machine, measure, say
    from twolevel.analysis.planner.costs.base import Setting
    from twolevel.analysis.planner.plan import Request, plan
    from twolevel.analysis.planner.presentation import (
        draw_study,
        plan_json,
        print_plan,
        print_study,
        study_json,
    )
    from twolevel.analysis.planner.study import study

    if config.calibrate:
        machine = measure(config.device, config.precision, threads=config.threads, output=config.output)
        if machine is None:  # another rank than the first
            return
    else:
        machine = find_machine(config.machine)
    link = presets.link(config.link) if config.link else None
    internode = presets.link(config.internode) if config.internode else None
    machine = machine.with_links(link, internode, config.ranks_per_node)
    precision = config.precision or machine.precision or "float32"
    request = Request(
        model=config.model,
        conv=config.conv,
        ranks=config.ranks,
        setting=Setting(machine, config.batch_size, precision, config.recompute == "blocks"),
        groups=config.groups,
        representatives=config.representatives,
        num_classes=config.num_classes,
        image_size=config.image_size,
        epoch_images=config.epoch_images,
        wide_stem=config.wide_stem,
    )
    if config.scaling:
        points = study(request)
        print(study_json(request, points)) if config.json else print_study(request, points)
    else:
        made = plan(request)
        print(plan_json(made)) if config.json else print_plan(made)
        points = study(request) if config.figure else []
    if config.figure:
        say(f"wrote {draw_study(request, points, config.figure)}")


def _check(config: PlanConfig) -> None:
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
