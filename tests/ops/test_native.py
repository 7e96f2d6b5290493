"""The C kernels compute what convolutions compute, on any processor."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from twolevel.ops import Geometry
from twolevel.ops.kernels.native import NativeKernels, call
from twolevel.ops.problem import Problem
from twolevel.ops.strides import memory_format_of

LAST = torch.channels_last
MEMORY = st.sampled_from([torch.contiguous_format, LAST])
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
RULES = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def kernels(kernels) -> NativeKernels:
    """The set, by one of the libraries."""
    return NativeKernels()


def assert_sum(found, wanted, scale):
    """`found` is a sum of products in float32, whose absolute values add up to `scale`.

    Every addition rounds to 2^-24 of a partial sum, which is at most `scale`. Roundings of either sign cancel: of the
    some thousand terms here, 32 are allowed to add up.
    """
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs()
    assert (error <= 32 * 2**-24 * scale).all(), (error / scale).nan_to_num().max() * 2**24


def conv_and_grads(x, weight, gz, geometry, groups=None):
    """z, gx and gw of a group convolution in float64; by default of one output a group, as the paper's restriction."""
    x, weight, gz = (t.detach().double() for t in (x, weight, gz))
    x.requires_grad_(), weight.requires_grad_()
    z = F.conv2d(x, weight, None, *geometry, groups or len(weight))
    return z.detach(), *torch.autograd.grad(z, (x, weight), gz)


def randn_as_output(x, weight, geometry, groups, generator):
    output = F.conv2d(torch.empty(1, *x.shape[1:], device="meta"), weight.to("meta"), None, *geometry, groups)
    return torch.randn(len(x), *output.shape[1:], generator=generator)


@st.composite
def layers(draw, most_groups=8):
    """x, A, gy, the geometry and the number of groups of a group convolution."""
    groups = draw(st.integers(1, most_groups))
    inputs, outputs = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    # Rows of whole vectors go another way than others.
    width = draw(st.one_of(st.sampled_from([8, 16, 32]), st.integers(5, 35)))
    batch, size = draw(st.integers(0, 3)), (draw(st.integers(5, 19)), width)
    padding, dilation = draw(st.tuples(*[st.integers(0, 2)] * 2)), draw(st.tuples(*[st.integers(1, 2)] * 2))
    kernel, geometry = draw(PAIRS), Geometry(draw(PAIRS), padding, dilation)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    x = torch.randn(batch, groups * inputs, *size, generator=generator).to(memory_format=draw(MEMORY))
    weight = torch.randn(groups * outputs, inputs, *kernel, generator=generator)
    return x, weight, randn_as_output(x, weight, geometry, groups, generator), geometry, groups


@RULES
@given(layers(most_groups=16), st.booleans())
def test_restriction_is_the_group_convolution(kernels, problem, several):
    """By one representative of a group, or by several."""
    x, weight, gz, geometry, groups = problem
    if not several:
        weight, gz = weight[:groups], gz[:, :groups]
    wanted = conv_and_grads(x, weight, gz, geometry, groups)
    scales = conv_and_grads(x.abs(), weight.abs(), gz.abs(), geometry, groups)
    z = kernels.restrict(x, weight, geometry)
    assert z.is_contiguous()
    assert_sum(z.transpose(0, 1), wanted[0], scales[0])

    gz, before = gz.transpose(0, 1), torch.ones_like(x)  # gz: not contiguous
    gx = before.clone()
    assert_sum(kernels.restrict_backward(gz, x, weight, geometry, gx, True), wanted[2], scales[2])
    assert_sum(gx, wanted[1] + before, scales[1] + before)
    gx = before.clone()
    assert kernels.restrict_backward(gz, x, weight, geometry, gx, False) is None
    assert_sum(gx, wanted[1] + before, scales[1] + before)
    assert_sum(kernels.restrict_backward(gz, x, weight, geometry, None, True), wanted[2], scales[2])


def coarse_terms(y, z, gy, coarse):
    """y + C z, C^T gy and gy z^T."""
    added = y + torch.einsum("mr,rbhw->bmhw", coarse, z)
    return added, torch.einsum("mr,bmhw->rbhw", coarse, gy), torch.einsum("bmhw,rbhw->mr", gy, z)


@RULES
@given(
    channels=st.integers(1, 70),
    rows=st.integers(1, 35),
    batch=st.integers(0, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 17)),
    memory=MEMORY,
    seed=st.integers(0, 9),
)
def test_coarse_term_is_a_product_over_representatives(kernels, channels, rows, batch, size, memory, seed):
    generator = torch.Generator().manual_seed(seed)
    y, gy = torch.randn(2, batch, channels, *size, generator=generator)
    y = y.to(memory_format=memory)  # not always that of gy
    z = torch.randn(rows, batch, *size, generator=generator)
    coarse = torch.randn(channels, rows, 1, 1, generator=generator)
    operands = (y, z, gy, coarse[..., 0, 0])
    wanted = coarse_terms(*(t.double() for t in operands))
    scales = coarse_terms(*(t.double().abs() for t in operands))

    both = kernels.coarse_grads(gy, z, coarse)
    assert both[0].is_contiguous()
    assert torch.equal(both[0], kernels.coarse_input_grad(gy, coarse))
    assert torch.equal(both[1], kernels.coarse_weight_grad(gy, z))
    assert_sum(both[0], wanted[1], scales[1])
    assert_sum(both[1][..., 0, 0], wanted[2], scales[2])
    assert kernels.add_coarse_(y, z, coarse) is y
    assert_sum(y, wanted[0], scales[0])


def test_an_expanded_gradient_is_one(kernels):
    """Of a sum, autograd hands back one number for all pixels."""
    gy, coarse, z = (
        torch.randn(1, 5, 1, 1).expand(2, 5, 3, 4),
        torch.randn(5, 3, 1, 1),
        torch.randn(3, 2, 3, 4),
    )
    found = kernels.coarse_grads(gy, z, coarse)
    wanted = kernels.coarse_grads(gy.clone(), z, coarse)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@RULES
@given(layers())
def test_local_part_is_the_group_convolution(kernels, problem):
    x, weight, gy, geometry, groups = problem
    wanted = conv_and_grads(x, weight, gy, geometry, groups)
    scales = conv_and_grads(x.abs(), weight.abs(), gy.abs(), geometry, groups)
    y = kernels.local(x, weight, geometry, groups)
    assert y.is_contiguous(memory_format=memory_format_of(x))
    assert_sum(y, wanted[0], scales[0])
    gx, gw = kernels.local_backward(gy, x, weight, geometry, groups, (True, True))
    assert_sum(gx, wanted[1], scales[1])
    assert_sum(gw, wanted[2], scales[2])
    alone = kernels.local_backward(gy, x, weight, geometry, groups, (True, False))
    assert alone[1] is None and torch.equal(alone[0], gx)
    alone = kernels.local_backward(gy, x, weight, geometry, groups, (False, True))
    assert alone[0] is None and torch.equal(alone[1], gw)


def two_level_and_grads(x, local, restriction, coarse, gy, geometry):
    """y, z and the gradients of x, A, r and C, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, local, restriction, coarse)]
    x, local, restriction, coarse = leaves
    groups = x.shape[1] // local.shape[1]
    z = F.conv2d(x, restriction, None, *geometry, groups)
    y = F.conv2d(x, local, None, *geometry, groups) + F.conv2d(z, coarse)
    return y.detach(), z.detach().transpose(0, 1), *torch.autograd.grad(y, leaves, gy.double())


@RULES
@given(layers(), st.sampled_from([1, 1, 2, 3, 5]), st.integers(0, 9))
def test_one_walk_is_all_the_parts(kernels, problem, of_group, seed):
    """Everything of one rank together, and what goes together before and after an exchange."""
    x, local, gy, geometry, groups = problem
    generator = torch.Generator().manual_seed(seed)
    restriction = torch.randn(of_group * groups, *local.shape[1:], generator=generator)
    coarse = torch.randn(len(local), of_group * groups, 1, 1, generator=generator)
    tensors = (x, local, restriction, coarse)
    wanted = two_level_and_grads(*tensors, gy, geometry)
    scales = two_level_and_grads(*(t.abs() for t in (*tensors, gy)), geometry)

    y, z = kernels.whole(*tensors, geometry)
    grads = kernels.whole_backward(gy, *tensors, z, geometry, (True,) * 4)
    for found, right, scale in zip((y, z, *grads), wanted, scales, strict=True):
        assert_sum(found, right, scale)
    assert y.is_contiguous(memory_format=memory_format_of(x))

    assert torch.equal(kernels.local_and_coarse(x, local, geometry, groups, z, coarse), y)
    gz, g_coarse = kernels.coarse_grads(gy, z, coarse)
    together = kernels.local_and_restriction_backward(
        gy, gz, x, local, restriction, geometry, (True, True, True)
    )
    for found, same in zip((*together, g_coarse), grads, strict=True):
        assert torch.equal(found, same)

    exact = wanted[2:]
    for only in range(4):
        wanted = tuple(index == only for index in range(4))
        alone = kernels.whole_backward(gy, *tensors, z, geometry, wanted)
        assert [grad is not None for grad in alone] == [*wanted]
        # That of r is summed in another order where that of A is not wanted.
        assert only == 2 or torch.equal(alone[only], grads[only])
        assert_sum(alone[only], exact[only], scales[2 + only])


def test_groups_do_not_see_each_other(kernels):
    x = torch.ones(1, 32, 5, 5)
    x[0, 5, 2, 2] = torch.nan
    y = kernels.local(x, torch.ones(64, 4, 3, 3), Geometry((1, 1), (1, 1)), 8)
    expected = torch.zeros(64, 5, 5, dtype=torch.bool)
    expected[8:16, 1:4, 1:4] = True
    assert torch.equal(y[0].isnan(), expected)


@pytest.mark.parametrize(("groups", "width"), [(3, 5), (4, 4), (2, 16)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 9), (9, 16)])
def test_nothing_spreads_beyond_where_it_is_read(kernels, groups, width, stride, size):
    """Other groups, images and rows are not read: 0 times infinity would be seen. (Of an infinite weight or gradient
    at the border the zeros of the padding do make a NaN, as in many a convolution of other libraries.)
    """
    geometry = Geometry((stride, stride), (1, 1), (1, 1))
    x, weight = torch.ones(2, groups * width, *size), torch.ones(groups, width, 3, 3)
    gz = torch.ones_like(F.conv2d(x, weight, None, *geometry, groups))
    clean = conv_and_grads(x, weight, gz, geometry)
    for of, place in (("x", (1, width, 0, size[1] - 1)), ("gz", (1, 1, 2, 2))):
        operands = {"x": x.clone(), "weight": weight.clone(), "gz": gz.clone()}
        operands[of][place] = torch.inf
        marked = {name: t.clone() for name, t in operands.items()}
        marked[of][place] = 1e6
        changed = [a != b for a, b in zip(conv_and_grads(*marked.values(), geometry), clean, strict=True)]
        gx = torch.zeros_like(x)
        x_, weight_, gz_ = operands.values()
        z = kernels.restrict(x_, weight_, geometry).transpose(0, 1)
        gw = kernels.restrict_backward(gz_.transpose(0, 1), x_, weight_, geometry, gx, True)
        for found, wanted in zip((z, gx, gw), changed, strict=True):
            assert torch.equal(~found.isfinite(), wanted), of


def test_nothing_spreads_beyond_where_the_coarse_term_reads_it(kernels):
    """The infinities lie where the last blocks of pixels, which are not whole, might find them left behind."""
    size = (7, 11)
    y, gy = torch.ones(2, 2, 21, *size)
    y, z, coarse = y.to(memory_format=LAST), torch.ones(5, 2, *size), torch.ones(21, 5, 1, 1)
    z[3, 1, 4, 4], gy[1, 20, 5, 8] = torch.inf, torch.inf  # pixels 125 and 140 of 154
    kernels.add_coarse_(y, z, coarse)
    gz, g_coarse = kernels.coarse_grads(gy, z, coarse)
    expected = torch.zeros(2, 21, *size, dtype=torch.bool)
    expected[1, :, 4, 4] = True
    assert torch.equal(y.isinf(), expected) and not y.isnan().any()
    expected = torch.zeros(5, 2, *size, dtype=torch.bool)
    expected[:, 1, 5, 8] = True
    assert torch.equal(gz.isinf(), expected) and not gz.isnan().any()
    expected = torch.zeros(21, 5, dtype=torch.bool)
    expected[20], expected[:, 3] = True, True
    assert torch.equal(g_coarse[..., 0, 0].isinf(), expected) and not g_coarse.isnan().any()


@pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(("groups", "width"), [(3, 5), (4, 8)])
def test_only_the_images_given_are_written(kernels, groups, width, memory):
    """The middle of three images is computed; its neighbours in memory stay as they are."""
    geometry = Geometry((1, 1), (1, 1))
    x = torch.randn(1, groups * width, 5, 7).to(memory_format=memory)
    weight, z = torch.randn(groups, width, 3, 3), torch.randn(groups, 1, 5, 7)
    gx, y = torch.ones(2, 3, groups * width, 5, 7)
    gx, y = gx.to(memory_format=memory), y.to(memory_format=memory)
    kernels.restrict_backward(z, x, weight, geometry, gx[1:2], False)
    kernels.add_coarse_(y[1:2], z, torch.randn(groups * width, groups, 1, 1))
    for t in (gx, y):
        assert (t[::2] == 1).all() and (t[1] != 1).any()


def test_threads_change_sums_by_rounding_and_nothing_from_run_to_run(kernels, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry((1, 1), (1, 1))
    x = torch.randn(5, 24, 6, 7, generator=generator).to(memory_format=LAST)
    weight, gz = torch.randn(3, 8, 3, 3, generator=generator), torch.randn(3, 5, 6, 7, generator=generator)
    coarse = torch.randn(24, 3, 1, 1, generator=generator)
    monkeypatch.setattr(call, "WORTH_VALUES", 1)

    local, gy = torch.randn(48, 8, 3, 3, generator=generator), torch.randn(5, 48, 6, 7, generator=generator)
    wide = torch.randn(5, 48, 6, 7, generator=generator).to(memory_format=LAST)

    def run(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        gx, y = torch.ones_like(x), x.clone(memory_format=torch.preserve_format)
        gw = kernels.restrict_backward(gz, x, weight, geometry, gx, True)
        g_wide, g_local = kernels.local_backward(gy, wide, local, geometry, 6, (True, True))
        gz_, g_coarse = kernels.coarse_grads(x, gz, coarse)
        kernels.add_coarse_(y, gz, coarse)
        maps = [
            kernels.restrict(x, weight, geometry),
            gx,
            y,
            gz_,
            kernels.local(wide, local, geometry, 6),
            g_wide,
        ]
        return maps, [gw, g_coarse, g_local]

    for threads in (2, 3, 7):
        maps, sums = run(threads)
        for found, wanted in zip(maps, run(1)[0], strict=True):
            assert torch.equal(found, wanted)
        for found, again, wanted in zip(sums, run(threads)[1], run(1)[1], strict=True):
            assert torch.equal(found, again)
            # Sums of 210 products of normal numbers, of which at most 5 parts are added in another order.
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4, 5, 5).double(), torch.ones(2, 4, 5, 5, device="meta")], ids=["float64", "meta"]
)
def test_other_tensors_are_not_supported(x):
    weights = [torch.ones(shape).to(x) for shape in ((4, 2, 3, 3), (2, 2, 3, 3), (4, 2, 1, 1))]
    reason = NativeKernels().unsupported(Problem.of(x, *weights, Geometry(), 1))
    assert reason is not None and "float32 on CPUs" in reason
