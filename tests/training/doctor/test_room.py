"""Room for checkpoints, and shared memory: where there is enough and where not."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

from command import run
from doctor_settings import GPU, config, imagenet, levels, world

from twolevel.data import DataConfig
from twolevel.training.config import OptimiserConfig, RunConfig
from twolevel.training.doctor import room

Usage = namedtuple("Usage", "total used free")


def disk(monkeypatch, total: int, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total, total - free, free))


def test_the_bytes_of_a_checkpoint_are_those_that_a_run_writes(pool, tiny, tmp_path):
    run(pool, "train", *tiny, "--max-steps", 1, "--ema-decay", 0.9, "--output", tmp_path)
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.safetensors"))
    settings = config(
        data=DataConfig("imagenet", data_root=Path(tiny[tiny.index("--data-root") + 1]), image_size=16),
        optimiser=OptimiserConfig(ema_decay=0.9),
        run=RunConfig(precision="float64"),
    )
    number = room.checkpoint_bytes(settings)
    assert number < written < 1.2 * number  # names, shapes and random states, of a network this small


def test_fewer_parts_take_fewer_bytes():
    whole = room.checkpoint_bytes(config(optimiser=OptimiserConfig(ema_decay=0.9)))
    without_average = room.checkpoint_bytes(config())
    assert room.checkpoint_bytes(config(optimiser=OptimiserConfig(momentum=0))) < without_average < whole


def test_the_checkpoints_that_are_kept():
    assert room.kept(config()) == 3
    run_config = RunConfig(keep_checkpoints=1, keep_best=False, keep_epochs=50)
    assert room.kept(config(run=run_config)) == 1 + 200 // 50


def test_room_for_the_checkpoints(tmp_path, monkeypatch):
    disk(monkeypatch, 10_000, 4_000)
    assert levels(room.check_room(config(), 1_000, 1, tmp_path / "new"))["room"] == "ok"
    found = next(room.check_room(config(), 1_001, 1, tmp_path / "new"))
    assert found.level == "problem" and "--keep-checkpoints" in found.advice
    step = tmp_path / "checkpoints" / "step-00000001"  # has its room already
    step.mkdir(parents=True)
    (step / "shard").write_bytes(bytes(1_001))
    assert levels(room.check_room(config(), 1_001, 1, tmp_path))["room"] == "ok"


def test_a_file_system_without_room_for_more_files(tmp_path, monkeypatch):
    disk(monkeypatch, 10_000, 4_000)
    Status = namedtuple("Status", "f_files f_favail")
    for status, level in ((Status(100, 5), "problem"), (Status(0, 0), None), (Status(10_000, 9_000), "ok")):
        monkeypatch.setattr(os, "statvfs", lambda path, status=status: status)
        assert levels(room.check_room(config(), 1, 1, tmp_path)).get("files") == level


def test_shared_memory(monkeypatch):
    monkeypatch.setattr(room, "SHM", Path("/"))
    disk(monkeypatch, 2**26, 2**26)
    assert levels(room.check_shm(config(), world())) == {"/dev/shm": "ok"}
    assert levels(room.check_shm(config(), world(2, GPU))) == {"/dev/shm": "warning"}
    (found,) = room.check_shm(imagenet(4), world())
    assert found.level == "problem" and "--shm-size=8g" in found.advice
    disk(monkeypatch, 2**34, 2**34)
    assert levels(room.check_shm(imagenet(4), world(4, GPU))) == {"/dev/shm": "ok"}
