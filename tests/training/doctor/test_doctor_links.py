"""What is measured between ranks, beside what is assumed, and who is slow."""

import socket
import time
from unittest import mock

import pytest
import torch.distributed as dist
from doctor_settings import CPU, world

from twolevel.analysis.planner import presets
from twolevel.analysis.planner.machine import Link
from twolevel.distributed.environment import World
from twolevel.training.doctor import links
from twolevel.training.doctor.finding import Finding


def link(latency: float, bandwidth: float) -> Link:
    return Link(name="some", latency=latency, bandwidth=bandwidth)


@pytest.mark.parametrize(
    ("latency", "bandwidth", "wrong"),
    [(1e-5, 2e9, []), (2.9e-5, 0.5e9, []), (4e-5, 1e9, ["latency"]), (1e-5, 0.3e9, ["bandwidth"])],
)
def test_a_link_beside_what_is_assumed(latency, bandwidth, wrong):
    found = links.compare(link(latency, bandwidth), link(1e-5, 1e9), one_machine=False)
    assert [each.what for each in found if each.level == "warning"] == wrong


def test_what_is_assumed_of_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert links.assumed_link(world(2), None) == presets.link("loopback")
    assert links.assumed_link(world(4, local=2), None) == presets.link("ethernet-10g")
    assert links.assumed_link(world(2), "h100") == presets.link("nvlink-h100")
    own = Link(name="own", latency=1.0, bandwidth=1.0, source="measured by all-gathers")
    machine = presets.machine("titan-rtx").with_links(own, presets.link("ethernet-10g"), None)
    machine.save(tmp_path / "twolevel" / "machine-cpu-float32-1.json")
    assert links.assumed_link(world(2), None) == own
    assert links.assumed_link(world(4, local=2), None) == presets.link("ethernet-10g")


@pytest.mark.parametrize("ranks", range(2, 10))
def test_rounds_hold_every_pair_of_the_ring_and_each_rank_once(ranks):
    made = links.rounds(ranks)
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in made)
    every = {frozenset((rank, (rank + 1) % ranks)) for rank in range(ranks)}
    assert {frozenset(pair) for pairs in made for pair in pairs} == every


@pytest.mark.parametrize(
    ("slow", "named"),
    [
        ({}, None),
        ({(1, 2): 9.0}, "ranks 1, 2 on b, c"),
        ({(0, 1): 9.0, (1, 2): 7.0}, "rank 1 on b"),
    ],
)
@pytest.mark.parametrize("ranks", [3, 4])
def test_the_pair_or_rank_that_is_slow_is_named(ranks, slow, named):
    seconds = {pair: slow.get(pair, 1.0) for pairs in links.rounds(ranks) for pair in pairs}
    found = links.slow_links(seconds, list("abcd")[:ranks])
    assert (found.level == "warning") == (named is not None)
    assert named is None or f"but {named}" in found.finding


def of_slow_rank(factor: float) -> list[Finding]:
    seconds = factor if dist.get_rank() == 1 else 1.0
    with mock.patch.object(links, "compute_seconds", lambda device: seconds):
        return [*links.check_speed(world())]


def test_a_rank_that_computes_slowly_is_named(pool):
    (found,), other = pool.run(of_slow_rank, 5.0, ranks=2)
    assert found.level == "warning" and f"rank 1 on {socket.gethostname()} takes" in found.finding
    assert other == [found]
    assert pool.run(of_slow_rank, 1.5, ranks=2)[0][0].level == "ok"


def of_clock(ahead: float) -> list[Finding]:
    off = ahead if dist.get_rank() == 1 else 0.0
    with mock.patch.object(links, "now", lambda: time.time() + off):
        return [*links.check_clocks()]


def test_a_clock_that_is_off_is_named(pool):
    (found,), _ = pool.run(of_clock, -5.0, ranks=2)
    assert found.level == "warning" and "rank 1 on " in found.finding and "-5.0 s beside" in found.finding
    assert pool.run(of_clock, 0.0, ranks=2)[0][0].level == "ok"


def real_links() -> list[Finding]:
    here = World(dist.get_rank(), 3, dist.get_rank(), 3, CPU, "gloo", "torchrun")
    return [*links.check_link(here, None, "group"), *links.check_pairs(here), *links.check_speed(here)]


def test_links_are_measured_on_real_ranks(pool):
    """How fast they are is not asserted: other processes run here too."""
    found = pool.run(real_links, ranks=3)
    whats = {"latency", "bandwidth", "pairs of ranks", "speed of a rank"}
    assert all({each.what for each in of_rank} == whats for of_rank in found)
