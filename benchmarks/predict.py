"""How well the cost model predicts training steps on this machine, for networks that its calibration has not seen.

    python -m benchmarks.predict

The calibration (`twolevel plan --calibrate`) times single layers over a grid of shapes; here whole steps of networks
are timed as in `benchmarks.step` and put beside the model's sums. `one rank of P` computes what one of P ranks does;
NOTHING CROSSES, so it says nothing of communication.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks import report
from benchmarks.peers import one_rank
from benchmarks.step import WARM_UP, Step
from twolevel import models
from twolevel.analysis import plots
from twolevel.analysis.planner import calibrate, presets
from twolevel.analysis.planner.costs.base import walk
from twolevel.analysis.planner.machine import Machine
from twolevel.analysis.planner.timing import Timing
from twolevel.analysis.planner.tracing import trace
from twolevel.errors import UserError

WITHIN = 0.2  # a prediction is good if it is off by no more than this share of what was measured


@dataclass(frozen=True)
class Case:
    """One rank's step: rank 0 of `ranks`, images a step."""

    model: str
    conv: str
    groups: int
    ranks: int
    batch: int

    @property
    def name(self) -> str:
        groups = f" G={self.groups}" if self.groups > 1 else ""
        ranks = f", one rank of {self.ranks}" if self.ranks > 1 else ""
        return f"{self.model} {self.conv}{groups}{ranks}, batch {self.batch}"


CASES = (
    Case("wrn-10-2", "sc", 1, 1, 32),
    Case("wrn-16-2", "sc", 1, 1, 64),
    Case("wrn-16-4", "sc", 1, 1, 16),
    Case("wrn-22-2", "sc", 1, 1, 32),
    Case("wrn-16-2", "gc", 4, 1, 32),
    Case("wrn-16-4", "gc", 8, 1, 32),
    Case("wrn-10-2", "gc2l", 2, 1, 64),
    Case("wrn-16-2", "gc2l", 4, 1, 32),
    Case("wrn-16-4", "gc2l", 4, 1, 32),
    Case("wrn-16-4", "gc2l", 16, 1, 32),
    Case("wrn-28-2", "gc2l", 8, 1, 16),
    Case("wrn-22-2", "gc2l", 2, 2, 32),
    Case("wrn-16-4", "gc2l", 4, 2, 16),
    Case("wrn-16-4", "gc2l", 4, 4, 32),
    Case("wrn-28-2", "gc2l", 4, 4, 16),
    Case("wrn-16-4", "gc2l", 16, 4, 32),
    Case("wrn-16-6", "gc2l", 8, 4, 32),
    Case("wrn-16-4", "gc2l", 8, 8, 64),
)


@dataclass
class Settings:
    """Predict and time training steps on the CPU, float32."""

    machine: Path | None = None
    """file of twolevel plan --calibrate; measured first unless given"""

    turns: int = 9
    """timed steps of every network"""

    threads: int = 1
    """threads of torch; with 1, times are those that the thread had a core"""

    cases: tuple[str, ...] = ()
    """take only cases whose name contains one of these words"""

    output: Path = field(default_factory=lambda: report.RESULTS / "predict.json")
    """file to write, a picture beside it"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        if not self.chosen:
            raise UserError(
                f"--cases {' '.join(self.cases)} is in the name of none of the {len(CASES)} cases"
            )

    @property
    def chosen(self) -> list[Case]:
        return [c for c in CASES if not self.cases or any(word in c.name for word in self.cases)]


def calibrated(settings: Settings) -> Machine:
    if settings.machine:
        return Machine.load(settings.machine)
    calibration, tables = calibrate.Calibration("cpu", "float32"), {}
    for name, table in calibration.run():
        tables[name] = table
        print(f"measured {name}, {len(table.forward)} shapes", flush=True)
    links = presets.link("loopback"), presets.link("ethernet-10g")
    return calibrate.measured(tables, "cpu", "float32", *links)


def predicted(case: Case, timing: Timing) -> float:
    """Seconds of a step by the model."""
    with torch.device("meta"):
        network = models.create(case.model, conv=case.conv, groups=case.groups)
    size = models.image_size(case.model)
    workload = trace(network, (3, size, size))
    return walk(workload, workload.layers, case.batch, timing, case.ranks).compute


def make(case: Case) -> nn.Module:
    if case.ranks > 1:
        return one_rank(case.model, case.groups, case.ranks)
    return models.create(case.model, conv=case.conv, groups=case.groups)


def timed(case: Case, settings: Settings) -> list[float]:
    """Seconds of each of the turns."""
    size, generator = models.image_size(case.model), torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    step = Step(make(case), images, torch.randint(10, (case.batch,), generator=generator))
    seconds = report.stopwatch("cpu", settings.threads)
    for _ in range(WARM_UP):
        step()
    return [seconds(step) for _ in range(settings.turns)]


def measure(settings: Settings, machine: Machine) -> dict:
    """Predicted and measured milliseconds of every case, their ratio, and how many are within 20 %."""
    torch.set_num_threads(settings.threads)
    report.steady_memory()
    timing, cases = Timing(machine), []
    for case in settings.chosen:
        taken, expected = timed(case, settings), predicted(case, timing)
        found = report.summary(taken)
        ratio = 1e3 * expected / found["median_ms"]
        cases.append(
            {"case": case.name, **vars(case), **found, "predicted_ms": 1e3 * expected, "ratio": ratio}
        )
        print(f"{case.name:42} measured {found['median_ms']:8.1f} ms  predicted {1e3 * expected:8.1f} ms  "
              f"ratio {ratio:.2f}", flush=True)  # fmt: skip
    off = [abs(c["ratio"] - 1) for c in cases]
    return {
        "cases": cases,
        "within_20_percent": sum(o <= WITHIN for o in off),
        "of": len(cases),
        "median_error": statistics.median(off),
        "largest_error": max(off),
    }


def draw(found: dict, path: Path) -> None:
    """Predicted against measured, with the lines of 20 %."""
    figure, (axes,) = plots.new_figure(width=6.5, height=6, theme=plots.PAPER)
    measured = [c["median_ms"] for c in found["cases"]]
    ends = [min(measured) / 1.5, max(measured) * 1.5]
    for factor, style in ((1, "-"), (1 - WITHIN, ":"), (1 + WITHIN, ":")):
        axes.plot(ends, [factor * e for e in ends], style, color="gray", lw=1)
    for conv, colour in zip(("sc", "gc", "gc2l"), plots.PALETTE, strict=False):
        mine = [c for c in found["cases"] if c["conv"] == conv]
        for alone, marker in ((True, "o"), (False, "^")):
            shown = [c for c in mine if (c["ranks"] == 1) is alone]
            if shown:
                label = conv if alone else f"{conv}, one rank of P (nothing is sent)"
                points = [c["median_ms"] for c in shown], [c["predicted_ms"] for c in shown]
                axes.plot(*points, marker, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="measured, ms a step", ylabel="predicted, ms a step")
    plots.decades(axes.xaxis)
    plots.decades(axes.yaxis)
    plots.one_legend(figure, columns=2)
    axes.set_title(f"{found['within_20_percent']} of {found['of']} within 20 %", fontsize=10)
    plots.save(figure, path)
    print(f"wrote {path}")


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "predict", argv)
    torch.set_num_threads(settings.threads)
    facts = report.machine("cpu")
    found = measure(settings, calibrated(settings))
    print(
        f"{found['within_20_percent']} of {found['of']} within 20 %; error: median {found['median_error']:.1%}, "
        f"largest {found['largest_error']:.1%}"
    )
    report.write("predict", argv, settings, facts, found)
    draw(found, settings.output.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"benchmarks: {error}")
