"""A rank that is lost or late, a store that cannot be reached and ranks that differ are named, each in one line."""

import json
import threading
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command import command
from hypothesis import given, settings
from hypothesis import strategies as st

from twolevel.distributed import init_mesh
from twolevel.distributed.collectives import MeshAxis
from twolevel.training import watchdog as watchdogs
from twolevel.training.epoch import Epochs
from twolevel.training.fingerprint import difference
from twolevel.training.step import make_step
from twolevel.training.watchdog import Watchdog
from twolevel.training.whereabouts import Finder, Whereabouts

# ---- where a rank is


def where_it_stays(finder: Finder, found: list[str]) -> None:
    """Add the place in which a thread stays for half a second."""
    place, since = "", time.monotonic()
    while time.monotonic() - since < 0.5:
        now = str(finder.find())
        if now != place:
            place, since = now, time.monotonic()
        time.sleep(0.02)
    found.append(place)


def place_while_waiting(late_at: str, options: dict) -> str | None:
    """Where the first rank is said to be while the last one is late in this layer, or in its so many-th scatter."""
    mesh = init_mesh(*options.pop("mesh", (1, 2)), device="cpu")
    step = make_step("wrn-10-1", mesh, "cpu", **options)
    finder, found = Finder(replicas=mesh["data"].size() > 1), []
    finder.follow(step.placed.model)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    step(images, labels)  # so that nothing is measured or connected in the second one
    dist.barrier()
    if dist.get_rank() == 0:
        looking = threading.Thread(target=where_it_stays, args=(finder, found))
        looking.start()
        step(images, labels)
        looking.join()
        return found[0]
    scatter_sum, calls = MeshAxis.scatter_sum, 0

    def late(self, parts):
        nonlocal calls
        calls += 1
        if str(calls) == late_at:
            time.sleep(3)
        return scatter_sum(self, parts)

    layers = dict(step.placed.model.named_modules())
    if late_at in layers:
        layers[late_at].register_forward_pre_hook(lambda *_: time.sleep(3))
    with mock.patch.object(MeshAxis, "scatter_sum", late):
        step(images, labels)
    return None


@pytest.mark.parametrize(
    ("late_at", "options", "expected"),
    [
        ("stages.0.0.conv2", {"conv": "gc2l", "groups": 2}, "the all-gather of stages.0.0.conv2"),
        ("stages.1.0.conv1", {"conv": "bgc", "groups": 2}, "the all-reduce of stages.1.0.conv1"),
        ("classifier", {"conv": "gc", "groups": 2}, "the all-reduce of classifier"),
        ("1", {"conv": "gc2l", "groups": 2}, "the reduce-scatter of stages.2.0.shortcut (backward)"),
        ("2", {"conv": "gc2l", "groups": 2}, "the reduce-scatter of stages.2.0.conv2 (backward)"),
        (
            "stages.0.0.conv1",
            {"conv": "gc", "groups": 2, "mesh": (2, 1)},
            "the all-reduce of the gradients of replicas (backward)",
        ),
    ],
)
def test_the_collective_and_its_layer_are_named(pool, late_at, options, expected):
    found, _ = pool.run(place_while_waiting, late_at, options, ranks=2)
    assert found == expected


def test_who_waits_for_nobody_is_at_a_line():
    finder = Finder()
    found = []
    thread = threading.Thread(target=lambda: found.append(finder.find()))
    thread.start()
    thread.join()
    assert found[0].collective is None and "threading.py" in found[0].line


# ---- fingerprints

SHAPES = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (3, 2)]


def alike(shape: tuple[int, int]) -> list[dict[str, int]]:
    data, groups = shape
    return [
        {"step": 7, "batch": 100 + d, "common": 5, "own": 200 + g} for d in range(data) for g in range(groups)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_that_agree_are_left_alone(shape):
    assert difference(alike(shape), shape) is None


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([shape for shape in SHAPES if shape[0] * shape[1] > 2]), st.data())
def test_the_one_that_differs_is_named(shape, data):
    prints = alike(shape)
    rank = data.draw(st.integers(0, len(prints) - 1))
    name = data.draw(st.sampled_from(["step", "common"]))
    prints[rank][name] += 1
    assert f"rank {rank} and rank" in difference(prints, shape)


@pytest.mark.parametrize(
    ("shape", "name", "rank", "other", "words"),
    [
        ((1, 4), "batch", 2, 0, "the images of a batch"),
        ((4, 1), "own", 3, 0, "the parameters of replicas"),
        ((3, 2), "own", 3, 1, "the parameters of replicas"),
        ((2, 2), "common", 1, 0, "parameters that every rank holds whole"),
        ((2, 2), "step", 2, 0, "the number of steps done"),
    ],
)
def test_what_differs_is_named(shape, name, rank, other, words):
    prints = alike(shape)
    prints[rank][name] ^= 1
    assert difference(prints, shape) == f"rank {rank} and rank {other} differ in {words}"


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_what_may_differ_does_not_count(shape):
    """Replicas see other images, and ranks of one replica hold other parameters."""
    prints = alike(shape)
    for p in prints[: shape[1]]:
        p["batch"] += 1
    for p in prints[:: shape[1]]:
        p["own"] += 1
    assert difference(prints, shape) is None


def drifted(*argv: object, rank: int, what: str):
    """The command, after whose second step one bit differs on one rank; the line with which it would have ended."""
    take_step, lines = Epochs.step, []

    def step(self, images, labels):
        rate = take_step(self, images, labels)
        if self.state.step == 1 and dist.get_rank() == rank:
            layout = self.state.model.layout
            name = next(
                n for n, _ in self.state.model.named_parameters() if layout.is_split(n) != (what == "common")
            )
            parameter = dict(self.state.model.named_parameters())[name]
            parameter.data.view(torch.int64)[(0,) * parameter.dim()] ^= 1
        time.sleep(0.2)
        return rate

    with (
        mock.patch.object(Epochs, "step", step),
        mock.patch.object(watchdogs, "BEAT", 0.05),
        mock.patch.object(watchdogs, "_end", lambda line, lost: lines.append(line)),
    ):
        outcome = command(*argv)
    return outcome.code, lines


@pytest.mark.parametrize(
    ("mesh", "ranks", "what", "words"),
    [
        ("--data-parallel 2", 4, "own", "rank 3 and rank 1 differ in the parameters of replicas"),
        ("", 2, "common", "rank 1 and rank 0 differ in parameters that every rank holds whole"),
        ("", 2, None, None),
    ],
)
def test_one_bit_of_one_rank_ends_the_run(pool, tiny, tmp_path, mesh, ranks, what, words):
    argv = ["train", *tiny, *mesh.split(), "--fingerprint-steps", 1, "--output", tmp_path / "run"]
    rank = ranks - 1 if what else -1
    for code, lines in pool.run(drifted, *argv, rank=rank, what=what, ranks=ranks, init=False, timeout=90):
        assert code == 0
        assert (words is None and not lines) or f"after step 2 {words}" in lines[0]


# ---- signs of life


class World:
    """One rank's watchdog, and a store in which the test is the other ranks."""

    def __init__(self, ranks: int, **options):
        self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            "127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False
        )
        self.lines: list[str] = []
        self.ended = threading.Event()
        self.place = Whereabouts("all-gather", "blocks.0.conv1", False, "here")
        for rank in range(ranks):
            self.sign(rank, 0)
        with (
            mock.patch.object(dist, "get_rank", lambda: 0),
            mock.patch.object(dist, "get_world_size", lambda: ranks),
        ):
            self.dog = Watchdog(
                self.store,
                (1, ranks),
                lambda: self.place,
                end=self.end,
                **{"silence": 0.5, "patience": 60} | options,
            )

    def end(self, line, lost):
        self.lines.append(line)
        self.ended.set()

    def sign(self, rank: int, number: int, **more) -> None:
        about = {
            "number": number,
            "host": "node1",
            "pid": 40 + rank,
            "where": "w",
            "since": 0.0,
            "waits": False,
        }
        self.store.set(f"sign {rank}", json.dumps(about | {"prints": {}, "done": False} | more))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(watchdogs, "BEAT", 0.05)


def live(world: World, ranks: range, seconds: float, **more) -> None:
    until = time.monotonic() + seconds
    number = 0
    while time.monotonic() < until and not world.ended.is_set():
        number += 1
        for rank in ranks:
            world.sign(rank, number, **more)
        time.sleep(0.05)


def test_ranks_that_give_signs_are_left_alone():
    world = World(3)
    with world.dog:
        live(world, range(1, 3), 1.5)
    assert not world.lines


def test_a_silent_rank_is_named_with_where_the_others_wait():
    world = World(3)
    with world.dog:
        live(world, range(1, 2), 5)
    assert len(world.lines) == 1
    assert world.lines[0].startswith("no sign of rank 2 (node1, process 42) for ")
    assert world.lines[0].endswith("this rank waits in the all-gather of blocks.0.conv1")
    assert [sign.pid for sign in world.dog.lost] == [42]


def test_a_rank_that_has_finished_may_be_silent():
    world = World(2)
    with world.dog:
        world.sign(1, 9, done=True)
        time.sleep(1.2)
    assert not world.lines


def test_a_rank_that_keeps_others_waiting_is_named_with_what_it_does():
    world = World(2, patience=0.6)
    with world.dog:
        live(world, range(1, 2), 5, where="batches (twolevel/data/loading.py:9)", since=0.7)
    assert (
        "rank 1 (node1, process 41) has been in batches (twolevel/data/loading.py:9) for 1 s"
        in world.lines[0]
    )
    assert world.lines[0].endswith("this rank waits for it in the all-gather of blocks.0.conv1")


def test_ranks_that_all_wait_are_nobodys_fault():
    """A slow network: torch's own time-out says so."""
    world = World(2, patience=0.1)
    with world.dog:
        live(world, range(1, 2), 1, where="x", since=5.0, waits=True)
    assert not world.lines


def test_a_store_that_does_not_answer_is_named():
    world = World(2)
    stuck = threading.Event()

    def answer(keys):
        stuck.wait(20)
        raise RuntimeError

    with mock.patch.object(world.dog, "store") as store:
        store.multi_get.side_effect = answer
        with world.dog:
            assert world.ended.wait(10)
            stuck.set()
    assert world.lines[0].startswith("no answer from the store of rank 0 for ")
