"""Balanced group convolution equals its formula, and takes the place of nn.Conv2d."""

import copy
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import BalancedConv2d
from twolevel.ops import LOCAL

CL = torch.channels_last
# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ALWAYS_THE_SAME = settings(max_examples=40, deadline=None, derandomize=True, database=None)
N, M, G = 8, 12, 4

# Every form in which nn.Conv2d takes kernel, stride, padding and dilation.
ARGUMENTS = [
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (2, 3), "stride": (1, 3), "padding": (0, 2)},
    {"kernel_size": 3, "padding": "valid", "dilation": 2},
    {"kernel_size": (5, 1), "padding": "same", "dilation": (1, 3)},
]


def layer(groups=G, dtype=torch.float64, **arguments) -> BalancedConv2d:
    torch.manual_seed(0)
    arguments = arguments or {"kernel_size": 3, "stride": 2, "padding": 1}
    return BalancedConv2d(N, M, **arguments, groups=groups, dtype=dtype)


def image(dtype=torch.float64, memory_format=torch.contiguous_format) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, N, 9, 8, dtype=dtype).to(memory_format=memory_format).requires_grad_()


def run(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and the gradients of x and of every parameter for a gradient that is the same each time."""
    y = module(x)
    gy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    weights = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *weights.values()], gy)
    names = [name.removeprefix("_orig_mod.") for name in weights]
    return {"y": y.detach(), **dict(zip(["x", *names], grads, strict=True))}


@st.composite
def layers(draw) -> BalancedConv2d:
    groups = draw(st.integers(1, 4))
    n, m = (groups * draw(st.integers(1, 3)) for _ in range(2))
    pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
    return BalancedConv2d(
        n,
        m,
        draw(st.sampled_from([1, 3, (2, 3)])),
        draw(pairs),
        draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        groups=groups,
        dilation=draw(pairs),
        dtype=torch.float64,
    ).to(memory_format=draw(st.sampled_from([torch.contiguous_format, CL])))


def by_the_formula(conv: BalancedConv2d, x: torch.Tensor) -> torch.Tensor:
    """y, number by number: every output of group g is a sum over the channels, rows and columns of two kernels."""
    groups, (sh, sw), (ph, pw), (dh, dw) = conv.groups, *conv.geometry
    local, mean = conv.local.weight, conv.mean.weight
    rows, width, kh, kw = local.shape
    x = nn.functional.pad(x, (pw, pw, ph, ph))
    height, breadth = ((x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1)
    y = x.new_zeros(len(x), rows, height, breadth)
    for o in range(rows):
        group = o // (rows // groups)
        for i in range(width):
            own = x[:, group * width + i]
            mean_of_all = sum(x[:, g * width + i] for g in range(groups)) / groups
            for r in range(kh):
                for c in range(kw):
                    read = (
                        slice(None),
                        slice(r * dh, r * dh + sh * (height - 1) + 1, sh),
                        slice(c * dw, c * dw + sw * (breadth - 1) + 1, sw),
                    )
                    y[:, o] += local[o, i, r, c] * own[read] + mean[o, i, r, c] * mean_of_all[read]
    return y


@ALWAYS_THE_SAME
@given(layers(), st.sampled_from([torch.contiguous_format, CL]), st.integers(1, 2))
def test_output_is_that_of_the_formula(conv, memory_format, batch):
    torch.manual_seed(1)
    x = torch.randn(batch, conv.in_channels, 7, 6, dtype=torch.float64).to(memory_format=memory_format)
    torch.testing.assert_close(conv(x), by_the_formula(conv, x), **CLOSE)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_gradcheck(arguments, memory_format):
    conv, x = layer(**arguments), image(memory_format=memory_format)[:, :, :6, :5].detach().requires_grad_()
    weights = [conv.local.weight, conv.mean.weight]

    def compute(x, local, mean):
        return functional_call(conv, {"local.weight": local, "mean.weight": mean}, (x,))

    assert gradcheck(compute, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_layer_is_one_dense_convolution(arguments):
    """With the weight W[o, i] = [g(o) = g(i)] A[o, i] + B[o, i] / G."""
    conv, dense = layer(**arguments), nn.Conv2d(N, M, **arguments, bias=False).double()
    own = torch.eye(G, dtype=torch.float64).repeat_interleave(M // G, 0)[:, :, None, None, None]
    weight = own * conv.local.weight[:, None] + conv.mean.weight[:, None] / G
    dense.weight.data.copy_(weight.flatten(1, 2))
    got, wanted = run(conv, image()), run(dense, image())
    torch.testing.assert_close([got["y"], got["x"]], [wanted["y"], wanted["x"]], **CLOSE)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_no_mean_part_is_group_convolution(arguments):
    conv, grouped = layer(**arguments), nn.Conv2d(N, M, **arguments, groups=G, bias=False).double()
    nn.init.zeros_(conv.mean.weight)
    grouped.weight.data.copy_(conv.local.weight)
    got, wanted = run(conv, image()), run(grouped, image())
    for name, of_grouped in {"y": "y", "x": "x", "local.weight": "weight"}.items():
        torch.testing.assert_close(got[name], wanted[of_grouped], **CLOSE)


def test_one_group_is_the_dense_convolution_of_the_sum_of_both_parts():
    conv, dense = layer(groups=1), nn.Conv2d(N, M, 3, 2, 1, bias=False).double()
    dense.weight.data.copy_(conv.local.weight + conv.mean.weight)
    got, wanted = run(conv, image()), run(dense, image())
    torch.testing.assert_close([got["y"], got["x"]], [wanted["y"], wanted["x"]], **CLOSE)
    torch.testing.assert_close(got["mean.weight"], wanted["weight"], **CLOSE)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_state_dict_is_the_documented_one(groups):
    conv = layer(groups=groups, kernel_size=(2, 3))
    shapes = {name: tuple(tensor.shape) for name, tensor in conv.state_dict().items()}
    part = (M, N // groups, 2, 3)
    assert shapes == {"local.weight": part, "mean.weight": part}
    assert sum(p.numel() for p in conv.parameters()) == 2 * M * N * 6 // groups


def test_description_names_its_groups_and_no_schedule():
    assert layer().extra_repr() == "8, 12, kernel_size=(3, 3), groups=4"


def test_meta_device_gives_the_shape():
    conv = BalancedConv2d(N, M, 3, 2, 1, groups=G, device="meta")
    y = conv(torch.empty(2, N, 9, 8, device="meta"))
    assert y.is_meta
    assert y.shape == (2, M, 5, 4)


def test_channels_last_weights_and_images_give_channels_last_results():
    wanted = run(layer(), image())
    got = run(layer().to(memory_format=CL), image(memory_format=CL))
    torch.testing.assert_close(got, wanted, **CLOSE)
    assert got["y"].is_contiguous(memory_format=CL) and not got["y"].is_contiguous()
    assert got["x"].is_contiguous(memory_format=CL) and not got["x"].is_contiguous()
    assert wanted["y"].is_contiguous()


def test_image_is_left_as_it_was():
    x = image()
    kept = x.detach().clone()
    run(layer(), x)
    assert torch.equal(x, kept)


def test_autocast_is_that_of_conv2d():
    """bfloat16 out, float32 gradients in."""
    conv, wanted = layer(dtype=torch.float32), run(layer(dtype=torch.float32), image(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(conv, image(torch.float32))
        assert got["y"].dtype == nn.Conv2d(N, M, 3)(image(torch.float32)).dtype == torch.bfloat16
    for name, value in got.items():
        assert name == "y" or value.dtype == torch.float32
        # Inputs, the mean and results are each rounded to 8 bits, to within 2**-9 of their value, and no more than 8
        # such roundings meet in one gradient.
        error = (value - wanted[name]).norm() / wanted[name].norm()
        assert 0 < error < 8 * 2**-9, name


def test_autocast_leaves_float64_alone_as_conv2d_does():
    with torch.autocast("cpu", torch.bfloat16):
        assert layer()(image()).dtype == torch.float64


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_computes_the_same_and_exchanges_with_no_one_too(copied):
    conv = layer()
    assert copied(conv).exchange is LOCAL
    assert torch.equal(copied(conv)(image()), conv(image()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL])
def test_traces_whole(memory_format):
    """No graph break, and the trace computes the same forward and backward."""
    conv = layer()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x = image(memory_format=memory_format)
    torch.testing.assert_close(run(compiled, x), run(conv, x), **CLOSE)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="the compiler of torch.compile needs a C++ compiler",
)
def test_compiles_whole():
    conv = layer()
    torch.testing.assert_close(run(torch.compile(conv, fullgraph=True), image()), run(conv, image()), **CLOSE)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_is_of_operations_that_every_run_time_knows(strict):
    conv, x = layer(), image().detach()
    exported = torch.export.export(conv, (x,), strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in targets and not any("twolevel" in target for target in targets)
    torch.testing.assert_close(exported.module()(x), conv(x), **CLOSE)


def test_a_network_in_channels_last_memory_compiles_whole():
    model = create("wrn-10-1", conv="bgc", groups=4).double().to(memory_format=CL)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=CL)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)(x).square().sum().backward()
    # Two steps of batch norm over other running statistics would differ; gradients of one batch do not.
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((16, 160), {"groups": 6}, "groups=6 does not divide in_channels=16; use one of 1, 2, 4, 8, 16"),
        ((8, 12), {"groups": 8}, "groups=8 does not divide out_channels=12; use one of 1, 2, 4"),
        ((8, 8), {"groups": 0}, "groups=0 is not positive; use 1 or more"),
        ((8, 8), {"groups": 2, "padding": "sane"}, "unknown padding 'sane'; did you mean same?"),
    ],
    ids=str,
)
def test_error_says_what_was_wrong_and_what_would_do(channels, options, message):
    with pytest.raises(UserError) as caught:
        BalancedConv2d(*channels, 3, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", [(2, M, 9, 8), (2, N // G, 9, 8)])
def test_image_of_other_channels_is_refused(shape):
    with pytest.raises(
        UserError, match=rf"BalancedConv2d takes \[B, {N}, H, W\].*got \[2, {shape[1]}, 9, 8\]"
    ):
        layer()(torch.zeros(shape, dtype=torch.float64))
