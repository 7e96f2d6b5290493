"""`python -m benchmarks gpu`: a card's first hour, in steps of at most 8 minutes that go on where they stopped.

    python -m benchmarks gpu --folder runs/gpu --budget-s 540

    parity      the tests that need a card
    tuning-*    the kernels of a network: compiled in parallel, the fastest kept
    step-*      whole training steps: dense, two-level by stock layers, ours; eager, compiled, as CUDA graphs
    profile-*   where the time of a step goes, kernel by kernel
    layers-*    every distinct convolution against the roofline
    nccl        two ranks over NCCL, on one card where it can

FOLDER holds everything: results, what was printed, and in FOLDER/cache/ the kernels and what was measured of them.
Copy it to another machine with the same card to go on there. Without cache/triton and cache/inductor it is small, and
kernels are compiled again where they are used, or in parallel by --again tuning-10-4.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.gpu import runner
from benchmarks.gpu.plan import steps as planned
from twolevel.errors import unknown


@dataclass
class Settings:
    """Measure what is worth most where there is a GPU, step by step; go on where an earlier command stopped."""

    folder: Path = Path("runs", "gpu")
    """where results and caches are, and where a command goes on"""

    budget_s: float = float("inf")
    """seconds that the command may take: it stops before a step that does not fit"""

    only: tuple[str, ...] = ()
    """names of the steps to run, in their order; all unless given"""

    again: tuple[str, ...] = ()
    """names of steps to run though they are done"""

    processes: int | None = None
    """processes that compile and test; one a core unless given"""

    plan: bool = False
    """print the steps and what has become of them, and run nothing"""

    def __post_init__(self) -> None:
        names = [step.name for step in planned()]
        for name in (*self.only, *self.again):
            if name not in names:
                raise unknown("step", name, names)


def caches(folder: Path) -> dict[str, str]:
    """Where compilers and measurements are kept, as environment variables."""
    cache = folder.resolve() / "cache"
    return {
        "XDG_CACHE_HOME": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "PYTHONUNBUFFERED": "1",
    }


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "gpu", argv)
    steps = [step for step in planned(settings.processes) if not settings.only or step.name in settings.only]
    if settings.plan:
        ledger = runner.Ledger(settings.folder)
    else:
        report.choose_device("cuda")
        facts = report.machine("cuda")
        ledger = runner.Ledger(settings.folder, facts)
        print(f"{settings.folder}: {facts['gpu']}, torch {facts['torch']}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step in hand is ended too
        runner.run_steps(
            steps,
            ledger,
            budget_s=settings.budget_s,
            again=settings.again,
            environment=caches(settings.folder),
        )
    print(report.table(runner.summary(steps, ledger), first=14, width=12))
