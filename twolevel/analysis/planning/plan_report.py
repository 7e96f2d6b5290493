"""A plan as a table, as JSON and as a picture."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from twolevel.analysis.planning.machine import Machine
from twolevel.analysis.planning.plan import Plan, Request, gigabytes, seconds, title
from twolevel.analysis.planning.scaling import SERIES, Point

PROJECTION = "These are projections of the cost model, not measurements."


def print_plan(plan: Plan) -> None:
    """Every strategy by step time, then the choice and its reasons."""
    request = plan.request
    console = Console(markup=False, emoji=False)
    console.width = max(console.width, 210)  # cut numbers would be of no use in a pipe
    console.print(headline(request), highlight=False)
    table = Table(box=None, header_style="bold")
    table.add_column("strategy", no_wrap=True)
    columns = ("parameters", "param+grad", "momentum", "activations", "peak", "fits", "compute", "bubble")
    for name in (*columns, "hidden", "exposed", "step", "epoch", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in plan.costs:
        mark = " *" if cost is plan.best else ""
        table.add_row(
            title(cost) + mark,
            f"{cost.parameters:,}",
            gigabytes(cost.parameter_bytes + cost.gradient_bytes),
            gigabytes(cost.momentum_bytes),
            gigabytes(cost.activation_bytes),
            gigabytes(cost.peak_bytes),
            "yes" if cost.fits else "no",
            *(seconds(value) for value in (cost.compute, cost.bubble, cost.hidden, cost.exposed, cost.step)),
            seconds(cost.epoch(request.epoch_images)),
            gigabytes(cost.bytes_sent),
            style=None if cost.fits else "dim",
        )
    console.print(table)
    console.print()
    for reason in plan.reasons:
        console.print(reason, highlight=False, soft_wrap=True)
    console.print(PROJECTION, highlight=False)


def plan_json(plan: Plan) -> str:
    """The whole plan: request, machine, costs (bytes and seconds), the choice and its reasons."""
    request = plan.request
    number = {id(cost): index for index, cost in enumerate(plan.costs)}
    return json.dumps(
        _request(request)
        | {
            "costs": [
                c.as_dict() | {"epoch": c.epoch(request.epoch_images), "title": title(c)} for c in plan.costs
            ],
            "best": None if plan.best is None else number[id(plan.best)],
            "best_dense": None if plan.dense is None else number[id(plan.dense)],
            "reasons": plan.reasons,
            "note": PROJECTION,
        },
        indent=1,
    )


def print_study(request: Request, points: list[Point]) -> None:
    """A row for each number of ranks, a column for each strategy: step time, the exposed share of it in brackets."""
    console = Console(markup=False, emoji=False)
    console.width = max(console.width, 230)
    console.print(headline(request), highlight=False)
    names = [name for name in SERIES if any(p.series == name for p in points)]
    table = Table(box=None, header_style="bold")
    for name in ("ranks", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for ranks in sorted({p.ranks for p in points}):
        cells = {p.series: p.cost for p in points if p.ranks == ranks}
        table.add_row(str(ranks), *(_cell(cells[name]) if name in cells else "" for name in names))
    console.print(table)
    console.print("Step time (share of it that waits for communication); ! does not fit.", highlight=False)
    console.print(PROJECTION, highlight=False)


def _cell(cost) -> str:
    mesh = (
        f" {cost.data}x{cost.inner} G={cost.groups}"
        if cost.strategy == "group" and cost.inner != cost.ranks
        else ""
    )
    return f"{'' if cost.fits else '! '}{seconds(cost.step)} ({cost.exposed / cost.step:.0%}){mesh}"


def study_json(request: Request, points: list[Point]) -> str:
    found = [{"series": p.series, "ranks": p.ranks} | p.cost.as_dict() for p in points]
    return json.dumps(_request(request) | {"points": found, "note": PROJECTION}, indent=1)


def draw_study(request: Request, points: list[Point], path: Path) -> Path:
    """Step time against processors, both logarithmic; hollow where it does not fit."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(SERIES):
        mine = [p for p in points if p.series == name]
        if not mine:
            continue
        colour = f"C{index}" if index < 10 else "black"
        axes.plot([p.ranks for p in mine], [p.cost.step for p in mine], color=colour, lw=1.2, label=name)
        for fits, face in ((True, colour), (False, "white")):
            shown = [p for p in mine if p.cost.fits is fits]
            axes.plot(
                [p.ranks for p in shown], [p.cost.step for p in shown], "o", color=colour, mfc=face, ms=5
            )
    axes.set(xlabel="processors", ylabel="seconds a step", xscale="log", yscale="log")
    ticks = sorted({p.ranks for p in points})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    title = f"{headline(request)}; projections of the cost model; hollow: does not fit"
    figure.suptitle("\n".join(textwrap.wrap(title, 120)), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def headline(request: Request) -> str:
    machine = request.setting.machine
    links = (
        f"{machine.link.name} within nodes of {machine.ranks_per_node}, {machine.internode.name} between them"
    )
    stem = ", a stem of max(16, G) channels" if request.wide_stem else ""
    return (
        f"{request.model}{stem}, batch {request.setting.batch}, {request.setting.precision}, {request.ranks} ranks of "
        f"{machine.name} ({machine.source}), {links}"
    )


def _request(request: Request) -> dict:
    machine: Machine = request.setting.machine
    described = asdict(machine)
    described["tables"] = sorted(machine.tables)
    asked = {
        name: getattr(request, name)
        for name in ("model", "conv", "ranks", "groups", "epoch_images", "wide_stem")
    }
    return {
        "request": asked | {"batch_size": request.setting.batch, "precision": request.setting.precision}
    } | {"machine": described}
