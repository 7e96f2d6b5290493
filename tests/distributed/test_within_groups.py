"""What may be cut by channel group, read from a network's graph."""

import pytest
import torch
from torch import nn
from torchvision import models

from twolevel.distributed.within_groups import check_within_groups
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import TwoLevelConv2d


class Then(nn.Module):
    """Stem, one two-level convolution, and then `operation`, between it and the classifier."""

    def __init__(self, operation):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = TwoLevelConv2d(8, 8, 3, groups=4)
        self.classifier = nn.Linear(8, 10)
        self.operation = operation

    def forward(self, x):
        return self.classifier(self.operation(self.conv(self.stem(x))).mean((2, 3)))


def grouped(*middle):
    conv = TwoLevelConv2d(8, 8, 3, groups=4)
    return nn.Sequential(nn.Conv2d(3, 8, 3), conv, *middle, nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize("name", ["wrn-10-1", "mobilenetv2", "wrn-34-2"])
@pytest.mark.parametrize("conv", ["gc", "gc2l"])
def test_our_networks_act_within_groups(name, conv):
    check_within_groups(create(name, conv=conv, groups=2), 2)


@pytest.mark.parametrize(
    "middle",
    [
        [nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1)],
        [nn.Conv2d(8, 8, 3, groups=8)],
        [nn.Conv2d(8, 16, 3, groups=4), nn.GELU(), nn.AdaptiveAvgPool2d(1)],
    ],
)
def test_what_treats_every_channel_alone_is_allowed(middle):
    check_within_groups(grouped(*middle), 4)


def test_after_the_classifier_anything_is_allowed():
    check_within_groups(nn.Sequential(*grouped(), nn.LayerNorm(10), nn.Linear(10, 5), nn.Softmax(1)), 4)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (grouped(nn.Conv2d(8, 8, 1)), "2 is a dense convolution"),
        (grouped(nn.GroupNorm(2, 8)), "2 (GroupNorm)"),
        (grouped(nn.ChannelShuffle(2)), "2 (ChannelShuffle)"),
        (grouped(nn.Softmax2d()), "2 (Softmax2d)"),
        (grouped(nn.Linear(8, 8)), "2 (Linear)"),  # on a map it works along the width
        (Then(lambda x: x.flip(1)), "the operation 'flip'"),
        (Then(lambda x: torch.cat([x, x], 1)), "the operation 'cat'"),
        (Then(lambda x: x * x.mean(1, keepdim=True)), "the operation 'mean'"),
        (Then(lambda x: x.transpose(1, 2)), "the operation 'transpose'"),
        (Then(lambda x: torch.softmax(x, 1)), "the operation 'softmax'"),
        (nn.Sequential(*grouped(), nn.Dropout(0.5), nn.Linear(10, 5)), "4 would drop other values on each"),
        (models.densenet121(num_classes=10), "the operation 'cat'"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_crosses_channels_is_named(model, named):
    with pytest.raises(UserError) as raised:
        check_within_groups(model, 2)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_network_whose_graph_depends_on_its_data_is_refused():
    model = Then(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(UserError, match=r"torch\.fx cannot read its graph"):
        check_within_groups(model, 2)
