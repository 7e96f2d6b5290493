"""One rank of N, on this device: what it computes is real, and NOTHING CROSSES. A projection, not a measurement.

The process group is torch's fake one: it has N ranks, of which this process is rank 0, and its collectives return
at once with copies of this rank's own values. So the time bounds that of N devices from below; what would have
crossed is counted beside it. All cases are in one process and take turns.

N ranks are `data x group`: as many as the network's channels allow along `group`, replicas for the rest. A replica
takes its share of the batch, one image at least.
"""

import torch
from torch.distributed import DeviceMesh

from benchmarks import report
from benchmarks.collectives import by_kind, counting
from benchmarks.strategies import OVER_DATA, Training, build
from twolevel import models
from twolevel.distributed.simulation import simulated_ranks
from twolevel.errors import UserError
from twolevel.nn.structure import ends
from twolevel.settings import PIPELINES

WARM_UP = 2
LABEL = "projection: one rank of N on one device, nothing crosses"


def corner(data: int, group: int) -> DeviceMesh:
    """The first data x group ranks of those that are simulated."""
    ranks = torch.arange(data * group).view(data, group)
    return DeviceMesh("cpu", ranks, mesh_dim_names=("data", "group"))


def shape_of(strategy: str, model: str, ranks: int) -> tuple[int, int]:
    """(data, group) of N ranks."""
    if strategy in OVER_DATA:
        return ranks, 1
    with torch.device("meta"):
        stem, _ = ends(models.create(model))
    group = next(g for g in range(ranks, 0, -1) if ranks % g == 0 and stem.out_channels % g == 0)
    return ranks // group, group


def one_rank(
    strategy: str, model: str, conv: str, ranks: int, batch: int, device: str = "cpu"
) -> tuple[Training, dict]:
    """The step of one of `ranks` ranks, a channel group to each rank of the group axis; in `simulated_ranks`."""
    data, group = shape_of(strategy, model, ranks)
    images = max(1, batch // data)
    conv, groups = (conv, group) if strategy == "group" else ("sc", 1)
    training = build(
        strategy,
        model,
        conv=conv,
        groups=groups,
        batch=images * data,
        mesh=corner(data, group),
        device=device,
    )
    facts = {"strategy": strategy, "model": model, "conv": conv, "groups": groups, "ranks": ranks}
    return training, facts | {
        "data": data,
        "group": group,
        "batch": images * data,
        "images_of_a_rank": images,
    }


def summaries(steps: list[Training], turns: int, device: str, threads: int) -> list[dict]:
    """Median and quartiles of each one's step, in their order."""
    seconds = report.stopwatch(device, threads)
    taken = report.take_turns(dict(enumerate(steps)), turns, seconds, warm_up=WARM_UP)
    return [report.summary(own) for own in taken.values()]


def project(
    strategies: tuple[str, ...],
    ranks: tuple[int, ...],
    *,
    model: str,
    conv: str,
    batch: int,
    turns: int,
    threads: int,
    device: str = "cpu",
) -> dict:
    """A row for each strategy and number of ranks; `bound_images_per_second` is that of all N ranks at this pace."""
    rows, steps, skipped = [], [], {}
    with simulated_ranks(max(ranks)):
        for strategy in strategies:
            if strategy in PIPELINES:
                skipped[f"{strategy}, one rank of N"] = (
                    "a pipeline's ranks do not do the same: one is no bound of all"
                )
                continue
            for number in ranks:
                try:
                    step, facts = one_rank(strategy, model, conv, number, batch, device)
                except UserError as error:
                    skipped[f"{strategy}, one rank of {number}"] = str(error)
                    continue
                steps.append(step)
                rows.append(facts)
        for row, times in zip(rows, summaries(steps, turns, device, threads), strict=True):
            row |= times | {"bound_images_per_second": 1e3 * row["batch"] / times["median_ms"]}
        for row, step in zip(rows, steps, strict=True):
            with counting() as seen:
                step()
            row |= {"would_cross": by_kind(seen), "held_bytes": step.held_bytes()}
    return {"label": LABEL, "rows": rows, "skipped": skipped}
