"""What may be cut by channel group, read from a network's graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from twolevel.distributed.separable import check_within_groups
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.structure import ACTIVATIONS


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
@pytest.mark.parametrize("conv", ["gc", "gc2l", "bgc"])
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


ELEMENTWISE = [
    *(F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.hardswish, F.hardsigmoid, F.softplus, F.logsigmoid),
    *(F.relu_, F.elu_, F.leaky_relu_, torch.relu_, torch.sigmoid_, torch.tanh_, torch.abs, torch.neg),
    lambda x: F.threshold(x, 0.1, 0.2),
    lambda x: x.sigmoid_().tanh_().clamp_(0, 6),
    lambda x: torch.clamp(x, min=0, max=6),
    lambda x: x * F.relu6(x + 3) / 6,
    lambda x: -x.abs().sqrt() - 2,
    lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2),
    lambda x: F.adaptive_max_pool2d(x, 1),
]


@pytest.mark.parametrize("operation", ELEMENTWISE, ids=lambda function: function.__name__)
def test_operations_on_single_numbers_are_allowed(operation):
    check_within_groups(Then(operation), 4)


@pytest.mark.parametrize("module", ACTIVATIONS.values())
def test_every_activation_is_computed_alike_by_channels_and_whole(module):
    """What the table says of it: an activation of some channels is some channels of the activation."""
    x = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    activation = module(*{nn.Threshold: (0.1, 0.2)}.get(module, ()))
    check_within_groups(grouped(activation), 4)
    # Vector instructions and those for what is left over round the last bit in their own ways.
    torch.testing.assert_close(activation(x)[:, 2:4], activation(x[:, 2:4].clone()), rtol=1e-6, atol=1e-7)


class PerChannel(Then):
    """As Then, and `operation` also takes a tensor of one number a channel."""

    def __init__(self, operation):
        super().__init__(operation)
        self.scale = nn.Parameter(torch.arange(8.0))

    def forward(self, x):
        y = self.operation(self.conv(self.stem(x)), self.scale)
        return self.classifier(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        (F.prelu, "prelu"),
        (lambda x, scale: x * scale[:, None, None], "mul"),
        (lambda x, scale: torch.add(x, scale.view(8, 1, 1)), "add"),
        (lambda x, scale: x.mul_(scale.view(8, 1, 1)), "mul_"),
        (lambda x, scale: torch.clamp(x, max=scale.view(8, 1, 1)), "clamp"),
        (lambda x, _: x - torch.arange(8.0).view(8, 1, 1), "sub"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_a_number_for_each_channel_is_refused(operation, named):
    """Every rank has all of these numbers, and its own channels alone."""
    with pytest.raises(UserError, match=f"the operation '{named}'"):
        check_within_groups(PerChannel(operation), 4)


def test_prelu_whose_weights_are_not_cut_is_refused():
    for module in (nn.PReLU(8), nn.PReLU()):
        with pytest.raises(UserError, match=r"2 \(PReLU\) is not known to act within channel groups"):
            check_within_groups(grouped(module), 4)


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
