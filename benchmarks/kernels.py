"""What the Triton kernels of a network are compiled to, for cards that need not be there: nothing is timed.

    python -m benchmarks kernels --offline

Every kernel of every two-level convolution, in the configuration that is the best estimate without a measurement:

    forward, restriction    local part and restriction in one pass (schedule fused)
    forward, coarse         local part and coarse term in one pass (overlapped, one rank)
    forward                 local part (overlapped, several ranks)
    restriction             restriction alone (overlapped)
    input gradient          of the local part, a kernel for each phase of the stride
    weight gradient         of the local part
    ... of restriction      of the restriction

Columns: channels of a group; sides of a tile, warps and stages; registers of a thread and bytes that it spills;
shared memory; programs that a processor holds at once; instructions of the main loop for one tile of the product;
loads from global memory by the bytes of a thread, in that loop or, where it is unrolled, in the whole kernel; the
instructions of all warps of the launch, in millions; the kind of tensor-core instruction.
"""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import layers, offline, report
from benchmarks.offline import TARGETS
from twolevel.errors import UserError, unknown
from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.triton import Config, Problem, candidates, launches, problem_of
from twolevel.ops.kernels.triton.launches import Launch
from twolevel.ops.kernels.triton.problem import Operation

HEADS = (
    "",
    "a group",
    "tile",
    "registers",
    "spilled",
    "shared",
    "programs",
    "a step",
    "loads",
    "M issued",
    "products",
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Settings:
    """Compile every Triton kernel of some networks and count what is in them."""

    networks: tuple[str, ...] = ("wrn-28-10/4", "wrn-28-10/16", "wrn-28-40/4/4")
    """networks as MODEL/GROUPS, or MODEL/GROUPS/RANKS for what one of so many ranks computes"""

    offline: bool = False
    """compile for all targets though there is a card; without it for the card that is here, if there is one"""

    targets: tuple[int, ...] = TARGETS
    """compute capabilities to compile for: 80 and 90 (Ampere's A100, Hopper)"""

    batch: int = 128
    """images"""

    dtype: str = "bfloat16"
    """bfloat16, float16 or float32 (as tf32)"""

    output: Path = report.RESULTS / "kernels-offline.json"
    """file to write, the table beside it"""

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise unknown("target", str(target), map(str, TARGETS))
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if not self.offline and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            if 10 * major + minor not in TARGETS:
                raise UserError(f"nothing is known of compute capability {major}.{minor} here; use --offline")
            self.targets = (10 * major + minor,)


class Kernel(NamedTuple):
    """One launch of a layer."""

    operation: str
    problem: Problem
    launch: Launch


@dataclass(frozen=True)
class Network:
    """A network of two-level convolutions, or what one of `ranks` ranks computes of it."""

    model: str
    groups: int
    ranks: int = 1

    @classmethod
    def named(cls, name: str) -> "Network":
        model, *numbers = name.split("/")
        if len(numbers) not in (1, 2) or not all(number.isdecimal() and int(number) for number in numbers):
            raise UserError(f"--networks {name} is not MODEL/GROUPS or MODEL/GROUPS/RANKS, as wrn-28-10/4")
        network = cls(model, *map(int, numbers))
        if network.groups % network.ranks:
            raise UserError(f"--networks {name}: {network.ranks} ranks cannot share {network.groups} groups")
        return network

    def __str__(self) -> str:
        rank = f", one rank of {self.ranks}" if self.ranks > 1 else ""
        return f"{self.model} G={self.groups}{rank}"

    def kernels(self, shape: layers.Shape, batch: int, dtype: torch.dtype, target: int) -> Iterator[Kernel]:
        """All of one layer, in the configurations that are estimated to be the best on such a card."""
        groups = self.groups // self.ranks
        inputs, outputs = shape.channels // self.ranks, shape.outputs // self.ranks
        x_shape = (batch, inputs, shape.height, shape.height)
        geometry = Geometry((shape.stride,) * 2, (shape.kernel // 2,) * 2)

        def problem(outputs: int, maps: int = 0) -> Problem:
            weight = (outputs, inputs // groups, shape.kernel, shape.kernel)
            return problem_of(x_shape, weight, geometry, groups, dtype, maps)

        def best(problem: Problem, operation: Operation) -> Config:
            return candidates(problem, operation, divmod(target, 10))[0]

        def forward(name: str, problem: Problem, maps: int = 0) -> Kernel:
            launch = launches.forward(problem, best(problem, "forward"), "tf32", maps)
            return Kernel(name, problem, launch)

        local, alone = problem(outputs), problem(groups)
        yield forward("forward, restriction", problem(outputs, maps=1))
        yield forward("forward, coarse", local, self.groups) if self.ranks == 1 else forward("forward", local)
        yield forward("restriction", alone)
        for whose, one in (("", local), (" of restriction", alone)):
            for launch in launches.input_grad(one, best(one, "input_grad"), "tf32"):
                taps = f"{launch.constants['TAPS_H']}x{launch.constants['TAPS_W']}"
                phase = f", {taps} taps" if shape.stride > 1 else ""
                yield Kernel(f"input gradient{whose}{phase}", one, launch)
            launch, _ = launches.weight_grad(one, best(one, "weight_grad"), "tf32")
            yield Kernel(f"weight gradient{whose}", one, launch)


def measure(settings: Settings) -> dict:
    """Every kernel of every network for every target, with what was counted in it; and `issued`, their sums."""
    dtype, found, issued = DTYPES[settings.dtype], [], Counter()
    for network in map(Network.named, settings.networks):
        for shape, times in layers.shapes(network.model).items():
            for target in settings.targets:
                for kernel in network.kernels(shape, settings.batch, dtype, target):
                    made = offline.compiled(kernel.launch, dtype, target)
                    found.append(
                        {
                            "network": str(network),
                            "layer": str(shape),
                            "times_in_model": times,
                            "operation": kernel.operation,
                            "group": f"{kernel.problem.group_inputs} to {kernel.problem.group_outputs}",
                            "pack": kernel.launch.constants["PACK"],
                            "target": target,
                            "config": [*kernel.launch.config],
                            "programs": kernel.launch.programs,
                            **made.counts(),
                        }
                    )
                    issued[_title(found[-1])] += times * _issued(found[-1])
            print(f"compiled {network}: {shape}", flush=True)
    return {"kernels": found, "issued": dict(issued)}


def table(found: dict) -> str:
    """A block for each network and target, a line for each kernel."""
    blocks = {}
    for kernel in found["kernels"]:
        title = _title(kernel)
        loop = kernel["loop"]
        rows = blocks.setdefault(title, [[title, *HEADS]])
        rows.append(
            [
                kernel["layer"],
                kernel["operation"],
                kernel["group"],
                "x".join(map(str, kernel["config"])),
                str(kernel["registers"]),
                str(kernel["spilled_bytes"]),
                f"{kernel['shared_bytes'] / 1024:.0f} KiB",
                str(kernel["programs_per_processor"]),
                "unrolled" if loop is None else f"{loop['instructions'] / loop['steps']:.0f}",
                _loads(kernel["loads"] if loop is None else loop["loads"]),
                f"{_issued(kernel) / 1e6:.1f}",
                " ".join(kernel["products"]) or "none",
            ]
        )
    for title, total in found["issued"].items():
        blocks[title].append(["all, as often as they occur", *[""] * 9, f"{total / 1e6:.0f}", ""])
    return "\n\n".join(_columns(rows) for rows in blocks.values())


def _title(kernel: dict) -> str:
    return f"{kernel['network']}, sm_{kernel['target']}"


def _issued(kernel: dict) -> int:
    """Instructions of all warps of a launch."""
    return kernel["programs"] * kernel["config"][3] * kernel["issued"]


def _loads(by_bytes: dict[int, int]) -> str:
    return " ".join(f"{number}x{size}B" for size, number in by_bytes.items())


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "kernels", argv)
    if (why := offline.unavailable()) is not None:
        print(f"skipped kernels: {why}")
        return
    facts = report.machine() | offline.versions()
    found = measure(settings)
    lines = table(found)
    print(lines)
    command = shlex.join(["python", "-m", "benchmarks", "kernels", *argv])
    report.save(settings.output, command, facts, asdict(settings), found)
    settings.output.with_suffix(".txt").write_text(lines + "\n")
