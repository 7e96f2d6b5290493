"""MobileNetV2: torchvision's function, with the pointwise convolutions replaced."""

from fractions import Fraction

import pytest
import torch
import torchvision
from torch import nn

from twolevel.analysis import count
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import DynamicGroupConv2d, TwoLevelConv2d
from twolevel.nn.structure import convolutions


@pytest.mark.parametrize("width", [1.0, 0.35, 0.75, 1.4])
def test_standard_convolutions_give_torchvisions_network(width):
    reference = torchvision.models.mobilenet_v2(width_mult=width).eval().double()
    for module in reference.modules():  # statistics that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model = create("mobilenetv2", width=width).eval().double()
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


def test_strides_are_those_of_the_first_block_of_each_stage():
    with torch.device("meta"):
        model = create("mobilenetv2-cifar", strides=(1, 2, 1, 3, 1, 1, 2))
    strides = [c.stride[0] for c in convolutions(model) if c.groups > 1]
    first = [0, 1, 3, 6, 10, 13, 16]  # depthwise convolutions, by stages of 1 2 3 4 3 3 1 blocks
    assert [strides[i] for i in first] == [1, 2, 1, 3, 1, 1, 2]
    assert all(stride == 1 for i, stride in enumerate(strides) if i not in first)


# The fit: strides, xi, and the operations of an image that it has before any rounding.
FITS = [
    ("mobilenetv2-cifar", (1, 1, 2, 1, 2, 1, 1), Fraction(65, 100), 155_308_784),
    ("mobilenetv2", None, Fraction(60, 100), 245_281_345),
]


@pytest.mark.parametrize(("name", "strides", "xi", "operations"), FITS)
def test_fit_of_dgc_has_the_published_operations(name, strides, xi, operations):
    """155M and 245M. A count rounds each layer; without that the sums end in .4 and .6, which are cut off."""
    with torch.device("meta"):
        model = create(name, conv="dgc", groups=4, xi=float(xi), reduction=8, strides=strides)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DynamicGroupConv2d)}
    assert len(layers) == 17
    side = 32 if name.endswith("cifar") else 224
    got = count(model, (3, side, side))
    exact = Fraction(got.macs + got.elementwise)
    for layer in got.layers:
        if conv := layers.get(layer.name):
            heads = (1 - xi) * conv.weight.numel() * layer.output[1] * layer.output[2]
            rounded = layer.macs - conv.squeeze.numel() - conv.excite.numel()
            assert abs(rounded - heads) <= Fraction(1, 2)
            exact += heads - rounded
    assert int(exact) == operations
    assert abs(got.macs + got.elementwise - operations) <= 17 / 2


def test_dgc_with_the_share_in_its_papers_text_has_other_operations_than_published():
    with torch.device("meta"):
        model = create("mobilenetv2", conv="dgc", groups=4, xi=0.75, reduction=8)
    got = count(model, (3, 224, 224))
    assert round((got.macs + got.elementwise) / 1e6) == 228


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strides": [1, 2]},
            "strides=[1, 2] is invalid; use 7 positive numbers, such as [1, 1, 2, 2, 1, 2, 1]",
        ),
        (
            {"strides": [1, 1, 2, 0, 1, 2, 1]},
            "strides=[1, 1, 2, 0, 1, 2, 1] is invalid; use 7 positive numbers",
        ),
        ({"width": 0}, "width=0 is invalid; use a positive number, such as 0.75"),
        ({"width": float("nan")}, "width=nan is invalid; use a positive number, such as 0.75"),
    ],
)
def test_error_names_what_would_do(options, message):
    with pytest.raises(UserError) as caught:
        create("mobilenetv2-cifar", **options)
    assert str(caught.value).startswith(message)
