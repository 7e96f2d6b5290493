"""`twolevel plan` from its words to what it prints."""

import json

import pytest
from command import command

from twolevel.analysis.planner import calibrate


def test_plan_prints_a_table_and_why():
    done = command(*"plan --model wrn-28-80 --ranks 4 --machine titan-rtx --groups 4".split())
    assert done.code == 0
    assert "SC does not fit one rank" in done.out
    assert "gc2l G=4 on 1 data x 4 group *" in done.out
    assert "SC FSDP on 4" in done.out and "SC 1f1b on 4 stages" in done.out
    assert "projections of the cost model, not measurements" in done.out


def test_plan_takes_more_representatives():
    words = "plan --model wrn-16-4 --ranks 4 --machine a100-80 --groups 4 --representatives".split()
    done = command(*words, 3)
    assert done.code == 0 and "gc2l G=4 r=3 on 1 data x 4 group" in done.out
    assert "3 representatives a group" in " ".join(done.out.split())
    one, three = (json.loads(command(*words, number, "--json").out) for number in (1, 3))
    assert three["request"]["representatives"] == 3
    sent = [
        next(c["bytes_sent"] for c in made["costs"] if c["conv"] == "gc2l" and c["inner"] == 4)
        for made in (one, three)
    ]
    assert 2.9 < sent[1] / sent[0] <= 3  # the logits are the same
    refused = command(*words, 2, "--conv", "gc")
    assert refused.code == 2 and "representatives=2 is of conv=gc2l, not of conv=gc" in refused.err


def test_plan_speaks_json_and_draws(tmp_path):
    figure = tmp_path / "deep" / "plan.png"
    words = "plan --model wrn-16-2 --ranks 4 --machine h100 --precision bf16 --groups 4 --json --figure"
    done = command(*words.split(), figure)
    assert done.code == 0, done.err
    read = json.loads(done.out)  # all else went to standard error
    assert read["request"]["precision"] == "bf16" and read["best"] is not None
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_scaling_lists_numbers_of_processors():
    done = command(*"plan --model wrn-16-2 --ranks 8 --machine a100-80 --groups 8 --scaling".split())
    rows = [line.split()[0] for line in done.out.splitlines() if line.strip()]
    assert {"1", "2", "4", "8"} <= set(rows)
    read = command(*"plan --model wrn-16-2 --ranks 2 --machine a100-80 --groups 2 --scaling --json".split())
    assert {p["ranks"] for p in json.loads(read.out)["points"]} == {1, 2}


def test_links_and_nodes_can_be_chosen():
    links = "--link pcie3 --internode ethernet-10g --ranks-per-node 2"
    words = f"plan --model wrn-16-2 --machine v100 {links} --groups 4 --json"
    machine = json.loads(command(*words.split()).out)["machine"]
    assert (machine["link"]["name"], machine["internode"]["name"], machine["ranks_per_node"]) == (
        "pcie3",
        "ethernet-10g",
        2,
    )


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A cache of its own, and a calibration of a few shapes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    grid = calibrate.Grid((2, 8), (1, 4), (1, 4), ((1, 4), (2, 8)), (4, 16), (256, 4096))
    monkeypatch.setattr(calibrate, "CPU_GRID", grid)
    monkeypatch.setattr(calibrate, "DEPTH", 1)
    return tmp_path


def test_calibrated_machine_is_kept_and_found_again(quick):
    words = "--model wrn-10-1 --ranks 2 --batch-size 4 --groups 2 --json".split()
    nothing = command("plan", *words)
    assert nothing.code == 2 and "none measured" in nothing.err and "--calibrate" in nothing.err
    first = command("plan", *words, "--calibrate", "--device", "cpu", "--threads", 1)
    assert first.code == 0, first.err
    assert "measured 10 of 10" in first.err and "assumed, not measured" in first.err
    assert (quick / "twolevel" / "machine-cpu-float32-1.json").is_file()
    again = command("plan", *words)
    assert json.loads(again.out) == json.loads(first.out)


def calibrate_on_ranks(folder):
    """As the command on two ranks, with a grid of a few shapes."""
    import os

    os.environ["XDG_CACHE_HOME"] = folder
    grid, calibrate.CPU_GRID = (
        calibrate.CPU_GRID,
        calibrate.Grid((2, 4), (1, 2), (1, 2), ((1, 4),), (4,), (256,)),
    )
    try:
        return command(*"plan --calibrate --device cpu --model wrn-10-1 --groups 2 --ranks 2 --json".split())
    finally:
        calibrate.CPU_GRID = grid


def test_link_is_measured_between_ranks(pool, tmp_path):
    first, second = pool.run(calibrate_on_ranks, str(tmp_path), ranks=2, init=False)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == ""
    link = json.loads(first.out)["machine"]["link"]
    assert link["source"] == "measured by all-gathers of 2 ranks"
    assert 0 < link["latency"] < 1 and link["bandwidth"] > 1e4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--machine h20", "unknown machine 'h20'; did you mean h200"),
        ("--machine h100 --link pcie5", "unknown link 'pcie5'"),
        ("--machine titan-rtx --precision bf16", "machine titan-rtx has no rate for bf16; use float32"),
        ("--machine h100 --ranks 0", "ranks=0 is not positive; use 1 or more"),
        ("--machine h100 --image-size 0", "image_size=0 is invalid; use 1 or more"),
        ("--machine h100 --num-classes -1", "num_classes=-1 is invalid; use 1 or more"),
        ("--machine h100 --groups 3", "groups=3 does not divide"),
        ("--machine h100 --ranks-per-node 0", "ranks_per_node=0 is not positive; use 1 or more"),
        ("--machine nowhere.json", "machine file 'nowhere.json' cannot be read"),
        ("--machine h100 --calibrate", "machine='h100' and calibrate exclude each other"),
        ("--machine h100 --output m.json", "output=m.json is of calibrate; leave it out, or add --calibrate"),
        ("--machine h100 --threads 2", "threads=2 is of calibrate; leave it out, or add --calibrate"),
        ("--machine h100 --model wrn-11-2", "depth=11 is not 6 n + 4"),
        ("--machine h100 --conv flgc", "flgc"),
        ("--machine h100 --conv bgc", "bgc"),
        ("--machine h100 --conv lgc", "lgc"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, message):
    done = command("plan", *words.split())
    assert done.code == 2
    assert done.err.startswith("twolevel plan: ") and done.err.count("\n") == 1
    assert message in done.err
