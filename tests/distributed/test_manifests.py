"""The YAML of launch/ is what Kubernetes, Kubeflow Trainer and SkyPilot read, to the last key."""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from documented import check_options
from test_launchers import LAUNCH
from test_recipes import manifests

# The model that the API's own schema gives, by the kind of an object; those of Kubernetes come with Kubeflow's.
MODELS = {
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
    "Service": "IoK8sApiCoreV1Service",
    "Job": "IoK8sApiBatchV1Job",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
OBJECTS = [("kubernetes.yaml", kind) for kind in list(MODELS)[:3]] + [("trainjob.yaml", "TrainJob")]


def check(manifest: dict) -> None:
    """Raises where an object does not fit its API. The models check types and needed keys, and drop unknown ones."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    read = getattr(models, MODELS[manifest["kind"]]).from_dict(manifest).to_dict()
    lost = left_out(manifest, read)
    assert lost == [], f"{manifest['kind']} has no {', '.join(lost)}"


def left_out(given: Any, read: Any, path: str = "") -> list[str]:
    """The places in `given` that are not in `read`, which may have more."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [
            place
            for key, value in given.items()
            for place in (left_out(value, read[key], f"{path}.{key}") if key in read else [f"{path}.{key}"])
        ]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = enumerate(zip(given, read, strict=True))
        return [place for at, pair in pairs for place in left_out(*pair, f"{path}[{at}]")]
    return [] if given == read else [path]


@pytest.mark.parametrize("file, kind", OBJECTS)
def test_a_manifest_fits_its_api(file, kind):
    check(manifests(file)[kind])


@pytest.mark.parametrize(
    "file, kind, path, key",
    [
        ("trainjob.yaml", "TrainJob", ("spec", "trainer"), "numNodes"),
        ("trainjob.yaml", "TrainJob", ("spec",), "runtimeRef"),
        ("trainjob.yaml", "TrainJob", ("spec", "trainer", "env", 0), "value"),
        ("trainjob.yaml", "TrainJob", ("spec", "runtimePatches", 0), "trainingRuntimeSpec"),
        ("kubernetes.yaml", "Job", ("spec",), "backoffLimit"),
        ("kubernetes.yaml", "Job", ("spec", "template", "spec", "volumes", 1, "emptyDir"), "medium"),
        ("kubernetes.yaml", "PersistentVolumeClaim", ("spec", "resources"), "requests"),
        ("kubernetes.yaml", "Service", ("spec",), "publishNotReadyAddresses"),
    ],
)
def test_a_key_that_is_misspelt_does_not_fit(file, kind, path, key):
    manifest = copy.deepcopy(manifests(file)[kind])
    place = manifest
    for step in path:
        place = place[step]
    place[f"{key}s"] = place.pop(key)
    with pytest.raises((AssertionError, ValueError)):
        check(manifest)


SKYPILOT = os.environ.get("TWOLEVEL_TEST_SKYPILOT")
READ = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, *task.resources, task.volumes)"


def read_by_skypilot(task: str, folder: Path) -> subprocess.CompletedProcess:
    """A task, read by a Python that has SkyPilot."""
    (folder / "task.yaml").write_text(task)
    return subprocess.run(
        [str(SKYPILOT), "-c", READ, folder / "task.yaml"],
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
    )


needs_skypilot = pytest.mark.skipif(
    SKYPILOT is None, reason="TWOLEVEL_TEST_SKYPILOT is not set to a Python that has skypilot"
)


@needs_skypilot
def test_skypilot_reads_its_recipe(tmp_path):
    done = read_by_skypilot((LAUNCH / "skypilot.yaml").read_text(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 <Cloud>([Spot], {'A100': 8}) {'/runs': 'twolevel-runs'}" in done.stdout


@needs_skypilot
@pytest.mark.parametrize("key", ["num_nodes", "accelerators", "use_spot", "setup"])
def test_skypilot_refuses_a_key_that_is_misspelt(tmp_path, key):
    text = (LAUNCH / "skypilot.yaml").read_text()
    assert text.count(f"{key}:") == 1
    done = read_by_skypilot(text.replace(f"{key}:", f"{key}s:"), tmp_path)
    assert done.returncode != 0 and f"{key}s" in done.stderr


def test_the_recipe_for_skypilot_goes_on_with_its_run_on_the_volume(tmp_path):
    """Its lines, with the variables that SkyPilot sets, start the recipe for several machines."""
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    stub = tmp_path / "launch" / "torchrun-multinode.sh"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    told = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NUM_GPUS_PER_NODE": "8", "NODE_RANK": "1"}
    environ = os.environ | {f"SKYPILOT_{name}": value for name, value in told.items()}
    done = subprocess.run(
        ["bash", "-ec", task["run"]], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    nodes, gpus, head, *words = done.stdout.splitlines()
    assert (nodes, gpus, head) == ("2", "8", "10.0.0.1")
    check_options(["twolevel", "train", *words])
    assert {"--resume", "--mesh"} <= {*words}
    assert Path(words[words.index("--output") + 1]).parent == Path(*task["volumes"])
