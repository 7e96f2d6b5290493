"""The mesh that ranks make by themselves, and what it cannot be asked together with."""

import pytest
import torch

from twolevel import models
from twolevel.errors import UserError
from twolevel.nn.layout import channel_groups
from twolevel.settings import CONVS, SPLIT_BY_GROUP
from twolevel.training.config import MeshConfig, TrainConfig
from twolevel.training.config.shape import largest_shape
from twolevel.training.context import _taken
from twolevel.training.preflight import _normalised_together

GROUP = {"parallel": "group", "conv": "gc2l", "schedule": "auto", "microbatches": None, "accumulate": 1}


def shape(ranks: int, groups: int, batch: int, **settings) -> tuple[int, int]:
    return largest_shape(GROUP | {"groups": groups, "batch_size": batch} | settings, ranks)


@pytest.mark.parametrize(
    "ranks, groups, batch, expected",
    [
        (1, 4, 128, (1, 1)),
        (2, 4, 128, (1, 2)),
        (3, 4, 128, (1, 2)),  # of 2 x 1 and 1 x 2
        (4, 4, 128, (1, 4)),
        (5, 4, 128, (1, 4)),
        (6, 4, 128, (1, 4)),  # 3 does not divide the batch
        (6, 4, 96, (3, 2)),
        (7, 4, 128, (1, 4)),
        (8, 4, 128, (2, 4)),
        (8, 8, 128, (1, 8)),
        (12, 6, 100, (2, 6)),
        (5, 6, 100, (5, 1)),
        (3, 1, 2, (2, 1)),
        (64, 4, 8, (8, 4)),
    ],
)
def test_the_largest_mesh_of_ranks_and_of_equals_the_longest_group(ranks, groups, batch, expected):
    assert shape(ranks, groups, batch) == expected


def test_no_mesh_of_at_most_so_many_ranks_is_larger():
    for ranks in range(1, 20):
        for groups, batch in ((4, 12), (6, 10), (1, 7)):
            data, group = shape(ranks, groups, batch)
            all_of_them = [(d, g) for d in range(1, 20) for g in range(1, 20) if d * g <= ranks]
            fit = [(d * g, g) for d, g in all_of_them if groups % g == 0 and batch % d == 0]
            assert (data * group, group) == max(fit)
            assert shape(data * group, groups, batch) == (
                data,
                group,
            )  # a run finds its own mesh from its ranks


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"accumulate": 4}, (2, 2)),  # 8 images are 4 parts of 2
        ({"conv": "sc"}, (4, 1)),
        ({"conv": "dgc"}, (4, 1)),
        ({"schedule": "dense"}, (4, 1)),
        ({"parallel": "fsdp"}, (4, 1)),
        ({"parallel": "naive"}, (1, 7)),
        ({"parallel": "gpipe"}, (1, 4)),
        ({"parallel": "gpipe", "microbatches": 2}, (1, 7)),
        ({"parallel": "1f1b"}, (1, 4)),
        ({"parallel": "1f1b", "microbatches": 2}, (1, 2)),
    ],
)
def test_seven_ranks_share_a_network_of_two_groups_as_its_kind_allows(settings, expected):
    assert shape(7, 2, 8, **settings) == expected


@pytest.mark.parametrize("conv", CONVS)
def test_the_convolutions_that_ranks_split_are_those_of_networks_with_groups(conv):
    with torch.device("meta"):
        network = models.create("wrn-10-2", conv=conv, groups=1 if conv in ("sc", "dgconv") else 4)
    assert (channel_groups(network) > 1) == (conv in SPLIT_BY_GROUP)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"data_parallel": 2}, "data_parallel=2 is invalid with mesh=auto, which chooses it"),
        ({"group_parallel": 1}, "group_parallel=1 is invalid with mesh=auto, which chooses it"),
        ({"parallel": "channel"}, "mesh=auto is invalid with parallel=channel, whose ranks divide"),
    ],
)
def test_what_a_mesh_of_its_own_cannot_be_asked_with_is_named(config, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(mesh="auto", **config)


@pytest.mark.parametrize(
    "shape_, spares, said",
    [
        ((1, 1), 0, "1 rank came: mesh data=1 x group=1"),
        ((2, 4), 0, "8 ranks came: mesh data=2 x group=4"),
        (
            (1, 2),
            1,
            "3 ranks came: mesh data=1 x group=2; rank 2 waits as a spare and joins at the next change",
        ),
        (
            (1, 4),
            3,
            "7 ranks came: mesh data=1 x group=4; ranks 4 to 6 wait as spares and join at the next change",
        ),
    ],
)
def test_the_first_rank_says_what_became_of_those_that_came(shape_, spares, said):
    from twolevel.training.config.shape import Shape

    assert _taken(Shape(*shape_), spares) == said


def test_the_statistics_of_batch_norm_are_known_of_a_mesh_of_its_own():
    settings = TrainConfig(mesh=MeshConfig(mesh="auto")).flat()  # batches of 128, 4 groups
    assert [_normalised_together(settings, ranks) for ranks in (2, 4, 8, 16)] == [128, 128, 64, 32]
