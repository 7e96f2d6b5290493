"""A checkpoint is published whole or not at all, and only a run's own are counted and removed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command import command, run

from twolevel.errors import UserError
from twolevel.training import checkpoint

STATE = {"config": {name: {} for name in checkpoint.SECTIONS}, "num_classes": 3, "step": 7}
STATE |= {"epoch_sums": [0, 0, 0], "ranks": 2}


def save_step(root: Path, step: int, keep: int = 2, **state: object) -> None:
    tensors = {f"random.{dist.get_rank()}": torch.arange(5)}
    path = checkpoint.folder(root, step)
    checkpoint.write(path, tensors, STATE | {"step": step, "ranks": dist.get_world_size()} | state)
    if dist.get_rank() == 0:
        checkpoint.Retention(keep).prune(root, step)


def save_where_each_rank_has_a_folder_of_its_own(root: str) -> tuple[str, list[str]]:
    os.chdir(Path(root, str(dist.get_rank())))
    with pytest.raises(UserError) as caught:
        save_step(Path("checkpoints"), 7)
    return str(caught.value), [path.name for path in Path("checkpoints").glob("step-*")]


def test_a_checkpoint_without_the_shard_of_every_rank_is_not_published(pool, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank / "checkpoints").mkdir(parents=True)
    for message, published in pool.run(save_where_each_rank_has_a_folder_of_its_own, str(tmp_path), ranks=2):
        assert "the shard of rank 1 is not in rank 0's folder" in message
        assert published == []


def test_a_checkpoint_can_be_checked_by_hand(pool, tmp_path):
    pool.run(save_step, tmp_path, 7, ranks=2)
    path = checkpoint.folder(tmp_path, 7)
    shards = {f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    assert {*os.listdir(path)} == {checkpoint.STATE, checkpoint.SUMS, *shards}
    found = subprocess.run(
        ["sha256sum", "--check", "--strict", checkpoint.SUMS],
        cwd=path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(found.stdout.splitlines()) == 3 and "FAILED" not in found.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", None),
        ("config", []),
        ("config", {**STATE["config"], "model": None}),
        ("test_error", "low"),
        ("step", "x"),
        ("ranks", None),
        ("num_classes", "ten"),
        ("epoch_sums", 3),
    ],
)
def test_a_state_that_is_not_what_was_written_is_called_damaged(tmp_path, name, value):
    (tmp_path / checkpoint.STATE).write_text(json.dumps(STATE | {name: value}))
    with pytest.raises(UserError, match=r"is damaged: state\.json") as caught:
        checkpoint.read_state(tmp_path)
    assert "\n" not in str(caught.value)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / checkpoint.STATE).write_text("{}")


def test_steps_are_compared_as_numbers_and_other_names_are_not_checkpoints(tmp_path):
    touch(tmp_path, "step-best", "step-00000009", "step-100000000", "step-00000009-copy", "step-")
    assert [*checkpoint.complete(tmp_path)] == [9, 100_000_000]


@pytest.mark.parametrize(("keep", "left"), [(1, []), (2, [4]), (3, [3, 4]), (9, [1, 2, 3, 4])])
def test_pruning_removes_earlier_steps_and_nothing_else(pool, tmp_path, keep, left):
    others = ["step-best", "step-00000004-copy", "step-00000099"]
    touch(tmp_path, *others, *(f"step-{step:08d}" for step in (1, 2, 3, 4)))
    pool.run(save_step, tmp_path, 7, keep, ranks=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*others, *(f"step-{step:08d}" for step in (*left, 7))]
    )


def test_a_copy_beside_the_checkpoints_is_neither_gone_on_from_nor_a_reason_to_remove_others(
    pool, tiny, tmp_path
):
    output = tmp_path / "run"
    run(pool, "train", *tiny, "--output", output, "--max-steps", 2)
    shutil.copytree(output / "checkpoints" / "step-00000002", output / "checkpoints" / "step-best")
    (outcome,) = run(pool, "train", *tiny, "--output", output, "--resume", "--max-steps", 3)
    assert "from step 2" in outcome.out
    names = ["step-00000002", "step-00000003", "step-best"]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == names


def test_a_checkpoint_written_again_takes_the_place_of_the_old_one(pool, tmp_path):
    for _ in range(2):
        pool.run(save_step, tmp_path, 7, ranks=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def diverge(*argv: str):
    """The command, after whose third step one weight of the last rank is infinite and no loss shows it."""
    from twolevel.training.epoch import Epochs

    take_step = Epochs.step

    def broken(self, images, labels):
        rate = take_step(self, images, labels)
        if self.state.step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            next(self.state.model.parameters()).data[0] = float("inf")
        return rate

    Epochs.step = broken
    try:
        return command(*argv)
    finally:
        Epochs.step = take_step


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_are_not_saved(pool, tiny, tmp_path, ranks):
    argv = ["train", *tiny, "--output", str(tmp_path / "run"), "--checkpoint-steps", "2"]
    argv += ["--batch-size", "4"]  # six steps an epoch: the fifth is no epoch's end
    argv += ["--log-steps", "99"]
    for outcome in pool.run(diverge, *argv, "--max-steps", "3", ranks=ranks, init=False):
        assert outcome.code == 2
        assert "not finite after step 3" in outcome.err and "--learning-rate" in outcome.err
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert names == ["step-00000002"]
