"""Measures the link between ranks that a launcher has started: latency and bandwidth of an all-gather."""

import statistics
import time

import torch
import torch.distributed as dist

from twolevel.analysis.planner.machine import Link
from twolevel.distributed.collectives import MeshAxis

# Bytes of a rank: the smallest is latency alone; the largest is a rank's map of 32 x 32 for 256 images.
SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
TURNS = 15


def measure_link(
    axis: MeshAxis,
    device: torch.device,
    name: str,
    *,
    sizes: tuple[int, ...] = SIZES,
    turns: int = TURNS,
) -> Link:
    """alpha and beta of a ring's step on these ranks; every one of them must call this, and all get the same.

    Fits seconds = (P - 1) (alpha + bytes of a rank / beta) to the smallest size and the slope of the two largest.
    """
    times = [_all_gather(axis, device, size, turns) for size in sizes]
    steps = axis.ranks - 1
    small, large = times[-2] / steps, times[-1] / steps
    slope = max((large - small) / (sizes[-1] - sizes[-2]), large / sizes[-1] / 10)
    latency = max(times[0] / steps - sizes[0] * slope, 1e-7)
    agreed = torch.tensor([latency, 1 / slope], dtype=torch.float64, device=device)
    dist.broadcast(agreed, group_src=0, group=axis.group)
    latency, bandwidth = agreed.tolist()
    source = f"measured by all-gathers of {axis.ranks} ranks"
    return Link(name=name, latency=latency, bandwidth=bandwidth, source=source)


def _all_gather(axis: MeshAxis, device: torch.device, size: int, turns: int) -> float:
    sent = torch.zeros(1, size // 4, device=device)
    times: list[float] = []
    for _ in range(turns + 2):
        dist.barrier(axis.group)
        start = time.perf_counter()
        axis.gather(sent).wait()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
