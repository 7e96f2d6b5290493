"""Real launchers start real ranks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pool import free_port

LAUNCH = Path(__file__).parents[2] / "launch"
PER_RANK = {  # what a launcher or a recipe would set, which must not come from around the test
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "MPIRUN_FLAGS", "JOB", "RESTARTS", "REQUEUES", "SLURM_RESTART_COUNT"),
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


def test_options_that_are_refused_start_no_rank(tmp_path):
    """torchrun would start ranks again as often as it may, whatever their status."""
    words = (
        "--max-restarts",
        "3",
        "-m",
        "twolevel",
        "train",
        "--groops",
        "6",
        "--output",
        str(tmp_path / "run"),
    )
    done = torchrun_quietly(*words)
    assert done.returncode == 2
    assert done.stderr == "twolevel train: Unrecognized options: --groops, 6; did you mean --groups?\n"


def test_what_doctor_found_is_not_followed_by_a_traceback(tmp_path):
    done = torchrun_quietly("-m", "twolevel", "doctor", "--data", "cifar10", "--data-root", str(tmp_path))
    assert done.returncode == 1 and "problem  data " in done.stdout
    assert "Traceback" not in done.stderr


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


LISTENS = """
import os, sys
from pathlib import Path
from twolevel.distributed.environment import start, stop

world = start("cpu", timeout_s=60)
own = set()
for process in (os.getpid(), os.getppid()):  # a rank, and what started it
    for one in Path(f"/proc/{process}/fd").iterdir():
        try:
            own.add(os.readlink(one))
        except OSError:
            pass
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in own:
            sys.stdout.write(f"[listens] {words[1]}\\n")
stop(world)
"""


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="no /proc")
@pytest.mark.parametrize("launcher", ["torchrun", "by hand"])
def test_ranks_of_one_machine_listen_to_nobody_else(tmp_path, launcher):
    script = tmp_path / "listens.py"
    script.write_text(LISTENS)
    if launcher == "torchrun":
        done = torchrun_quietly(str(script))
    else:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environ = environment(PYTHONPATH=str(LAUNCH.parent), OMP_NUM_THREADS="1", **place)
        environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        other = subprocess.Popen([sys.executable, script], env=environ | {"RANK": "1", "LOCAL_RANK": "1"})
        done = subprocess.run(
            [sys.executable, script],
            env=environ | {"RANK": "0", "LOCAL_RANK": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert other.wait(60) == 0
    assert done.returncode == 0, done.stderr
    places = re.findall(r"\[listens\] (\w+):", done.stdout)
    assert places and {*places} == {"0100007F"}, done.stdout
