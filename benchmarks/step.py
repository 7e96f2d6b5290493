"""How long a training step takes on one device: ours against dense, group and stock two-level convolutions.

    python -m benchmarks step

A step is forward, loss, backward and fused SGD on one fixed batch; loading data is not in it. All peers are
in one process and take turns, step by step, so that what else the machine does falls on all of them; times are
medians over the turns.

    sc                  dense convolutions
    gc                  group convolutions
    gc2l                twolevel.nn.TwoLevelConv2d
    stock               two-level by stock layers, as its paper has it (benchmarks/stock.py)
    stock tuned         the same without a copy; stock three: by three stock convolutions
    one rank of P       gc2l cut for P ranks, what rank 0 computes; NOTHING CROSSES: copies of its own
                        representatives stand for the others', so it is a bound for P devices, not their time;
                        fused: by the schedule that waits for the exchange, and then passes over less memory
    ... compiled        under torch.compile: on the CPU stock and gc2l, on a GPU all but the variants of stock
    ... graph           forward, backward and SGD replayed as one CUDA graph, without the host's part in them (on a GPU)
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from benchmarks.peers import COMPILED, GRAPH, NEVER_COMPILED, networks, rank_name
from twolevel import models
from twolevel.errors import UserError, unknown
from twolevel.nn.structure import memory_format
from twolevel.ops.replay import replay_of
from twolevel.settings import Device

WARM_UP = 2  # steps of each peer before the first timed one: memory, choices of algorithms, optimiser state


@dataclass
class Settings:
    """Time training steps of every peer on one device."""

    device: Device = "auto"
    """where to run; auto takes the GPU where there is one"""

    model: str | None = None
    """network, as for `twolevel train`; by default wrn-16-4 on the CPU, wrn-28-10 on a GPU"""

    batch: int | None = None
    """images in a step; by default 32 on the CPU, 128 on a GPU"""

    groups: tuple[int, ...] = (4, 16)
    """numbers of groups to time"""

    ranks: int = 4
    """P of the peer that computes what one of P ranks does; divides the groups"""

    peers: tuple[str, ...] = ()
    """names of the peers to time, as printed; all unless given"""

    turns: int = 15
    """timed steps of every peer"""

    threads: int = 1
    """threads of torch on the CPU; with 1, times are those that the thread had a core"""

    compile: bool = True
    """time torch.compile too, which takes a minute more and, on the CPU, a C++ compiler"""

    output: Path | None = None
    """file to write, a picture beside it; by default results/step.json, on a GPU results/step-gpu.json"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        self.device = report.choose_device(self.device)
        on_gpu = self.device == "cuda"
        self.model = self.model or ("wrn-28-10" if on_gpu else "wrn-16-4")
        self.batch = self.batch or (128 if on_gpu else 32)
        self.output = self.output or report.RESULTS / ("step-gpu.json" if on_gpu else "step.json")
        self.check_peers()

    def check_peers(self) -> None:
        """Raise UserError for the name of a peer that there is not."""
        there = {name for name, _ in self.every_network()}
        if self.device == "cuda":
            there |= {name + GRAPH for name in there if name not in NEVER_COMPILED}
        for name in self.peers:
            if name not in there:
                raise unknown("peer", name, sorted(there))
            replayed = name.removesuffix(GRAPH)
            if replayed not in self.peers:
                raise UserError(f"--peers {name!r} replays {replayed!r}; name that too")

    def every_network(self) -> dict[tuple[str, int], Callable[[], nn.Module]]:
        """How to make each peer but those that are replayed."""
        assert self.model is not None
        return networks(self.model, self.groups, self.ranks, device=self.device, compile=self.compile)

    def wants(self, peer: str) -> bool:
        return not self.peers or peer in self.peers


class Step:
    """A training step of one network on a fixed batch: float32 on the CPU, bfloat16 autocast on a GPU."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor):
        memory = memory_format(network, images.device)
        self.network = network.to(images.device, memory_format=memory)
        self.images, self.labels = images.contiguous(memory_format=memory), labels
        # A small rate: the batch never changes, and once it is learnt gradients would be denormal numbers.
        self.optimiser = torch.optim.SGD(
            network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True
        )

    def __call__(self) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        device = self.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(self.network(self.images), self.labels)
        loss.backward()
        self.optimiser.step()
        return loss.detach()


class GraphedStep:
    """A warm step captured in a CUDA graph: one launch, without the host's part in it."""

    def __init__(self, step: Step):
        self.network = step.network

        def call() -> None:
            self.loss = step()

        self.replay = replay_of(call)

    def __call__(self) -> Tensor:
        self.replay()
        return self.loss


def ready(settings: Settings) -> tuple[dict[tuple[str, int], Step], dict[tuple[str, int], float], dict]:
    """Steps that are warm, seconds that each one's warming took, and those that cannot run here, with why."""
    size = models.image_size(settings.model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch, 3, size, size, generator=generator)
    images = images.to(settings.device)
    labels = torch.randint(10, (settings.batch,), generator=generator).to(settings.device)
    steps, warming, skipped = {}, {}, {}

    def warm(key: tuple[str, int], make: Callable[[], Step]) -> None:
        start = time.perf_counter()
        try:
            step = make()
            losses = [float(step()) for _ in range(WARM_UP)]
        except Exception as error:
            # A compiler that is missing or broken, a capture that fails, or a card that is full should not cost the
            # other peers' times.
            if not (COMPILED in key[0] or GRAPH in key[0] or isinstance(error, torch.OutOfMemoryError)):
                raise
            skipped["{}, G={}".format(*key)] = str(error).strip().partition("\n")[0]
            return
        assert all(map(math.isfinite, losses)), (key, losses)
        steps[key], warming[key] = step, time.perf_counter() - start

    for key, build in settings.every_network().items():
        if settings.wants(key[0]):
            warm(key, lambda build=build: Step(build(), images, labels))
    if settings.device == "cuda":
        for peer, groups in [*steps]:
            if peer not in NEVER_COMPILED and settings.wants(peer + GRAPH):
                warm((peer + GRAPH, groups), lambda key=(peer, groups): GraphedStep(steps[key]))
    return steps, warming, skipped


def measure(settings: Settings) -> dict:
    """Milliseconds of a step by peer, and the ratios of medians to dense and to stock convolutions."""
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    report.steady_memory()
    steps, warming, skipped = ready(settings)
    seconds = report.stopwatch(settings.device, settings.threads)
    taken = report.take_turns(steps, settings.turns, seconds)
    times = {key: report.summary(of_peer) for key, of_peer in taken.items()}
    # Of dense convolutions the fastest way to run them, compiled or not.
    dense = min(
        (found["median_ms"] for (name, _), found in times.items() if name.split()[0] == "sc"), default=None
    )
    peers = []
    for (name, groups), found in times.items():
        ratios = {}
        for stock in ("stock", "stock tuned", "stock compiled"):
            other = times.get((stock, groups))
            ratios[f"to_{stock.replace(' ', '_')}"] = (
                found["median_ms"] / other["median_ms"] if other else None
            )
        peers.append(
            {
                "peer": name,
                "groups": groups,
                **found,
                "images_per_second": 1e3 * settings.batch / found["median_ms"],
                "to_sc": found["median_ms"] / dense if dense else None,
                **ratios,
                "warm_up_s": warming[name, groups],
            }
        )
    return {"peers": peers, "skipped": skipped}


def table(found: dict) -> str:
    """One line for each peer."""
    rows = [["", "G", "ms", "quartiles", "/ sc", "/ stock", "/ tuned", "/ compiled"]]
    for peer in found["peers"]:
        low, _, high = peer["quartiles_ms"]
        rows.append(
            [
                peer["peer"],
                str(peer["groups"]),
                f"{peer['median_ms']:.1f}",
                f"{low:.1f} to {high:.1f}",
                *(
                    f"{peer[to]:.3f}" if peer[to] else ""
                    for to in ("to_sc", "to_stock", "to_stock_tuned", "to_stock_compiled")
                ),
            ]
        )
    return report.table(rows, first=26, width=16)


def draw(found: dict, settings: Settings, path: Path) -> None:
    """Ratios to the dense network, of every peer, by number of groups."""
    ratios = {(peer["peer"], peer["groups"]): peer["to_sc"] for peer in found["peers"] if peer["to_sc"]}
    names = [name for name in dict.fromkeys(name for name, _ in ratios) if name.split()[0] != "sc"]
    if not names:
        return
    series = {
        name + (" (nothing is sent)" if name.startswith(rank_name(settings.ranks)) else ""): [
            ratios.get((name, groups)) for groups in settings.groups
        ]
        for name in names
    }
    report.bars(
        {"time of a training step / that of dense convolutions": series},
        [f"G = {groups}" for groups in settings.groups],
        path,
        title=f"{settings.model}, batch {settings.batch}, {settings.device}",
        unit="ratio of medians",
    )


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "step", argv)
    facts = report.machine(settings.device)
    found = measure(settings)
    print(f"{settings.model}, batch {settings.batch}, {settings.device}, {settings.turns} turns")
    print(table(found))
    for what, why in found["skipped"].items():
        print(f"skipped {what}: {why}")
    report.write("step", argv, settings, facts, found)
    draw(found, settings, settings.output.with_suffix(".png"))
