"""The recipes in launch/ hand their arguments to launchers, and start again what goes on."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from test_launchers import LAUNCH, environment

from twolevel.cli.options import parse
from twolevel.training.config import TrainConfig

SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


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
            ["-m", "twolevel.torchrun", "--standalone", "--nproc-per-node", "3", "--max-restarts", "0"],
        ),
        ("torchrun-multinode.sh", ["2", "3", "alpha"], "python", ["--rdzv-endpoint", "alpha"]),
        ("torchrun-multinode.sh", ["2", "3", "alpha"], "python", ["--max-restarts", "0", "--nnodes", "2"]),
        (
            "torchrun-multinode.sh",
            ["1:4", "3", "alpha"],
            "python",
            ["--max-restarts", "3", "--nnodes", "1:4"],
        ),
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


def test_the_number_of_restarts_is_a_variable_of_each_recipe(tmp_path):
    for script, own in (("torchrun.sh", ["3"]), ("torchrun-multinode.sh", ["1:4", "3", "alpha"])):
        line = recorded(tmp_path, script, *own, RESTARTS="7")
        assert line[line.index("--max-restarts") + 1] == "7"


def ended_with(tmp_path: Path, script: str, launcher: str, statuses: list[int], **extra: str) -> tuple:
    """A recipe whose launcher ends with these statuses one after the other: its own, and what it ran, a line each."""
    for name in (launcher, "scontrol"):
        stub = tmp_path / name
        stub.write_text(
            f'#!/bin/bash\necho "${{0##*/}} $*" >> {tmp_path}/lines\n[ "${{0##*/}}" = scontrol ] && exit 0\n'
            f"statuses=({' '.join(map(str, statuses))})\n"
            f'exit "${{statuses[$(grep -c {launcher} {tmp_path}/lines) - 1]}}"\n'
        )
        stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    own = ["2"] if script == "mpirun.sh" else []
    environ = environment(PATH=path, SLURM_CPUS_PER_TASK="5", SLURM_JOB_ID="70", **extra)
    done = subprocess.run(["bash", LAUNCH / script, *own], env=environ, capture_output=True, text=True)
    return done.returncode, (tmp_path / "lines").read_text().splitlines()


@pytest.mark.parametrize(
    "statuses, restarts, status",
    [
        ([137, 75, 0], "3", 0),  # killed; one whose partner was; and then it ended
        ([137, 137, 137], "2", 137),
        ([137], "0", 137),
        ([2], "3", 2),
        ([1], "3", 1),
        ([130], "3", 130),
        ([0], "3", 0),
    ],
)
def test_the_recipe_for_mpirun_goes_on_after_a_lost_rank_and_no_other_end(
    tmp_path, statuses, restarts, status
):
    found, lines = ended_with(tmp_path, "mpirun.sh", "mpirun", statuses, RESTARTS=restarts)
    assert found == status and len(lines) == len(statuses)
    assert ["--resume" in line for line in lines] == [False] + [True] * (len(statuses) - 1)


@pytest.mark.parametrize(
    "status, restarts, again",
    [
        *((status, "0", False) for status in (0, 1, 2, 130, 143)),
        (137, "0", True),
        (75, "1", True),
        (75, "50", False),
    ],
)
def test_the_recipe_for_slurm_puts_a_job_back_that_lost_a_rank_and_no_other(
    tmp_path, status, restarts, again
):
    found, lines = ended_with(tmp_path, "slurm.sbatch", "srun", [status], SLURM_RESTART_COUNT=restarts)
    assert found == status
    assert ("--resume" in lines[0]) == (restarts != "0")
    assert lines[1:] == ["scontrol requeue 70"] * again


def test_the_recipe_for_slurm_puts_a_job_back_whose_time_is_up(tmp_path):
    """Slurm warns the script, which asks the run to stop with a checkpoint."""
    for name, body in {
        "srun": "trap 'kill %1; exit 130' USR1\nsleep infinity &\necho ready\nwait\n",
        "scontrol": 'echo "scontrol $*"\n',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environ = environment(PATH=path, SLURM_CPUS_PER_TASK="5", SLURM_JOB_ID="70")
    recipe = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch"], env=environ, stdout=subprocess.PIPE, text=True
    )
    assert recipe.stdout.readline() == "ready\n"
    recipe.send_signal(signal.SIGUSR1)
    assert recipe.communicate(timeout=60)[0].endswith("\nscontrol requeue 70\n")
    assert recipe.returncode == 130


def manifests(name: str) -> dict[str, dict]:
    """The objects of a file for kubectl, by kind."""
    yaml = pytest.importorskip("yaml")
    return {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / name).read_text())}


def trained_by(container: dict) -> TrainConfig:
    """What a container's command line trains, by twolevel's torchrun."""
    command, words = container["command"], container["args"]
    assert command == ["python", "-m", "twolevel.torchrun"]
    at = words.index("twolevel")
    assert words[at - 1 : at + 2] == ["-m", "twolevel", "train"]
    return parse(TrainConfig, "train", words[at + 2 :])


def test_the_recipe_for_kubernetes_is_elastic_and_keeps_its_runs_on_a_volume():
    found = manifests("kubernetes.yaml")
    job, claim = found["Job"]["spec"], found["PersistentVolumeClaim"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    config = trained_by(container)
    assert config.mesh.mesh == "auto" and config.run.resume
    (mount,) = (each["mountPath"] for each in container["volumeMounts"] if each["name"] == "runs")
    assert Path(mount) in config.output.parents and Path(mount) in Path(config.data.data_root).parents
    (volume,) = (each for each in pod["volumes"] if each["name"] == "runs")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert f"--nnodes=1:{job['completions']}" in container["args"]
    assert any(word.startswith("--max-restarts=") for word in container["args"])
    # A user's error ends the job; the field needs that restartPolicy.
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > 30


def test_the_recipe_for_kubeflow_trains_the_same_on_the_same_volume():
    job = manifests("trainjob.yaml")["TrainJob"]
    assert (job["apiVersion"], job["spec"]["runtimeRef"]["name"]) == (
        "trainer.kubeflow.org/v1alpha1",
        "torch-distributed",
    )
    (container,) = manifests("kubernetes.yaml")["Job"]["spec"]["template"]["spec"]["containers"]
    assert trained_by(job["spec"]["trainer"]) == trained_by(container)
    assert "claimName: twolevel-runs" in (LAUNCH / "trainjob.yaml").read_text()


@pytest.mark.parametrize("script", ["torchrun.sh", "torchrun-multinode.sh", "mpirun.sh"])
def test_a_recipe_without_arguments_says_how_it_is_used(script):
    result = subprocess.run(["bash", LAUNCH / script], capture_output=True, text=True)
    assert result.returncode != 0
    assert f"usage: launch/{script}" in result.stderr
