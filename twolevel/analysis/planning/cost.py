"""What a training step costs one rank, by strategy: memory, compute, communication hidden and exposed, time.

    group   convolutions cut by channel group over the inner axis, replicas over the data axis (GC-2L, GC)
    ddp     the whole network on every rank, gradients all-reduced under backward
    fsdp    as ddp, with parameters, gradients and momentum sharded; gathered block by block
    channel every rank computes m/P filters of the dense convolution on all input channels, which are gathered
    naive, gpipe, 1f1b   layers in stages (see `pipeline_cost`)

Here are the parts that strategies share, and the cost of group and ddp.
The formulas are in COST_MODEL.md.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from twolevel.analysis.planning.collectives import (
    Axis,
    Message,
    all_gather,
    all_reduce,
    axes,
    broadcast,
    buckets,
    drain,
)
from twolevel.analysis.planning.machine import Machine
from twolevel.analysis.planning.memory import Part, buffers, held
from twolevel.analysis.planning.timing import ITEMSIZE, Seconds, Timing
from twolevel.analysis.planning.workload import Layer, Workload

Strategy = Literal["group", "ddp", "fsdp", "channel", "naive", "gpipe", "1f1b"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Setting:
    """What all strategies share: a machine and a precision, images of a step over all replicas together."""

    machine: Machine
    batch: int
    precision: str = "float32"

    @property
    def timing(self) -> Timing:
        return Timing(self.machine, self.precision)


@dataclass(frozen=True)
class Cost:
    """A step of one strategy on data x inner ranks, as the rank with the most memory sees it; seconds and bytes."""

    strategy: str
    conv: str
    groups: int
    data: int
    inner: int
    batch: int
    parameters: int
    """on this rank"""
    parameter_bytes: int
    gradient_bytes: int
    momentum_bytes: int
    activation_bytes: int
    peak_bytes: int
    fits: bool
    compute: float
    bubble: float
    messages: tuple[Message, ...] = field(repr=False)
    microbatches: int = 1
    two_level_exchange: bool = False

    @property
    def ranks(self) -> int:
        return self.data * self.inner

    @property
    def communication(self) -> float:
        return sum(m.seconds for m in self.messages)

    @property
    def exposed(self) -> float:
        return sum(m.exposed for m in self.messages)

    @property
    def hidden(self) -> float:
        return self.communication - self.exposed

    @property
    def step(self) -> float:
        return self.compute + self.bubble + self.exposed

    @property
    def bytes_sent(self) -> float:
        return sum(m.bytes_sent for m in self.messages)

    @property
    def collectives(self) -> Counter:
        return Counter(m.kind for m in self.messages)

    def epoch(self, images: int) -> float:
        """Seconds of one pass over so many images, the last batch made full."""
        return -(-images // self.batch) * self.step

    def as_dict(self) -> dict:
        names = ("strategy conv groups data inner batch microbatches two_level_exchange parameters parameter_bytes "
                 "gradient_bytes momentum_bytes activation_bytes peak_bytes fits compute bubble")  # fmt: skip
        more = ("communication", "exposed", "hidden", "step", "bytes_sent")
        return {name: getattr(self, name) for name in (*names.split(), *more)} | {
            "collectives": dict(self.collectives)
        }


@dataclass
class Walk:
    """The time line of one rank through forward and backward: seconds of compute, and when gradients are ready."""

    forward: float = 0.0
    backward: float = 0.0
    optimiser: float = 0.0
    ready: list[tuple[float, Layer]] = field(default_factory=list)
    """(seconds of backward after which a layer's gradients are there, the layer), in the order of backward"""

    @property
    def compute(self) -> float:
        return self.forward + self.backward + self.optimiser


def walk(
    workload: Workload,
    layers: Iterable[Layer],
    batch: int,
    timing: Timing,
    ranks: int = 1,
    *,
    whole_input: bool = False,
    see: Callable[[Layer, Seconds], float] = lambda layer, seconds: 0.0,
) -> Walk:
    """Compute of a rank. `see` is shown every layer's seconds, and returns those of backward that it adds."""
    layers, line, sizes = tuple(layers), Walk(), []
    made = {layer.output for layer in layers}
    joins = Counter(v for v in workload.joins if v in made)
    for layer in reversed(layers):
        for _ in range(joins[layer.output]):
            line.backward += timing(workload.join(layer.output, batch, ranks)).forward
        seconds = timing(workload.work(layer, batch, ranks, whole_input=whole_input))
        line.forward += seconds.forward
        line.backward += seconds.backward + see(layer, seconds)
        if layer.parameters:
            line.ready.append((line.backward, layer))
            sizes += [held(layer, ranks) // len(layer.parameters)] * len(layer.parameters)
    line.optimiser = timing.optimiser(len(sizes), sum(sizes))
    return line


def replica_messages(workload: Workload, line: Walk, axis: Axis, ranks: int) -> list[Message]:
    """DDP over the data axis: all-reduces in buckets under a walk's backward; running statistics before forward."""
    if axis.ranks == 1:
        return []
    sizes = [4 * held(layer, ranks) for _, layer in line.ready]
    messages, jobs = [], []
    for indices in buckets(sizes):
        size = sum(sizes[i] for i in indices)
        seconds = all_reduce(axis, size)
        jobs.append((line.ready[indices[-1]][0], seconds))
        messages.append(Message("all-reduce", size, 2 * (axis.ranks - 1) / axis.ranks * size, seconds))
    messages[-1] = replace(messages[-1], exposed=drain(jobs, line.backward))
    norms = sum(layer.kind == "norm" for _, layer in line.ready)
    statistics = buffers(workload, [layer for _, layer in line.ready], ranks)
    for size in (statistics - 8 * norms, 8 * norms) if norms else ():  # one message a type
        seconds = broadcast(axis, size)
        messages.append(Message("broadcast", size, size, seconds, seconds))
    return messages


def group_cost(
    workload: Workload,
    setting: Setting,
    conv: str,
    data: int,
    group: int,
    *,
    two_level_exchange: bool = False,
) -> Cost:
    """Cut by channel group over `group` ranks, `data` replicas. With group=1, data parallelism (DDP)."""
    batch, timing = setting.batch // data, setting.timing
    replicas, axis = axes(setting.machine, data, group)
    messages: list[Message] = []

    def exchange(layer: Layer, seconds: Seconds) -> float:
        if group > 1:
            messages.extend(
                group_messages(workload, layer, seconds, axis, batch, setting, two_level_exchange)
            )
        return 0.0

    line = walk(workload, workload.layers, batch, timing, group, see=exchange)
    messages += replica_messages(workload, line, replicas, group)
    parameters = sum(held(layer, group) for layer in workload.layers)
    part = Part(workload, workload.layers, batch, group, setting.precision)
    static = buffers(workload, workload.layers, group) + 4 * batch * workload.values[0].elements
    strategy = "group" if group > 1 or workload.groups > 1 else "ddp"
    return make(strategy, conv, workload.groups, data, group, setting, 4 * parameters, static, part, line, messages,
                two_level_exchange=two_level_exchange)  # fmt: skip


def group_messages(
    workload: Workload,
    layer: Layer,
    seconds: Seconds,
    axis: Axis,
    batch: int,
    setting: Setting,
    two_level: bool,
) -> list[Message]:
    others = (axis.ranks - 1) / axis.ranks
    if layer.kind == "two-level":
        height_width = workload.values[layer.output].elements // workload.values[layer.output].shape[0]
        z = batch * layer.groups * height_width * ITEMSIZE[setting.precision]
        taken = all_gather(axis, z, two_level=two_level)
        gather = max(0.0, taken - seconds.local_forward), max(0.0, taken - seconds.local_backward)
        return [
            Message("all-gather", z // axis.ranks, others * z, taken, gather[0]),
            Message("reduce-scatter", z, others * z, taken, gather[1]),
        ]
    if layer.end == "classifier":
        logits = 4 * batch * workload.values[layer.output].elements
        taken = all_reduce(axis, logits)
        return [Message("all-reduce", logits, 2 * others * logits, taken, taken)]
    return []


def make(
    strategy: str,
    conv: str,
    groups: int,
    data: int,
    inner: int,
    setting: Setting,
    parameter_bytes: int,
    static: int,
    part: Part,
    line: Walk,
    messages: list[Message],
    *,
    gradients_persist: bool | None = None,
    **more,
) -> Cost:
    """The cost from its parts. Parameters and momentum are always held, gradients where they persist (DDP)."""
    persist = data > 1 if gradients_persist is None else gradients_persist
    always = parameter_bytes * (3 if persist else 2) + static
    peak = always + part.peak(gradients_persist=persist)
    # Where gradients come and go, they are all there when the optimiser steps.
    peak = max(peak, parameter_bytes * 3 + static)
    return Cost(
        strategy, conv, groups, data, inner, setting.batch, parameter_bytes // 4, parameter_bytes, parameter_bytes,
        parameter_bytes, part.activations(), peak, peak <= setting.machine.usable, line.compute, 0.0,
        tuple(messages), **more,
    )  # fmt: skip
