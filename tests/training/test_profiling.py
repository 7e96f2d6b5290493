"""`train --profile N`: where the time of some steps goes, with nothing of the run changed."""

import gzip
import json
from collections import Counter

import pytest
import torch
from command import FIXED, command, losses, run, weights

from twolevel.nn import TwoLevelConv2d
from twolevel.ops import ranges, two_level
from twolevel.ops.ranges import RANGES


def trace(output, rank):
    with gzip.open(output / "profile" / f"rank-{rank}.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def named(events):
    """How often each of our ranges is there: (forward, backward)."""
    ours = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in RANGES]
    nodes = [e for e in events if e["name"].startswith("autograd::engine::evaluate_function")]

    def in_backward(event):
        begin, end = event["ts"], event["ts"] + event["dur"]
        return any(n["tid"] == event["tid"] and n["ts"] <= begin and end <= n["ts"] + n["dur"] for n in nodes)

    return tuple(Counter(e["name"] for e in ours if in_backward(e) is back) for back in (False, True))


@pytest.mark.parametrize(
    "options",
    [
        FIXED,
        [*FIXED, "--recompute", "blocks"],
        [*FIXED, "--precision", "float32"],  # batch norm by our kernels, where they are the fastest
        "--mesh auto --schedule fused --kernels grouped".split(),
        "--data-parallel 2 --sync-batch-norm --schedule overlapped --kernels grouped".split(),
    ],
    ids=" ".join,
)
def test_traces_have_the_parts_of_layers_and_the_run_is_the_same_to_the_bit(pool, tiny, tmp_path, options):
    argv = ["train", *tiny, *options, "--max-steps", 6]
    run(pool, *argv, "--output", tmp_path / "plain", ranks=2)
    config = tmp_path / "plain" / "config.json"  # whose forms are not measured again
    again = ["train", "--config", config, "--max-steps", 6, "--output", tmp_path / "run"]
    first, second = run(pool, *again, "--profile", 2, ranks=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    plain, profiled = (weights(pool, tmp_path / name) for name in ("plain", "run"))
    assert all(torch.equal(profiled[name], value) for name, value in plain.items())

    expected = {*RANGES}
    if "--data-parallel" in options:
        expected -= {"exchange"}  # a rank has all groups
    if "fused" in options:
        expected = {"exchange", "coarse", "batch norm"}
    for rank in range(2):
        forward, backward = named(trace(tmp_path / "run", rank))
        assert {*forward} == {*backward} == expected
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert table.startswith("2 steps of rank 0, a step:\n")
    assert {line.split("  ")[0] for line in table.splitlines()} >= expected
    assert table in first.out and "profile     " in first.out and second.out == ""
    assert "profile" not in json.loads((tmp_path / "run" / "config.json").read_text())["run"]


def test_as_many_steps_are_recorded_as_asked_for(pool, tiny, tmp_path):
    """The network has eight two-level convolutions; an exchange is started and waited for."""
    run(pool, "train", *tiny, *FIXED, "--profile", 2, "--max-steps", 6, "--output", tmp_path / "run", ranks=2)
    forward, backward = named(trace(tmp_path / "run", 0))
    assert forward["restriction"] == forward["local"] == forward["coarse"] == 2 * 8
    assert forward["exchange"] == backward["exchange"] == 2 * 2 * 8
    assert backward["restriction"] == backward["local"] == 2 * 8


def test_a_compiled_run_is_profiled(pool, tiny, tmp_path):
    """Two compiled runs differ in the last bits without a profile too, so the losses agree to rounding."""
    argv = ["train", *tiny, *FIXED, "--compile", "--max-steps", 5]
    run(pool, *argv, "--output", tmp_path / "plain", ranks=2, timeout=300)
    run(pool, *argv, "--profile", 1, "--output", tmp_path / "run", ranks=2, timeout=300)
    plain, profiled = ([loss for _, loss, _ in losses(tmp_path / name)] for name in ("plain", "run"))
    assert profiled == pytest.approx(plain, rel=1e-12)
    forward, backward = named(trace(tmp_path / "run", 1))
    assert {*forward} >= {*RANGES} - {"batch norm"} and {*backward} >= {*RANGES} - {"batch norm"}


def test_a_disk_that_takes_no_profile_is_warned_of_and_the_run_goes_on(pool, tiny, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "profile").write_text("")  # no folder can be made there
    argv = ["train", *tiny, *FIXED, "--max-steps", 6, "--profile", 2, "--output", output]
    first, _ = run(pool, *argv, ranks=2)
    assert "lacks the profile of rank 0, 1: File exists; the run goes on" in first.err
    assert [step for step, *_ in losses(output)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_too_short_says_so(pool, tiny, tmp_path):
    (done,) = run(pool, "train", *tiny, "--max-steps", 3, "--profile", 2, "--output", tmp_path / "run")
    assert "profile=2: nothing is recorded, as the run took 3 steps" in done.err


@pytest.mark.parametrize(
    ("options", "why"),
    [("--profile 0", "profile=0 is invalid; use 1 or more"), ("--profile 2 --cuda-graph", "have no names")],
)
def test_what_cannot_be_profiled_is_refused(options, why):
    done = command("train", *options.split())
    assert done.code == 2 and why in done.err


def test_without_a_profile_a_layer_is_computed_as_ever(monkeypatch):
    """No range is opened, and no schedule stands in for the one that was chosen."""
    monkeypatch.setattr(ranges, "record_function", None)
    given = []
    apply = two_level._TwoLevel.apply
    monkeypatch.setattr(two_level._TwoLevel, "apply", lambda *args: given.append(args[-1]) or apply(*args))
    layer = TwoLevelConv2d(8, 8, 3, padding=1, groups=2, schedule="overlapped", kernels="grouped")
    layer(torch.randn(2, 8, 5, 5)).sum().backward()
    assert type(given[0]).__name__ == "Overlapped"
    forward = torch.nn.BatchNorm2d.forward
    with ranges.named():
        assert torch.nn.BatchNorm2d.forward is not forward
    assert torch.nn.BatchNorm2d.forward is forward
