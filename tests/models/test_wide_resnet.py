"""Wide residual networks: which convolutions are replaced, and the function, against a restatement of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.models import create, wide_resnet, wide_resnet34_2
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.structure import convolutions

# Float64 sums of at most some hundred numbers in every layer, taken in the same order up to that of groups.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def on_meta(build, *args, **options) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **options)


def restated(state, x, blocks, conv):
    """The network as the paper has it, from a state dict, in training mode."""

    def relu_bn(name, x):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))

    x = F.conv2d(x, state["stem.weight"], padding=1)
    for stage, depth in enumerate(blocks):
        for index in range(depth):
            name, stride = f"stages.{stage}.{index}", 2 if stage > 0 and index == 0 else 1
            o = relu_bn(f"{name}.bn1", x)
            y = conv(state, f"{name}.conv1", o, stride, 1)
            y = conv(state, f"{name}.conv2", relu_bn(f"{name}.bn2", y), 1, 1)
            changes = y.shape != x.shape
            x = y + (conv(state, f"{name}.shortcut", o, stride, 0) if changes else x)
    x = relu_bn("bn", x)
    return F.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


def grouped(groups):
    return lambda state, name, x, stride, padding: F.conv2d(
        x, state[f"{name}.weight"], None, stride, padding, groups=groups
    )


def two_level(state, name, x, stride, padding):
    local, restriction, coarse = (state[f"{name}.{p}.weight"] for p in ("local", "restriction", "coarse"))
    z = F.conv2d(x, restriction, None, stride, padding, groups=len(restriction))
    return F.conv2d(x, local, None, stride, padding, groups=len(restriction)) + F.conv2d(z, coarse)


def balanced(state, name, x, stride, padding):
    local, mean = (state[f"{name}.{p}.weight"] for p in ("local", "mean"))
    x_mean = sum(x.chunk(4, 1)) / 4
    y = F.conv2d(x, local, None, stride, padding, groups=4)
    return y + F.conv2d(x_mean, mean, None, stride, padding)


@pytest.mark.parametrize(
    ("kind", "groups", "conv"),
    [("sc", 1, grouped(1)), ("gc", 4, grouped(4)), ("gc2l", 4, two_level), ("bgc", 4, balanced)],
)
@pytest.mark.parametrize(("depth", "widen", "size"), [(10, 2, 8), (16, 1, 9)])
def test_network_is_the_papers(depth, widen, size, kind, groups, conv):
    model = create(f"wrn-{depth}-{widen}", conv=kind, groups=groups).double()
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    blocks = [(depth - 4) // 6] * 3
    torch.testing.assert_close(model(x), restated(dict(model.state_dict()), x, blocks, conv), **CLOSE)


def test_image_is_left_as_it_was():
    """ReLU works in place, but never on what the caller handed in, nor on what a shortcut still needs."""
    model, x = create("wrn-10-1"), torch.randn(2, 3, 8, 8)
    kept = x.clone()
    model(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("widen", [2, 10])
def test_every_3x3_and_shortcut_of_wrn_28_is_replaced_stem_and_classifier_are_not(widen):
    model = on_meta(create, f"wrn-28-{widen}", conv="gc2l", groups=4)
    stem, *others = convolutions(model)
    assert type(stem) is nn.Conv2d
    assert (stem.groups, stem.out_channels, stem.kernel_size) == (1, 16, (3, 3))
    assert all(type(conv) is TwoLevelConv2d and conv.groups == 4 for conv in others)
    assert [conv.kernel_size for conv in others].count((3, 3)) == 24
    shortcuts = [conv for conv in others if conv.kernel_size == (1, 1)]
    assert [(conv.in_channels, conv.out_channels) for conv in shortcuts] == [
        (16, 16 * widen),
        (16 * widen, 32 * widen),
        (32 * widen, 64 * widen),
    ]


def test_wrn_34_2_has_32_and_4():
    model = on_meta(create, "wrn-34-2", conv="gc2l", groups=4)
    stem, *others = convolutions(model)
    assert (stem.groups, stem.out_channels, stem.kernel_size, stem.stride) == (1, 64, (7, 7), (2, 2))
    assert all(type(conv) is TwoLevelConv2d and conv.groups == 4 for conv in others)
    assert [conv.kernel_size for conv in others].count((3, 3)) == 32
    shortcuts = [(c.in_channels, c.out_channels) for c in others if c.kernel_size == (1, 1)]
    assert shortcuts == [(64, 128), (128, 256), (256, 512), (512, 1024)]
    assert [len(stage) for stage in model.stages] == [3, 4, 6, 3]


def test_shortcut_is_a_convolution_only_where_the_shape_changes():
    model = on_meta(create, "wrn-16-1")  # its first stage goes from 16 to 16 channels
    with_conv = [name for name, _ in model.named_modules() if name.endswith("shortcut")]
    assert with_conv == ["stages.1.0.shortcut", "stages.2.0.shortcut"]


@pytest.mark.parametrize(
    ("name", "size", "maps", "classes"),
    [
        ("wrn-10-2", 32, [(32, 32), (64, 16), (128, 8)], 10),
        ("wrn-10-2", 27, [(32, 27), (64, 14), (128, 7)], 10),
        ("wrn-34-2", 64, [(128, 16), (256, 8), (512, 4), (1024, 2)], 1000),
    ],
)
@pytest.mark.parametrize("conv", ["sc", "gc2l"])
def test_maps_halve_from_the_second_stage_on(name, size, maps, classes, conv):
    model = on_meta(create, name, conv=conv, groups=1 if conv == "sc" else 2)
    seen = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, out: seen.append((out.shape[1], out.shape[2])))
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, classes)
    assert seen == maps


@pytest.mark.parametrize("depth", [4, 9, 11, 29])
def test_depth_that_is_not_6n_plus_4_is_refused(depth):
    with pytest.raises(UserError, match=rf"^depth={depth} is not 6 n \+ 4; use one of 10, 16, 22, 28"):
        wide_resnet(depth, 1)


def test_width_of_zero_is_refused():
    with pytest.raises(UserError, match=r"^widen=0 is not positive; use 1 or more$"):
        wide_resnet(10, 0)


@pytest.mark.parametrize("build", [lambda **o: wide_resnet(10, 1, **o), wide_resnet34_2])
def test_options_go_to_every_replaced_convolution(build):
    model = on_meta(build, conv="gc2l", groups=2, schedule="fused")
    assert {conv.schedule for conv in convolutions(model)[1:]} == {"fused"}
