"""A grid trains every run once, whatever interrupts it, and leaves a line for each."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from command import result_line, write_image_folder

from twolevel.cli import main
from twolevel.errors import Stopped, UserError
from twolevel.grids import declare, results
from twolevel.grids.runner import Place, Runner

PLACES = [Place(threads=1)] * 2
HOLD = """
import pathlib, sys
from twolevel.training.output import _lock
with _lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def runner(tmp_path, trainer):
    def of(grid, **options):
        given = {"folder": tmp_path / "work", "lines": tmp_path / "lines.jsonl", "places": PLACES}
        return Runner(grid, **given | options, module=trainer)

    return of


def started(tmp_path) -> list[str]:
    return (tmp_path / "work" / "started.txt").read_text().split("\n")[:-1]


def test_every_run_gets_its_line_and_is_not_repeated(tmp_path, grid, runner, capsys):
    lines = runner(grid()).run()
    assert [line["run"] for line in lines] == [run.name for run in grid().runs]
    assert len(started(tmp_path)) == 10
    first = lines[0]
    assert first["final"]["test_error"] == 38.0 and [e["epoch"] for e in first["curve"]] == [1, 2]
    assert first["counts"]["parameters"] == 77_850 and first["completed"]["lr_schedule"] == "multistep"
    assert "10 runs" in capsys.readouterr().out

    assert runner(grid()).run() == lines
    assert len(started(tmp_path)) == 10
    # Another seed is all that is missing.
    assert len(runner(grid(0, 1, 2)).run()) == 15
    assert len(started(tmp_path)) == 15
    assert {path.name for path in (tmp_path / "work").iterdir() if path.is_dir()} == set()


def test_a_line_is_of_its_settings_and_not_of_a_grids_name(tmp_path, grid, file, runner):
    runner(grid(0)).run()
    same = file.with_name("other.toml")
    same.write_text(
        file.read_text().replace("epochs = 2", "epochs = 2\nlearning_rate = 0.1")
    )  # as the recipe has it
    assert len(runner(declare.read(str(same), (0,))).run()) == 5 == len(started(tmp_path))
    same.write_text(file.read_text().replace("epochs = 2", "epochs = 2\nlearning_rate = 0.2"))
    runner(declare.read(str(same), (0,))).run()
    assert len(started(tmp_path)) == 10


def test_a_run_that_outlived_its_grid_is_left_to_itself(tmp_path, grid, runner):
    first = tmp_path / "work" / grid(0).runs[0].name
    first.mkdir(parents=True)
    # As a run holds its folder, in a process of its own: locks of one process do not hinder it.
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holding.stdout.readline() == "held\n"
    own = runner(grid(0))
    assert len(own.run()) == 4 and own.elsewhere == 1
    assert (first / ".lock").read_text().startswith(f"process {holding.pid} ")
    holding.communicate("")
    assert len(runner(grid(0)).run()) == 5


def test_lines_hold_no_path(tmp_path, grid, runner):
    runner(grid(0), options=["--data-root", str(tmp_path / "data")]).run()
    assert str(tmp_path) not in (tmp_path / "lines.jsonl").read_text()


def test_a_run_that_fails_leaves_the_others(tmp_path, grid, runner, capsys):
    with pytest.raises(UserError, match=r"5 of 10 runs failed; wrn-10-1-sc-sample-seed13-.* says why in"):
        runner(grid(13, 1)).run()
    assert len(results.read(tmp_path / "lines.jsonl")) == 5
    assert "failed: the loss is nan at step 1" in capsys.readouterr().out


def test_two_grids_in_one_folder_share_the_runs(tmp_path, grid, runner):
    found, both = [], threading.Barrier(2)

    def train():
        own = runner(grid(), places=PLACES[:1])
        own._signals = __import__("contextlib").nullcontext  # signals are of the main thread
        both.wait()
        found.append(len(own.run()))

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(started(tmp_path)) == ["0"] * 5 + ["1"] * 5
    assert len(results.read(tmp_path / "lines.jsonl")) == 10 and max(found) == 10


def test_a_grid_that_is_asked_to_stop_goes_on_from_its_checkpoints(tmp_path, grid, runner):
    def ask_when_ready():
        while len(list((tmp_path / "work").glob("*/ready"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_when_ready)
    thread.start()
    with pytest.raises(Stopped, match="go on with the same command"):
        runner(grid(99)).run()
    thread.join()
    assert started(tmp_path) == ["99", "99"]
    (tmp_path / "work" / "go").touch()  # what begins now need not wait to be stopped
    assert len(runner(grid(99)).run()) == 5
    assert started(tmp_path)[2:4] == ["99 resumed", "99 resumed"]


def test_a_run_of_more_ranks_than_there_is_room_for_is_refused(file, runner):
    file.write_text(file.read_text().replace("epochs = 2", "epochs = 2\ngroup_parallel = 2"))
    with pytest.raises(UserError, match="has 2 ranks, and there is room for 1 here; use --at-once 2 on CPUs"):
        runner(declare.read(str(file)), places=PLACES[:1]).run()


def test_a_line_that_was_written_in_part_costs_no_other(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"settings": {}')
    line = result_line()
    results.append(path, line)
    with pytest.raises(UserError, match="line 1 is not that of a finished run; remove it"):
        results.read(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]) + "\n")
    assert results.read(path) == [line]


def test_a_full_disk_is_told_and_the_run_is_kept(tmp_path, grid, runner, monkeypatch):
    monkeypatch.setattr(results.os, "write", lambda file, text: len(text) // 2)
    with pytest.raises(UserError, match=r"took \d+ of \d+ bytes of a result: is the disk full"):
        runner(grid(0)).run()
    assert len([path for path in (tmp_path / "work").iterdir() if path.is_dir()]) >= 1


def test_a_line_without_a_setting_had_its_default(grid, runner):
    (line, *_) = runner(grid(0)).run()
    run = grid(0).runs[0]
    del line["completed"]["representatives"], line["completed"]["label_smoothing"]
    assert results.is_of(line, run)
    other = declare.Run(run.settings | {"label_smoothing": 0.1})
    assert not results.is_of(line, other)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(result_line()) + '\n{"settings": {}\n')
    with pytest.raises(UserError, match="line 2 is not that of a finished run; remove it"):
        results.read(path)


def test_the_command_trains_for_real(tmp_path, capsys):
    write_image_folder(tmp_path / "images")
    (tmp_path / "own.toml").write_text(
        '[settings]\nmodel = "wrn-10-1"\ndata = "imagenet"\nimage_size = 16\nworkers = 0\nbatch_size = 8\n'
        'epochs = 2\n[[runs]]\nconv = "gc"\n[[runs]]\nconv = "gc2l"\ngroup_parallel = 2\n'
    )
    words = ["grid", str(tmp_path / "own.toml"), "--output", str(tmp_path / "work")]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "twolevel",
            *words,
            "--data-root",
            str(tmp_path / "images"),
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "work" / "results.jsonl").read_text().splitlines()]
    assert {line["settings"]["conv"] for line in lines} == {"gc", "gc2l"}
    assert all(len(line["curve"]) == 2 and line["seconds"] > 0 for line in lines)
    assert main([*words, "--list"]) == 0
    assert capsys.readouterr().out.count(" %\n") == 2
    assert main(["report", str(tmp_path / "work"), "--page", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count("<td>GC-2L, 2 ranks</td>") == 1
