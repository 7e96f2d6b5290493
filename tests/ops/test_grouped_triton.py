"""The Triton kernels compute the group convolution, its gradients, the restriction and the coarse term.

Kernels are decorated for the interpreter or for a card when Triton is first imported, so one process tests one of the
two: with a card this one; without, `test_everything_in_the_interpreter` runs this file again in a child.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.ops import LOCAL, Copies, Geometry, two_level_conv2d
from twolevel.ops.kernels import triton as grouped
from twolevel.ops.problem import Problem

pytest.importorskip("triton")
CHILD = os.environ.get("TRITON_INTERPRET") == "1"
REPOSITORY = Path(__file__).parents[2]

if CHILD:
    DEVICE, DTYPES = "cpu", [torch.float32, torch.float16]  # the interpreter has no bfloat16 product
else:
    DEVICE, DTYPES = "cuda", [torch.float32, torch.bfloat16] if torch.cuda.is_available() else []

NO_CARD = "no card; the child in the interpreter runs it"
ran_here = pytest.mark.skipif(not DTYPES, reason=NO_CARD)
parent_alone = pytest.mark.skipif(CHILD, reason="the parent runs it")
# Operands are exact in the dtype, products are summed in float32 and rounded once: a few units of its last place,
# relative to the norm, and sums of at most a few thousand float32 products, 1e-6.
CLOSE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# Small tiles, so that small images still fill several of every kind, with a ragged last one.
SMALL = grouped.Config(32, 16, 16, 2, 2)
# groups, inputs and outputs of a group, kernel, stride, padding, dilation, image, batch
CASES = {
    "plain": (2, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), (6, 5), 2),
    "one group": (1, 17, 40, (3, 3), (1, 1), (1, 1), (1, 1), (4, 5), 1),
    "pointwise": (4, 16, 17, (1, 1), (1, 1), (0, 0), (1, 1), (5, 5), 3),
    "pointwise stride 2": (2, 17, 4, (1, 1), (2, 2), (0, 0), (1, 1), (5, 6), 2),
    "stride 2": (2, 16, 3, (3, 3), (2, 2), (1, 1), (1, 1), (7, 6), 2),
    "uneven stride": (3, 4, 16, (2, 3), (3, 2), (1, 0), (1, 1), (8, 7), 1),
    "dilation": (2, 3, 4, (3, 3), (1, 1), (2, 2), (2, 2), (6, 5), 2),
    "stride and dilation": (2, 4, 3, (3, 3), (2, 2), (2, 1), (2, 3), (7, 9), 1),
    "kernel 5": (2, 3, 3, (5, 5), (1, 1), (2, 2), (1, 1), (5, 5), 1),
    "depthwise": (16, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), (5, 4), 2),
    "packs with a ragged last": (7, 3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (4, 4), 2),
    "narrow in, wide out": (4, 1, 40, (1, 1), (1, 1), (1, 1), (1, 1), (3, 3), 1),
    "wide in, narrow out": (4, 40, 1, (2, 3), (1, 1), (0, 1), (1, 1), (3, 4), 1),
    "ten channels": (6, 10, 10, (3, 3), (1, 1), (1, 1), (1, 1), (5, 7), 2),
    "ten channels, stride 2": (4, 10, 20, (3, 3), (2, 2), (1, 1), (1, 1), (6, 9), 1),
    "ten channels, pointwise stride 2": (5, 10, 20, (1, 1), (2, 2), (0, 0), (1, 1), (7, 4), 2),
    "a tile of two taps": (1, 24, 24, (3, 3), (1, 1), (1, 1), (1, 1), (4, 6), 1),
    "whole tiles": (2, 32, 32, (3, 3), (1, 1), (1, 1), (1, 1), (8, 4), 1),
    "an image wider than its kernel's padding": (2, 5, 6, (1, 5), (1, 2), (0, 2), (1, 1), (3, 9), 2),
}
# The interpreter is slow, and its kernels are the same code in both dtypes.
HALF = ["plain", "stride 2", "depthwise", "ten channels"] if CHILD else CASES
RUNS = [(dtype, case) for dtype in DTYPES for case in (CASES if dtype == torch.float32 else HALF)]


def tensors(case, dtype, seed=0):
    """(x, weight, gy, geometry, groups), exactly representable in the dtype."""
    groups, inputs, outputs, kernel, stride, padding, dilation, image, batch = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry(stride, padding, dilation)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x = last(random(batch, groups * inputs, *image))
    weight = random(groups * outputs, inputs, *kernel)
    y = F.conv2d(x.double(), weight.double(), None, *geometry, groups)
    return x, weight, last(random(*y.shape)), geometry, groups


def last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= CLOSE[actual.dtype], f"relative error {error:.2e}"


@parent_alone
def test_everything_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout and NO_CARD not in child.stdout, child.stdout[-2000:]


@ran_here
@pytest.mark.parametrize(("dtype", "case"), RUNS)
def test_forward_is_the_group_convolution(case, dtype):
    x, weight, _, geometry, groups = tensors(case, dtype)
    y = grouped.forward(x, weight, geometry, groups, config=SMALL)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, F.conv2d(x.double(), weight.double(), None, *geometry, groups))


@ran_here
@pytest.mark.parametrize(("dtype", "case"), RUNS)
def test_gradients_are_those_of_autograd(case, dtype):
    x, weight, gy, geometry, groups = tensors(case, dtype)
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.conv2d(wide_x, wide_weight, None, *geometry, groups)
    expected_x, expected_weight = torch.autograd.grad(y, (wide_x, wide_weight), gy.double())
    gx = grouped.input_grad(gy, weight, x.shape, geometry, groups, config=SMALL)
    gw = grouped.weight_grad(gy, x, weight.shape, geometry, groups, config=SMALL)
    assert gx.is_contiguous(memory_format=torch.channels_last)
    assert gw.dtype == torch.float32  # whatever the operands are
    assert_close(gx, expected_x)
    assert_close(gw, expected_weight)


@ran_here
@pytest.mark.parametrize(
    "case", ["plain", "stride 2", "depthwise", "packs with a ragged last", "ten channels", "whole tiles"]
)
@pytest.mark.parametrize("representatives", [1, 2, 3])
def test_restriction_rides_along(case, representatives):
    x, weight, _, geometry, groups = tensors(case, torch.float32)
    restriction = torch.randn(representatives * groups, *weight.shape[1:], device=DEVICE)
    y, z = grouped.forward(x, weight, geometry, groups, restriction, config=SMALL)
    assert_close(y, F.conv2d(x.double(), weight.double(), None, *geometry, groups))
    assert z.is_contiguous()
    wide = F.conv2d(x.double(), restriction.double(), None, *geometry, groups)
    assert_close(z, wide.transpose(0, 1))


@ran_here
@pytest.mark.parametrize("case", ["plain", "stride 2", "packs with a ragged last"])
@pytest.mark.parametrize("maps", [1, 4, 17])
def test_coarse_term_is_added_for_any_number_of_representatives(case, maps):
    x, weight, gy, geometry, groups = tensors(case, torch.float32)
    z = torch.randn(maps, gy.shape[0], *gy.shape[2:], device=DEVICE)
    coarse = torch.randn(weight.shape[0], maps, device=DEVICE)
    y = grouped.forward(x, weight, geometry, groups, coarse=coarse, z=z, config=SMALL)
    local = F.conv2d(x.double(), weight.double(), None, *geometry, groups)
    assert_close(y, local + torch.einsum("or,rbhw->bohw", coarse.double(), z.double()))


@ran_here
@pytest.mark.parametrize("case", ["plain", "stride 2", "pointwise stride 2", "packs with a ragged last"])
@pytest.mark.parametrize("schedule", ["overlapped", "fused"])
@pytest.mark.parametrize(("ranks", "representatives"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_two_level_layer_and_its_gradients(case, schedule, ranks, representatives, tmp_path, monkeypatch):
    """As float64 has them, on one rank and on one of two that are alike."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for dtype in DTYPES:
        x, local, gy, geometry, groups = tensors(case, dtype)
        maps = groups * representatives
        restriction = torch.randn(maps, *local.shape[1:], device=DEVICE, dtype=dtype)
        coarse = torch.randn(len(local), maps * ranks, 1, 1, device=DEVICE, dtype=dtype)
        narrow = [t.clone().requires_grad_() for t in (x, local, restriction, coarse)]
        wide = [t.double().requires_grad_() for t in narrow]
        found = []
        for leaves, how in (
            (narrow, {"schedule": schedule, "kernels": "triton"}),
            (wide, {"kernels": "grouped"}),
        ):
            exchange = LOCAL if ranks == 1 else Copies(ranks)
            y = two_level_conv2d(*leaves, geometry, **how, exchange=exchange)
            found.append([y, *torch.autograd.grad(y, leaves, gy.to(y.dtype))])
        for got, expected in zip(*found, strict=True):
            error = (got.double() - expected).norm() / expected.norm()
            # z and its gradient are rounded on the way, and two rounded parts are added.
            assert error <= 8 * CLOSE[dtype], f"relative error {error:.2e}"


@ran_here
@pytest.mark.parametrize("operation", grouped.OPERATIONS)
def test_result_does_not_depend_on_the_configuration(operation):
    x, weight, gy, geometry, groups = tensors("stride 2", torch.float32)
    run = {
        "forward": lambda **config: grouped.forward(x, weight, geometry, groups, **config),
        "input_grad": lambda **config: grouped.input_grad(gy, weight, x.shape, geometry, groups, **config),
        "weight_grad": lambda **config: grouped.weight_grad(gy, x, weight.shape, geometry, groups, **config),
    }[operation]
    expected = run().double()
    for config in [(16, 32, 16, 4, 2), (64, 16, 32, 4, 3), grouped.Config(16, 16, 64, 1, 1)]:
        assert_close(run(config=config), expected)


@ran_here
def test_weight_gradient_repeats_bit_for_bit():
    x, weight, gy, geometry, groups = tensors("plain", torch.float32)
    first, second = (
        grouped.weight_grad(gy, x, weight.shape, geometry, groups, config=SMALL) for _ in range(2)
    )
    assert torch.equal(first, second)


@ran_here
def test_weight_may_be_channels_last_and_x_may_have_one_channel():
    x, weight, gy, geometry, groups = tensors("kernel 5", torch.float32)
    expected = F.conv2d(x.double(), weight.double(), None, *geometry, groups)
    assert_close(grouped.forward(x, last(weight), geometry, groups), expected)
    gx = grouped.input_grad(gy, last(weight), x.shape, geometry, groups)
    assert torch.equal(gx, grouped.input_grad(gy, weight, x.shape, geometry, groups))
    shifted = torch.empty(weight.numel() + 1, device=DEVICE)[1:].view(weight.shape).copy_(weight)
    assert shifted.data_ptr() % 16  # the kernel would read whole copies of 16 bytes
    assert torch.equal(
        grouped.forward(x, shifted, geometry, groups), grouped.forward(x, weight, geometry, groups)
    )
    one = x[:, :1].contiguous()
    expected = F.conv2d(one.double(), weight[:, :1].double(), None, *geometry)
    assert_close(grouped.forward(one, weight[:, :1].contiguous(), geometry, 1), expected)


@ran_here
def test_empty_batch_has_empty_outputs_and_a_zero_weight_gradient():
    x, weight, gy, geometry, groups = tensors("plain", torch.float32)
    x, gy = last(x[:0]), last(gy[:0])
    assert grouped.forward(x, weight, geometry, groups).shape == gy.shape
    assert grouped.input_grad(gy, weight, x.shape, geometry, groups).shape == x.shape
    gw = grouped.weight_grad(gy, x, weight.shape, geometry, groups)
    assert gw.shape == weight.shape and not gw.any()


@ran_here
def test_autograd_function_has_the_three_together():
    x, weight, gy, geometry, groups = tensors("uneven stride", torch.float32)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = grouped.GroupedConv2d.apply(x, weight, geometry, groups)
    gx, gw = torch.autograd.grad(y, (x, weight), gy.contiguous())
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.conv2d(wide_x, wide_weight, None, *geometry, groups)
    expected_x, expected_weight = torch.autograd.grad(expected, (wide_x, wide_weight), gy.double())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        y = grouped.GroupedConv2d.apply(x, weight, geometry, groups)
        torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()
    for actual, wide in ((y, expected), (gx, expected_x), (gw, expected_weight)):
        assert_close(actual, wide)


@ran_here
def test_inputs_that_cannot_be_read_are_named():
    x, weight, gy, geometry, groups = tensors("plain", torch.float32)
    uneven = torch.zeros(3, *weight.shape[1:], device=DEVICE)
    z, coarse = torch.zeros(3, *gy[:, 0].shape, device=DEVICE), torch.zeros(32, 3, device=DEVICE)
    calls = {
        "x has strides": lambda: grouped.forward(x.contiguous(), weight, geometry, groups),
        "gy has strides": lambda: grouped.weight_grad(gy.contiguous(), x, weight.shape, geometry, groups),
        "gy has shape": lambda: grouped.input_grad(gy[:1], weight, x.shape, geometry, groups),
        "weight has dtype": lambda: grouped.forward(x, weight.half(), geometry, groups),
        "groups=3": lambda: grouped.forward(x, weight, geometry, 3),
        "float64": lambda: grouped.forward(x.double(), weight.double(), geometry, groups),
        "coarse is given without z": lambda: grouped.forward(x, weight, geometry, groups, coarse=coarse),
        "z has shape": lambda: grouped.forward(x, weight, geometry, groups, coarse=coarse, z=z[:, :1]),
        "restriction has shape": lambda: grouped.forward(x, weight, geometry, groups, uneven),
        "more than 15 taps": lambda: grouped.forward(x, weight.repeat(1, 1, 6, 1), geometry, groups),
        "does not fit": lambda: grouped.forward(x, weight, Geometry(dilation=(5, 5)), groups),
        "unknown precision": lambda: grouped.forward(x, weight, geometry, groups, precision="tf16"),
        "block_in=24": lambda: grouped.forward(x, weight, geometry, groups, config=(32, 16, 24, 4, 2)),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message):
            call()
    assert grouped.unsupported(layer_of(x, weight, geometry, groups)) is None
    assert "channels_last" in grouped.unsupported(layer_of(x.contiguous(), weight, geometry, groups))
    assert "float64" in grouped.unsupported(layer_of(x.double(), weight.double(), geometry, groups))


def layer_of(x, weight, geometry, groups) -> Problem:
    """The two-level layer with this local part."""
    restriction, coarse = x.new_empty(groups, *weight.shape[1:]), x.new_empty(len(weight), groups, 1, 1)
    return Problem.of(x, weight, restriction, coarse, geometry, 1)


@parent_alone
def test_imports_without_triton_and_supports_nothing():
    code = """
import sys
sys.modules["triton"] = None
import torch
from twolevel.ops import Geometry
from twolevel.ops.kernels import triton
x = torch.zeros(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
weight = torch.zeros(4, 2, 1, 1)
from twolevel.ops.dispatch import able_forms
from twolevel.ops.problem import Problem
layer = Problem.of(x, weight, torch.zeros(2, 2, 1, 1), torch.zeros(4, 2, 1, 1), Geometry(), 1)
print(any(form.kernels == "triton" for form in able_forms(layer)))
try:
    triton.forward(x, weight, Geometry(), 2)
except ValueError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[0] == "False"
    assert "Triton is not installed" in child.stdout
