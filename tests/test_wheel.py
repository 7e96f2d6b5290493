"""What is built and installed is the whole package: it runs without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a build reads: the rest of the repository is not there.
READ = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in READ:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "twolevel", source / "twolevel", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", str(made), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = made.glob("twolevel-*.whl")
    return file


def test_every_file_of_the_package_is_in_it(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("twolevel/")}
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "twolevel"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert names == {*listed.stdout.splitlines()}


def test_it_says_what_it_needs_and_which_command_it_brings(wheel):
    files = zipfile.ZipFile(wheel)
    (metadata,) = (files.read(name).decode() for name in files.namelist() if name.endswith("/METADATA"))
    (entries,) = (
        files.read(name).decode() for name in files.namelist() if name.endswith("/entry_points.txt")
    )
    assert "Requires-Dist: torch>=2.11\n" in metadata and "Provides-Extra: mpi\n" in metadata
    assert "twolevel = twolevel.cli:entry" in entries


def test_installed_it_trains_evaluates_and_exports(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    where = "import twolevel; print(twolevel.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(tmp_path / "site"))
    small = "--model wrn-10-1 --data sample --max-steps 1 --checkpoint-steps 1 --output run"
    for words in (f"train {small}", "evaluate run", "export run model.safetensors", "plan --machine h100"):
        done = subprocess.run(
            [sys.executable, "-m", "twolevel", *words.split()],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").exists()
