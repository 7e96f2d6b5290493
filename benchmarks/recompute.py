"""What blocks that are computed again in backward save of memory, and take of time.

    python -m benchmarks recompute

A step is that of `benchmarks step`. Peers are one network that stores its activations, one whose blocks are computed
again (`twolevel.nn.recompute_blocks`), and one whose blocks are called through torch.utils.checkpoint as its
documentation has it. Times are of turns in one process. Memory is the highest resident size of a process that takes
three steps, above what it had before it made the network: weights, gradients and momentum are in it. Its C library is
told to hand back what is freed (MALLOC_MMAP_THRESHOLD_), which takes time; unless told, glibc keeps most of it, in
pieces that fit nothing else, and a process on CPUs gains less. (With stock checkpoints running statistics follow each
batch twice.)
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import report
from benchmarks.scaling.rank import in_use
from benchmarks.step import Step
from twolevel import models
from twolevel.nn import recompute_blocks
from twolevel.nn.structure import blocks
from twolevel.settings import UNGROUPED

STEPS = 3  # of which memory is taken


@dataclass
class Settings:
    """Time and measure steps with and without activations that are computed again, on the CPU."""

    model: str = "wrn-28-4"
    """network, as for `twolevel train`"""

    convs: tuple[str, ...] = ("gc2l", "sc")
    """its convolutions"""

    groups: int = 4
    """channel groups"""

    batch: int = 64
    """images in a step"""

    turns: int = 7
    """timed steps of every peer"""

    threads: int = 1
    """threads of torch; with 1, times are those that the thread had a core"""

    output: Path = report.RESULTS / "recompute.json"
    """file to write"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)


class Checkpointed(nn.Module):
    """A block through torch.utils.checkpoint."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def by_torch(model: nn.Module) -> None:
    for name, block in [*blocks(model)]:
        model.set_submodule(name, Checkpointed(block))


PEERS: dict[str, Callable[[nn.Module], object]] = {
    "stored": lambda model: None,
    "computed again": recompute_blocks,
    "torch.utils.checkpoint": by_torch,
}


def make_step(settings: Settings, conv: str, peer: str) -> Step:
    groups = 1 if conv in UNGROUPED else settings.groups
    model = models.create(settings.model, conv=conv, groups=groups, num_classes=10).train()
    PEERS[peer](model)
    images = torch.randn(settings.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Step(model, images, torch.arange(settings.batch) % 10)


def peak_mb(settings: Settings, conv: str, peer: str) -> float:
    """In a process of its own, whose highest size is this peer's."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)  # bytes of a block from which on it is handed back
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_mb, (settings, conv, peer))


def _peak_mb(settings: Settings, conv: str, peer: str) -> float:
    torch.set_num_threads(settings.threads)
    device = torch.device("cpu")
    before = in_use("VmRSS", device)
    step = make_step(settings, conv, peer)
    for _ in range(STEPS):
        step()
    return (in_use("VmHWM", device) - before) / 2**20


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "recompute", argv)
    facts = report.machine()
    torch.set_num_threads(settings.threads)
    report.steady_memory()
    seconds = report.stopwatch("cpu", settings.threads)
    rows, found = [["of the step that stores", "memory", "time"]], {}
    for conv in settings.convs:
        steps = {peer: make_step(settings, conv, peer) for peer in PEERS}
        times = report.take_turns(steps, settings.turns, seconds, warm_up=2)
        del steps
        memory = {peer: peak_mb(settings, conv, peer) for peer in PEERS}
        stored = statistics.median(times["stored"])
        found[conv] = {
            peer: report.summary(times[peer])
            | {"peak_mb": memory[peer], "time_ratio": statistics.median(times[peer]) / stored}
            | {"memory_ratio": memory[peer] / memory["stored"]}
            for peer in PEERS
        }
        for peer, row in found[conv].items():
            rows.append([f"{conv}, {peer}", f"{row['memory_ratio']:.2f}", f"{row['time_ratio']:.2f}"])
    print(report.table(rows, first=36))
    report.write("recompute", argv, settings, facts, {"networks": found})
