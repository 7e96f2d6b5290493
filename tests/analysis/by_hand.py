"""A machine whose times can be worked out by hand, and networks as the cost model reads them."""

import torch

from twolevel import models
from twolevel.analysis.planner.machine import Link, Machine
from twolevel.analysis.planner.tracing import trace

CURVES = {"float32": ((1, 1.0), (2, 1.0)), "bf16": ((1, 1.0), (2, 1.0))}
# Everything by hand: 1 GFLOP/s, 1 GB/s, links of 1 ms and 1 MB/s (within) or 0.1 MB/s (between nodes).
SIMPLE = Machine(
    name="simple",
    source="",
    memory=0,
    flops={"float32": 1e9, "bf16": 1e9},
    bandwidth=1e9,
    dense=CURVES,
    grouped=CURVES,
    streaming=1.0,
    overhead=0.0,
    link=Link(name="in", latency=1e-3, bandwidth=1e6),
    internode=Link(name="out", latency=1e-3, bandwidth=1e5),
    ranks_per_node=4,
)


def workload(name, conv="sc", groups=1, size=16, **options):
    with torch.device("meta"):
        return trace(models.create(name, conv=conv, groups=groups, **options), (3, size, size))
