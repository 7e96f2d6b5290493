"""MobileNetV2: torchvision's function, with the pointwise convolutions replaced."""

import pytest
import torch
import torchvision
from torch import nn

from twolevel.models import create
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.structure import convolutions


def test_standard_convolutions_give_torchvisions_network():
    reference = torchvision.models.mobilenet_v2().eval().double()
    for module in reference.modules():  # statistics that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model = create("mobilenetv2").eval().double()
    theirs = reference.state_dict().values()  # both define their layers in the order of the paper's table
    model.load_state_dict(dict(zip(model.state_dict(), theirs, strict=True)))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    # The same float64 operations; the mean over pixels alone may be taken in another order.
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("conv", "cls"), [("gc", nn.Conv2d), ("gc2l", TwoLevelConv2d)])
def test_expand_and_project_are_replaced_and_the_last_1x1_is_grouped(conv, cls):
    with torch.device("meta"):
        stem, *inner, last = convolutions(create("mobilenetv2", conv=conv, groups=4))
    assert (type(stem), stem.groups, stem.kernel_size) == (nn.Conv2d, 1, (3, 3))
    assert (type(last), last.groups, last.in_channels, last.out_channels) == (nn.Conv2d, 4, 320, 1280)
    depthwise = [conv for conv in inner if conv.kernel_size == (3, 3)]
    assert len(depthwise) == 17
    assert all(type(conv) is nn.Conv2d and conv.groups == conv.in_channels for conv in depthwise)
    pointwise = [conv for conv in inner if conv.kernel_size == (1, 1)]
    assert len(pointwise) == 16 + 17  # the first block does not expand
    assert all(type(conv) is cls and conv.groups == 4 for conv in pointwise)


@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc", 8), ("gc2l", 8)])
def test_logits_of_64x64(conv, groups):
    with torch.device("meta"):
        model = create("mobilenetv2", conv=conv, groups=groups)
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)
