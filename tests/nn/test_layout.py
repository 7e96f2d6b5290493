"""Which dimension of each tensor divides by channel group, and what a part of a network holds."""

import pytest
import torch
from torch import nn

from twolevel.models import create
from twolevel.nn import BalancedConv2d, TwoLevelConv2d, layout_of


def two_level_net(groups: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        TwoLevelConv2d(16, 32, 3, groups=groups),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def test_dimensions_are_those_of_the_design():
    layout = layout_of(two_level_net())
    assert layout.groups == 4
    assert layout.dims == {
        "0.weight": 0,
        **{f"1.{name}": 0 for name in ("weight", "bias", "running_mean", "running_var")},
        "1.num_batches_tracked": None,
        **{f"2.{name}.weight": 0 for name in ("local", "restriction", "coarse")},
        "4.weight": 1,
        "4.bias": None,
    }


@pytest.mark.parametrize(
    ("name", "conv"), [("wrn-10-1", "gc"), ("wrn-10-1", "gc2l"), ("wrn-10-1", "bgc"), ("mobilenetv2", "gc2l")]
)
def test_every_name_of_the_state_dict_has_a_dimension(name, conv):
    with torch.device("meta"):
        model = create(name, conv=conv, groups=4)
    assert layout_of(model).dims.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "conv", "groups", "channel_groups"),
    [
        ("wrn-10-1", "sc", 1, 1),
        ("wrn-10-1", "gc", 1, 1),
        ("wrn-10-1", "gc", 8, 8),
        ("wrn-10-1", "gc2l", 2, 2),
        ("wrn-10-1", "bgc", 4, 4),
        ("mobilenetv2", "bgc", 4, 4),
        ("mobilenetv2", "sc", 1, 1),  # its depthwise convolutions alone do not make it divide
        ("mobilenetv2", "gc2l", 4, 4),  # nor do they make more groups of it
        ("mobilenetv2", "gc", 8, 8),
    ],
)
def test_network_divides_by_the_groups_of_its_convolutions(name, conv, groups, channel_groups):
    with torch.device("meta"):
        assert layout_of(create(name, conv=conv, groups=groups)).groups == channel_groups


@pytest.mark.parametrize("conv", [TwoLevelConv2d, BalancedConv2d])
def test_convolution_alone_divides_by_its_groups(conv):
    layout = layout_of(conv(8, 8, 3, groups=4))
    assert layout.groups == 4
    assert set(layout.dims.values()) == {0}


def test_dense_network_has_nothing_that_divides():
    layout = layout_of(create("wrn-10-1"))
    assert layout.groups == 1
    assert set(layout.dims.values()) == {None}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_joined_are_the_whole(parts):
    """With rows that hold their own number, so that a part can be told by hand."""
    layout = layout_of(two_level_net())
    held = [layout.part(index, parts) for index in range(parts)]
    rows = torch.arange(32.0)[:, None].expand(32, 6)
    for index, part in enumerate(held):
        own = part.cut("2.local.weight", rows)
        assert own[:, 0].tolist() == list(range(32 // parts * index, 32 // parts * (index + 1)))
        assert part.whole_shape("2.local.weight", own) == [32, 6]
        assert [*part.held_groups()] == list(range(4 // parts * index, 4 // parts * (index + 1)))
    features = torch.arange(320.0).view(10, 32)
    assert torch.equal(torch.cat([part.cut("4.weight", features) for part in held], 1), features)
    bias = torch.arange(10.0)
    assert all(torch.equal(part.cut("4.bias", bias), bias) for part in held)
    assert held[-1].is_split("4.weight") == (parts > 1)
    assert not held[-1].is_split("4.bias")
