"""Whether each rank has a GPU of its own, and cores for its threads."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import torch

from twolevel.distributed import nccl
from twolevel.distributed.environment import World
from twolevel.host import usable_cores
from twolevel.training.config import TrainConfig
from twolevel.training.doctor.finding import Finding, count, naming, ok, warning


def report(world: World, config: TrainConfig) -> dict[str, Any]:
    """What a rank has."""
    gpu = None
    if world.device.type == "cuda":
        gpu = str(torch.cuda.get_device_properties(world.device).uuid)
    return {
        "host": socket.gethostname(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "workers": decoding(config),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "gpu": gpu,
    }


def decoding(config: TrainConfig) -> int:
    """Processes of a rank that decode images."""
    return config.data.workers if "workers" in config.data.data_set.uses else 0


def check(reports: list[dict[str, Any]]) -> Iterator[Finding]:
    """Of the reports of all ranks."""
    if any(report["gpu"] for report in reports):
        yield _gpus(reports)
    for host in dict.fromkeys(report["host"] for report in reports):
        there = [report for report in reports if report["host"] == host]
        on_gpus = there[0]["gpu"] is not None
        yield _workers(host, there) if on_gpus else _threads(host, there)


def _gpus(reports: list[dict[str, Any]]) -> Finding:
    hosts = [report["host"] for report in reports]
    of: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        of.setdefault(report["gpu"], []).append(rank)
    shared = [ranks for ranks in of.values() if len(ranks) > 1]
    if not shared:
        return ok("gpu of a rank", f"{count(len(of), 'rank')}, each with one of its own")
    there = sum(hosts[ranks[0]] == hosts[shared[0][0]] for ranks in of.values())
    sharing = "" if nccl.shares_gpus() else ", and Gloo carries their tensors by way of the CPU"
    return warning(
        "gpu of a rank",
        f"{naming(shared[0], hosts)} share one GPU{sharing}",
        f"start {there} ranks on that machine (--nproc-per-node {there})",
    )


def _threads(host: str, reports: list[dict[str, Any]]) -> Finding:
    """Of ranks that compute on the cores of one machine."""
    what, ranks = "threads", len(reports)
    cores = len({core for report in reports for core in report["cores"]})
    threads = sum(report["threads"] for report in reports)
    omp = reports[0]["omp"]
    found = (
        f"{count(ranks, 'rank')} with {count(threads, 'thread')} in all on {count(cores, 'core')} of {host}"
    )
    found += ", OMP_NUM_THREADS is " + ("unset: cores are divided" if omp is None else omp)
    each = max(1, cores // ranks)
    if ranks > cores:
        return warning(
            what, found, f"ranks wait for each other's cores: start {count(cores, 'rank')} or fewer there"
        )
    if threads > cores:
        return warning(what, found, f"threads wait for each other: set OMP_NUM_THREADS={each}")
    if 2 * threads < cores:
        return warning(what, found, f"more than half of the cores are idle: set OMP_NUM_THREADS={each}")
    return ok(what, found)


def _workers(host: str, reports: list[dict[str, Any]]) -> Finding:
    """Of ranks that compute on GPUs, beside which the cores decode images."""
    cores = len({core for report in reports for core in report["cores"]})
    workers = sum(report["workers"] for report in reports)
    busy = workers + len(reports)
    found = f"{count(len(reports), 'rank')} and {count(workers, 'data worker')} on {count(cores, 'core')} of {host}"
    if busy <= cores:
        return ok("threads", found)
    each = max(1, cores // len(reports) - 1)
    fewer = f"use --workers {each}, and " if workers else ""
    return warning("threads", found, f"they wait for each other: {fewer}give the job more cores")
