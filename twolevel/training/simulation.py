"""A run with --simulate: steps of rank 0 of N, taken by this process alone, and what they cost on this device.

The steps are those of a run: its data, network, loss, rules, optimiser. What other ranks would send is copied from this
one (`twolevel.distributed.simulation`), so that a step of N ranks takes this time and what is exposed of its exchange.
"""

import statistics
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from twolevel.analysis.count import count, countable
from twolevel.analysis.planner.plan import seconds
from twolevel.analysis.traffic import collective
from twolevel.data import Data
from twolevel.distributed.strategies import Placed
from twolevel.errors import Stopped
from twolevel.ops.clock import Marks
from twolevel.terminal import Console
from twolevel.training.context import Context
from twolevel.training.display import waiting
from twolevel.training.graphed import GraphedStep
from twolevel.training.meter import Meter
from twolevel.training.projection import project
from twolevel.training.rules import Rule
from twolevel.training.run_step import take_step
from twolevel.training.state import TrainState
from twolevel.training.step import TrainStep

STEPS = 20  # that are timed, unless --max-steps says
WARM_UP = 3  # before: memory, momentum, choices of algorithms, what is compiled


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends it by Stopped: there is nothing to save."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Stopped("interrupted; a simulation has nothing to save") from interrupt


def announce(context: Context) -> None:
    """Say what this is, and what it is not."""
    Console().print(
        f"simulating rank 0 of {context.world.size} ({_shape(context)}) on {context.device.type}: "
        "nothing is sent, losses mean nothing, and nothing is written"
    )


@dataclass
class Simulation:
    """Steps of rank 0 of the ranks of a simulated world, as a run from its beginning takes them."""

    context: Context
    placed: Placed
    data: Data
    state: TrainState
    train_step: TrainStep | GraphedStep
    rules: list[Rule]
    meter: Meter
    all_steps: int

    def __post_init__(self):
        self.config = self.state.config

    def run(self) -> None:
        """Take the steps and print what they cost."""
        number = self.config.run.max_steps or STEPS
        times = self._times(number)
        step = statistics.median(times)
        memory = self.meter.steps(0.0, sum(times))["memory_mb"]
        used = self.meter.utilisation(self.config.data.batch, step)
        ranks, device = self.context.world.size, self.context.device.type
        threads = f", threads: {torch.get_num_threads()}" if device == "cpu" else ""
        every = f"the {ranks} ranks" if ranks > 1 else "the one rank"
        rows = {
            "mesh": f"{self.placed.strategy} on {device}{threads}",
            "this rank": f"{self.placed.num_parameters():,} parameters, {self._images()} images a step",
            "step": f"{seconds(step)}, the median of {number}{_spread(times)}, after {self._warm_up()} others",
            "upper bound": f"{self.config.data.batch / step:,.0f} images/s of {every}, without exchange",
            "peak memory": _memory(memory, device),
            "utilisation": "not known" if used is None else f"{100 * used:.0f} %",
            "a real step": self._sent(),
            "exchange": self._exchange(step),
        }
        console = Console()
        for name, text in rows.items():
            console.print(f"{name:13}{text}")

    def _times(self, number: int) -> list[float]:
        """Seconds of so many steps, each with its batch, after those that warm up."""
        warm_up, marks = self._warm_up(), Marks(self.context.device)
        self.state.model.train()
        with waiting("warming up", shown=True) as say, closing(self._batches()) as batches:
            for index, (images, labels) in enumerate(batches, start=1 - warm_up):
                take_step(images, labels, self.state, self.train_step, self.rules, self.all_steps)
                self.state.step += 1
                if index == 0:
                    self.meter.begin()
                if index >= 0:
                    marks.mark()
                if index > 0:
                    say(f"step {index} of {number}")
                if index == number:
                    break
            return marks.seconds()

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's share of batches, from the first epoch on."""
        while True:
            yield from self.data.train.batches(self.state.epoch, self.state.position)

    def _warm_up(self) -> int:
        return self.train_step.warm_up + 1 if isinstance(self.train_step, GraphedStep) else WARM_UP

    def _images(self) -> int:
        return self.config.data.batch // self.context.mesh["data"].size()

    def _sent(self) -> str:
        """What this rank would send in a step, by algorithms that send the least."""
        mesh, parts, strategy = self.context.mesh, self.config.optimiser.accumulate, self.placed.strategy
        counted = count(
            countable(**self._options()),
            self.config.data.image_shape,
            ranks=mesh["group"].size(),
            batch_size=self._images() // parts,
            dtype=torch.bfloat16 if strategy.precision == "bf16" else strategy.dtype,
        )
        kinds = [f"{parts * found} {kind}" for kind, found in counted.collectives_by_kind().items()]
        said = f"{', '.join(kinds)}: {_megabytes(parts * counted.bytes_sent)}" if kinds else ""
        replicas = mesh["data"].size()
        if replicas > 1:
            size = sum(p.nbytes for p in self.placed.model.parameters() if p.requires_grad)
            summed = collective("all-reduce", size, ranks=replicas)
            said += "; " if said else ""
            said += f"{_megabytes(summed.bytes_sent)} of gradients over {replicas} replicas, beside their statistics"
        return f"sends {said}" if said else "sends nothing"

    def _exchange(self, step: float) -> str:
        """What the exchange would take, by the cost model."""
        if self.context.world.size == 1:
            return "none with one rank"
        found = project(self.config, self.placed.strategy, self.context.mesh, self._options())
        cost, machine = found.time, found.machine
        if cost is None or machine is None:
            return f"time not known: {found.why_no_time}"
        return (
            f"{seconds(cost.communication)}, of which {seconds(cost.exposed)} exposed, so steps of "
            f"{seconds(step + cost.exposed)}: a projection, by the cost model for {machine.name} ({machine.source})"
        )

    def _options(self) -> dict:
        return self.config.model.create_options(self.data.num_classes)


def _shape(context: Context) -> str:
    return f"data={context.mesh['data'].size()} x group={context.mesh['group'].size()}"


def _spread(times: list[float]) -> str:
    if len(times) < 4:
        return ""
    first, _, third = statistics.quantiles(times, n=4)
    return f" (half of them from {seconds(first)} to {seconds(third)})"


def _memory(megabytes: float | None, device: str) -> str:
    if megabytes is None:
        return "not known"
    return f"{megabytes:,.0f} MB, {'of tensors on the GPU' if device == 'cuda' else 'of the process, images included'}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"
