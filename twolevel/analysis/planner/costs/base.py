"""What a training step costs one rank, in memory and time, and the parts that strategies share."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from twolevel.analysis.planner.footprint import Part, buffers, rank_parameters
from twolevel.analysis.planner.machine import Machine
from twolevel.analysis.planner.messages import Axis, Message, all_reduce, broadcast, buckets, drain, message
from twolevel.analysis.planner.timing import Seconds, Timing
from twolevel.analysis.planner.workload import Layer, Workload
from twolevel.analysis.traffic import collective

Strategy = Literal["group", "ddp", "fsdp", "channel", "naive", "gpipe", "1f1b"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Setting:
    """What all strategies share: a machine and a precision, images of a step over all replicas together.

    With `recompute` blocks are computed again in backward where the network is replicated or split by group.
    """

    machine: Machine
    batch: int
    precision: str = "float32"
    recompute: bool = False

    @property
    def timing(self) -> Timing:
        return Timing(self.machine, self.precision)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A step of one strategy on data x inner ranks, as the rank with the most memory sees it; seconds and bytes."""

    strategy: str
    conv: str
    groups: int
    data: int
    inner: int
    batch: int
    parameters: int
    """on this rank, float32; their gradients and momenta take as many bytes each"""
    activation_bytes: int
    peak_bytes: int
    fits: bool
    compute: float
    bubble: float
    messages: tuple[Message, ...] = field(repr=False)
    microbatches: int = 1
    representatives: int = 1
    two_level_exchange: bool = False

    @property
    def parameter_bytes(self) -> int:
        return 4 * self.parameters

    @property
    def gradient_bytes(self) -> int:
        return self.parameter_bytes

    @property
    def momentum_bytes(self) -> int:
        return self.parameter_bytes

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
    def collectives(self) -> Counter[str]:
        return Counter(m.kind for m in self.messages)

    def epoch(self, images: int) -> float:
        """Seconds of one pass over so many images, the last batch filled up."""
        return -(-images // self.batch) * self.step

    def as_dict(self) -> dict[str, Any]:
        names = (
            "strategy conv groups representatives data inner batch microbatches two_level_exchange parameters "
            "parameter_bytes gradient_bytes momentum_bytes activation_bytes peak_bytes fits compute bubble"
        )
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
    again: Collection[Layer] = (),
    on_layer: Callable[[Layer, Seconds], None] = lambda layer, seconds: None,
) -> Walk:
    """Compute of a rank, which computes the layers in `again` twice.

    `on_layer` is called with every layer and its seconds, from the last layer to the first.
    """
    layers, line = tuple(layers), Walk()
    sizes: list[int] = []
    outputs = {layer.output for layer in layers}
    joins = Counter(v for v in workload.joins if v in outputs)
    for layer in reversed(layers):
        for _ in range(joins[layer.output]):
            line.backward += timing(workload.join(layer.output, batch, ranks)).forward
        seconds = timing(workload.work(layer, batch, ranks, whole_input=whole_input))
        line.forward += seconds.forward
        line.backward += seconds.backward + (seconds.forward if layer in again else 0.0)
        on_layer(layer, seconds)
        if layer.parameters:
            line.ready.append((line.backward, layer))
            sizes += [rank_parameters(layer, ranks) // len(layer.parameters)] * len(layer.parameters)
    line.optimiser = timing.optimiser(len(sizes), sum(sizes))
    return line


def replica_messages(workload: Workload, line: Walk, axis: Axis, ranks: int) -> list[Message]:
    """DDP over the data axis: all-reduces in buckets under a walk's backward; running statistics before forward."""
    if axis.ranks == 1:
        return []
    sizes = [4 * rank_parameters(layer, ranks) for _, layer in line.ready]
    messages: list[Message] = []
    jobs: list[tuple[float, float]] = []
    for indices in buckets(sizes):
        size = sum(sizes[i] for i in indices)
        seconds = all_reduce(axis, size)
        jobs.append((line.ready[indices[-1]][0], seconds))
        messages.append(message(collective("all-reduce", size, ranks=axis.ranks), seconds))
    messages[-1] = replace(messages[-1], exposed=drain(jobs, line.backward))
    norms = sum(layer.kind == "norm" for _, layer in line.ready)
    statistics = buffers(workload, [layer for _, layer in line.ready], ranks)
    for size in (statistics - 8 * norms, 8 * norms) if norms else ():  # one message a type
        seconds = broadcast(axis, size)
        messages.append(message(collective("broadcast", size, ranks=axis.ranks), seconds, exposed=seconds))
    return messages


def step_cost(
    strategy: Strategy,
    workload: Workload,
    setting: Setting,
    *,
    conv: str,
    data: int,
    inner: int,
    parameters: int,
    static: int,
    part: Part,
    line: Walk,
    messages: list[Message],
    gradients_persist: bool | None = None,
    two_level_exchange: bool = False,
) -> Cost:
    """The cost of a step, from `parameters` on this rank, `static` bytes beside them, and the rank's time line.

    Parameters and momentum are always held, gradients where they persist (unless given, where there are replicas).
    """
    persist = data > 1 if gradients_persist is None else gradients_persist
    parameter_bytes = 4 * parameters
    always = parameter_bytes * (3 if persist else 2) + static
    peak = always + part.peak(gradients_persist=persist)
    # Where gradients come and go, they are all there when the optimiser steps.
    peak = max(peak, parameter_bytes * 3 + static)
    return Cost(
        strategy=strategy,
        conv=conv,
        groups=workload.groups,
        representatives=workload.representatives,
        data=data,
        inner=inner,
        batch=setting.batch,
        parameters=parameters,
        activation_bytes=part.activations(),
        peak_bytes=peak,
        fits=peak <= setting.machine.usable,
        compute=line.compute,
        bubble=0.0,
        messages=tuple(messages),
        two_level_exchange=two_level_exchange,
    )
