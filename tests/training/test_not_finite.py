"""A loss that is not finite stops a run, or costs it a step, or sends it back to its newest checkpoint."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command import command, records, run, weights

from twolevel.training.epoch import Epochs
from twolevel.training.step import TrainStep

take_step = TrainStep.__call__


def poisoned(*argv: object, steps: list[int], leave_out: bool = False, rank: int = 0):
    """The command, of whose calls of a step (from 1) those in `steps` see an image of infinite brightness on one rank.

    With `leave_out` they are not made at all.
    """
    calls = 0

    def step(self, images, labels):
        nonlocal calls
        calls += 1
        if calls in steps and leave_out:
            return torch.zeros(3, dtype=torch.float64)
        if calls in steps and dist.get_rank() == rank:
            images = images.clone()
            images[0] = float("inf")
        return take_step(self, images, labels)

    with mock.patch.object(TrainStep, "__call__", step):
        return command(*argv)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


MESHES = [(1, ""), (2, ""), (2, "--data-parallel 2")]


@pytest.mark.parametrize(("ranks", "mesh"), MESHES)
def test_a_skipped_step_changes_nothing(pool, tiny, tmp_path, ranks, mesh):
    argv = ["train", *tiny, *mesh.split(), "--epochs", 2, "--on-not-finite", "skip", "--output"]
    for name, leave_out in (("skipped", False), ("left-out", True)):
        options = {"steps": [2, 4], "leave_out": leave_out, "rank": ranks - 1}
        outcomes = pool.run(poisoned, *argv, tmp_path / name, ranks=ranks, init=False, timeout=90, **options)
        assert [o.code for o in outcomes] == [0] * ranks, outcomes[0].err
        assert ("step 2 is skipped" in outcomes[0].out) != leave_out
    assert same(weights(pool, tmp_path / "skipped"), weights(pool, tmp_path / "left-out"))
    assert [record["loss"] is None for record in records(tmp_path / "skipped", "step")] == [
        step in (2, 4) for step in range(1, 7)
    ]


@pytest.mark.parametrize(("ranks", "mesh"), MESHES)
def test_a_fault_that_does_not_come_again_leaves_no_trace(pool, tiny, tmp_path, ranks, mesh):
    argv = ["train", *tiny, *mesh.split(), "--epochs", 2, "--checkpoint-steps", 2, "--on-not-finite", "back"]
    run(pool, *argv, "--output", tmp_path / "undisturbed", ranks=ranks)
    outcomes = pool.run(
        poisoned, *argv, "--output", tmp_path / "run", steps=[5], ranks=ranks, init=False, timeout=90
    )
    assert [o.code for o in outcomes] == [0] * ranks, outcomes[0].err
    assert "the loss is nan at step 5" in outcomes[0].out and "went back to step 4" in outcomes[0].out
    assert same(weights(pool, tmp_path / "run"), weights(pool, tmp_path / "undisturbed"))
    losses = [[r["loss"] for r in records(tmp_path / name, "step")] for name in ("run", "undisturbed")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def spoiled(*argv: object, step: int):
    """The command, in which once, after this step, a weight of the last rank is infinite."""
    step_of, done = Epochs.step, False

    def broken(self, images, labels):
        nonlocal done
        rate = step_of(self, images, labels)
        if self.state.step + 1 == step and not done and dist.get_rank() == dist.get_world_size() - 1:
            done = True
            next(self.state.model.parameters()).data[0] = float("inf")
        return rate

    with mock.patch.object(Epochs, "step", broken):
        return command(*argv)


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_weight_that_is_not_finite_is_gone_back_from(pool, tiny, tmp_path, step):
    """It is found while the checkpoint of step 4 is written, by the loss of the next step, or after the last."""
    argv = ["train", *tiny, "--epochs", 2, "--checkpoint-steps", 2, "--on-not-finite", "back"]
    run(pool, *argv, "--output", tmp_path / "undisturbed", ranks=2)
    outcomes = pool.run(
        spoiled, *argv, "--output", tmp_path / "run", step=step, ranks=2, init=False, timeout=90
    )
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].err
    assert "went back to step" in outcomes[0].out
    assert same(weights(pool, tmp_path / "run"), weights(pool, tmp_path / "undisturbed"))


@pytest.mark.parametrize(
    ("choice", "steps", "words"),
    [
        ("stop", [5], "the loss is nan at step 5"),
        ("back", [5, 6], "it came again after going back to step 4"),
        ("back", [1], "there is no checkpoint to go back to"),
        ("skip", [*range(2, 99)], "not finite in 10 steps one after the other"),
    ],
)
def test_what_does_not_end_stops_the_run(pool, tiny, tmp_path, choice, steps, words):
    argv = ["train", *tiny, "--epochs", 9, "--checkpoint-steps", 2, "--on-not-finite", choice]
    argv += ["--batch-size", 2, "--output", tmp_path / "run"]  # 12 steps an epoch
    for outcome in pool.run(poisoned, *argv, steps=steps, ranks=2, init=False, timeout=90):
        assert outcome.code == 2 and words in outcome.err.splitlines()[-1]


def test_an_epoch_without_a_step_ends_the_run(pool, tiny, tmp_path):
    argv = ["train", *tiny, "--on-not-finite", "skip", "--output", tmp_path / "run"]  # 3 steps an epoch
    (outcome,) = pool.run(poisoned, *argv, steps=[4, 5, 6], ranks=1, init=False, timeout=90)
    assert outcome.code == 2 and "every step of epoch 2 was skipped" in outcome.err
