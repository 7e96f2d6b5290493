"""Strategies are compared at the same work, what they send is counted, and a projection is called one."""

import json
import signal
import subprocess
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist

from benchmarks import links
from benchmarks.collectives import by_kind, counting, sent_by_ring
from benchmarks.scaling import command, launch, paper, projection, rank, show
from benchmarks.scaling.cases import Case, Job, cases_of, widened, with_peers
from benchmarks.scaling.rows import compared, expected, rows_of
from benchmarks.strategies import ALONE, OVER_DATA, STRATEGIES, build, mesh_of
from twolevel import models
from twolevel.analysis import count
from twolevel.distributed import MeshAxis
from twolevel.distributed.simulation import simulated_ranks
from twolevel.errors import UserError

CPU = torch.device("cpu")
GROUP = Case("group", "wrn-10-1", "gc2l", 2, 4, 2)
DENSE = [Case(name, "wrn-10-1", "sc", 1, 4, 2) for name in STRATEGIES if name != "group"]
SHORT = {"device": "cpu", "turns": 2, "threads": 1, "memory": False}


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def built(case: Case):
    mesh = mesh_of(case.strategy, crosses=case.crosses)
    settings = {k: getattr(case, k) for k in ("conv", "groups", "batch", "exchange")}
    return build(case.strategy, case.model, mesh=mesh, **settings)


# ---- the steps ----


def sums_of(cases: list[Case]) -> list[list[float]]:
    return [built(case)().tolist() for case in cases]


def test_every_strategy_takes_the_same_batch_through_the_same_network(pool):
    """[sum of losses, number right, images]; float32, whose sums in another order differ in the sixth digit."""
    cases = [GROUP, *DENSE]
    alone = [GROUP.alone(), DENSE[0].alone()]
    by_rank = pool.run(sums_of, [*cases, *alone], ranks=2)
    of_group, of_dense = by_rank[0][-2:]
    for case, first, last in zip(cases, *by_rank, strict=False):
        total = [a + b for a, b in zip(first, last, strict=True)] if case.strategy in OVER_DATA else last
        assert total[2] == 4, case
        if case.strategy in ("group", "channel", "naive"):  # in the others batch norm sees parts of the batch
            reference = of_group if case.strategy == "group" else of_dense
            assert total[0] == pytest.approx(reference[0], rel=1e-5), case


def step_on_one_rank(case: Case) -> bool:
    """Rank 0 takes a step, rank 1 none; both then meet."""
    training = built(case)
    done = dist.get_rank() == 0 and bool(training()[2])
    dist.barrier()
    return done


@pytest.mark.parametrize(
    "case", [GROUP.alone(), GROUP.silent(), *(c.silent() for c in DENSE)], ids=lambda case: case.strategy
)
def test_a_step_alone_or_in_silence_waits_for_no_other_rank(pool, case):
    """If anything crossed, rank 0 would wait for rank 1, which takes no step, until the pool gives up."""
    first, _ = pool.run(step_on_one_rank, case, ranks=2)
    assert first == (case.strategy not in ("naive", "gpipe", "1f1b"))  # its last stage has the logits


def test_a_batch_that_does_not_divide_is_refused(pool):
    with pytest.raises(Exception, match="batch=3 does not divide over 2 replicas; use a multiple of 2"):
        pool.run(sums_of, [replace(DENSE[1], strategy="ddp", batch=3)], ranks=2)


# ---- what crosses ----


def known_collectives():
    axis, one = MeshAxis(dist.group.WORLD), torch.ones(4)
    with counting() as seen:
        axis.gather(one).wait()
        axis.scatter_sum(one).wait()
        axis.sum(one).wait()
        axis.all_reduce_(one)
        dist.broadcast(one, 0)
        (dist.send if dist.get_rank() == 0 else dist.recv)(one, 1 - dist.get_rank())
    axis.all_reduce_(one)  # not in it
    return seen


def test_what_is_counted_is_what_was_called(pool):
    calls = [("all-gather", 16), ("reduce-scatter", 16), *2 * [("all-reduce", 16)], ("broadcast", 16)]
    first, second = pool.run(known_collectives, ranks=2)
    assert first == [*calls, ("send", 16)]
    assert second == [*calls, ("receive", 16)]


def test_bytes_of_a_ring_by_hand():
    """4 ranks, 12 bytes handed over. Gathered: own part to 3 others. Scattered: 3 quarters. Reduced: twice that."""
    each = {"all-gather": 36, "reduce-scatter": 9, "all-reduce": 18, "broadcast": 9, "send": 12, "receive": 0}
    for kind, sent in each.items():
        assert sent_by_ring(by_kind([(kind, 12)]), 4) == sent
    assert sent_by_ring(by_kind([(kind, 12) for kind in each]), 4) == sum(each.values())


def times_of(cases: list[Case]) -> dict:
    return rank.times(SHORT | {"cases": [asdict(case) for case in cases]}, CPU)


@pytest.fixture(scope="module")
def found(pool) -> tuple[Job, list[Case], dict]:
    """What rank 0 of two found of every strategy."""
    cases = cases_of(STRATEGIES, "wrn-10-1", "gc2l", (2, 4), 4, 2)
    job = Job(2, "torchrun", "none", with_peers(cases))
    return job, cases, pool.run(times_of, job.cases, ranks=2)[0]


def test_bytes_that_cross_are_those_of_the_model(found):
    rows = {(row["strategy"], row["groups"]): row for row in rows_of(*found)}
    for key in [("group", 2), ("group", 4), ("channel", 1)]:
        assert rows[key]["as_expected"] is True
        assert rows[key]["collectives"] == rows[key]["expected"]
    whole = models.create("wrn-10-1", conv="gc2l", groups=2)
    counted = count(whole, (3, 32, 32), ranks=2, batch_size=4)
    assert rows["group", 2]["sent_by_ring_bytes"] == counted.bytes_sent
    dense = models.create("wrn-10-1")
    weights = 4 * sum(p.numel() for p in dense.parameters())
    assert rows["ddp", 1]["collectives"]["all-reduce"]["bytes_in"] == weights
    assert rows["ddp", 1]["as_expected"] is None  # no model of it is asked


def test_channels_gathered_by_hand():
    """WRN-10-1: six activations behind the stem are read, the first of a block by its shortcut too, once."""
    numbers = Counter({32 * 32 * 16: 2 + 1, 16 * 16 * 32: 2, 8 * 8 * 64: 1})
    whole = 4 * 4 * sum(n * times for n, times in numbers.items())
    found = expected(DENSE[0])
    assert DENSE[0].strategy == "channel"
    assert found["all-gather"] == {"number": 6, "bytes_in": whole // 2}
    assert found["reduce-scatter"] == {"number": 6, "bytes_in": whole}


def test_every_case_has_its_times_its_peers_and_what_it_holds(found):
    job, cases, answers = found
    assert not answers["skipped"]
    rows = rows_of(job, cases, answers)
    assert [row["strategy"] for row in rows] == [case.strategy for case in cases]
    held = {}
    for row in rows:
        assert row["alone_ms"] > 0 and row["silent_ms"] > 0
        assert row["speed_up"] == pytest.approx(row["alone_ms"] / row["median_ms"])
        assert row["exposed_ms"] == row["median_ms"] - row["silent_ms"]
        assert row["wire_bytes"] is None
        held[row["strategy"], row["groups"]] = [h["parameters"] for h in row["held_bytes"]]
    dense = 4 * sum(p.numel() for p in models.create("wrn-10-1").parameters())
    assert held["ddp", 1] == [dense, dense]
    assert sum(held["naive", 1]) == dense
    part = count(models.create("wrn-10-1", conv="gc2l", groups=2), (3, 32, 32), ranks=2).held
    assert held["group", 2] == [4 * part, 4 * part]


def test_tables_name_every_strategy(found):
    text = show.measured(rows_of(*found))
    for name in ("group gc2l G=2", "group gc2l G=4", "channel sc", "1f1b sc"):
        assert name in text
    assert "P=2, strong scaling, wrn-10-1, batch 4" in text


# ---- what is compared ----


def test_speed_up_and_efficiency_by_hand():
    strong = replace(GROUP, ranks=4, batch=8)
    assert compared(strong, 10.0, 30.0) == {"alone_ms": 30.0, "speed_up": 3, "efficiency": 0.75}
    # 4 times the images in 1.25 of the time: 3.2 times as many a second.
    batch = replace(strong, scaling="weak-batch")
    assert batch.alone().batch == 2
    faster = {"alone_ms": 10.0, "speed_up": 3.2, "efficiency": 0.8}
    assert compared(batch, 12.5, 10.0) == pytest.approx(faster)
    width = replace(strong, scaling="weak-width", model="wrn-10-4", groups=4)
    assert (width.alone().model, width.alone().groups, width.alone().batch) == ("wrn-10-1", 1, 8)
    assert compared(width, 12.5, 10.0) == {"alone_ms": 10.0, "speed_up": None, "efficiency": 0.8}
    assert compared(strong, 10.0, None) == {"alone_ms": None, "speed_up": None, "efficiency": None}


def test_cases_are_those_that_the_ranks_divide_and_none_comes_twice():
    cases = cases_of(("group", "ddp"), "wrn-10-1", "gc2l", (2, 4, 6, 8), 4, 4, ("batch", "width"))
    assert {c.groups for c in cases if c.strategy == "group"} == {4, 8}
    assert Counter(c.scaling for c in cases) == {"strong": 3, "weak-batch": 3, "weak-width": 3}
    assert {c.conv for c in cases if c.strategy == "ddp"} == {"sc"}
    peers = with_peers(cases)
    assert len({case.name for case in peers}) == len(peers)
    assert {case.ranks for case in peers if case.strategy == ALONE} == {1}
    assert cases_of(STRATEGIES, "wrn-10-1", "gc2l", (2,), 4, 1) == []


def test_only_wide_residual_networks_are_widened():
    assert widened("wrn-16-4", 2) == "wrn-16-8"
    assert widened("wrn-16-4", 1 / 4) == "wrn-16-1"
    for name in ("wrn-34-2", "resnet18", "wrn-10-1"):
        with pytest.raises(UserError, match=f"--weak width: {name} cannot be made 0.5 times as wide"):
            widened(name, 0.5)


def test_what_is_not_started_is_named():
    settings = command.Settings(
        device="cpu", ranks=(2, 3), links=("none", "1gbit"), carriers=("gloo", "mpi"), groups=(6,)
    )
    jobs, skipped = command.jobs_of(settings)
    assert [(job.ranks, job.link, job.launcher) for job, _ in jobs] == [
        (2, "none", "mpi"),
        (2, "1gbit", "torchrun"),
        (3, "none", "mpi"),
    ]
    assert {c.exchange for job, _ in jobs for c in job.cases if job.link != "none"} == {"group"}
    assert skipped == {
        "P=2 over 1gbit, mpi": "mpirun's own connections do not reach into the namespaces",
        "P=3 over 1gbit": "two nodes take an even number of ranks",
    }


def test_a_link_that_cannot_be_made_is_skipped_with_its_reason(monkeypatch):
    def refuse(link):
        raise links.NoLink("no emulated link: not here")

    monkeypatch.setattr(command, "joined", refuse)
    settings = command.Settings(device="cpu", links=("1gbit",), memory=False)
    assert command.measure(settings) == {
        "rows": [],
        "links": {},
        "skipped": {"P=2 over 1gbit": "no emulated link: not here"},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 1}, "--turns 1 gives no spread"),
        ({"strategies": ("grupo",)}, "unknown strategy 'grupo'; did you mean group"),
        ({"links": ("fast",)}, "'fast' is no link"),
        ({"ranks": (0,)}, "--ranks 0 is not positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        command.Settings(device="cpu", **options)


# ---- ranks of their own ----


def test_ranks_on_a_link_send_at_least_what_a_ring_would():
    """Counted by the interface: headers and all, and Gloo's reduce-scatter sends what an all-reduce does."""
    if reason := links.why_not():
        pytest.skip(reason)
    job = Job(2, "torchrun", "1gbit", (GROUP,))
    settings = command.Settings(device="cpu", turns=2)
    answers, link = command.run_job(job, settings)
    (row,) = rows_of(job, [GROUP], answers)
    assert row["sent_by_ring_bytes"] < row["wire_bytes"]["sent"] < 3 * row["sent_by_ring_bytes"]
    assert link["rate_mbit"] == 1000 and link["measured_mbit"] > 0


def test_ranks_of_mpi_send_what_the_model_says():
    pytest.importorskip("mpi4py")
    case = replace(GROUP, exchange="mpi")
    job = Job(2, "mpi", "none", (case,))
    try:
        launch.mpirun()
    except UserError as error:
        pytest.skip(str(error))
    (row,) = rows_of(job, [case], launch.run(job, SHORT))
    assert row["carrier"] == "mpi"
    assert row["as_expected"] is True


def test_memory_is_read_on_every_rank():
    every = launch.run(Job(2, "torchrun", "none", (GROUP,)), SHORT | {"memory": True})["ranks"]
    assert len(every) == 2
    assert all(own["peak_bytes"] > own["before_bytes"] > 0 for own in every)


def test_a_rank_that_fails_is_an_error_and_ends_the_others(monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    commands = [(["sleep", "1000"], {}), (["sh", "-c", "echo what went wrong; exit 3"], {})]
    monkeypatch.setattr(launch, "_commands", lambda *_: commands)
    monkeypatch.setattr(launch.subprocess, "Popen", Recorded)
    with pytest.raises(launch.RanksFailed, match="process 1 of 2 failed:\nwhat went wrong"):
        launch.run(Job(2, "torchrun", "none", (GROUP,)), SHORT)
    assert [process.returncode for process in started] == [-signal.SIGKILL, 3]


def test_no_mpirun_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--carriers mpi: no mpirun here; pip install twolevel"):
        launch.mpirun()


# ---- projections ----


@pytest.mark.parametrize(
    ("strategy", "ranks", "shape"),
    [
        ("group", 4, (1, 4)),
        ("group", 16, (1, 16)),
        ("group", 1024, (64, 16)),  # 16 channels leave the stem
        ("channel", 64, (4, 16)),
        ("ddp", 1024, (1024, 1)),
        ("fsdp", 8, (8, 1)),
    ],
)
def test_one_rank_of_many_holds_and_sends_what_it_would(strategy, ranks, shape):
    with simulated_ranks(ranks):
        step, facts = projection.one_rank(strategy, "wrn-10-1", "gc2l", ranks, 2)
        step()
        with counting() as seen:
            step()
        held = step.held_bytes()["parameters"]
    assert not dist.is_initialized()
    data, group = (facts["data"], facts["group"])
    assert (data, group) == shape
    assert facts["images_of_a_rank"] == max(1, 2 // data)
    crossing = by_kind(seen)
    if strategy == "group":
        whole = models.create("wrn-10-1", conv="gc2l", groups=group)
        counted = count(whole, (3, 32, 32), ranks=group, batch_size=facts["images_of_a_rank"])
        assert held == 4 * counted.held
        model = by_kind([(c.kind, c.bytes_in) for c in counted.collectives])
        for kind in ("all-gather", "reduce-scatter"):
            assert crossing[kind] == model[kind]
    if strategy == "ddp":
        assert crossing["all-reduce"]["bytes_in"] == held


def test_a_projection_says_that_it_is_one_and_what_it_leaves_out(capsys):
    options = {"model": "wrn-10-1", "conv": "gc2l", "batch": 2, "turns": 2, "threads": 1}
    found = projection.project(("group", "naive"), (1, 4), **options)
    assert found["label"].startswith("projection: ") and "nothing crosses" in found["label"]
    assert [row["ranks"] for row in found["rows"]] == [1, 4]
    assert [*found["skipped"]] == ["naive, one rank of N"]
    assert show.projected(found).startswith("projection: ")


def test_the_paper_is_printed_beside_ours():
    row = {"k": 1, "batch": 2, "hours": None, "median_ms": 8.0}
    ours = [row | {"ranks": p, "to_one": 1 / p} for p in paper.PROCESSORS]
    found = {"label": projection.LABEL, "published_remark": paper.REMARK, "rows": ours}
    lines = show.paper(found).splitlines()
    assert "projection" in lines[0]
    assert lines[3].split()[-2:] == ["0.358", "0.174"]  # 17h47m and 8h40m over 49h43m
    assert lines[-1].split()[-2:] == ["0.500", "0.250"]


def test_results_name_their_command_and_are_drawn(tmp_path, monkeypatch, found, capsys):
    _, _, answers = found
    monkeypatch.setattr(launch, "run", lambda job, settings, nodes: answers)
    output = tmp_path / "scaling.json"
    argv = ["--device", "cpu", "--model", "wrn-10-1", "--batch", "4", "--groups", "2", "4", "--links", "none"]
    argv += ["--turns", "2", "--no-memory", "--projection", "1", "4", "--paper", "--output", str(output)]
    command.main(argv)
    result = json.loads(output.read_text())
    assert result["command"] == " ".join(["python -m benchmarks scaling", *argv])
    assert result["settings"]["clock_of_ranks"] == "perf_counter"
    assert len(result["rows"]) == 8
    assert result["projection"]["label"] == projection.LABEL
    assert result["paper"] is None
    assert {path.name for path in tmp_path.glob("*.png")} == {"scaling.png", "scaling-projection.png"}
    assert "P=2, strong scaling" in capsys.readouterr().out
