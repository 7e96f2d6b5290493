"""A run's folder is its own while it lasts, and one that all of its ranks see."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from command import command, run

from twolevel.errors import UserError
from twolevel.training import output as training_output
from twolevel.training.output import claim

CPU = torch.device("cpu")


def claimed(output: Path, resume: bool = False):
    return claim(output, resume=resume, first=True, device=CPU)


HOLD = """
import sys, torch
from pathlib import Path
from twolevel.training import output as training_output
from twolevel.training.output import claim
with claim(Path(sys.argv[1]), resume=False, first=True, device=torch.device("cpu")):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(output: Path) -> subprocess.Popen:
    """A process that holds the folder until its input ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_and_its_owner_named(tmp_path, resume):
    with holder(tmp_path / "run") as owner:
        with (
            pytest.raises(
                UserError, match=f"in use by a run .process {owner.pid} on .*name another --output"
            ),
            claimed(tmp_path / "run", resume),
        ):
            pass
        owner.stdin.close()
    with claimed(tmp_path / "run"):  # its owner is gone
        pass


def test_a_crash_leaves_nothing_in_the_way(tmp_path):
    with holder(tmp_path / "run") as owner:
        owner.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / ".lock").exists()
    with claimed(tmp_path / "run") as start:
        assert start is None


def test_a_fork_does_not_hold_the_folder_after_its_parent(tmp_path):
    with claimed(tmp_path / "run"):
        ready, done = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with holder(tmp_path / "run") as other:
            other.stdin.close()
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    with claimed(tmp_path / "runs" / "new"):
        assert (tmp_path / "runs" / "new" / ".lock").exists()
    assert not (tmp_path / "runs" / "new").exists()
    (tmp_path / "mine").mkdir()
    with claimed(tmp_path / "mine"):
        pass
    assert [*(tmp_path / "mine").iterdir()] == []


@pytest.mark.parametrize("left", ["config.json", "checkpoints", "metrics.jsonl"])
def test_what_an_earlier_run_left_is_refused(tmp_path, left):
    (tmp_path / left).mkdir()
    with (
        pytest.raises(UserError, match=f"holds a run already; go on with --resume.*found {left}"),
        claimed(tmp_path),
    ):
        pass


def in_a_folder_of_its_own(root: str, *argv: str):
    os.chdir(Path(root, os.environ["RANK"]))
    with mock.patch.object(training_output, "APPEARS_SECONDS", 0.2):  # no network between these folders
        return command(*argv)


def test_ranks_that_do_not_share_the_folder_are_refused_before_the_first_step(pool, tiny, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    argv = ["train", *tiny, "--output", "runs/mine"]
    outcomes = pool.run(in_a_folder_of_its_own, str(tmp_path), *argv, ranks=2, init=False)
    for outcome in outcomes:
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
        assert "is not the folder that rank 0 writes; give an absolute --output" in outcome.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_second_resume_is_refused_while_the_first_runs(pool, tiny, tmp_path):
    output = tmp_path / "run"
    run(pool, "train", *tiny, "--output", output, "--max-steps", 2)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    lock = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    command_line = [sys.executable, "-c", lock, output / ".lock"]
    with subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        argv = [str(word) for word in ("train", *tiny, "--output", output, "--resume")]
        for outcome in pool.run(command, *argv, ranks=2, init=False):
            assert outcome.code == 2 and "is in use by a run" in outcome.err
        owner.stdin.close()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    run(pool, "train", *tiny, "--output", output, "--resume", "--max-steps", 3)


def test_a_restarted_run_waits_for_the_lock_of_one_that_is_dying(tmp_path, monkeypatch):
    """Its launcher kills it, which takes a while; another run that lives is refused all the same."""
    output = tmp_path / "run"
    with holder(output) as owner:
        looks = []

        def look(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 2:
                owner.kill()
                owner.wait()

        monkeypatch.setattr(training_output.time, "sleep", look)
        with (
            pytest.warns(UserWarning, match="nothing to resume"),
            claim(output, resume=True, first=True, device=CPU, restarted=True),
        ):
            assert len(looks) == 2
    monkeypatch.setattr(training_output, "DYING_SECONDS", 0.0)
    with holder(output) as owner:
        with (
            pytest.raises(UserError, match="in use by a run"),
            claim(output, resume=True, first=True, device=CPU, restarted=True),
        ):
            pass
        owner.stdin.close()
