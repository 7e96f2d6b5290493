"""The restriction is one group convolution, however it is computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from twolevel.ops import Geometry
from twolevel.ops.kernels.restriction import WAYS, restrict, restrict_backward, ways
from twolevel.ops.problem import Problem

# float64; the ways differ in the order of sums of at most a few hundred products.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def of(x, weight) -> Problem:
    """A two-level layer with this restriction, and one output a group."""
    local, coarse = x.new_empty(len(weight), *weight.shape[1:]), x.new_empty(len(weight), len(weight), 1, 1)
    return Problem.of(x, local, weight, coarse, Geometry(), 1)


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=80, deadline=None, database=None)
@given(
    groups=st.sampled_from([1, 2, 3, 4, 8, 16]),
    width=st.sampled_from([1, 2, 5, 9, 20]),
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    last=st.booleans(),
)
def test_every_way_is_the_group_convolution(groups, width, kernel, stride, padding, dilation, size, last):
    memory_format = torch.channels_last if last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, groups * width, *size, generator=generator, dtype=torch.float64)
    x = x.to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(groups, width, *kernel, generator=generator, dtype=torch.float64).requires_grad_()
    geometry = Geometry(stride, padding, dilation)
    wanted = F.conv2d(x, weight, None, *geometry, groups)
    gz = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    wanted_gx, wanted_gw = torch.autograd.grad(wanted, (x, weight), gz)

    gz = gz.transpose(0, 1).contiguous()
    found = ways(of(x, weight))
    assert set(found) == set(WAYS if x.is_contiguous(memory_format=torch.channels_last) else ["grouped"])
    for way in found:
        with torch.no_grad():
            z = restrict(x, weight, geometry, way)
            assert z.is_contiguous()
            torch.testing.assert_close(z.transpose(0, 1), wanted, **CLOSE)
            before = torch.ones_like(x)
            gx = before.clone()
            gw = restrict_backward(gz, x, weight, geometry, gx, True, way)
            torch.testing.assert_close(gx - before, wanted_gx, **CLOSE)
            torch.testing.assert_close(gw, wanted_gw, **CLOSE)
            assert restrict_backward(gz, x, weight, geometry, gx, False, way) is None
            gw = restrict_backward(gz, x, weight, geometry, None, True, way)
            torch.testing.assert_close(gw, wanted_gw, **CLOSE)


@pytest.mark.parametrize(
    ("groups", "width", "kernel", "memory_format", "expected"),
    [
        (4, 16, 3, torch.channels_last, "products"),
        (16, 4, 3, torch.channels_last, "depthwise"),
        (16, 4, 1, torch.channels_last, "products"),
        (4, 16, 3, torch.contiguous_format, "grouped"),
    ],
)
def test_the_way_with_the_smaller_maps_comes_first(groups, width, kernel, memory_format, expected):
    x = torch.randn(2, groups * width, 6, 6).to(memory_format=memory_format)
    weight = torch.randn(groups, width, kernel, kernel)
    assert ways(of(x, weight))[0] == expected
    assert ways(of(x.bfloat16(), weight.bfloat16()))[0] == "grouped"
