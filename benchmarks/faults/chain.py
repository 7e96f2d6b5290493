"""A run whose number of ranks changes under way: its losses, beside those of a run that nothing happens to."""

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from benchmarks.faults import processes, trial
from twolevel.analysis import plots
from twolevel.training import metrics

CHAINS = ((4, 3, 2, 1, 4), (8, 7, 5, 4, 8))
# Batch norm sees the whole batch, over how many replicas it may be spread.
MESH = ("--mesh", "auto", "--sync-batch-norm", "--resume")
KIND = trial.Kind("all ranks are killed, and others come", 4, mesh=MESH)


def measure(folder: Path) -> list[dict[str, Any]]:
    """Of each chain what its ranks and steps were, its losses and the undisturbed ones, by step."""
    return [_run(chain, folder / f"chain-{'-'.join(map(str, chain))}") for chain in CHAINS]


def _run(chain: tuple[int, ...], folder: Path) -> dict[str, Any]:
    kind = replace(KIND, ranks=chain[0])
    reference = folder / "undisturbed"
    trial.undisturbed(kind, reference)
    shutil.rmtree(folder / "changed", ignore_errors=True)
    ended_at, printed = [], []
    for number, ranks in enumerate(chain):
        run = trial.Run(replace(KIND, ranks=ranks), folder / "changed", f"{folder.name}-{number}")
        with trial.surroundings(run):
            run.start()
            if number + 1 < len(chain):
                step = round((number + 1) * trial.LAST_STEP / len(chain))
                processes.wait_for(lambda run=run, step=step: trial.steps(run) >= step, trial.LIMIT_S)
                processes.send(signal.SIGKILL, run.trial)
            run.wait(trial.LIMIT_S, again=number + 1 == len(chain))
        ended_at.append(trial.steps(run))
    printed = [line for line in run.log.splitlines() if " ranks came: " in line]
    print(f"{' -> '.join(map(str, chain))} ranks, which ended after steps {ended_at}", flush=True)
    print(*printed, sep="\n", flush=True)
    found = {
        "ranks": chain,
        "ended_after_step": ended_at,
        "meshes": printed,
        "losses": _losses(run.output),
        "undisturbed": _losses(reference / "run"),
    }
    return found | {"largest_difference": difference(found["losses"], found["undisturbed"])}


def _losses(output: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(output, "step")]


def difference(losses: list[float], undisturbed: list[float]) -> float:
    """The largest of all steps; infinite where one has more steps."""
    if len(losses) != len(undisturbed):
        return math.inf
    return max(abs(a - b) for a, b in zip(losses, undisturbed, strict=True))


def draw(chains: list[dict[str, Any]], path: Path) -> Path:
    """The losses of each chain on those of the undisturbed run, with the ranks of each stretch."""
    figure, panes = plots.new_figure(1, len(chains), width=5.5, height=4, theme=plots.PAPER)
    for axes, chain in zip(panes, chains, strict=True):
        steps = [*range(1, 1 + len(chain["undisturbed"]))]
        axes.plot(steps, chain["undisturbed"], color=plots.PALETTE[0], lw=5, alpha=0.35, label="undisturbed")
        axes.plot(
            steps[: len(chain["losses"])],
            chain["losses"],
            color=plots.PALETTE[1],
            lw=1.4,
            label="changed ranks",
        )
        plots.from_zero(axes)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        begins = [0, *chain["ended_after_step"][:-1]]
        for ranks, begin, end in zip(chain["ranks"], begins, chain["ended_after_step"], strict=True):
            axes.axvline(begin + 0.5, color=plots.PAPER.lines, lw=1)
            axes.text((begin + end + 1) / 2, 0.1, f"P={ranks}", ha="center", color=plots.PAPER.text)
        names = " \N{RIGHTWARDS ARROW} ".join(map(str, chain["ranks"]))
        axes.set(
            xlabel="step",
            ylabel="cross-entropy",
            title=f"P = {names}: differs by {chain['largest_difference']:.0e} at most",
        )
    plots.one_legend(figure)
    return plots.save(figure, path)
