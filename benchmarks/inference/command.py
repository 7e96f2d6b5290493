"""The command line of `python -m benchmarks inference`, and its file of results."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.inference import layers, networks
from twolevel.errors import UserError


@dataclass
class Settings:
    """Time group convolutions in inference against dense ones, on the CPU: layers of a ResNet-18, condensenet-86."""

    turns: int = 100
    """timed passes of every peer"""

    batch: int = 1
    """images in a pass"""

    size: int = 224
    """height and width of the ResNet-18's input, a multiple of 32"""

    groups: tuple[int, ...] = (4, 8)
    """groups of gc, flgc and dgconv (powers of two), heads of dgc; one table for each"""

    xi: float = 0.75
    """share of the channels that dgc drops"""

    threads: int = 1
    """threads of torch; with 1, times are those that the thread had a core, else those of the clock"""

    output: Path = report.RESULTS / "inference.json"
    """file to write"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        for groups in self.groups:
            if groups < 2 or groups & (groups - 1):
                raise UserError(f"--groups {groups} is not a power of two from 2 on, as dgconv needs; use 4")
        if self.size < 32 or self.size % 32:
            raise UserError(
                f"--size {self.size} is not a multiple of 32, by which a ResNet-18 divides it; use 224"
            )


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "inference", argv)
    facts = report.machine()
    torch.set_num_threads(settings.threads)
    by_groups = {}
    for groups in settings.groups:
        by_groups[groups] = layers.measure(settings, groups)
        print(f"convolutions of a ResNet-18, {groups} groups\n{layers.table(by_groups[groups])}\n")
    network = networks.measure(settings)
    print(networks.table(network))
    found = {"resnet18_by_groups": by_groups, "condensenet86": network}
    report.write("inference", argv, settings, facts, found)


if __name__ == "__main__":
    main(sys.argv[1:])
