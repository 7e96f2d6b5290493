"""What holds of a training step on a GPU; all of it is skipped where there is none."""

import copy

import pytest
import torch
from command import command

from twolevel.distributed import init_mesh
from twolevel.distributed.environment import start, stop
from twolevel.training.config import OptimiserConfig
from twolevel.training.epoch import Epochs
from twolevel.training.graphed import WARM_UP, GraphedStep
from twolevel.training.step import make_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
STEPS = WARM_UP + 3


@pytest.fixture
def mesh():
    world = start("cuda")
    yield init_mesh(device="cuda")
    stop(world)


def batches(number: int):
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        images = torch.randn(16, 3, 32, 32, generator=generator).cuda()
        labels = torch.randint(10, (16,), generator=generator).cuda()
        yield images.contiguous(memory_format=torch.channels_last), labels


def step_of(mesh, precision="float32"):
    rule = OptimiserConfig(learning_rate=0.01, weight_decay=5e-4)
    return make_step("wrn-16-4", mesh, "cuda", conv="gc2l", groups=4, precision=precision, optimiser=rule)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_waits_for_nothing(mesh, precision):
    """No copy to the host and no synchronisation, once kernels are chosen."""
    step = step_of(mesh, precision)
    given = [*batches(2)]
    for images, labels in given:
        step(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in given:
            step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_of_the_graph_are_the_steps(mesh):
    step = step_of(mesh)
    other = copy.deepcopy(step.placed.model.state_dict())
    plain = [step(images, labels).tolist() for images, labels in batches(STEPS)]
    again = step_of(mesh)
    again.model.load_state_dict(other)
    graphed = GraphedStep(again)
    graphed.set_rate(0.01)
    replayed = [graphed(images, labels).tolist() for images, labels in batches(STEPS)]
    assert graphed.graph is not None
    for (loss, right, number), wanted in zip(replayed, plain, strict=True):
        # The same kernels; some of cuDNN's add up in an order that changes from run to run.
        assert loss == pytest.approx(wanted[0], rel=1e-3)
        assert abs(right - wanted[1]) <= 1 and number == wanted[2]


@pytest.mark.parametrize("options", [[], ["--cuda-graph"]])
def test_a_run_lets_cudnn_time_its_algorithms_and_leaves_the_setting_as_it_was(
    tmp_path, monkeypatch, options
):
    tuned, step = [], Epochs.step

    def spy(self, images, labels):
        tuned.append(torch.backends.cudnn.benchmark)
        return step(self, images, labels)

    monkeypatch.setattr(Epochs, "step", spy)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    argv = f"train --model wrn-10-1 --conv gc2l --groups 4 --data sample --max-steps {STEPS}".split()
    done = command(*argv, "--device", "cuda", *options, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert tuned == [True] * STEPS
    assert torch.backends.cudnn.benchmark is False
