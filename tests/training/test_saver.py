"""Checkpoints are written while training goes on; what a full disk does not take ends no run."""

import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command import command, records, run

from twolevel.errors import UserError
from twolevel.training import checkpoint
from twolevel.training.checkpoint import folders, saver

STATE = {"config": {name: {} for name in checkpoint.SECTIONS}, "num_classes": 3}
STATE |= {"epoch_sums": [0, 0, 0]}


def state_of(step: int, **more: object) -> dict:
    return STATE | {"step": step, "ranks": dist.get_world_size()} | more


def change_while_it_is_written(root: str) -> None:
    begin, write = threading.Event(), saver.write

    def late(*args, **options):
        assert begin.wait(30)
        write(*args, **options)

    weights = torch.arange(5.0)
    name = f"random.{dist.get_rank()}"
    with mock.patch.object(saver, "write", late):
        writer = checkpoint.Saver(Path(root), checkpoint.Retention())
        writer.save(7, {name: weights}, state_of(7))
        weights.zero_()  # the next step
        begin.set()
        writer.finish()
    found = {name: torch.zeros(5)}
    checkpoint.load(folders.folder(Path(root), 7), found)
    assert found[name].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_is_of_the_moment_at_which_it_began(pool, tmp_path, ranks):
    pool.run(change_while_it_is_written, str(tmp_path), ranks=ranks)


def keep(root: str, saved: list[dict], retention: dict) -> list[str]:
    writer = checkpoint.Saver(Path(root), checkpoint.Retention(**retention))
    for about in saved:
        writer.save(about["step"], {"random.0": torch.ones(3)}, state_of(**about))
    writer.finish()
    return sorted(os.listdir(root))


EPOCHS = [
    {"step": 10 * epoch, "epoch": epoch, "position": 0, "untested": None, "test_error": error}
    for epoch, error in enumerate([50.0, 40.0, 45.0, 40.0, 47.0, 46.0], start=1)
]
WITHIN = [
    {"step": 10 * epoch + 5, "epoch": epoch, "position": 5, "test_error": None} for epoch in range(1, 6)
]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        ({"newest": 1, "best": False}, [60]),
        ({"newest": 2, "best": False}, [55, 60]),
        ({"newest": 2}, [20, 55, 60]),
        ({"newest": 1, "epochs": 3}, [20, 30, 60]),
        ({"newest": 1, "best": False, "epochs": 2}, [20, 40, 60]),
    ],
)
def test_the_newest_the_best_and_every_so_many_epochs_are_kept(pool, tmp_path, retention, left):
    saved = sorted([*EPOCHS, *WITHIN], key=lambda about: about["step"])
    (found,) = pool.run(keep, str(tmp_path), saved, retention, ranks=1)
    assert found == [f"step-{step:08d}" for step in left]


def full(*argv: object, ends_at: int | None):
    """A command on whose disk there is no room from the second checkpoint on, until step `ends_at` if any."""
    publish = folders.publish

    def refusing(path, *rest):
        step = int(path.name.removeprefix("step-"))
        if step > 1 and (ends_at is None or step < ends_at):
            raise OSError(28, "No space left on device")
        publish(path, *rest)

    with mock.patch.object(folders, "publish", refusing):
        return command(*argv)


def test_a_checkpoint_for_which_there_is_no_room_ends_no_run(pool, tiny, tmp_path):
    output = tmp_path / "run"
    argv = ["train", *tiny, "--output", output, "--checkpoint-steps", 1, "--keep-checkpoints", 9]
    first, second = pool.run(full, *argv, ends_at=5, ranks=2, init=False, timeout=90)
    assert first.code == second.code == 0 and not second.err
    warned = [line for line in first.err.splitlines() if "No space left on device" in line]
    assert len(warned) == 3 and all("the run goes on and tries again" in line for line in warned)
    assert [*checkpoint.complete(output / "checkpoints")] == [1, 5, 6, 7, 8, 9]
    assert not [*output.glob("checkpoints/.*")]


def test_a_run_whose_last_checkpoint_is_not_written_has_failed(pool, tiny, tmp_path):
    output = tmp_path / "run"
    argv = ["train", *tiny, "--output", output, "--checkpoint-steps", 1, "--max-steps", 4]
    for outcome in pool.run(full, *argv, ends_at=None, ranks=2, init=False, timeout=90):
        assert outcome.code == 2
        assert "step-00000004: No space left on device" in outcome.err.splitlines()[-1]
    assert [*checkpoint.complete(output / "checkpoints")] == [1]
    (outcome,) = run(pool, "train", *tiny, "--output", output, "--resume", "--max-steps", 4)
    assert "from step 1" in outcome.out
    assert [record["step"] for record in records(output, "step")] == [1, 2, 3, 4]


def slow(*argv: object):
    """A command whose steps take a tenth of a second."""
    from twolevel.training.epoch import Epochs

    step = Epochs.step

    def slower(self, images, labels):
        time.sleep(0.1 + 0.05 * dist.get_rank())
        return step(self, images, labels)

    with mock.patch.object(Epochs, "step", slower), mock.patch("twolevel.training.stopping.INTERVAL", 0.05):
        return command(*argv)


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_are_written_by_the_clock(pool, tiny, tmp_path, ranks):
    output = tmp_path / "run"
    argv = ["train", *tiny, "--output", output, "--keep-checkpoints", 99, "--checkpoint-minutes", 0.2 / 60]
    argv += ["--batch-size", 4, "--epochs", 2]  # 6 steps an epoch
    outcomes = pool.run(slow, *argv, ranks=ranks, init=False, timeout=90)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].err
    steps = {*checkpoint.complete(output / "checkpoints")}
    assert {6, 12} < steps and len(steps) >= 4


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan"])
def test_minutes_are_positive(pool, tiny, tmp_path, minutes):
    outcome = command("train", *tiny, "--output", tmp_path / "run", "--checkpoint-minutes", minutes)
    assert outcome.code == 2 and "checkpoint_minutes=" in outcome.err


def test_errors_of_one_rank_are_every_ranks(pool, tmp_path):
    for message in pool.run(fail_on_the_last_rank, str(tmp_path), ranks=2):
        assert "tensors are not finite after step 3, random.1 among them" in message


def fail_on_the_last_rank(root: str) -> str:
    writer = checkpoint.Saver(Path(root), checkpoint.Retention())
    value = float("nan") if dist.get_rank() == 1 else 0.0
    writer.save(3, {f"random.{dist.get_rank()}": torch.full((2,), value)}, state_of(3))
    with pytest.raises(UserError) as caught:
        writer.finish()
    assert not os.listdir(root)
    return str(caught.value)
