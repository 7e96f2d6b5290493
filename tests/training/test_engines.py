"""Whatever starts the ranks, ten steps of one configuration have the same losses.

Two ranks: a sum of two numbers has one order, so that the losses are equal to the last bit whoever carries them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest
import slurm
from command import losses

from twolevel.errors import LOST_RANK, LostRank

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAIN = (
    "--model wrn-10-1 --conv gc2l --groups 4 --data sample --batch-size 16 --precision float64 --max-steps 10 "
    "--log-steps 1 --schedule overlapped --kernels grouped --device cpu --output"
).split()
FOREIGN = ("RAY_", "SLURM_", "OMPI_", "PMIX_")


def environment(**extra: str) -> dict[str, str]:
    """Python of this environment, one thread, and nothing of a launcher around the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def ran(*argv: object, status: int = 0, **extra: str) -> str:
    """What a command printed, which has to end with this status."""
    done = subprocess.run(
        [*map(str, argv)],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("torchrun") / "run"
    ran(LAUNCH / "torchrun.sh", 2, *TRAIN, output)
    assert [step for step, _, _ in losses(output)] == [*range(1, 11)]
    return output


@pytest.fixture
def short() -> Iterator[str]:
    """A folder for Ray, whose sockets want a short name."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_mpirun_has_the_losses_of_torchrun(by_torchrun, tmp_path):
    pytest.importorskip("mpi4py")
    out = ran(LAUNCH / "mpirun.sh", 2, *TRAIN, tmp_path / "run")
    assert "1 data x 2 group ranks on cpu (mpi)" in out
    assert losses(tmp_path / "run") == losses(by_torchrun)


def test_slurm_has_the_losses_of_torchrun(by_torchrun, tmp_path):
    if (reason := slurm.not_supported_reason()) is not None:
        pytest.skip(reason)
    (tmp_path / "slurm").mkdir()
    cluster, log = slurm.Cluster(tmp_path / "slurm"), tmp_path / "job.log"
    try:
        cluster.start()
        sbatch = ["--gpus-per-node", 0, "--ntasks-per-node", 2, "--cpus-per-task", 1, "--output", log]
        recipe = [LAUNCH / "slurm.sbatch", *TRAIN, tmp_path / "run"]
        job = cluster.sbatch(
            *sbatch, *recipe, PATH=environment()["PATH"], PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"
        )
        slurm.until(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), cluster.logs)
        assert cluster.job(job)["JobState"] == "COMPLETED", log.read_text()
    finally:
        cluster.close()
    assert losses(tmp_path / "run") == losses(by_torchrun)


def test_a_loop_of_ones_own_under_fabric_has_the_losses_of_torchrun(by_torchrun, tmp_path):
    pytest.importorskip("lightning_fabric")
    out = ran(sys.executable, LAUNCH / "fabric_train.py", "--ranks", 2, "--", *TRAIN, tmp_path)
    found = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", out, re.M)]
    assert found == [loss for _, loss, _ in losses(by_torchrun)]
    assert (tmp_path / "network.pt").exists()


def test_ray_has_the_losses_of_torchrun(by_torchrun, tmp_path, short):
    pytest.importorskip("ray.train")
    argv = [LAUNCH / "ray_train.py", "--workers", 2, "--", *TRAIN, tmp_path / "run"]
    out = ran(sys.executable, *argv, RAY_TMPDIR=short)
    assert "1 data x 2 group ranks on cpu (gloo)" in out
    assert losses(tmp_path / "run") == losses(by_torchrun)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # Ray's own folder is gone


def test_ray_replaces_a_worker_that_is_killed_and_the_run_ends_as_if_it_had_not_been(
    by_torchrun, tmp_path, short
):
    pytest.importorskip("ray.train")
    own = [tmp_path / "mark", "--workers", 2, "--min-workers", 2, "--restarts", 1]
    argv = [
        Path(__file__).with_name("ray_script.py"),
        *own,
        "--",
        "--checkpoint-steps",
        2,
        *TRAIN,
        tmp_path / "run",
    ]
    out = ran(sys.executable, *argv, RAY_TMPDIR=short, PYTHONPATH=f"{ROOT}{os.pathsep}{LAUNCH}")
    assert (tmp_path / "mark").exists() and re.search(r"from step [24]\n", out), out
    assert losses(tmp_path / "run") == losses(by_torchrun)


@pytest.mark.parametrize("recipe", ["ray_train.py --workers 2", "fabric_train.py --ranks 2"])
def test_options_that_are_refused_start_no_rank(recipe):
    script, *own = recipe.split()
    pytest.importorskip("ray.train" if "ray" in script else "lightning_fabric")
    out = ran(sys.executable, LAUNCH / script, *own, "--", "--groops", 6, status=2)
    assert re.fullmatch(r"\S+( \S+)?: Unrecognized options: --groops, 6; did you mean --groups\?\n", out)


@pytest.mark.parametrize(
    "option, name", [("--accumulate 2", "accumulate=2"), ("--recipe fast", "label_smoothing=0.1")]
)
def test_the_loop_under_fabric_refuses_what_it_does_nothing_about(option, name):
    pytest.importorskip("lightning_fabric")
    out = ran(sys.executable, LAUNCH / "fabric_train.py", "--", *option.split(), status=2)
    assert out == f"launch/fabric_train.py: {name}: this loop has no such thing; leave it out, or add it\n"


def test_the_status_under_ray_tells_a_lost_worker_from_a_defect():
    pytest.importorskip("ray.train")
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    spec = util.spec_from_file_location("ray_train", LAUNCH / "ray_train.py")
    ray_train = util.module_from_spec(spec)
    spec.loader.exec_module(ray_train)
    gone, after = RayActorError(), UserExceptionWithTraceback(LostRank("rank 0 lost another one"), "")
    defect = UserExceptionWithTraceback(TypeError("wrong"), "")
    assert ray_train.status_of(WorkerGroupError("", {0: after, 1: gone})) == LOST_RANK
    assert ray_train.status_of(WorkerGroupError("", {0: after, 1: defect})) == 1
    assert ray_train.status_of(ControllerError(ValueError("wrong"))) == 1
