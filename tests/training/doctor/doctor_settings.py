"""Worlds and settings of which the checks of `twolevel doctor` are asked, and what they answer."""

import torch

from twolevel.data import DataConfig
from twolevel.distributed.environment import World
from twolevel.training.config import ModelConfig, TrainConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def world(
    size: int = 1, device: torch.device = CPU, local: int | None = None, backend: str = "gloo"
) -> World:
    return World(0, size, 0, local or size, device, backend, "none")


def config(**sections) -> TrainConfig:
    return TrainConfig(**{"model": ModelConfig("wrn-10-1", "gc2l", 4)} | sections)


def levels(findings) -> dict[str, str]:
    return {each.what: each.level for each in findings}


def imagenet(workers: int, batch: int = 256) -> TrainConfig:
    return config(data=DataConfig("imagenet", workers=workers, batch_size=batch))
