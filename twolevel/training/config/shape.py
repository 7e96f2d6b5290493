"""The mesh that so many ranks make by themselves, with --mesh auto (imports no torch)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from twolevel.settings import PIPELINES, SPLIT_BY_GROUP


class Shape(NamedTuple):
    """A mesh of data x group ranks."""

    data: int
    group: int

    @property
    def ranks(self) -> int:
        return self.data * self.group


def largest_shape(settings: Mapping[str, Any], ranks: int) -> Shape:
    """The mesh of the most ranks, of at most `ranks`, that can train by these settings, `TrainConfig.flat()`.

    `data` divides a part of a batch, batch_size / accumulate. `group` divides the groups of a network that ranks can
    split, and is 1 for others. Of meshes of as many ranks it is the one with the longest `group`: replicas would
    change the statistics of batch norm. A pipeline takes all ranks that have microbatches; fsdp has data alone.
    """
    images = settings["batch_size"] // settings["accumulate"]
    if settings["parallel"] in PIPELINES:
        return Shape(1, _stages(settings, images, ranks))
    groups = settings["groups"] if _is_split(settings) else 1
    shapes = [Shape(_divisor(images, ranks // group), group) for group in _divisors(groups, ranks)]
    return max(shapes, key=lambda shape: (shape.ranks, shape.group))


def _is_split(settings: Mapping[str, Any]) -> bool:
    """Whether ranks hold groups of the network, by its settings."""
    splits = settings["conv"] in SPLIT_BY_GROUP and settings["schedule"] != "dense"
    return settings["parallel"] == "group" and splits


def _stages(settings: Mapping[str, Any], images: int, ranks: int) -> int:
    microbatches, parallel = settings["microbatches"], settings["parallel"]
    if parallel == "naive" or (parallel == "gpipe" and microbatches is not None):
        return ranks
    if microbatches is not None:  # 1f1b keeps every stage busy with one
        return min(microbatches, ranks)
    return _divisor(images, ranks)  # one microbatch a rank


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def _divisor(number: int, most: int) -> int:
    return _divisors(number, most)[-1]
