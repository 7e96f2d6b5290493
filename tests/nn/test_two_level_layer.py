"""TwoLevelConv2d as a drop-in for nn.Conv2d: arguments, types, memory formats, compilation, errors."""

import copy
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import TwoLevelConv2d
from twolevel.ops import LOCAL, dense_weight
from twolevel.settings import SCHEDULES

# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

# Every form in which nn.Conv2d takes kernel, stride, padding and dilation.
ARGUMENTS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 3), "padding": (0, 2)},
    {"kernel_size": 5, "stride": 3, "padding": (2, 1)},
    {"kernel_size": 3, "padding": "valid", "dilation": 2},
    {"kernel_size": (3, 5), "padding": "same"},
    {"kernel_size": (5, 1), "padding": "same", "dilation": (1, 3)},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (2, 1)},
]
N, M, G = 8, 12, 4


def layer(schedule="auto", dtype=torch.float64, **arguments) -> TwoLevelConv2d:
    torch.manual_seed(0)
    return TwoLevelConv2d(N, M, **arguments, groups=G, schedule=schedule, dtype=dtype)


def image(size=(9, 8), dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, N, *size, dtype=dtype, requires_grad=True)


def run(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and the gradients of x and of every parameter for a gradient that is the same each time."""
    y = module(x)
    gy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    weights = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *weights.values()], gy)
    return {"y": y.detach(), **dict(zip(["x", *weights], grads, strict=True))}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_no_coarse_part_is_group_convolution(arguments, schedule):
    conv, grouped = layer(schedule, **arguments), nn.Conv2d(N, M, **arguments, groups=G, bias=False).double()
    nn.init.zeros_(conv.coarse.weight)
    grouped.weight.data.copy_(conv.local.weight)
    got, wanted = run(conv, image()), run(grouped, image())
    for name, of_grouped in {"y": "y", "x": "x", "local.weight": "weight"}.items():
        torch.testing.assert_close(got[name], wanted[of_grouped], **CLOSE)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_layer_is_one_dense_convolution(arguments):
    conv, dense = layer(**arguments), nn.Conv2d(N, M, **arguments, bias=False).double()
    weights = [conv.local.weight, conv.restriction.weight, conv.coarse.weight]
    dense.weight.data.copy_(dense_weight(*weights))
    got, wanted = run(conv, image()), run(dense, image())
    torch.testing.assert_close([got["y"], got["x"]], [wanted["y"], wanted["x"]], **CLOSE)


def test_state_dict_is_the_documented_one():
    conv = layer(kernel_size=(2, 3))
    shapes = {name: tuple(tensor.shape) for name, tensor in conv.state_dict().items()}
    assert shapes == {
        "local.weight": (M, N // G, 2, 3),
        "restriction.weight": (G, N // G, 2, 3),
        "coarse.weight": (M, G, 1, 1),
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_representatives_are_more_rows_and_one_is_the_papers(schedule):
    conv = layer(schedule, kernel_size=3, padding=1, representatives=2)
    shapes = [tuple(part.weight.shape) for part in (conv.local, conv.restriction, conv.coarse)]
    assert shapes == [(M, N // G, 3, 3), (2 * G, N // G, 3, 3), (M, 2 * G, 1, 1)]
    # Without its second representatives it is the layer with the first.
    one = layer(schedule, kernel_size=3, padding=1)
    one.local.weight.data.copy_(conv.local.weight)
    one.restriction.weight.data.copy_(conv.restriction.weight[::2])
    one.coarse.weight.data.copy_(conv.coarse.weight[:, ::2])
    conv.coarse.weight.data[:, 1::2] = 0
    torch.testing.assert_close(run(conv, image())["y"], run(one, image())["y"], **CLOSE)


@pytest.mark.parametrize("representatives", [0, -1, 1.5])
def test_fewer_than_one_representative_is_refused(representatives):
    with pytest.raises(UserError, match=f"representatives={representatives} is invalid; use 1"):
        TwoLevelConv2d(8, 8, 3, groups=2, representatives=representatives)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_meta_device_gives_the_shape(schedule):
    arguments = {"kernel_size": 3, "stride": 2, "padding": 1, "schedule": schedule}
    conv = TwoLevelConv2d(N, M, **arguments, groups=G, device="meta")
    y = conv(torch.empty(2, N, 9, 8, device="meta"))
    assert y.is_meta
    assert y.shape == (2, M, 5, 4)


def test_channels_last_weights_and_images_give_channels_last_results():
    conv = layer(kernel_size=3, padding=1)
    wanted = run(conv, image())
    x = image().detach().to(memory_format=torch.channels_last).requires_grad_()
    got = run(conv.to(memory_format=torch.channels_last), x)
    torch.testing.assert_close(got, wanted, **CLOSE)
    assert got["y"].is_contiguous(memory_format=torch.channels_last)
    assert got["x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_is_that_of_conv2d(schedule):
    """bfloat16 out, float32 gradients in."""
    conv, dense = layer(schedule, torch.float32, kernel_size=3, padding=1), nn.Conv2d(N, M, 3, padding=1)
    wanted, x = run(conv, image(dtype=torch.float32)), image(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(conv, x)
        assert got["y"].dtype == dense(x).dtype == torch.bfloat16
    for name, value in got.items():
        assert name == "y" or value.dtype == torch.float32
        # Inputs, representatives and results are each rounded to 8 bits, to within 2**-9 of their value,
        # and no more than 8 such roundings meet in one gradient.
        error = (value - wanted[name]).norm() / wanted[name].norm()
        assert 0 < error < 8 * 2**-9, name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_leaves_float64_alone_as_conv2d_does(schedule):
    conv = layer(schedule, kernel_size=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Conv2d(N, M, 3).double()(image()).dtype == torch.float64
        assert conv(image()).dtype == torch.float64


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_exchanges_with_no_one_too(copied):
    """Which schedules ask of the exchange by `is`: the average of a network is computed as the network."""
    assert copied(layer(kernel_size=3)).exchange is LOCAL


@pytest.mark.parametrize("schedule", ["overlapped", "fused", "dense"])
def test_traces_whole(schedule):
    """No graph break, and the trace computes the same forward and backward."""
    conv = layer(schedule, kernel_size=3, stride=2, padding=1)
    wanted = run(conv, image())
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    got = {name.removeprefix("_orig_mod."): value for name, value in run(compiled, image()).items()}
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_compiled_layer_is_one_operation():
    """Where its form is chosen, and not three convolutions, which are for what is exported."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(layer(kernel_size=3), fullgraph=True, backend=backend)(image())
    torch.compiler.reset()
    assert "twolevel.two_level_conv2d.default" in seen and not any("conv2d of" in name for name in seen)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_is_of_operations_that_every_run_time_knows(strict):
    conv, x = layer(kernel_size=3), image().detach()
    exported = torch.export.export(conv, (x,), strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets == {"aten.conv2d.default", "aten.add.Tensor"}
    torch.testing.assert_close(exported.module()(x), conv(x), **CLOSE)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="the compiler of torch.compile needs a C++ compiler",
)
def test_compiles_whole():
    conv = layer(kernel_size=3, stride=2, padding=1)
    wanted = run(conv, image())
    compiled = torch.compile(conv, fullgraph=True)
    got = {name.removeprefix("_orig_mod."): value for name, value in run(compiled, image()).items()}
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 160, 3, {"groups": 6}), "groups=6 does not divide in_channels=16; use one of 1, 2, 4, 8, 16"),
        (
            (192, 160, 3, {"groups": 6}),
            "groups=6 does not divide out_channels=160; use one of 1, 2, 4, 8, 16, 32",
        ),
        (
            (160, 160, 3, {"groups": 6}),
            "groups=6 does not divide in_channels=160; use one of 1, 2, 4, 5, 8, 10, 16, 20, ...",
        ),
        ((8, 8, 3, {"groups": 0}), "groups=0 is not positive; use 1 or more"),
        ((8, 8, 3, {"groups": -2}), "groups=-2 is not positive; use 1 or more"),
        (
            (8, 8, 3, {"groups": 2, "schedule": "fussed"}),
            "unknown schedule 'fussed'; did you mean fused?",
        ),
        (
            (8, 8, (3, 2), {"groups": 2, "padding": "same"}),
            "padding='same' with kernel_size=(3, 2) pads unevenly; use an odd kernel or numbers",
        ),
        ((8, 8, 3, {"groups": 2, "padding": "sane"}), "unknown padding 'sane'; did you mean same?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_error_says_what_was_wrong_and_what_would_do(arguments, message):
    *channels, options = arguments
    with pytest.raises(UserError) as caught:
        TwoLevelConv2d(*channels, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", [(2, M, 9, 8), (2, N // G, 9, 8)])
def test_image_of_other_channels_is_refused(shape):
    with pytest.raises(ValueError, match=rf"\[B, {N}, H, W\] or \[{N}, H, W\], got \[2, {shape[1]}, 9, 8\]"):
        layer(kernel_size=3)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("groups", [4, 16])
def test_a_network_in_channels_last_memory_compiles_whole(groups):
    """Functionalisation has to undo what a layer does in place; few and many groups go different ways."""
    model = create("wrn-10-1", conv="gc2l", groups=groups).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    compiled(x).square().sum().backward()
    # Two steps of batch norm over other running statistics would differ; gradients of one batch do not.
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, rtol=1e-9, atol=1e-9)
