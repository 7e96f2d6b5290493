"""The paper's wall clock (arXiv 2110.05060, Table 2) beside ours: 200 epochs of CIFAR-10, WRN-28-k, on 1, 2, 4 GPUs.

Theirs are Titan RTX. Ours is one rank of P on one device, where nothing crosses: a projection. Hours, on a GPU alone,
are those of 200 epochs at its pace; on a CPU the networks are narrower, and only the ratios to one processor count.
"""

import torch

from benchmarks.scaling.projection import LABEL, corner, summaries
from benchmarks.strategies import ALONE, build
from twolevel.distributed.simulation import simulated_ranks

PROCESSORS = (1, 2, 4)
HOURS = {  # SC, GC-2L of 2 groups, of 4
    40: (49 + 43 / 60, 17 + 47 / 60, 8 + 40 / 60),
    60: (89 + 49 / 60, 30 + 18 / 60, 11 + 49 / 60),
    80: (255 + 1 / 60, 73 + 29 / 60, 20 + 12 / 60),
}
REMARK = (
    "SC at k = 60 and 80 did not fit one of their GPUs and ran as naive model parallelism on more of them"
)
EPOCHS, IMAGES = 200, 50_000


def measure(widths: tuple[int, ...], *, batch: int, turns: int, threads: int, device: str) -> dict:
    """A row for each width and number of processors."""
    rows = []
    with simulated_ranks(max(PROCESSORS)):
        for k in widths:
            steps = []
            for ranks in PROCESSORS:
                strategy, conv = (ALONE, "sc") if ranks == 1 else ("group", "gc2l")
                steps.append(
                    build(
                        strategy,
                        f"wrn-28-{k}",
                        conv=conv,
                        groups=ranks,
                        batch=batch,
                        mesh=corner(1, ranks),
                        device=device,
                    )
                )
            found = summaries(steps, turns, device, threads)
            for ranks, times in zip(PROCESSORS, found, strict=True):
                hours = times["median_ms"] / 3.6e6 * (IMAGES // batch) * EPOCHS
                rows.append(
                    {"k": k, "ranks": ranks, "batch": batch, **times}
                    | {"to_one": times["median_ms"] / found[0]["median_ms"]}
                    | {"hours": hours if device == "cuda" else None}
                )
            del steps
            if device == "cuda":
                torch.cuda.empty_cache()
    published = {k: dict(zip(PROCESSORS, hours, strict=True)) for k, hours in HOURS.items()}
    return {"label": LABEL, "rows": rows, "published_hours": published, "published_remark": REMARK}
