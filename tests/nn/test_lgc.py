"""LGC is a masked dense convolution that drops inputs in stages; its inference form computes the groups alone."""

import math
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from twolevel.errors import UserError
from twolevel.nn import LearnedGroupConv2d
from twolevel.nn.inference.gathered import GatheredConv2d
from twolevel.nn.inference.grouped import RegroupedConv2d

CL = torch.channels_last
# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
ALWAYS_THE_SAME = settings(max_examples=40, deadline=None, derandomize=True, database=None)
N, M, G = 8, 12, 4


def layer(
    groups=G, dtype=torch.float64, stage=0, n=N, m=M, condensation=None, **arguments
) -> LearnedGroupConv2d:
    torch.manual_seed(0)
    arguments = arguments or {"kernel_size": 3, "stride": 2, "padding": 1}
    conv = LearnedGroupConv2d(n, m, **arguments, groups=groups, condensation=condensation, dtype=dtype)
    conv.condense(stage)
    return conv


def image(channels=N, dtype=torch.float64, memory_format=torch.contiguous_format) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, 9, 8, dtype=dtype).to(memory_format=memory_format).requires_grad_()


def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of x and of every parameter for a gradient that is the same each time."""
    y = module(x)
    gy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], gy)]


@st.composite
def layers(draw) -> LearnedGroupConv2d:
    """Layers of every geometry at a drawn stage."""
    groups, condensation = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    conv = layer(
        groups,
        n=math.lcm(groups, condensation) * draw(st.integers(1, 2)),
        m=groups * draw(st.integers(1, 3)),
        condensation=condensation,
        kernel_size=draw(st.sampled_from([1, 3, (2, 3)])),
        stride=draw(pairs),
        padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dilation=draw(pairs),
        stage=draw(st.integers(0, condensation - 1)),
    )
    return conv.to(memory_format=draw(st.sampled_from([torch.contiguous_format, CL])))


# ---- the formula


def masked(conv: LearnedGroupConv2d) -> torch.Tensor:
    """The weight, number by number: output o is in group o mod G."""
    weight = conv.weight.detach().clone()
    for o in range(conv.out_channels):
        for j in range(conv.in_channels):
            if not conv.kept[o % conv.groups, j]:
                weight[o, j] = 0
    return weight


def by_the_formula(conv: LearnedGroupConv2d, x: torch.Tensor) -> torch.Tensor:
    """y, number by number: a sum over the channels, rows and columns of a kernel."""
    (sh, sw), (ph, pw), (dh, dw) = conv.geometry
    weight = masked(conv)
    kh, kw = weight.shape[2:]
    x = nn.functional.pad(x, (pw, pw, ph, ph))
    height, breadth = ((x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1)
    y = torch.empty(len(x), len(weight), height, breadth, dtype=x.dtype)
    for row in range(height):
        for column in range(breadth):
            window = x[:, :, sh * row :, sw * column :][:, :, : dh * kh : dh, : dw * kw : dw]
            for o, kernel in enumerate(weight):
                y[:, o, row, column] = (window[:, :, :kh, :kw] * kernel).sum((1, 2, 3))
    return y


@ALWAYS_THE_SAME
@given(layers())
def test_layer_is_its_formula(conv):
    x = image(conv.in_channels).detach()
    torch.testing.assert_close(conv(x), by_the_formula(conv, x), **CLOSE)


@ALWAYS_THE_SAME
@given(layers())
def test_gradients_are_those_of_the_masked_weight(conv):
    x, weight = image(conv.in_channels), masked(conv).requires_grad_()
    y = nn.functional.conv2d(x, weight, None, *conv.geometry)
    gy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    gx, gw = torch.autograd.grad(y, [x, weight], gy)
    mask = torch.stack([conv.kept[o % conv.groups] for o in range(conv.out_channels)])
    torch.testing.assert_close(run(conv, x), [y.detach(), gx, gw * mask[:, :, None, None]], **CLOSE)


@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_numerically_right(stage):
    conv = layer(m=4, kernel_size=(2, 1), stride=2, stage=stage)
    weight = conv.weight.detach().requires_grad_()
    assert gradcheck(lambda x, w: functional_call(conv, {"weight": w}, (x,)), (image()[:, :, :4, :3], weight))


# ---- the inference form


@ALWAYS_THE_SAME
@given(layers())
def test_inference_form_equals_training_form(conv):
    x = image(conv.in_channels).detach()
    frozen = conv.eval().to_inference()
    torch.testing.assert_close(frozen(x), conv(x), **CLOSE)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("stage", range(4))
def test_inference_form_computes_the_groups_alone(stage):
    conv = layer(stage=stage)
    frozen = conv.to_inference()
    assert type(frozen) is (RegroupedConv2d if stage else nn.Conv2d)
    assert (
        sum(weight.numel() for weight in frozen.parameters())
        == conv.used_parameters()
        == (4 - stage) * 2 * 12 * 9
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_inference_form_of_float32_is_that_of_the_c_kernels():
    conv = layer(stage=3, dtype=torch.float32)
    frozen, x = conv.to_inference(), image(dtype=torch.float32)
    assert type(frozen) is GatheredConv2d
    torch.testing.assert_close(frozen(x), conv(x), rtol=1e-5, atol=1e-5)


def test_inference_form_keeps_its_values_when_training_goes_on():
    conv, x = layer(stage=1), image()
    frozen, before = conv.to_inference(), conv(x)
    nn.init.normal_(conv.weight)
    conv.set_progress(1)
    torch.testing.assert_close(frozen(x), before, **CLOSE)


# ---- a drop-in for nn.Conv2d


def test_channels_last_weights_and_images_give_channels_last_results():
    wanted = run(layer(stage=2), image())
    conv = layer(stage=2).to(memory_format=CL)
    x = image(memory_format=CL)
    got = run(conv, x)
    torch.testing.assert_close(got, wanted, **CLOSE)
    frozen = conv.to_inference()
    maps = [tensor for tensor in [*got, frozen(x), *frozen.parameters()] if tensor.dim() == 4]
    assert all(tensor.is_contiguous(memory_format=CL) for tensor in maps)


def test_autocast_is_that_of_conv2d():
    """bfloat16 out, float32 gradients in."""
    conv, x = layer(stage=2, dtype=torch.float32), image(dtype=torch.float32)
    wanted = run(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = run(conv, x)
        assert conv.to_inference()(x).dtype == y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    for value, exact in zip([y, *grads], wanted, strict=True):
        # Each tensor on the way is rounded to 8 bits, to within 2**-9 of its value; four such roundings meet.
        assert 0 < (value - exact).norm() / exact.norm() < 4 * 2**-9


def test_one_compiled_graph_serves_all_stages():
    conv, x = layer(), image()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for stage in range(4):
            conv.condense(stage)
            torch.testing.assert_close(run(compiled, x), run(conv, x), **CLOSE)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="the compiler of torch.compile needs a C++ compiler",
)
def test_compiles_whole():
    conv = layer(stage=1)
    torch.testing.assert_close(run(torch.compile(conv, fullgraph=True), image()), run(conv, image()), **CLOSE)


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((16, 160), {"groups": 6}, "groups=6 does not divide in_channels=16; use one of 1, 2, 4, 8, 16"),
        ((8, 12), {"groups": 8}, "groups=8 does not divide out_channels=12; use one of 1, 2, 4"),
        ((8, 8), {"groups": 0}, "groups=0 is not positive; use 1 or more"),
        ((8, 8), {"groups": 2, "condensation": 0}, "condensation=0 is not positive; use 1 or more"),
        (
            (8, 8),
            {"groups": 2, "condensation": 3},
            "condensation=3 does not divide in_channels=8; use one of 1, 2, 4, 8",
        ),
    ],
    ids=str,
)
def test_error_says_what_was_wrong_and_what_would_do(channels, options, message):
    with pytest.raises(UserError) as caught:
        LearnedGroupConv2d(*channels, 3, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_is_a_share(progress):
    with pytest.raises(UserError, match=rf"progress={progress} is not a share of the training; use 0 to 1"):
        layer().set_progress(progress)


@pytest.mark.parametrize(
    "form", [lambda conv: conv, LearnedGroupConv2d.to_inference], ids=["training", "inference"]
)
def test_image_of_other_shape_is_refused(form):
    with pytest.raises(UserError, match=r"takes \[B, 8, H, W\].*, got \[2, 12, 9, 8\]"):
        form(layer(stage=1))(torch.zeros(2, 12, 9, 8))
