"""Every schedule of the two-level convolution computes one function: that of a naive loop over groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.ops import Geometry, dense_weight, two_level_conv2d
from twolevel.ops.kernels import native
from twolevel.settings import SCHEDULES

# Both sides add at most some thousand products of normal numbers in float64, in different orders.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
NAMES = ("x", "local", "restriction", "coarse")


def naive(x, local, restriction, coarse, geometry):
    """The definition: one convolution a group, then every output adds its share of every representative."""
    groups = x.shape[1] // local.shape[1]
    split = x.chunk(groups, 1)
    z = [
        F.conv2d(x_g, r_g, None, *geometry) for x_g, r_g in zip(split, restriction.chunk(groups), strict=True)
    ]
    y = [F.conv2d(x_g, a_g, None, *geometry) for x_g, a_g in zip(split, local.chunk(groups), strict=True)]
    return torch.cat(y, 1) + torch.einsum("bghw,mg->bmhw", torch.cat(z, 1), coarse[:, :, 0, 0])


def make(groups, n, m, kernel, batch=2, size=(7, 6), memory_format=torch.contiguous_format, of_group=1):
    """x, local, restriction and coarse with n and m channels and `of_group` representatives a group, in float64."""
    shapes = [
        (batch, groups * n, *size),
        (groups * m, n, *kernel),
        (of_group * groups, n, *kernel),
        (groups * m, of_group * groups, 1, 1),
    ]
    x, *weights = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [t.requires_grad_() for t in (x.to(memory_format=memory_format), *weights)]


def results(compute, tensors, gy=None):
    """The output of compute(*tensors) and the gradient of each tensor, by name."""
    y = compute(*tensors)
    grads = torch.autograd.grad(y, tensors, torch.ones_like(y) if gy is None else gy)
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (2, 3)]))
    stride, padding = (
        draw(st.one_of(st.integers(low, 3).map(lambda s: (s, s)), st.tuples(*2 * [st.integers(low, 3)])))
        for low in (1, 0)
    )
    dilation = draw(st.sampled_from([(1, 1), (2, 2), (1, 2)]))
    # From the smallest image that the kernel fits to 6 pixels more: odd and even, outputs of one pixel too.
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = tuple(low + draw(st.integers(0, 6)) for low in least)
    channels = st.integers(1, 3)
    tensors = {"groups": groups, "n": draw(channels), "m": draw(channels), "kernel": kernel, "size": size}
    tensors["batch"], tensors["of_group"] = draw(channels), draw(channels)
    tensors["memory_format"] = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return tensors, Geometry(stride, padding, dilation), draw(st.integers(0, 2**31))


# No deadline: the other processes of a busy machine decide how long one example takes.
@settings(max_examples=60, deadline=None, database=None)
@given(cases())
def test_every_schedule_and_the_dense_weight_equal_the_definition(case):
    arguments, geometry, seed = case
    torch.manual_seed(seed)
    tensors = make(**arguments)
    gy = torch.randn_like(naive(*tensors, geometry))
    wanted = results(lambda *t: naive(*t, geometry), tensors, gy)
    groups = arguments["groups"]
    dense = results(lambda x, *w: F.conv2d(x, dense_weight(*w, groups), None, *geometry), tensors, gy)
    torch.testing.assert_close(dense, wanted, **CLOSE)
    for schedule in SCHEDULES:
        got = results(lambda *t, by=schedule: two_level_conv2d(*t, geometry, schedule=by), tensors, gy)
        torch.testing.assert_close(got, wanted, **CLOSE, msg=lambda text, by=schedule: f"{by}: {text}")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient_that_is_one_number_expanded(schedule):
    """y.sum() hands over a gradient whose strides are all 0."""
    tensors, geometry = make(4, 2, 3, (3, 3)), Geometry(padding=(1, 1))
    leaves = [t.detach().requires_grad_() for t in tensors]
    two_level_conv2d(*leaves, geometry, schedule=schedule).sum().backward()
    wanted = results(lambda *t: naive(*t, geometry), tensors)
    for name, leaf in zip(NAMES, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, wanted[name], **CLOSE)


@pytest.mark.parametrize("of_group", [1, 2])
@pytest.mark.parametrize("schedule", ["overlapped", "fused", "dense"])
def test_gradcheck(schedule, of_group):
    tensors, geometry = make(2, 2, 1, (2, 3), 1, (4, 5), of_group=of_group), Geometry((2, 1), (1, 0))
    assert torch.autograd.gradcheck(lambda *t: two_level_conv2d(*t, geometry, schedule=schedule), tensors)


@pytest.mark.parametrize("schedule", ["overlapped", "fused", "dense"])
@pytest.mark.parametrize("wanted", [*range(4), (1, 2, 3), (0, 3)])
def test_only_what_needs_a_gradient_gets_one(schedule, wanted):
    """A frozen weight, or an image that needs no gradient, changes none of the other gradients."""
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    whole, geometry = make(3, 2, 2, (3, 3)), Geometry((1, 1), (1, 1))
    expected = results(lambda *t: naive(*t, geometry), whole)
    tensors = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(whole)]
    two_level_conv2d(*tensors, geometry, schedule=schedule).sum().backward()
    for index, (name, tensor) in enumerate(zip(NAMES, tensors, strict=True)):
        if index in wanted:
            torch.testing.assert_close(tensor.grad, expected[name], **CLOSE)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_output_keeps_the_memory_format_of_the_input(schedule, dtype):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        tensors = make(4, 2, 3, (3, 3), memory_format=memory_format)
        y = two_level_conv2d(*(t.to(dtype) for t in tensors), Geometry(padding=(1, 1)), schedule=schedule)
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batch_of_no_images(schedule, memory_format):
    tensors, geometry = make(4, 2, 3, (3, 3), batch=0, memory_format=memory_format), Geometry()
    got = results(lambda *t: two_level_conv2d(*t, geometry, schedule=schedule), tensors)
    torch.testing.assert_close(got, results(lambda *t: naive(*t, geometry), tensors))


# Each padded image is smaller than the kernel in one dimension or in both; 3 and 2 divide what is missing.
TOO_SMALL = [
    ((1, 1), (0, 0), (1, 1)),
    ((1, 1), (0, 0), (2, 2)),
    ((1, 4), (0, 0), (3, 2)),
    ((5, 1), (1, 0), (2, 2)),
]
FORMS = [("overlapped", kernels) for kernels in ("grouped", "products", "depthwise", "native")]
FORMS += [("fused", "grouped"), ("fused", "native"), ("dense", "grouped")]


@pytest.mark.parametrize(("size", "padding", "stride"), TOO_SMALL)
@pytest.mark.parametrize(("schedule", "kernels"), FORMS)
def test_image_smaller_than_the_kernel_is_refused_as_by_torch(schedule, kernels, size, padding, stride):
    if kernels == "native" and native.available() is not None:
        pytest.skip(native.available())
    tensors = make(16, 4, 4, (3, 3), size=size, memory_format=torch.channels_last)
    tensors, geometry = [t.detach().float() for t in tensors], Geometry(stride, padding)
    with pytest.raises(RuntimeError) as wanted:
        F.conv2d(tensors[0], tensors[1], None, *geometry, 16)
    with pytest.raises(RuntimeError) as caught:
        two_level_conv2d(*tensors, geometry, schedule=schedule, kernels=kernels)
    assert str(caught.value) == str(wanted.value)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize(("schedule", "kernels"), FORMS)
def test_image_that_fits_only_with_its_padding(schedule, kernels, stride, size):
    if kernels == "native" and native.available() is not None:
        pytest.skip(native.available())
    geometry = Geometry(stride, (3, 3), (1, 2))
    tensors = make(16, 4, 4, (3, 3), size=size, memory_format=torch.channels_last)
    wanted = results(lambda *t: naive(*t, geometry), tensors)
    # The kernels in C are for float32; others are held to the same.
    tensors = [t.detach().float().requires_grad_() for t in tensors]
    got = results(lambda *t: two_level_conv2d(*t, geometry, schedule=schedule, kernels=kernels), tensors)
    for name, value in got.items():
        # Sums of at most some thousand products of float32.
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-4, atol=1e-4)


def test_dense_weight_is_structured():
    """Filled with numbers that tell the groups apart, so that every entry can be worked out by hand."""
    local = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    restriction = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)
    coarse = torch.tensor([[0.1, 0.2], [0.3, 0.4]])[..., None, None]
    weight = dense_weight(local, restriction, coarse)[:, :, 0, 0]
    torch.testing.assert_close(weight, torch.tensor([[1 + 0.1 * 10, 0.2 * 20], [0.3 * 10, 2 + 0.4 * 20]]))


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match=r"^unknown schedule 'overlaped'; did you mean overlapped\?$"):
        two_level_conv2d(*make(2, 1, 1, (1, 1)), Geometry(), schedule="overlaped")
