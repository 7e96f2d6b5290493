"""Group convolution with a shuffle is just that, in training and in inference form."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from twolevel.errors import UserError
from twolevel.nn import initialize
from twolevel.nn.channels import take_channels
from twolevel.nn.inference.fold import fold_permutations
from twolevel.nn.shuffle import ShuffleConv2d

CL = torch.channels_last
# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ALWAYS_THE_SAME = settings(max_examples=40, deadline=None, derandomize=True, database=None)
BOTH_SHUFFLES = pytest.mark.parametrize("seed", [None, 3], ids=["channel_shuffle", "permutation"])


@st.composite
def layers(draw) -> ShuffleConv2d:
    groups = draw(st.integers(1, 4))
    n, m = (groups * draw(st.integers(1, 3)) for _ in range(2))
    pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
    conv = ShuffleConv2d(
        n,
        m,
        draw(st.sampled_from([1, 3, (2, 3)])),
        draw(pairs),
        draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        groups=groups,
        dilation=draw(pairs),
        permutation_seed=draw(st.sampled_from([None, 0, 1])),
        dtype=torch.float64,
    )
    return conv.to(memory_format=draw(st.sampled_from([torch.contiguous_format, CL])))


def layer(seed=None, **options) -> ShuffleConv2d:
    torch.manual_seed(0)
    return ShuffleConv2d(8, 12, 3, 2, 1, groups=4, permutation_seed=seed, **options)


def image(channels=8, dtype=torch.float32, memory_format=torch.contiguous_format) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, 9, 8, dtype=dtype).to(memory_format=memory_format).requires_grad_()


def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of x and of every parameter for a gradient that is the same each time."""
    y = module(x)
    gy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], gy)]


@ALWAYS_THE_SAME
@given(layers())
def test_output_is_group_convolution_in_another_order(conv):
    x = image(conv.in_channels, torch.float64)
    grouped = nn.functional.conv2d(x, conv.weight, None, *conv.geometry, conv.groups)
    y = conv(x)
    for c in range(conv.out_channels):
        if conv.permutation is None:
            # ShuffleNet, Figure 1: one output of each group in turn.
            source = c % conv.groups * (conv.out_channels // conv.groups) + c // conv.groups
        else:
            source = conv.permutation[c]
        torch.testing.assert_close(y[:, c], grouped[:, source], **CLOSE)


@ALWAYS_THE_SAME
@given(layers(), st.booleans())
def test_inference_form_equals_training_form(conv, channels_last):
    x = image(conv.in_channels, torch.float64, CL if channels_last else torch.contiguous_format)
    frozen = conv.to_inference()
    torch.testing.assert_close(frozen(x), conv(x), **CLOSE)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@BOTH_SHUFFLES
def test_inference_form_keeps_its_values_when_training_goes_on(seed):
    conv, x = layer(seed), image()
    frozen, before = conv.to_inference(), conv(x)
    with torch.no_grad():
        for tensor in conv.state_dict().values():
            tensor.zero_()
    torch.testing.assert_close(frozen(x), before)


def test_second_layer_sees_every_group_of_the_first():
    layers = [ShuffleConv2d(16, 16, 1, groups=4, dtype=torch.float64) for _ in range(2)]
    x = image(16, torch.float64)
    of_one_output = nn.Sequential(*layers)(x)[:, 0].sum()
    (reach,) = torch.autograd.grad(of_one_output, x)
    assert (reach.unflatten(1, (4, 4)).abs().sum((0, 2, 3, 4)) > 0).all()


@BOTH_SHUFFLES
def test_shuffle_vanishes_into_a_dense_layer_that_follows(seed):
    x, frozen = image(dtype=torch.float64), layer(seed, dtype=torch.float64).to_inference()
    network = nn.Sequential(frozen, nn.ReLU(), nn.Conv2d(12, 5, 1).double()).eval()
    folding = fold_permutations(network)
    assert (list(folding.folded), folding.kept) == (["0.1"], {})
    torch.testing.assert_close(folding.model(x), network(x), **CLOSE)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL], ids=str)
def test_taken_channels_are_those_of_the_index(memory_format):
    x, index = image(memory_format=memory_format), torch.tensor([7, 0, 0, 3])
    y = take_channels(x, index)
    assert torch.equal(y, x[:, index])
    assert y.is_contiguous(memory_format=memory_format)


def test_permutation_depends_on_its_seed_alone():
    first = ShuffleConv2d(8, 64, 1, groups=4, permutation_seed=3).permutation
    torch.manual_seed(99)
    again = ShuffleConv2d(8, 64, 3, groups=2, permutation_seed=3).permutation
    other = ShuffleConv2d(8, 64, 1, groups=4, permutation_seed=4).permutation
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort().values, torch.arange(64))


def test_permutation_survives_the_meta_device():
    with torch.device("meta"):
        conv = ShuffleConv2d(8, 64, 1, groups=4, permutation_seed=3)
    initialize(conv, device="cpu")
    assert torch.equal(conv.permutation, ShuffleConv2d(8, 64, 1, groups=4, permutation_seed=3).permutation)


def test_same_generator_gives_the_same_weight_of_he_variance():
    conv = ShuffleConv2d(64, 256, 3, groups=4)
    conv.reset_parameters(torch.Generator().manual_seed(5))
    first = conv.weight.detach().clone()
    conv.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(conv.weight, first)
    # 36,864 draws: the relative error of their variance is about sqrt(2 / 36,864), less than 1 %.
    assert first.var().item() == pytest.approx(2 / (64 // 4 * 9), rel=0.05)


@BOTH_SHUFFLES
def test_state_round_trip_and_deepcopy_give_the_same_outputs(seed):
    conv, other, x = layer(seed), layer(None if seed is None else seed + 1), image()
    nn.init.ones_(other.weight)
    assert not torch.equal(other(x), conv(x))
    assert {name: tuple(t.shape) for name, t in conv.state_dict().items()} == {
        "weight": (12, 2, 3, 3),
        **({} if seed is None else {"permutation": (12,)}),
    }
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(x), conv(x))
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))


@BOTH_SHUFFLES
def test_meta_device_gives_the_shape(seed):
    with torch.device("meta"):
        assert layer(seed)(torch.empty(2, 8, 9, 8)).shape == (2, 12, 5, 4)


@BOTH_SHUFFLES
def test_channels_last_weights_and_images_give_channels_last_results(seed):
    wanted = run(layer(seed, dtype=torch.float64), image(dtype=torch.float64))
    conv = layer(seed, dtype=torch.float64).to(memory_format=CL)
    x = image(dtype=torch.float64, memory_format=CL)
    got = run(conv, x)
    torch.testing.assert_close(got, wanted, **CLOSE)
    assert all(tensor.is_contiguous(memory_format=CL) for tensor in [*got, conv.to_inference()(x)])


@BOTH_SHUFFLES
def test_autocast_is_that_of_conv2d(seed):
    """bfloat16 out, float32 gradients in."""
    conv, wanted = layer(seed), run(layer(seed), image())
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = run(conv, image())
        assert conv.to_inference()(image()).dtype == y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    for value, exact in zip([y, *grads], wanted, strict=True):
        # Inputs, weights and results are each rounded to 8 bits, to within 2**-9 of their value.
        assert 0 < (value - exact).norm() / exact.norm() < 4 * 2**-9


@BOTH_SHUFFLES
def test_traces_whole(seed):
    conv = layer(seed, dtype=torch.float64)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x = image(dtype=torch.float64)
    torch.testing.assert_close(run(compiled, x), run(conv, x), **CLOSE)


def test_work_is_that_of_group_convolution():
    conv = layer()
    assert conv.macs(5 * 4) == conv.macs(5 * 4, nominal=True) == 5 * 4 * 12 * 8 * 9 // 4
    assert conv.used_parameters() == conv.used_parameters(nominal=True) == 12 * 8 * 9 // 4


@pytest.mark.parametrize("groups", [1, 12])
def test_shuffle_of_one_group_or_of_single_channels_is_left_out(groups):
    assert type(ShuffleConv2d(12, 12, 1, groups=groups).to_inference()) is nn.Conv2d


def test_groups_must_divide_the_channels():
    with pytest.raises(UserError, match="groups=3 does not divide in_channels=8; use one of 1, 2, 4"):
        ShuffleConv2d(8, 12, 3, groups=3)


@pytest.mark.parametrize("shape", [(12, 8, 8), (2, 12, 9, 8), (8, 8)])
def test_image_of_other_shape_is_refused(shape):
    with pytest.raises(UserError, match=r"takes \[B, 8, H, W\] or \[8, H, W\], got"):
        layer()(torch.zeros(shape))
