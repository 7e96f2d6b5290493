"""Which runs can be captured in a CUDA graph, and after how many steps; that replays are steps, test_gpu_step says."""

from types import SimpleNamespace

import pytest
import torch

from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.training.config import MeshConfig, ModelConfig, OptimiserConfig, TrainConfig
from twolevel.training.graphed import WARM_UP, GraphedStep, check_capturable

NCCL = "cpu:gloo,cuda:nccl"


def world(size: int = 4, device: str = "cuda:0", backend: str = NCCL) -> World:
    return World(0, size, 0, size, torch.device(device), backend, "torchrun")


def config(conv: str = "gc2l", accumulate: int = 1, **mesh) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(conv=conv, groups=1 if conv == "sc" else 4),
        optimiser=OptimiserConfig(accumulate=accumulate),
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.parametrize(
    ("run", "ranks"),
    [
        (config(), world()),
        (config(), world(size=1, backend="gloo")),  # one rank sends nothing
        (config(data_parallel=4), world()),
        (config("sc", data_parallel=4, sync_batch_norm=True), world()),
        (config(data_parallel=2), world()),
    ],
    ids=["ranks", "one rank", "replicas", "dense replicas", "replicas of ranks"],
)
def test_runs_whose_steps_leave_nothing_to_the_host_are_captured(run, ranks):
    check_capturable(run, ranks)


@pytest.mark.parametrize(
    ("run", "ranks", "why"),
    [
        (config(), world(device="cpu", backend="gloo"), "needs a GPU, and ranks compute on the cpu"),
        (config(parallel="fsdp"), world(), "takes parallel=group, not fsdp"),
        (config("sc", parallel="channel"), world(), "takes parallel=group, not channel"),
        (config(parallel="1f1b"), world(), "takes parallel=group, not 1f1b"),
        (
            config(),
            world(backend="gloo"),
            "takes the exchange of NCCL, not of gloo, which goes by way of the host",
        ),
        (config("dgconv"), world(), "cannot follow conv=dgconv, whose rule changes from step to step"),
        (config("lgc"), world(), "cannot follow conv=lgc, whose rule changes from step to step"),
        (config("dgc"), world(), "cannot follow conv=dgc, whose rule changes from step to step"),
        (config(accumulate=2), world(), "takes accumulate=1, not 2"),
    ],
)
def test_others_are_refused_with_the_reason(run, ranks, why):
    with pytest.raises(UserError) as info:
        check_capturable(run, ranks)
    assert str(info.value) == f"cuda_graph=True {why}; leave it out"


@pytest.mark.parametrize(("replicas", "least"), [(1, WARM_UP), (2, 11)])
def test_replicas_are_warm_once_torch_has_stopped_timing_them(monkeypatch, replicas, least):
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    mesh = {"data": SimpleNamespace(size=lambda: replicas)}
    step = SimpleNamespace(placed=SimpleNamespace(mesh=mesh), optimiser=SimpleNamespace(param_groups=[]))
    assert GraphedStep(step).warm_up == least
