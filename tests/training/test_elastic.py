"""A run with --mesh auto goes on whatever ranks come: fewer, more, or others in place of some that died."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from command import FIXED, losses, run, weights
from pool import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("elastic_script.py")
# Sums over ranks are added in another order; rounding errors of 1e-16, amplified by batch norm over nine steps.
TOLERANCE = 1e-10


def test_a_spare_changes_nothing_and_says_nothing(pool, tiny, undisturbed, tmp_path):
    first, second, spare = run(pool, "train", *tiny, *FIXED, "--output", tmp_path / "run", ranks=3)
    assert first.out.startswith(
        "3 ranks came: mesh data=1 x group=2; rank 2 waits as a spare and joins at the next change\n"
    )
    assert (spare.out, spare.err) == (second.out, second.err) == ("", "")
    assert losses(tmp_path / "run") == losses(undisturbed)
    torch.testing.assert_close(weights(pool, tmp_path / "run"), weights(pool, undisturbed), rtol=0, atol=0)


def test_a_run_goes_on_with_any_number_of_ranks_and_no_argument_changed(pool, tiny, undisturbed, tmp_path):
    argv = ["train", *tiny, *FIXED, "--output", tmp_path / "run", "--resume"]
    run(pool, *argv, "--max-steps", 2, ranks=4)
    for step, ranks in ((4, 3), (5, 2), (7, 1)):
        outcomes = run(pool, *argv, "--max-steps", step, ranks=ranks)
        assert outcomes[0].err == ""  # the batch is whole on every one of these meshes
    run(pool, *argv, ranks=4)
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    torch.testing.assert_close(losses(tmp_path / "run"), losses(undisturbed), **close)
    torch.testing.assert_close(weights(pool, tmp_path / "run"), weights(pool, undisturbed), **close)


def test_blocks_computed_again_change_no_bit_of_a_run_and_may_be_chosen_under_way(
    pool, tiny, undisturbed, tmp_path
):
    argv = ["train", *tiny, *FIXED, "--output", tmp_path / "run"]
    run(pool, *argv, "--recompute", "blocks", "--max-steps", 5, ranks=2)
    first, _ = run(pool, *argv, "--resume", ranks=2)
    assert first.err == "" and losses(tmp_path / "run") == losses(undisturbed)
    torch.testing.assert_close(weights(pool, tmp_path / "run"), weights(pool, undisturbed), rtol=0, atol=0)


def test_replicas_that_come_or_go_are_one_line(pool, tiny, tmp_path):
    argv = ["train", *tiny, *FIXED, "--groups", 2, "--output", tmp_path / "run", "--resume"]
    run(pool, *argv, "--max-steps", 1, ranks=4)
    outcomes = run(pool, *argv, "--max-steps", 2, ranks=2)
    (line,) = outcomes[0].err.splitlines()
    assert "resumed with batch norm over 8 images at a time; it was 4 before" in line


def torchrun(*words: object) -> subprocess.Popen:
    argv = [sys.executable, "-m", "twolevel.torchrun", *map(str, words)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def ended(process: subprocess.Popen) -> str:
    """What it printed; it has to succeed."""
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    return out


def test_a_rank_that_is_killed_is_replaced_and_the_run_ends_as_if_it_had_not_been(
    pool, tiny, undisturbed, tmp_path
):
    """Without --resume: torchrun says that it has restarted."""
    flags = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    train = ["train", *tiny, *FIXED, "--checkpoint-steps", 2, "--output", tmp_path / "run"]
    out = ended(torchrun(*flags, SCRIPT, "kill", 6, *train))
    # The checkpoint of step 4 is being written while steps 5 and 6 are taken.
    assert re.search(
        r"restarted by torchrun: going on from the newest checkpoint\n.*from step [234]\n", out, re.S
    )
    assert losses(tmp_path / "run") == losses(undisturbed)
    torch.testing.assert_close(weights(pool, tmp_path / "run"), weights(pool, undisturbed), rtol=0, atol=0)


def test_a_machine_that_comes_later_joins_the_run(tiny, undisturbed, tmp_path):
    """Without --resume: torchrun does not count this as a restart, and the run's folder tells."""
    flags = ["--nnodes", "1:2", "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    flags += ["--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-conf", "last_call_timeout=1"]
    words = [*flags, SCRIPT, "grow", 5, "train", *tiny, *FIXED, "--output", tmp_path / "run"]
    first = torchrun(*words)
    assert first.stdout is not None
    before = list(iter(first.stdout.readline, "ready\n"))
    assert "1 rank came: mesh data=1 x group=1\n" in before
    second = torchrun(*words)
    said = ended(first) + ended(second)
    assert "2 ranks came: mesh data=1 x group=2" in said
    assert "restarted by torchrun: going on from the newest checkpoint" in said and "from step 5" in said
    torch.testing.assert_close(losses(tmp_path / "run"), losses(undisturbed), rtol=TOLERANCE, atol=TOLERANCE)
