"""`train --dry-run`: what the run would be, and nothing else."""

import json
import re

import pytest
import torch
from command import command, records, run

from twolevel.analysis.planner import presets
from twolevel.data import DataConfig, load
from twolevel.data.registry import DATA_SETS
from twolevel.training import step


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """No machine is measured here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "twolevel"


def rows(out):
    """The words of each row that has some after its name."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines() if "  " in line)


def test_it_says_what_the_run_would_be_and_rank_0_alone(pool, tiny, tmp_path):
    output = tmp_path / "deep" / "run"
    first, second = run(pool, "train", *tiny, "--dry-run", "--output", output, ranks=2)
    assert second.out == "" and first.out.startswith("dry run: nothing is written and no step is taken\n")
    counted = command(*"count --model wrn-10-1 --conv gc2l --groups 4 --num-classes 3".split(), "--ranks", 2)
    layers = [line.split()[:4] for line in counted.out.splitlines() if "TwoLevelConv2d" in line]
    named = {line.split()[0]: line.split() for line in first.out.splitlines() if "TwoLevelConv2d" in line}
    assert len(named) == 8 and [name for name, *_ in layers] == [*named]
    assert [named[name][3] for name, *_ in layers] == [parameters for *_, parameters in layers]
    said = rows(first.out)
    assert said["mesh"] == "1 data x 2 group ranks on cpu (gloo)"
    assert "3 epochs of 3 steps, batch 8" in said["recipe"]
    assert said["data"] == "imagenet: 24 training images of 16 x 16, 3 classes"
    assert said["output"] == f"{output}, a new run"
    assert said["time of a step"] == "not known: the cost model has no float64"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "--conv gc2l",
        "--conv sc --groups 1 --parallel fsdp",
        "--conv sc --groups 1 --parallel channel",
        "--parallel gpipe",
        "--conv flgc --data-parallel 2",
        "--conv dgc --data-parallel 2 --sync-batch-norm",
        "--conv lgc --data-parallel 2",
        "--conv dgconv --groups 1 --data-parallel 2",
    ],
)
def test_a_rank_is_said_to_hold_what_it_would_hold(pool, tiny, tmp_path, words):
    argv = ["train", *tiny, *words.split(), "--max-steps", 1, "--output", tmp_path / "run"]
    dry, _ = run(pool, *argv, "--dry-run", ranks=2)
    assert not list(tmp_path.iterdir())
    real, _ = run(pool, *argv, ranks=2)
    said = rows(dry.out)
    headline = next(line for line in real.out.splitlines() if "parameters on this one" in line)
    assert f", {said['this rank']} on this one" in headline
    mesh = said["mesh"].split(" on ")[0]
    assert f": {mesh} on cpu" in headline


def test_it_holds_no_network_and_takes_no_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(step.TrainStep, "__call__", None)
    monkeypatch.setattr(torch, "randn", None)  # which draws weights
    done = command(
        "train", *tiny, "--dry-run", "--model", "wrn-28-80", "--groups", 16, "--output", tmp_path / "x"
    )
    assert done.code == 0, done.err


def test_memory_and_time_are_those_of_the_plan(own_cache, tmp_path):
    model = "--model wrn-10-1 --groups 4".split()
    argv = ["train", *model, "--conv", "gc2l", "--dry-run", "--output", tmp_path / "run"]
    before = rows(command(*argv).out)
    assert before["time of a step"].startswith("not known: no machine is measured; ")
    presets.machine("a100-40").save(own_cache / "machine-x.json")
    said = rows(command(*argv).out)
    planned = command("plan", *model, "--ranks", 1, "--json", "--machine", own_cache / "machine-x.json")
    cost = next(c for c in json.loads(planned.out)["costs"] if c["conv"] == "gc2l")
    assert said["memory a rank"] == before["memory a rank"]
    assert said["memory a rank"].startswith(f"{cost['peak_bytes'] / 1e6:.1f} MB at the most")
    assert said["time of a step"].startswith(f"{cost['step'] * 1e3:.3g} ms, ")
    assert "a100-40" in said["time of a step"]


def test_a_run_that_would_go_on_is_checked_as_such(pool, tiny, tmp_path):
    output = tmp_path / "run"
    run(pool, "train", *tiny, "--max-steps", 2, "--output", output)
    left = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    dry = ["train", *tiny, "--dry-run", "--output", output]
    (first,) = run(pool, *dry, "--resume")
    assert rows(first.out)["output"] == f"{output}, going on from step-00000002"
    for options, why in (
        ([], "holds a run already; go on with --resume"),
        (["--resume", "--seed", 5], "seed=5 but the checkpoint"),
    ):
        (refused,) = pool.run(command, *dry, *options, ranks=1, init=False)
        assert refused.code == 2 and why in refused.err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == left
    run(pool, "train", *tiny, "--resume", "--max-steps", 3, "--output", output)
    assert "dry_run" not in json.loads((output / "config.json").read_text())["run"]
    assert len(records(output, "step")) == 3


@pytest.mark.parametrize(
    "options",
    [
        "--groups 6",
        "--groups 1",
        "--conv sc --groups 1",
        "--data cifar10 --data-root nowhere",
        "--data imagenet --data-root nowhere",
        "--group-parallel 4",
        "--batch-size 5000",
        "--data-parallel 2 --batch-size 7",
        "--schedule dense",
        "--kernels triton",
        "--cuda-graph",
        "--precise-batch-norm 50",
        "--output file",
        "--model condensenet-86 --recompute blocks --conv lgc",
    ],
)
def test_what_the_run_would_refuse_is_refused_in_its_words(pool, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    argv = ["train", "--model", "wrn-10-1", "--max-steps", "1", *options.split()]
    real = pool.run(command, *argv, ranks=2, init=False)
    dry = pool.run(command, *argv, "--dry-run", ranks=2, init=False)
    assert [o.code for o in (*real, *dry)] == [2] * 4, dry[0].err
    assert [o.err for o in dry] == [o.err for o in real]


def test_what_would_be_downloaded_is_not(tmp_path):
    argv = "train --model wrn-10-1 --conv gc2l --groups 4 --dry-run --data cifar100 --download".split()
    done = command(*argv, "--data-root", tmp_path / "data", "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert "100 classes; it would be downloaded first (cifar100 is not there" in rows(done.out)["data"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sample", "cifar10"])
def test_a_data_set_has_as_many_training_images_as_is_said(name, request):
    root = {"data_root": request.getfixturevalue("data_root")} if name == "cifar10" else {}
    found = load(DataConfig(data=name, **root), seed=0, device="cpu")
    assert len(found.train) == DATA_SETS[name].train_images
