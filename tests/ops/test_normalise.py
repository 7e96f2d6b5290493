"""Batch norm with or without ReLU is torch's two operations, by every set of kernels, forward and backward."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from twolevel.ops.kernels import native
from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.normalise import Moments, Normalisation, Running, joined
from twolevel.ops.normalise import batch_norm
from twolevel.ops.normalise_dispatch import SETS

FORMATS = [torch.contiguous_format, torch.channels_last]
# Odd images, fewer channels than a vector has lanes, more, a part of one, one image, one pixel, lines of many pixels.
SHAPES = [
    (4, 17, 7, 7),
    (2, 3, 5, 4),
    (1, 64, 9, 9),
    (9, 16, 1, 1),
    (3, 130, 2, 3),
    (2, 1, 3, 7),
    (2, 5, 70, 90),
]
EPS = 1e-5
# float32 against float64, of numbers around 5 with a spread of 3: they are rounded to 2^-24 of themselves, sums of some
# ten thousand of them to a few times that, and gradients are differences of sums.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6}
NATIVE = pytest.param(
    "native", torch.float32, marks=pytest.mark.skipif(native.available() is not None, reason="no C compiler")
)
KERNELS = [("torch", torch.float64), ("torch", torch.float32), NATIVE]


def maps(shape, dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    """x, weight, bias, and the gradients of o and of x from elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, go, more = (random(*shape).to(memory_format=memory_format) for _ in range(3))
    weight, bias = random(shape[1]), random(shape[1])
    return x * 3 + 5, weight, bias, go, more


def computed(x, weight, bias, go, more, *, relu, **how):
    """o and the gradients of x, weight and bias."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    o, again = batch_norm(*leaves, EPS, relu=relu, **how)
    assert again.data_ptr() == leaves[0].data_ptr()
    grads = torch.autograd.grad((o, again), [t for t in leaves if t is not None], (go, more))
    return o.detach(), *grads


def composed(x, weight, bias, go, more, *, above):
    """The same by torch in float64, ReLU with the signs that were found: near 0 rounding decides."""
    x, weight, bias, go, more = (None if t is None else t.double() for t in (x, weight, bias, go, more))
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    v = F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, EPS)
    o = v * above
    loss = (o * go).sum() + (leaves[0] * more).sum()
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return v.detach(), o.detach(), *grads


def assert_close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).abs().max() / other.abs().max().clamp_min(1e-3)
        assert error <= tolerance, float(error)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_it_is_batch_norm_and_relu_of_torch(kernels, dtype, shape, memory_format, relu):
    tensors = maps(shape, dtype, memory_format)
    found = computed(*tensors, relu=relu, kernels=SETS[kernels])
    v, *wanted = composed(*tensors, above=found[0] > 0 if relu else torch.ones_like(found[0]))
    assert_close(found, wanted, CLOSE[dtype])
    if relu:
        wrong = (found[0] > 0) != (v > 0)
        assert v[wrong].abs().max() < 1e-5 if wrong.any() else True
    assert found[0].is_contiguous(memory_format=memory_format)
    assert found[1].is_contiguous(memory_format=memory_format)


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectors_of_any_width_find_the_same(kernels, shape, memory_format):
    """By the kernels for smaller processors as well."""
    tensors = maps(shape, torch.float32, memory_format)
    for relu in (True, False):
        found = computed(*tensors, relu=relu, kernels=kernels.NativeNormaliser())
        wanted = composed(*tensors, above=found[0] > 0 if relu else torch.ones_like(found[0]))
        assert_close(found, wanted[1:], CLOSE[torch.float32])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
@pytest.mark.parametrize("given", [*itertools.product([True, False], repeat=2)], ids=str)
def test_weight_and_bias_may_be_missing(kernels, dtype, given, memory_format):
    x, weight, bias, go, more = maps((3, 5, 4, 6), dtype, memory_format)
    tensors = (x, weight if given[0] else None, bias if given[1] else None, go, more)
    found = computed(*tensors, relu=True, kernels=SETS[kernels])
    assert_close(found, composed(*tensors, above=found[0] > 0)[1:], CLOSE[dtype])


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
@pytest.mark.parametrize("frozen", [*itertools.product([True, False], repeat=3)], ids=str)
def test_only_the_gradients_that_are_wanted_are_computed(kernels, dtype, frozen):
    x, weight, bias, go, _ = maps((2, 6, 5, 5), dtype)
    wanted = computed(x, weight, bias, go, torch.zeros_like(x), relu=True, kernels=SETS[kernels])[1:]
    leaves = [t.clone().requires_grad_(not f) for t, f in zip((x, weight, bias), frozen, strict=True)]
    o, _ = batch_norm(*leaves, EPS, relu=True, kernels=SETS[kernels])
    assert o.requires_grad == (not all(frozen))
    if o.requires_grad:
        o.backward(go)
    for leaf, gradient, off in zip(leaves, wanted, frozen, strict=True):
        assert leaf.grad is None if off else torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_a_gradient_may_come_from_one_side_alone(kernels, dtype):
    x, weight, bias, go, more = maps((2, 6, 5, 5), dtype)
    for used in ((True, False), (False, True)):
        leaf = x.clone().requires_grad_()
        outputs = batch_norm(leaf, weight, bias, EPS, relu=True, kernels=SETS[kernels])
        torch.autograd.backward(
            [o for o, use in zip(outputs, used, strict=True) if use],
            [g for g, use in zip((go, more), used, strict=True) if use],
        )
        given = [g if use else torch.zeros_like(g) for g, use in zip((go, more), used, strict=True)]
        wanted = computed(x, weight, bias, *given, relu=True, kernels=SETS[kernels])[1]
        assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_gradients_may_have_any_strides(kernels, dtype):
    """Of a mean over pixels, autograd hands back one number for all of them."""
    x, weight, bias, _, more = maps((2, 5, 3, 4), dtype, torch.channels_last)
    go = torch.randn(2, 5, 1, 1, dtype=dtype).expand_as(x)
    found = computed(x, weight, bias, go, more.contiguous(), relu=True, kernels=SETS[kernels])
    wanted = computed(x, weight, bias, go.clone(), more, relu=True, kernels=SETS[kernels])
    assert_close(found, wanted, 0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_a_large_mean_costs_no_digit_of_the_variance(kernels, dtype, memory_format):
    """Sums of squares would lose it: of 1e8 float32 has no digit left for a variance of 1."""
    generator = torch.Generator().manual_seed(0)
    x = (1e4 + torch.randn(8, 5, 33, 31, generator=generator)).to(memory_format=memory_format)
    x[0, 3, 0, 0] = 0  # nor does a first number that is far from all others
    x[:4, 4] -= 2e4  # nor a mean that moves
    moments = SETS[kernels].moments(x.to(dtype))
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ((moments.mean.double() - mean).abs() <= 1e-6 * (var.sqrt() + mean.abs())).all()
    torch.testing.assert_close(moments.var.double(), var, rtol=1e-5, atol=0)
    assert moments.count == x.numel() // 5


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_moments_may_be_given_and_statistics_follow(kernels, dtype, memory_format):
    tensors = maps((3, 18, 6, 5), dtype, memory_format)
    running = [Running(torch.ones(18).to(dtype), torch.ones(18).to(dtype), 0.25) for _ in range(2)]
    own = computed(*tensors, relu=True, kernels=SETS[kernels], running=running[0])
    moments = SETS[kernels].moments(tensors[0])
    given = computed(*tensors, relu=True, kernels=SETS[kernels], running=running[1], moments=moments)
    # Where moments are found with the rest, the standard deviation is rounded once instead of twice.
    assert_close(given, [t.double() for t in own], CLOSE[dtype])
    reference = nn.BatchNorm2d(18, momentum=0.25, dtype=torch.float64)
    reference.running_mean.fill_(1)
    reference(tensors[0].double())
    for found in running:
        assert_close(found[:2], (reference.running_mean, reference.running_var), CLOSE[dtype])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_what_is_not_a_number_stays_in_its_channel_and_edges_are_as_in_torch(kernels, dtype, memory_format):
    x, weight, bias, go, more = maps((2, 20, 5, 7), dtype, memory_format)
    x[1, 3, 4, 4] = torch.nan
    x[1, 18, 4, 6] = torch.inf
    weight[5], bias[5] = 0, -0.0  # v is 0 or -0: no gradient passes
    x[:, 7] = 3  # without any spread: v is the bias
    bias[8] = torch.nan
    found = computed(x, weight, bias, go, more, relu=True, kernels=SETS[kernels])
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    o = F.relu(F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, EPS))
    wanted = o.detach(), *torch.autograd.grad((o * go).sum() + (leaves[0] * more).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_relu_of_the_vectors_is_that_of_torch():
    if native.available() is not None:
        pytest.skip("no C compiler")
    v = torch.tensor([-0.0, 0.0, torch.nan, torch.inf, -torch.inf, -1e-45, 1e-45, -1.0, 2.0] * 5)
    x = v.reshape(1, 1, 1, 45)
    by = Normalisation(torch.zeros(1), torch.ones(1), None, torch.tensor([-0.0]), True)
    o = SETS["native"].apply(x, by)
    wanted = torch.relu(x)
    torch.testing.assert_close(o, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(o.signbit(), wanted.signbit())  # -0 stays
    passed = SETS["native"].input_grad(torch.ones_like(x), x, None, by, torch.zeros(2, 1))
    leaf = x.clone().requires_grad_()
    torch.relu(leaf).sum().backward()
    assert torch.equal(passed[~x.isnan() & ~x.isinf()], leaf.grad[~x.isnan() & ~x.isinf()])


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, *_ = maps((2, 3, 3, 2))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert gradcheck(lambda *t: batch_norm(*t, EPS, relu=True, kernels=SETS["torch"]), leaves)


@pytest.mark.parametrize("relu", [True, False])
def test_second_derivatives(relu):
    x, weight, bias, *_ = maps((2, 3, 3, 2))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert gradgradcheck(lambda *t: batch_norm(*t, EPS, relu=relu, kernels=SETS["torch"]), leaves)


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
def test_what_no_kernel_differentiates_twice_torch_does():
    tensors = maps((2, 6, 5, 4), torch.float32, torch.channels_last)

    def penalty(x, weight, bias, dtype, compute):
        """The gradients of a norm of gradients."""
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        grads = torch.autograd.grad(compute(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    found = penalty(
        *tensors[:3], torch.float32, lambda *t: batch_norm(*t, EPS, relu=True, kernels=SETS["native"])[0]
    )
    wanted = penalty(
        *tensors[:3], torch.float64, lambda x, w, b: F.relu(F.batch_norm(x, None, None, w, b, True, 0.0, EPS))
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() < 1e-4 * other.norm()  # sums that cancel, twice


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_threads_change_sums_by_rounding_and_nothing_from_run_to_run(monkeypatch, memory_format):
    tensors = maps((5, 24, 6, 7), torch.float32, memory_format)
    monkeypatch.setattr(call, "WORTH_VALUES", 1)

    def run(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        running = Running(torch.zeros(24), torch.zeros(24), 1.0)
        return *computed(*tensors, relu=True, kernels=SETS["native"], running=running), *running[:2]

    one = run(1)
    for threads in (2, 3, 7):
        found = run(threads)
        assert all(torch.equal(a, b) for a, b in zip(found, run(threads), strict=True))
        assert_close(found, [t.double() for t in one], CLOSE[torch.float32])


@pytest.mark.skipif(native.available() is not None, reason="no C compiler")
def test_only_the_images_given_are_written():
    """The middle of three images is normalised; its neighbours in memory stay as they are."""
    for memory_format in FORMATS:
        o = torch.ones(3, 17, 5, 7).to(memory_format=memory_format)
        x = torch.randn(1, 17, 5, 7).to(memory_format=memory_format)
        by = Normalisation(torch.zeros(17), torch.ones(17), None, None, False)
        maps_, parts, _ = native.normalise._shared_out(x, by)
        native.normalise._run("twolevel_norm_apply", maps_, parts, x.data_ptr(), o[1:2].data_ptr())
        assert (o[::2] == 1).all() and torch.equal(o[1:2], x)


def test_sets_of_numbers_are_joined():
    x = torch.randn(3, 7, 5, 4, dtype=torch.float64) + 10
    parts = [x[:1], x[1:]]
    found = [torch.var_mean(part, (0, 2, 3), correction=0) for part in parts]
    counts = torch.tensor([[20.0], [40.0]], dtype=torch.float64)
    moments = joined(torch.stack([m for _, m in found]), torch.stack([v for v, _ in found]), counts)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(moments, Moments(mean, var, torch.tensor(60.0).double()), rtol=1e-13, atol=0)
