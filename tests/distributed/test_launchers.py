"""Real launchers start real ranks, and the recipes in launch/ hand their arguments to them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
PER_RANK = {  # what a launcher or a recipe would set, which must not come from around the test
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "MPIRUN_FLAGS", "JOB"),
}

# Its argument: how many groups are made, one after the other.
BODY = """
import json, sys, torch, torch.distributed as dist
from twolevel.distributed.environment import start, stop

totals = []
for _ in range(int(sys.argv[1])):
    world = start("cpu", timeout_s=60)
    total = torch.tensor([world.rank + 1])
    dist.all_reduce(total)
    totals.append(total.item())
    stop(world)
line = [world.launcher, world.rank, world.size, world.local_rank, world.local_size, totals]
sys.stdout.write(json.dumps(line) + "\\n")  # in one write: the ranks share the pipe
"""


def command(name: str) -> str:
    """Where the launcher `name` is: beside this Python, else on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return found


def environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in PER_RANK}
    return {**clean, **extra}


def started_by(launcher: list[str], script: Path, *, groups: int = 1) -> list:
    """What each rank printed, by rank: launcher, rank and so on, and one sum for each group."""
    script.write_text(BODY)
    result = subprocess.run(
        [*launcher, str(script), str(groups)],
        env=environment(PYTHONPATH=str(LAUNCH.parent)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    return sorted(json.loads(line) for line in lines)


def test_torchrun_starts_ranks_that_reach_each_other(tmp_path):
    launcher = [command("torchrun"), "--standalone", "--nproc-per-node", "2"]
    ranks = started_by(launcher, tmp_path / "body.py", groups=2)  # torchrun's store outlives the first
    assert ranks == [["torchrun", rank, 2, rank, 2, [3, 3]] for rank in (0, 1)]


def torchrun_quietly(*words: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "twolevel.torchrun", "--standalone", "--nproc-per-node", "2", *words]
    environ = environment(PYTHONPATH=str(LAUNCH.parent), OMP_NUM_THREADS="1")
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120)


def test_what_a_rank_said_is_not_followed_by_a_traceback(tmp_path):
    done = torchrun_quietly("-m", "twolevel", "train", "--groups", "6", "--output", str(tmp_path / "run"))
    lines = done.stderr.splitlines()
    said = [line for line in lines if "twolevel train: groups=6 does not divide" in line]
    assert done.returncode == 2 and said
    # One line of torch's names the process that ended first, and one each that it stops the others.
    assert len(lines) - len(said) <= 2 and "Traceback" not in done.stderr


def test_a_defect_in_a_rank_keeps_the_report_of_torchrun(tmp_path):
    (tmp_path / "defect.py").write_text("1 / 0")
    done = torchrun_quietly(str(tmp_path / "defect.py"))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "ChildFailedError" in done.stderr


def test_mpirun_starts_ranks_that_reach_each_other(tmp_path):
    pytest.importorskip("mpi4py")
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    launcher = [command("mpirun"), *root, "--oversubscribe", "-n", "2", sys.executable]
    ranks = started_by(launcher, tmp_path / "body.py")
    assert ranks == [["mpi", rank, 2, rank, 2, [3]] for rank in (0, 1)]


def test_srun_starts_ranks_that_reach_each_other(tmp_path):
    srun = command("srun")
    try:
        subprocess.run(["scontrol", "ping"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("srun is here, but no Slurm controller answers")
    launcher = [srun, "--nodes", "1", "--ntasks", "2", "--overcommit", sys.executable]
    ranks = started_by(launcher, tmp_path / "body.py")
    assert ranks == [["slurm", rank, 2, rank, 2, [3]] for rank in (0, 1)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_is_valid_bash(script):
    result = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def recorded(tmp_path: Path, script: str, *arguments: str, **extra: str) -> list[str]:
    """OMP_NUM_THREADS and the command line that a recipe would run in the end."""
    for name in ("python", "mpirun", "srun"):
        stub = tmp_path / name
        stub.write_text('#!/bin/sh\nprintf "%s\\n" "$OMP_NUM_THREADS" "${0##*/}" "$@"\n')
        stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=environment(PATH=path, **extra),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    "script, own, launcher, flags",
    [
        (
            "torchrun.sh",
            ["3"],
            "python",
            ["-m", "twolevel.torchrun", "--standalone", "--nproc-per-node", "3"],
        ),
        ("torchrun-multinode.sh", ["2", "3", "alpha"], "python", ["--rdzv-endpoint", "alpha"]),
        ("mpirun.sh", ["3"], "mpirun", ["-n", "3"]),
        ("slurm.sbatch", [], "srun", ["--cpus-per-task=5"]),
    ],
)
def test_a_recipe_hands_its_arguments_to_train(tmp_path, script, own, launcher, flags):
    words = ["--model", "wrn-28-10", "--name", "two words"]
    _, name, *line = recorded(tmp_path, script, *own, *words, SLURM_CPUS_PER_TASK="5")
    assert name == launcher
    assert line[-7:] == ["-m", "twolevel", "train", *words]
    at = line.index(flags[0])
    assert line[at : at + len(flags)] == flags


def test_every_script_in_launch_is_run_by_a_test_above():
    assert SCRIPTS == ["mpirun.sh", "slurm.sbatch", "torchrun-multinode.sh", "torchrun.sh"]


def test_a_recipe_gives_ranks_the_threads_that_torchrun_would_not(tmp_path):
    assert int(recorded(tmp_path, "torchrun.sh", "1")[0]) >= 1
    assert recorded(tmp_path, "torchrun.sh", "100000")[0] == "1"
    assert recorded(tmp_path, "torchrun.sh", "1", OMP_NUM_THREADS="7")[0] == "7"
    assert recorded(tmp_path, "slurm.sbatch", SLURM_CPUS_PER_TASK="5")[0] == "5"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_recipe_for_mpirun_asks_a_run_to_stop_instead_of_killing_it(tmp_path, number):
    stub = tmp_path / "mpirun"
    stub.write_text(
        "#!/bin/bash\ntrap 'echo stopped; kill %1; exit 130' USR1\nsleep infinity &\necho ready\nwait\n"
    )
    stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    recipe = subprocess.Popen(
        ["bash", LAUNCH / "mpirun.sh", "2"], env=environment(PATH=path), stdout=subprocess.PIPE, text=True
    )
    assert recipe.stdout.readline() == "ready\n"
    recipe.send_signal(number)
    assert recipe.communicate(timeout=60)[0] == "stopped\n"
    assert recipe.returncode == 130


@pytest.mark.parametrize("script", ["torchrun.sh", "torchrun-multinode.sh", "mpirun.sh"])
def test_a_recipe_without_arguments_says_how_it_is_used(script):
    result = subprocess.run(["bash", LAUNCH / script], capture_output=True, text=True)
    assert result.returncode != 0
    assert f"usage: launch/{script}" in result.stderr
