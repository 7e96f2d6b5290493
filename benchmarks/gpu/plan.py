"""The steps of a card's first hour, in order of worth; seconds are guesses until a card was there."""

import os

from benchmarks.gpu.runner import Step
from benchmarks.peers import COMPILED, GRAPH, rank_name

# Networks as MODEL/GROUPS, or MODEL/GROUPS/RANKS for what one of so many ranks computes, by a short name.
NETWORKS = {
    "10-4": "wrn-28-10/4",
    "10-16": "wrn-28-10/16",
    "40-4": "wrn-28-40/4/4",
    "80-4": "wrn-28-80/4/4",
}
BATCH = 128
WAYS = ("", GRAPH, COMPILED, COMPILED + GRAPH)


def steps(processes: int | None = None) -> list[Step]:
    """All of them; what can use several processes uses so many, by default one a core."""
    number = str(processes or os.cpu_count() or 1)
    return [
        Step(
            "parity",
            "the tests that need a card",
            ("benchmarks.gpu.parity", "--processes", number),
            takes_s=150,
        ),
        *(_tuning(short, number) for short in NETWORKS),
        _whole_step("10-4", ways("sc", "stock", "gc2l")),
        _whole_step("10-16", ways("sc", "stock", "gc2l")),
        _whole_step("40-4", ways("sc", rank_name(4))),
        # Dense, it takes about 45 GB once, and cannot be there twice.
        _whole_step("80-4", ("sc", *ways(rank_name(4)))),
        _profile("10-4", ("sc", "gc2l", "gc2l" + COMPILED)),
        _profile("10-16", ("gc2l", "gc2l" + COMPILED)),
        _profile("40-4", (rank_name(4), rank_name(4) + COMPILED)),
        Step(
            "layers-10",
            "the layers of wrn-28-10 against the roofline",
            ("benchmarks", "layers", "--device", "cuda", "--models", "wrn-28-10", "--groups", "4", "16"),
            takes_s=120,
        ),
        Step("nccl", "two ranks over NCCL", ("benchmarks.gpu.nccl",), takes_s=60, limit_s=180),
    ]


def ways(*peers: str) -> tuple[str, ...]:
    """These peers, each in eager mode, replayed, compiled, and compiled and replayed."""
    return tuple(peer + way for peer in peers for way in WAYS)


def _tuning(short: str, processes: str) -> Step:
    return Step(
        f"tuning-{short}",
        f"kernels for {NETWORKS[short]}",
        ("benchmarks.gpu.tuning", "--network", NETWORKS[short], "--processes", processes),
        takes_s=110,
    )


def _whole_step(short: str, peers: tuple[str, ...]) -> Step:
    return Step(
        f"step-{short}",
        f"whole steps of {NETWORKS[short]}",
        ("benchmarks", "step", *_options(short), "--peers", *peers),
        takes_s=220,
    )


def _profile(short: str, peers: tuple[str, ...]) -> Step:
    return Step(
        f"profile-{short}",
        f"where the time of a step of {NETWORKS[short]} goes",
        ("benchmarks.gpu.profiling", *_options(short), "--peers", *peers),
        takes_s=80,
    )


def _options(short: str) -> tuple[str, ...]:
    model, groups, *_ = NETWORKS[short].split("/")
    return ("--device", "cuda", "--model", model, "--batch", str(BATCH), "--groups", groups, "--ranks", "4")
