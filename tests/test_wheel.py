"""What is built and installed is the whole package: it runs without the repository, and the index can show it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from readme_renderer import markdown

ROOT = Path(__file__).parents[1]


def tracked(*paths: str) -> list[str]:
    """The files of the repository at these paths, also those that are not yet committed."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *paths]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def build(kind: str, source: Path, made: Path) -> Path:
    """The one file of this kind that a build of `source` leaves in `made`, by the tools that are installed here."""
    words = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(made), str(source)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = made.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution, so that this lacks nothing either."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as files:
        files.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_every_file_of_the_package_is_in_it(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("twolevel/")}
    assert names == {*tracked("twolevel")}


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


def test_the_index_can_show_the_readme(wheel):
    """Rendered as the index does, which cleans the page of what it does not allow; it has no files beside it."""
    files = zipfile.ZipFile(wheel)
    (metadata,) = (files.read(name).decode() for name in files.namelist() if name.endswith("/METADATA"))
    assert "Description-Content-Type: text/markdown\n" in metadata
    page = markdown.render(metadata.partition("\n\n")[2])
    assert page is not None and "<h2" in page and "<img" in page and "<pre" in page
    targets = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(targets) > 20 and all(target.startswith(("https://", "#")) for target in targets)


# Optional packages whose requirements would change those of the others.
NOT_TOGETHER = {"trackio": "it wants a Pillow older than torchvision's newest"}
EXTRAS = distribution("twolevel").metadata.get_all("Provides-Extra") or []


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_an_extra_names_is_installed_and_of_that_version(extra):
    """`make` installs all but one; an extra without requirements here would be a name that brings nothing."""
    if extra in NOT_TOGETHER:
        pytest.skip(NOT_TOGETHER[extra])
    asked = [Requirement(text) for text in distribution("twolevel").requires or []]
    own = [one for one in asked if one.marker is not None and one.marker.evaluate({"extra": extra})]
    assert own
    for one in own:
        try:
            found = version(one.name)
        except PackageNotFoundError:
            pytest.fail(f"{one} of twolevel[{extra}] is not installed")
        assert one.specifier.contains(found, prereleases=True), f"{one}, and {found} is installed"
