"""The C kernels for chosen channels compute group convolutions of any groups, on any processor."""

import math
import shutil

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from twolevel.ops import Geometry
from twolevel.ops.kernels.native import gathered
from twolevel.ops.kernels.native.gathered import GroupsLayer

LAST = torch.channels_last
RULES = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def assert_sum(found, wanted, scale):
    """`found` is a sum of products in float32, whose absolute values add up to `scale`.

    Every addition rounds to 2^-24 of a partial sum, which is at most `scale`. Roundings of either sign cancel: of the
    some hundred terms here, 32 are allowed to add up.
    """
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs()
    assert (error <= 32 * 2**-24 * scale).all(), (error / scale).nan_to_num().max() * 2**24


@st.composite
def group_convolutions(draw):
    """The arguments of `convolve_groups`: groups without inputs, repeated and unused channels, any sizes."""
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    padding = draw(st.tuples(*[st.integers(0, 3)] * 2))
    width = st.one_of(st.integers(0, 7), st.integers(15, 40))
    sizes = tuple(draw(st.lists(st.tuples(width, width), min_size=1, max_size=4)))
    assume(any(rows for _, rows in sizes))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [low + draw(st.one_of(st.integers(0, 9), st.integers(15, 40))) for low in smallest]
    read, outputs = (sum(numbers) for numbers in zip(*sizes, strict=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    inputs = order = None
    channels = read
    if draw(st.booleans()) or read == 0:
        channels = draw(st.integers(1, 40))
        inputs = torch.randint(channels, (read,), generator=generator)
    if draw(st.booleans()):
        order = torch.randperm(outputs, generator=generator)
    x = torch.randn(draw(st.integers(0, 2)), channels, *size, generator=generator)
    x = x.to(memory_format=draw(st.sampled_from([torch.contiguous_format, LAST])))
    values = sum(rows * columns for rows, columns in sizes) * kernel[0] * kernel[1]
    filters = torch.randn(values, generator=generator)
    bias = torch.randn(outputs, generator=generator) if draw(st.booleans()) else None
    groups = GroupsLayer(sizes, kernel, Geometry(stride, padding, dilation), relu=draw(st.booleans()))
    return x, groups, filters, bias, inputs, order


def convolved(x, groups, filters, bias, inputs, order):
    """The same by torch, in the type of x, by a dense filter and without the last ReLU."""
    sizes = groups.sizes
    dense = x.new_zeros(sum(rows for _, rows in sizes), x.shape[1], *groups.kernel)
    indices = torch.arange(x.shape[1]) if inputs is None else inputs
    shapes = [(rows, width, *groups.kernel) for width, rows in sizes]
    blocks = filters.split([math.prod(shape) for shape in shapes])
    rows = dense.split([rows for _, rows in sizes])
    columns = indices.split([width for width, _ in sizes])
    for to, index, block, shape in zip(rows, columns, blocks, shapes, strict=True):
        to.index_add_(1, index, block.view(shape))
    y = F.conv2d(x, dense, bias, *groups.geometry)
    return y if order is None else y[:, order]


@RULES
@given(group_convolutions())
def test_groups_of_any_channels_and_sizes_are_convolved(kernels, arguments):
    x, groups, filters, bias, *indices = arguments
    y = gathered.convolve_groups(*arguments)
    memory_format = torch.contiguous_format if x.is_contiguous() else LAST
    assert y.is_contiguous(memory_format=memory_format)
    x, filters, bias = (None if t is None else t.double() for t in (x, filters, bias))
    wanted = convolved(x, groups, filters, bias, *indices)
    x, filters, bias = (None if t is None else t.abs() for t in (x, filters, bias))
    assert_sum(y, wanted.relu() if groups.relu else wanted, convolved(x, groups, filters, bias, *indices))


def resnet_layer(batch=1):
    """A layer of 56 x 56 pixels and four unequal groups."""
    sizes, generator = ((10, 20), (20, 12), (19, 17), (15, 15)), torch.Generator().manual_seed(0)
    x = torch.randn(batch, 64, 56, 56, generator=generator)
    filters = torch.randn(9 * sum(a * b for a, b in sizes), generator=generator)
    orders = (torch.randperm(64, generator=generator) for _ in range(2))
    return x, GroupsLayer(sizes, (3, 3), Geometry(padding=(1, 1))), filters, None, *orders


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
def test_threads_change_no_bit(kernels, monkeypatch, batch, memory_format):
    x, *others = resnet_layer(batch)
    x = x.to(memory_format=memory_format)
    alone = gathered.convolve_groups(x, *others)
    for threads in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(gathered.convolve_groups(x, *others), alone)


def test_strided_images_are_convolved(kernels):
    x, *others = resnet_layer()
    part = F.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    assert torch.equal(gathered.convolve_groups(part, *others), gathered.convolve_groups(x, *others))


def test_not_a_number_stays_one(kernels):
    x, *others = resnet_layer()
    x[0, 0, 30, 30] = torch.nan
    y = gathered.convolve_groups(x, *others)
    sizes, inputs = others[0].sizes, others[3]
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor([width for width, _ in sizes]))
    assert y.isnan().sum() == 9 * sizes[group[inputs == 0]][1]


def test_what_others_act_on_is_left_to_torch():
    x = torch.zeros(1, 4, 5, 5)
    assert gathered.takes(x, x)
    assert not gathered.takes(x.double(), x)
    assert not gathered.takes(x, x.double())
    assert not gathered.takes(x, x.to("meta"))
    assert not gathered.takes(x.bfloat16(), x)
    assert not gathered.takes(x.to("meta"), x)
    assert not gathered.takes(x.clone().requires_grad_(), x)
    with torch.no_grad():
        assert gathered.takes(x.clone().requires_grad_(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not gathered.takes(x, x)
    assert not gathered.takes(torch._subclasses.FakeTensorMode().from_tensor(x), x)


def test_without_a_compiler_torch_computes(monkeypatch):
    monkeypatch.setattr(gathered, "available", lambda: "no C compiler")
    assert not gathered.takes(torch.zeros(1, 4, 5, 5), torch.zeros(4))
