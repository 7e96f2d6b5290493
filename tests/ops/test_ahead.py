"""What is compiled ahead is what the forms of a layer launch; in Triton's interpreter where there is no card."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twolevel.ops import Geometry
from twolevel.ops.autotune import Form
from twolevel.ops.dispatch import runs
from twolevel.ops.kernels.triton import grouped
from twolevel.ops.kernels.triton.ahead import compile_ahead, compile_job, jobs
from twolevel.ops.problem import Problem

pytest.importorskip("triton")
CHILD = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if CHILD else "cuda"
ran_here = pytest.mark.skipif(not (CHILD or torch.cuda.is_available()), reason="no card; the child runs it")
FORMS = [Form("overlapped", "triton"), Form("fused", "triton")]


def layer(groups=2, ranks=1, representatives=1, stride=1, device=DEVICE) -> Problem:
    return Problem(
        batch=2,
        inputs=8 * groups,
        size=(6, 5),
        outputs=16 * groups,
        kernel=(3, 3),
        groups=groups,
        geometry=Geometry((stride, stride), (1, 1)),
        ranks=ranks,
        dtype=torch.float32,
        device=torch.device(device),
        channels_last=True,
        representatives=representatives,
    )


@pytest.mark.skipif(CHILD or torch.cuda.is_available(), reason="run on the card, or by the parent")
def test_everything_here_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert "no card" not in child.stdout and " passed" in child.stdout


@pytest.fixture
def launched(monkeypatch) -> set:
    """What is launched, with all that it is compiled for."""
    found, run = set(), grouped.run

    def spy(launch, like, **tensors):
        found.add((launch.kernel, launch.config, *sorted({**launch.sizes, **launch.constants}.items())))
        run(launch, like, **tensors)

    monkeypatch.setattr(grouped, "run", spy)
    return found


@ran_here
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (4, 1, 1), (2, 1, 3)])
def test_jobs_launch_what_the_forms_of_a_layer_launch(launched, tmp_path, monkeypatch, sizes, stride):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = layer(*sizes, stride)
    most = 1 if CHILD else 4  # a card measures before it launches, the interpreter takes the estimate
    for job in jobs(one):
        assert compile_job(job, most, "tf32") == []
    ahead = set(launched)
    launched.clear()
    for run in runs(one, FORMS):
        run()
    assert launched <= ahead
    if CHILD:  # Nothing is compiled in vain: on one rank the plain forward is launched by measurements alone.
        assert len(ahead - launched) == (one.ranks == 1)


@ran_here
def test_what_fails_is_named(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(grouped, "run", fail)
    (forward, *_) = jobs(layer())
    assert compile_job(forward, 1, "tf32") == [
        f"forward of {layer().title()}, 32 outputs: RuntimeError: PassManager::run failed"
    ]


@pytest.mark.skipif(CHILD, reason="of layers that are not computed by Triton")
def test_layers_that_triton_cannot_compute_take_no_process():
    assert compile_ahead([layer(device="cpu")], 4, most=4, precision="tf32") == []
