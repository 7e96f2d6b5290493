"""A convolution by name."""

import pytest
import torch
from torch import nn

from twolevel.errors import UserError
from twolevel.nn import KINDS, BalancedConv2d, LearnedGroupConv2d, TwoLevelConv2d, make_conv


@pytest.mark.parametrize(
    ("kind", "groups", "cls", "conv_groups"),
    [
        ("sc", 1, nn.Conv2d, 1),
        ("gc", 1, nn.Conv2d, 1),
        ("gc", 4, nn.Conv2d, 4),
        ("gc2l", 4, TwoLevelConv2d, 4),
        ("bgc", 4, BalancedConv2d, 4),
        ("lgc", 4, LearnedGroupConv2d, 4),
    ],
)
def test_kind_is_a_class_and_a_number_of_groups(kind, groups, cls, conv_groups):
    conv = make_conv(kind, 8, 12, (3, 5), (2, 1), (1, 2), groups=groups)
    assert type(conv) is cls
    assert conv.groups == conv_groups
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (8, 12, (3, 5))


@pytest.mark.parametrize("kind", ["sc", "gc", "gc2l", "bgc", "lgc"])
def test_drop_in_for_conv2d_without_bias(kind):
    """Positional stride and padding mean what they mean there, and so does every option."""
    groups = {} if kind == "sc" else {"groups": 2}
    options = {"dilation": 2, "device": "meta", "dtype": torch.float64}
    conv = make_conv(kind, 8, 12, 3, 2, "valid", **groups, **options)
    x = torch.empty(2, 8, 11, 10, device="meta", dtype=torch.float64)
    like = nn.Conv2d(8, 12, 3, 2, "valid", **options)
    assert conv(x).shape == like(x).shape
    assert {p.dtype for p in conv.parameters()} == {torch.float64}
    assert not [name for name, _ in conv.named_parameters() if "bias" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_can_be_declined_as_in_conv2d_and_is_refused(kind):
    options = {} if kind == "sc" else {"groups": 4}
    built = make_conv(kind, 8, 8, 3, **options)
    makers = [lambda **bias: make_conv(kind, 8, 8, 3, **options, **bias)]
    if not isinstance(built, nn.Conv2d):
        makers.append(lambda **bias: type(built)(8, 8, 3, **options, **bias))
    for make in makers:
        assert make(bias=False).state_dict().keys() == built.state_dict().keys()
        with pytest.raises(UserError, match=r"^bias=True is invalid: none of these convolutions has a bias"):
            make(bias=True)


def test_options_go_to_the_class_of_the_kind():
    assert make_conv("gc2l", 8, 8, 3, groups=2, schedule="fused").schedule == "fused"
    assert make_conv("lgc", 8, 8, 3, groups=2, condensation=4).condensation == 4


@pytest.mark.parametrize(
    ("kind", "groups", "message"),
    [
        ("sc", 4, "conv='sc' is dense and takes groups=1, not groups=4; use gc, gc2l or bgc"),
        ("gc", 3, "groups=3 does not divide in_channels=8; use one of 1, 2, 4"),
        ("gc2l", 8, "groups=8 does not divide out_channels=12; use one of 1, 2, 4"),
        ("xyz", 1, f"unknown conv 'xyz'; use one of {', '.join(sorted(KINDS))}"),
    ],
)
def test_error_says_what_would_do(kind, groups, message):
    with pytest.raises(UserError) as caught:
        make_conv(kind, 8, 12, 3, groups=groups)
    assert str(caught.value) == message


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UserError, match=r"^unknown conv 'gcl2'; did you mean gc2l"):
        make_conv("gcl2", 8, 8, 3, groups=4)
