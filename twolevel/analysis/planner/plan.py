"""Every way to train a network on so many ranks, what each costs, which one to take, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from twolevel import models
from twolevel.analysis.planner.costs.base import Cost, Setting
from twolevel.analysis.planner.costs.channel import channel_cost
from twolevel.analysis.planner.costs.fsdp import fsdp_cost
from twolevel.analysis.planner.costs.group import group_cost
from twolevel.analysis.planner.costs.pipeline import pipeline_cost
from twolevel.analysis.planner.tracing import trace
from twolevel.analysis.planner.workload import Workload
from twolevel.errors import UserError
from twolevel.models.wide_resnet import WideResNet
from twolevel.nn import make_conv

GROUPS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# What is not 5 % faster is no reason to change the function that is trained.
WORTH = 1.05


@dataclass(frozen=True)
class Request:
    """What is to be trained, and where."""

    model: str
    conv: str
    ranks: int
    setting: Setting
    groups: tuple[int, ...] | None = None
    representatives: int = 1
    num_classes: int | None = None
    image_size: int | None = None
    epoch_images: int = 50_000
    wide_stem: bool = False

    def __post_init__(self) -> None:
        for name in ("ranks", "epoch_images", "representatives"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        if self.representatives > 1 and self.conv != "gc2l":
            raise UserError(
                f"representatives={self.representatives} is of conv=gc2l, not of conv={self.conv}; leave it out"
            )
        if self.setting.batch < 1:
            raise UserError(f"batch_size={self.setting.batch} is not positive; use 1 or more")


@dataclass(frozen=True)
class Plan:
    """All costs by step time; the fastest that fits, the fastest of them that trains the dense network, and why."""

    request: Request
    costs: tuple[Cost, ...]
    best: Cost | None
    dense: Cost | None
    reasons: tuple[str, ...]


@dataclass
class Networks:
    """The workloads of a request, each read once."""

    request: Request
    known: dict[tuple[str, int], Workload] = field(default_factory=dict)

    def __call__(self, conv: str, groups: int) -> Workload:
        key = conv, groups
        if key not in self.known:
            request = self.request
            size = request.image_size or models.image_size(request.model)
            with torch.device("meta"):
                self.known[key] = trace(self._create(conv, groups), (3, size, size))
        return self.known[key]

    def _create(self, conv: str, groups: int) -> nn.Module:
        request = self.request
        options: dict[str, Any] = {"conv": conv, "groups": groups}
        if conv == "gc2l":
            options["representatives"] = request.representatives
        if request.num_classes is not None:
            options["num_classes"] = request.num_classes
        if request.wide_stem and groups > 16:
            return _with_wide_stem(request.model, groups, options)
        return models.create(request.model, **options)

    def numbers_of_groups(self) -> list[int]:
        """Those that were asked for, else all powers of two that divide the network's channels, up to 1024."""
        asked = self.request.groups
        if asked is not None:
            for groups in asked:
                self(self.request.conv, groups)  # raises UserError where it cannot be
            return [g for g in asked if g > 1]
        fitting = []
        for groups in GROUPS:
            try:
                self(self.request.conv, groups)
            except UserError:
                break
            fitting.append(groups)
        return fitting


def _with_wide_stem(name: str, groups: int, options: dict[str, Any]) -> nn.Module:
    """WRN-D-k whose stem has `groups` channels instead of 16, so that more groups divide it."""
    try:
        depth, widen = map(int, name.removeprefix("wrn-").split("-"))
    except ValueError:
        raise UserError(f"wide_stem is for wrn-D-k, not for {name}; leave it out") from None
    num_classes = options.pop("num_classes", 10)
    stem = nn.Conv2d(3, groups, 3, padding=1, bias=False)
    widths = [16 * widen, 32 * widen, 64 * widen]
    make = partial(make_conv, options.pop("conv"), **options)
    return WideResNet(stem, [(depth - 4) // 6] * 3, widths, make, num_classes)


def costs(
    request: Request, networks: Networks | None = None, *, two_level_exchange: bool = False
) -> list[Cost]:
    """Every strategy, mesh and G that divides ranks and batch.

    Raises UserError for a network that the model cannot describe.
    """
    networks = networks or Networks(request)
    setting, ranks = request.setting, request.ranks
    dense, found = networks("sc", 1), []
    if setting.batch % ranks == 0:
        found.append(group_cost(dense, setting, "sc", data=ranks, group=1))
        if ranks > 1:
            found.append(fsdp_cost(dense, setting, "sc", ranks=ranks))
    for data, inner in meshes(ranks, setting.batch):
        if inner > 1 and _divides(dense, inner):
            found.append(channel_cost(dense, setting, data=data, ranks=inner))
    found += _pipelines(dense, setting, ranks)
    for groups in networks.numbers_of_groups():
        workload = networks(request.conv, groups)
        for data, group in meshes(ranks, setting.batch):
            if groups % group == 0 and _divides(workload, group):
                cost = partial(group_cost, workload, setting, request.conv, data=data, group=group)
                found.append(cost())
                if two_level_exchange and setting.machine.ranks_per_node < group:
                    found.append(cost(two_level_exchange=True))
    return sorted(found, key=lambda cost: cost.step)


def meshes(ranks: int, batch: int) -> Iterable[tuple[int, int]]:
    """(data, inner) whose product is `ranks`, where the replicas divide the batch."""
    return [(d, ranks // d) for d in range(1, ranks + 1) if ranks % d == 0 and batch % d == 0]


def _divides(workload: Workload, ranks: int) -> bool:
    """Whether ranks divide the channels of every map and the features of the classifier."""
    return all(v.shape[0] % ranks == 0 for i, v in enumerate(workload.values) if workload.is_map(i))


def _pipelines(dense: Workload, setting: Setting, ranks: int) -> list[Cost]:
    """naive, and of gpipe and 1f1b the best number of microbatches of P, 2 P, 4 P and 8 P."""
    if ranks == 1:
        return []
    try:
        found = [pipeline_cost(dense, setting, "naive", stages=ranks, microbatches=1)]
    except UserError:  # fewer places to cut than ranks
        return []
    for schedule in ("gpipe", "1f1b"):
        numbers = [ranks * 2**e for e in range(4) if setting.batch % (ranks * 2**e) == 0]
        options = [pipeline_cost(dense, setting, schedule, stages=ranks, microbatches=m) for m in numbers]
        fitting = [cost for cost in options if cost.fits]
        found += [min(fitting or options, key=lambda cost: cost.step)] if options else []
    return found


def plan(request: Request) -> Plan:
    """All costs of a request, and the choice among them.

    Raises UserError as `costs`, and for ranks with which nothing can be done.
    """
    networks = Networks(request)
    found = costs(request, networks)
    if not found:
        raise UserError(
            f"batch_size={request.setting.batch} and the channels of {request.model} do not divide by "
            f"ranks={request.ranks}; use another number of ranks"
        )
    fitting = [cost for cost in found if cost.fits]
    best = fitting[0] if fitting else None
    dense = next((cost for cost in fitting if cost.conv == "sc"), None)
    return Plan(request, tuple(found), best, dense, tuple(_reasons(request, networks, found, best, dense)))


def _reasons(
    request: Request, networks: Networks, found: list[Cost], best: Cost | None, dense: Cost | None
) -> Iterable[str]:
    setting = request.setting
    usable = setting.machine.usable
    alone = group_cost(networks("sc", 1), setting, "sc", data=1, group=1)
    room = "" if usable == float("inf") else f" of {usable / 1e9:.1f} GB usable"
    if alone.fits:
        yield f"SC fits one rank: {gigabytes(alone.peak_bytes)}{room}, {seconds(alone.step)} a step there."
    else:
        yield f"SC does not fit one rank: it takes {gigabytes(alone.peak_bytes)}{room}."
    if best is None:
        least = min(found, key=lambda cost: cost.peak_bytes)
        yield f"Nothing fits {request.ranks} ranks; the least memory is {gigabytes(least.peak_bytes)}: {title(least)}."
        return
    grouped = [c for c in found if c.strategy == "group" and c.inner > 1]
    group = next((c for c in grouped if c.fits), None)
    yield f"Fastest that fits: {title(best)}, {seconds(best.step)} a step, {gigabytes(best.peak_bytes)} a rank."
    if best.exposed > 0.2 * best.step:
        yield f"  {best.exposed / best.step:.0%} of it waits for communication; a faster link would help it most."
    if dense is None:
        yield "No strategy that trains the dense network fits these ranks."
    elif best is not dense:
        yield (
            f"It is {dense.step / best.step:.2f} times as fast as the fastest that trains the dense network, "
            f"{title(dense)} ({seconds(dense.step)}, {gigabytes(dense.peak_bytes)}), but it trains another function: "
            f"{request.conv} with G={best.groups} has fewer weights, and its error rises with G."
        )
    yield from _against(group, grouped, best, dense, found, request)


def _against(
    group: Cost | None,
    grouped: list[Cost],
    best: Cost,
    dense: Cost | None,
    found: list[Cost],
    request: Request,
) -> Iterable[str]:
    """Where group parallelism is not the best choice."""
    if request.ranks == 1:
        return
    if group is None:
        why = "it does not fit" if grouped else "no G divides by these ranks"
        yield f"Group parallelism is NOT an option here: {why}."
        return
    if best is not group:
        yield (
            f"Group parallelism is NOT the fastest here: {title(best)} takes {seconds(best.step)} a step, "
            f"{title(group)}, the fastest split by group, {seconds(group.step)}."
        )
    if dense is not None and best is not dense and group.step * WORTH > dense.step:
        yield (
            f"Group parallelism is NOT worth another function here: {title(dense)} trains the dense network in "
            f"{seconds(dense.step)} a step, {title(group)} takes {seconds(group.step)}."
        )
    replicas = {c.groups: c for c in found if c.fits and c.strategy == "group" and c.inner == 1}
    fastest = {c.groups: c for c in reversed(grouped) if c.fits}
    slower = [g for g, c in sorted(fastest.items()) if g in replicas and replicas[g].step < c.step]
    if slower:
        pairs = (f"G={g} ({seconds(replicas[g].step)} against {seconds(fastest[g].step)})" for g in slower)
        what = f"{request.conv} with {', '.join(pairs)}"
        yield f"Group parallelism is NOT the best way to train {what}: replicas are faster."


def title(cost: Cost) -> str:
    """A strategy in words."""
    if cost.strategy == "group":
        exchange = ", two-level exchange" if cost.two_level_exchange else ""
        more = f" r={cost.representatives}" if cost.representatives > 1 else ""
        return f"{cost.conv} G={cost.groups}{more} on {cost.data} data x {cost.inner} group{exchange}"
    if cost.strategy == "channel":
        return f"SC channel-parallel on {cost.data} data x {cost.inner}"
    if cost.strategy in ("ddp", "fsdp"):
        return f"SC {cost.strategy.upper()} on {cost.data}" if cost.ranks > 1 else "SC on 1"
    more = f", {cost.microbatches} microbatches" if cost.microbatches > 1 else ""
    return f"SC {cost.strategy} on {cost.inner} stages{more}"


def seconds(value: float) -> str:
    """A time for reading: 4 ms, 1.25 s, 7m04s, 2h05m."""
    if value >= 3600:
        return f"{int(value // 3600)}h{int(value % 3600 // 60):02}m"
    if value >= 100:
        return f"{int(value // 60)}m{int(value % 60):02}s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
