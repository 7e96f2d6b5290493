"""The cost of one way to train one network, which is known already: that of a run."""

from dataclasses import dataclass
from typing import Any

import torch

from twolevel import models
from twolevel.analysis.planner import presets
from twolevel.analysis.planner.command import find_machine
from twolevel.analysis.planner.costs.base import Cost, Setting
from twolevel.analysis.planner.costs.channel import channel_cost
from twolevel.analysis.planner.costs.fsdp import fsdp_cost
from twolevel.analysis.planner.costs.group import group_cost
from twolevel.analysis.planner.costs.pipeline import pipeline_cost
from twolevel.analysis.planner.machine import Machine
from twolevel.analysis.planner.tracing import trace
from twolevel.analysis.planner.workload import Workload
from twolevel.errors import UserError
from twolevel.terminal import program

ANY_MACHINE = "h100"  # bytes are the same on all


@dataclass(frozen=True, kw_only=True)
class Way:
    """How `data` x `inner` ranks share a network; `batch` images a step over all replicas."""

    parallel: str
    conv: str
    data: int
    inner: int
    batch: int
    precision: str
    microbatches: int = 1
    recompute: bool = False

    def cost(self, workload: Workload, machine: Machine) -> Cost:
        """Raises UserError for a machine that has no rate for this precision."""
        setting = Setting(machine, self.batch, self.precision, self.recompute)
        if self.parallel == "group":
            return group_cost(workload, setting, self.conv, data=self.data, group=self.inner)
        if self.parallel == "channel":
            return channel_cost(workload, setting, data=self.data, ranks=self.inner)
        if self.parallel == "fsdp":
            return fsdp_cost(workload, setting, self.conv, ranks=self.data)
        return pipeline_cost(
            workload,
            setting,
            self.parallel,  # pyright: ignore[reportArgumentType] one of PIPELINES
            stages=self.inner,
            microbatches=self.microbatches,
        )


@dataclass(frozen=True)
class Estimate:
    """`memory`: its bytes, None where the model does not know the network. `time`: with seconds, and of which machine.

    `why_no_memory` and `why_no_time` say why there is none.
    """

    memory: Cost | None = None
    time: Cost | None = None
    machine: Machine | None = None
    why_no_memory: str = ""
    why_no_time: str = ""


def estimate(way: Way, options: dict[str, Any], image_shape: tuple[int, int, int]) -> Estimate:
    """What the cost model says of `models.create(**options)`: its time on the machine that was measured here last."""
    try:
        with torch.device("meta"):
            workload = trace(models.create(**options), image_shape)
        memory = way.cost(workload, presets.machine(ANY_MACHINE))
    except UserError as error:
        why = str(error).partition(";")[0]
        return Estimate(why_no_memory=why, why_no_time=why)
    try:
        machine = find_machine(None)
    except UserError:
        return Estimate(
            memory, why_no_time=f"no machine is measured; {program()} plan --calibrate measures this one"
        )
    try:
        return Estimate(memory, way.cost(workload, machine), machine)
    except UserError as error:
        return Estimate(memory, why_no_time=str(error).partition(";")[0])
