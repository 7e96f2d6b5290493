"""From what ranks found to rows: speed-up, efficiency, what is exposed of communication, what was expected."""

from dataclasses import asdict

import torch
from torch import nn

from benchmarks.collectives import by_kind
from benchmarks.scaling.cases import WEAK_WIDTH, Case, Job
from twolevel import models
from twolevel.analysis import count
from twolevel.nn.structure import ends


def rows_of(job: Job, cases: list[Case], found: dict) -> list[dict]:
    """One row for each of `cases` that ran in the job."""
    carrier = {"group": "gloo", "mpi": "mpi"}
    rows = []
    for case in cases:
        times = found["cases"].get(case.name)
        if times is None:
            continue
        alone = found["cases"].get(case.alone().name)
        silent = found["cases"].get(case.silent().name)
        facts = asdict(case) | {"carrier": carrier[case.exchange], "link": job.link}
        for name in ("crosses", "exchange"):
            del facts[name]
        row = facts | times | {"images_per_second": 1e3 * case.batch / times["median_ms"]}
        row |= compared(case, times["median_ms"], alone["median_ms"] if alone else None)
        row["silent_ms"] = silent["median_ms"] if silent else None
        row["exposed_ms"] = times["median_ms"] - silent["median_ms"] if silent else None
        row["expected"] = expected(case)
        row["as_expected"] = row["expected"] == times["collectives"] if row["expected"] else None
        rows.append(row)
    for row in rows:
        row["to_group"] = to_group(row, rows)
    return rows


def to_group(row: dict, rows: list[dict]) -> float | None:
    """Its time of a step over that of `group` with the fewest groups, over Gloo, at the same place and batch."""
    same = ("scaling", "batch", "model", "ranks", "link")
    peers = [
        other
        for other in rows
        if other["strategy"] == "group"
        and other["carrier"] == "gloo"
        and all(other[field] == row[field] for field in same)
    ]
    first = min(peers, key=lambda other: other["groups"], default=None)
    return row["median_ms"] / first["median_ms"] if first else None


def compared(case: Case, step_ms: float, alone_ms: float | None) -> dict:
    """With one rank of this run: its time, how many times as many images a second, and the share of P times that.

    For weak scaling of the width there is no speed-up: the work is another; efficiency is the ratio of times.
    """
    if alone_ms is None:
        return {"alone_ms": None, "speed_up": None, "efficiency": None}
    if case.scaling == WEAK_WIDTH:
        return {"alone_ms": alone_ms, "speed_up": None, "efficiency": alone_ms / step_ms}
    faster = (case.batch / step_ms) / (case.alone().batch / alone_ms)
    return {"alone_ms": alone_ms, "speed_up": faster, "efficiency": faster / case.ranks}


def expected(case: Case) -> dict | None:
    """The collectives of a step by the package's model (`analysis.count`); of `channel` by its definition."""
    size = models.image_size(case.model)
    if case.strategy not in ("group", "channel"):
        return None
    with torch.device("meta"):
        whole = models.create(case.model, conv=case.conv, groups=case.groups, num_classes=10)
    if case.strategy == "group":
        counted = count(whole, (3, size, size), ranks=case.ranks, batch_size=case.batch)
        return by_kind([(c.kind, c.bytes_in) for c in counted.collectives])
    logits = ("all-reduce", case.batch * 10 * 4)
    found = [logits] if case.ranks > 1 else []
    for numbers in gathered_numbers(whole, size):
        whole_bytes = 4 * case.batch * numbers
        found += [("all-gather", whole_bytes // case.ranks), ("reduce-scatter", whole_bytes)]
    return by_kind(found)


def gathered_numbers(whole: nn.Module, size: int) -> list[int]:
    """Numbers in each activation that dense convolutions behind the stem read, for one image and on the meta device."""
    stem, _ = ends(whole)
    seen: dict[int, torch.Tensor] = {}  # the tensors too: an id is of one only while it is there

    def see(_, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[id(inputs[0])] = inputs[0]

    for module in whole.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module is not stem:
            module.register_forward_pre_hook(see)
    whole(torch.empty(1, 3, size, size, device="meta"))
    return [x.numel() for x in seen.values()]
