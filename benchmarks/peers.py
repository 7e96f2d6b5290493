"""The networks that `benchmarks.step` compares, by name, and what one rank of several holds of one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.stock import StockTwoLevelConv2d, ThreeConvolutions, TunedTwoLevelConv2d, to_stock
from twolevel import models
from twolevel.distributed import parallelize
from twolevel.distributed.simulation import simulated_ranks

Build = Callable[[], nn.Module]

COMPILED, GRAPH = " compiled", " graph"
# Compiled on the CPU; on a GPU all are but these.
COMPILED_ON_CPU = ("stock", "gc2l")
NEVER_COMPILED = ("stock tuned", "stock three")


def one_rank(name: str, groups: int, ranks: int, **options: Any) -> nn.Module:
    """The part of a two-level network that rank 0 of `ranks` holds, without any other rank; options are the layers'."""
    model = models.create(name, conv="gc2l", groups=groups, **options)
    with simulated_ranks(ranks):
        return parallelize(model, init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "group")))


def rank_name(ranks: int) -> str:
    return f"one rank of {ranks}"


def peers(name: str, groups: int, ranks: int) -> dict[str, Build]:
    """How to make each peer of one number of groups, but `sc`, which has none."""

    def two_level() -> nn.Module:
        return models.create(name, conv="gc2l", groups=groups)

    return {
        "gc": lambda: models.create(name, conv="gc", groups=groups),
        "gc2l": two_level,
        "stock": lambda: to_stock(two_level(), StockTwoLevelConv2d),
        "stock tuned": lambda: to_stock(two_level(), TunedTwoLevelConv2d),
        "stock three": lambda: to_stock(two_level(), ThreeConvolutions),
        rank_name(ranks): lambda: one_rank(name, groups, ranks),
        f"{rank_name(ranks)} fused": lambda: one_rank(name, groups, ranks, schedule="fused"),
    }


def networks(
    name: str, groups: tuple[int, ...], ranks: int, *, device: str, compile: bool
) -> dict[tuple[str, int], Build]:
    """How to make each peer, by its name and number of groups; with `compile` also those of torch.compile, last."""
    builders: dict[tuple[str, int], Build] = {("sc", 1): lambda: models.create(name, conv="sc")}
    for number in groups:
        builders |= {(peer, number): build for peer, build in peers(name, number, ranks).items()}
    # Weights are drawn where they are used: a wide network's take a CPU minutes.
    builders = {key: _on(device, build) for key, build in builders.items()}
    if compile:
        for (peer, number), build in [*builders.items()]:
            if peer in COMPILED_ON_CPU if device == "cpu" else peer not in NEVER_COMPILED:
                builders[peer + COMPILED, number] = lambda build=build: torch.compile(build())
    return builders


def _on(device: str, build: Build) -> Build:
    def built() -> nn.Module:
        with torch.device(device):
            return build()

    return built
