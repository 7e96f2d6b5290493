"""On a GPU a run compiles the kernels that it is about to measure by all cores, each rank of a machine its share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twolevel.nn import TwoLevelConv2d
from twolevel.ops import Geometry
from twolevel.ops.autotune import Decision, Form
from twolevel.ops.problem import Problem
from twolevel.training import forms

TRITON = [Form("overlapped", "grouped"), Form("overlapped", "triton")]
TORCH = [Form("overlapped", "grouped"), Form("fused", "grouped")]


def layer(channels: int) -> Problem:
    return Problem(
        batch=8,
        inputs=channels,
        size=(8, 8),
        outputs=channels,
        kernel=(3, 3),
        groups=4,
        geometry=Geometry(padding=(1, 1)),
        ranks=1,
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        channels_last=True,
    )


@pytest.fixture
def compiled(monkeypatch) -> list:
    """What is compiled, and by how many processes; layers of 40 channels are known, of 48 not for Triton."""
    asked = []

    class Kernels:
        def compile_ahead(self, layers, processes):
            asked.append(([one.inputs for one in layers], processes))
            return ["forward of a layer: no such instruction"] if layers else []

    def decide(problem, able, *, may_measure):
        assert not may_measure
        return Decision(able[0], {}) if problem.inputs == 40 else None

    monkeypatch.setattr(forms, "TritonKernels", Kernels)
    monkeypatch.setattr(forms.dispatch, "decide", decide)
    monkeypatch.setattr(
        forms, "_able", lambda one, problem, exchange_known: TORCH if problem.inputs == 48 else TRITON
    )
    monkeypatch.setattr(forms, "usable_cores", lambda: [*range(16)])
    return asked


def problems(*channels: int) -> dict:
    return {TwoLevelConv2d(number, number, 3, padding=1, groups=4): layer(number) for number in channels}


@pytest.mark.parametrize(
    ("local_rank", "ranks", "share"), [(0, 1, [16, 24, 32, 64]), (0, 2, [16, 32]), (1, 2, [24, 64])]
)
def test_what_is_not_known_is_compiled_once_and_shared_out(compiled, monkeypatch, local_rank, ranks, share):
    for name, value in (("RANK", local_rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(ranks))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    several = problems(16, 24, 24, 32, 40, 48, 56, 64)
    recorded = {layer(56).title(): "overlapped triton"}
    with pytest.warns(UserWarning, match="a kernel cannot be compiled: forward of a layer"):
        forms._compile_ahead(several, recorded, torch.device("cuda", 0))
    assert compiled == [(share, 16 // ranks)]


def test_on_a_cpu_nothing_is_compiled_ahead(compiled):
    forms._compile_ahead(problems(16), {}, torch.device("cpu"))
    assert compiled == []


def test_a_process_that_compiles_does_not_run_the_command_that_started_it():
    """Such a process imports what its parent was started with, under another name."""
    code = "import runpy; runpy.run_module('twolevel', run_name='__mp_main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
