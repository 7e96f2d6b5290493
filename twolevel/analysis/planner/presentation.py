"""A plan as a table, as JSON and as a picture."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twolevel.analysis.planner.costs.base import Cost
from twolevel.analysis.planner.plan import Plan, Request, gigabytes, seconds, title
from twolevel.analysis.planner.study import SERIES, Point
from twolevel.terminal import Column, Console, print_stacked, print_table

PROJECTION = "These are projections of the cost model, not measurements."


def print_plan(plan: Plan) -> None:
    """Every strategy by step time, then the choice and its reasons."""
    request = plan.request
    console = Console()
    console.paragraph(headline(request))
    styles = ["" if cost.fits else "dim" for cost in plan.costs]
    print_table(console, _columns(plan), styles=styles)
    console.print()
    for reason in plan.reasons:
        console.paragraph(reason)
    console.print(PROJECTION)


def _columns(plan: Plan) -> list[Column]:
    costs = plan.costs

    def times(heading: str, need: int) -> Column:
        return Column(heading, [seconds(getattr(cost, heading)) for cost in costs], need)

    def sizes(heading: str, values: list[float], need: int) -> Column:
        return Column(heading, [gigabytes(value) for value in values], need)

    titles = [title(cost) + (" *" if cost is plan.best else "") for cost in costs]
    epochs = [seconds(cost.epoch(plan.request.epoch_images)) for cost in costs]
    return [
        Column("strategy", titles, 13, left=True),
        Column("parameters", [f"{cost.parameters:,}" for cost in costs], 5),
        sizes("param+grad", [cost.parameter_bytes + cost.gradient_bytes for cost in costs], 2),
        sizes("momentum", [cost.momentum_bytes for cost in costs], 1),
        sizes("activations", [cost.activation_bytes for cost in costs], 4),
        sizes("peak", [cost.peak_bytes for cost in costs], 11),
        Column("fits", ["yes" if cost.fits else "no" for cost in costs], 10),
        times("compute", 7),
        times("bubble", 3),
        times("hidden", 0),
        times("exposed", 8),
        times("step", 12),
        Column("epoch", epochs, 9),
        sizes("sent", [cost.bytes_sent for cost in costs], 6),
    ]


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
    console = Console()
    console.paragraph(headline(request))
    ranks = sorted({p.ranks for p in points})
    cells = {(p.series, p.ranks): _cell(p.cost) for p in points}
    series = [name for name in SERIES if any(p.series == name for p in points)]
    columns = [Column(name, [cells.get((name, number), "") for number in ranks]) for name in series]
    print_stacked(console, Column("ranks", [*map(str, ranks)]), columns)
    console.paragraph("Step time (share of it that waits for communication); ! does not fit.")
    console.print(PROJECTION)


def _cell(cost: Cost) -> str:
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
    if request.representatives > 1:
        stem += f", {request.representatives} representatives a group"
    return (
        f"{request.model}{stem}, batch {request.setting.batch}, {request.setting.precision}, {request.ranks} ranks of "
        f"{machine.name} ({machine.source}), {links}"
    )


def _request(request: Request) -> dict[str, Any]:
    machine = request.setting.machine
    described = asdict(machine)
    described["tables"] = sorted(machine.tables)
    asked = {
        name: getattr(request, name)
        for name in ("model", "conv", "ranks", "groups", "representatives", "epoch_images", "wide_stem")
    }
    return {
        "request": asked | {"batch_size": request.setting.batch, "precision": request.setting.precision}
    } | {"machine": described}
