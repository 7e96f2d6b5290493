"""launch/slurm.sbatch under a real Slurm: whatever ends a run early, it ends as if nothing had happened.

TWOLEVEL_TEST_SLURM=1 pytest tests/training/test_slurm.py, as root, with slurm-wlm and munge installed.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command import FIXED, losses, weights
from slurm import Cluster, not_supported_reason, until

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("elastic_script.py")
pytestmark = pytest.mark.skipif(not_supported_reason() is not None, reason=str(not_supported_reason()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@dataclass
class Job:
    cluster: Cluster
    number: str
    output: Path
    log: Path

    def said(self, pattern: str) -> re.Match:
        """Wait until it has printed this."""
        until(lambda: self.log.exists() and bool(re.search(pattern, self.log.read_text())), self.told)
        found = re.search(pattern, self.log.read_text())
        assert found
        return found

    def ends(self, state: str, *, restarts: int) -> None:
        """Wait until Slurm has it in this state, after so many restarts."""
        last = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        until(lambda: self.cluster.job(self.number)["JobState"] in last, self.told)
        job = self.cluster.job(self.number)
        assert (job["JobState"], job["Restarts"]) == (state, str(restarts)), self.told()

    def told(self) -> str:
        text = self.log.read_text() if self.log.exists() else ""
        return f"{self.cluster.job(self.number)}\n{text}\n{self.cluster.logs()}"


@pytest.fixture
def submit(cluster, tiny, tmp_path):
    """Submits the recipe with two tasks; with `hold`, rank 1 of the first start waits in that step."""

    def submit(hold: int | None = None) -> Job:
        python = Path(sys.executable).parent
        if hold is not None:
            python = tmp_path / "bin"
            python.mkdir()
            # In place of `python -m twolevel`.
            (python / "python").write_text(
                f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{SCRIPT}" hold {hold} "$@"\n'
            )
            (python / "python").chmod(0o755)
        output, log = tmp_path / "run", tmp_path / "job.log"
        sbatch = ["--gpus-per-node", 0, "--ntasks-per-node", 2, "--cpus-per-task", 1, "--output", log]
        train = [*tiny, *FIXED, "--device", "cpu", "--checkpoint-steps", 2, "--output", output]
        path = f"{python}{os.pathsep}{os.environ['PATH']}"
        recipe = ROOT / "launch" / "slurm.sbatch"
        number = cluster.sbatch(*sbatch, recipe, *train, PATH=path, PYTHONPATH=str(ROOT))
        return Job(cluster, number, output, log)

    return submit


@pytest.fixture
def assert_as_undisturbed(pool, undisturbed):
    def check(job: Job) -> None:
        assert losses(job.output) == losses(undisturbed)
        torch.testing.assert_close(weights(pool, job.output), weights(pool, undisturbed), rtol=0, atol=0)

    return check


def test_a_job_trains_what_other_launchers_train(submit, assert_as_undisturbed):
    job = submit()
    job.ends("COMPLETED", restarts=0)
    assert job.cluster.job(job.number)["ExitCode"] == "0:0"
    assert_as_undisturbed(job)


def test_a_job_whose_time_is_almost_up_stops_with_a_checkpoint_and_goes_on(submit, assert_as_undisturbed):
    job = submit(hold=6)
    job.said("held")
    # Slurm looks every 30 s, and warns as much earlier than the recipe's two minutes.
    job.cluster.control("scontrol", "update", f"JobId={job.number}", "TimeLimit=3")
    job.said("status 130: the job is put back in the queue")
    job.cluster.control("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.said("from step 6\n")
    job.ends("COMPLETED", restarts=1)
    assert_as_undisturbed(job)


def test_a_job_that_is_preempted_stops_with_a_checkpoint_and_goes_on(submit, assert_as_undisturbed, tmp_path):
    job = submit(hold=6)
    job.said("held")
    urgent = job.cluster.sbatch(
        *("--partition", "urgent", "--ntasks", 2, "--output", tmp_path / "urgent.log", "--wrap", "true")
    )
    job.said("DUE TO PREEMPTION")
    job.said("stopped at step 6")
    job.said("from step 6\n")
    job.ends("COMPLETED", restarts=1)
    assert job.cluster.job(urgent)["JobState"] == "COMPLETED"
    assert_as_undisturbed(job)


def test_a_job_whose_rank_is_killed_goes_on(submit, assert_as_undisturbed):
    job = submit(hold=6)
    os.kill(int(job.said(r"held (\d+)\n")[1]), signal.SIGKILL)
    job.said("status 137: the job is put back in the queue")
    job.said(r"from step [24]\n")
    job.ends("COMPLETED", restarts=1)
    assert_as_undisturbed(job)


def test_a_job_whose_node_is_lost_goes_on(submit, assert_as_undisturbed):
    job = submit(hold=6)
    job.said("held")
    node = f"NodeName={job.cluster.host}"
    job.cluster.control("scontrol", "update", node, "State=DOWN", "Reason=test")
    job.cluster.control("scontrol", "update", node, "State=RESUME")
    job.said(r"from step [246]\n")
    job.ends("COMPLETED", restarts=1)
    assert_as_undisturbed(job)


def test_a_job_that_is_cancelled_stops_with_a_checkpoint_and_stays_away(submit):
    job = submit(hold=6)
    job.said("held")
    job.cluster.control("scancel", job.number)
    job.ends("CANCELLED", restarts=0)
    assert "stopped at step 6" in job.log.read_text() and "put back" not in job.log.read_text()
