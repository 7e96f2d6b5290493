"""DGConv2d: what its gates make of it, their gradients, and its inference form."""

import copy
import functools
import itertools
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn import initialize
from twolevel.nn.dgconv import DGConv2d, kronecker_mask

# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
FORMATS = [torch.contiguous_format, torch.channels_last]
# (n, m, a, b, K): the largest power of two that divides both widths.
WIDTHS = [(8, 8, 1, 1, 3), (4, 40, 1, 10, 2), (40, 80, 5, 10, 3), (24, 16, 3, 2, 3), (2, 6, 1, 3, 1)]


def layer(n=8, m=8, kernel=3, *, gates=None, dtype=torch.float64, **options) -> DGConv2d:
    torch.manual_seed(0)
    conv = DGConv2d(n, m, kernel, dtype=dtype, **options)
    if gates is not None:
        with torch.no_grad():  # any magnitude: the sign decides
            conv.gates.copy_(torch.tensor([0.3 if g else -0.7 for g in gates]))
    return conv


def image(n=8, size=(7, 6), dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, n, *size, dtype=dtype, requires_grad=True)


def kron_of(gates: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """U of the paper, by torch.kron, for gates that are numbers 0 and 1."""
    ones, eye = torch.ones(2, 2, dtype=gates.dtype), torch.eye(2, dtype=gates.dtype)
    factors = [g * ones + (1 - g) * eye for g in gates]
    return functools.reduce(torch.kron, [*factors, torch.ones(b, a, dtype=gates.dtype)])


def patterns(number: int):
    return itertools.product([0, 1], repeat=number)


def same_output(module: nn.Module, conv: DGConv2d, x: torch.Tensor) -> None:
    torch.testing.assert_close(module(x), conv(x), **CLOSE)


@pytest.mark.parametrize("number", range(1, 7))
def test_nonzeros_and_groups_of_every_gate_pattern(number):
    conv = layer(2**number, 2**number, 1)
    for gates in patterns(number):
        conv = layer(2**number, 2**number, 1, gates=gates)
        connected = conv.connectivity()
        assert connected.shape == (2**number, 2**number)
        product = 1
        for gate in gates:
            product *= 2 * (1 + gate)
        assert connected.sum() == conv.complexity() == product
        # Rows that share a channel are equal, so there are as many groups as different rows.
        assert conv.channel_groups() == len(connected.unique(dim=0)) == 2 ** gates.count(0)
        assert conv.used_parameters() == product
        assert conv.macs(10) == conv.macs(10, nominal=True) == 10 * product


def test_channels_connect_where_they_agree_on_the_bits_of_closed_gates():
    """Gate 1 is the most significant bit."""
    for gates in patterns(4):
        closed = sum(1 << (3 - k) for k, gate in enumerate(gates) if not gate)
        wanted = [[(o ^ i) & closed == 0 for i in range(16)] for o in range(16)]
        assert layer(16, 16, 1, gates=gates).connectivity().tolist() == wanted


def test_last_gates_closed_are_interleaved_groups():
    connected = layer(8, 8, gates=[1, 0, 0]).connectivity()
    assert [row.nonzero().flatten().tolist() for row in connected[:4]] == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(("n", "m", "a", "b", "number"), WIDTHS)
def test_layer_is_a_convolution_with_the_kronecker_product(n, m, a, b, number):
    """Whatever the widths, in its outputs, its connectivity and its complexity."""
    x = image(n)
    for gates in patterns(number):
        conv = layer(n, m, padding=1, gates=gates)
        mask = kron_of(torch.tensor(gates, dtype=torch.float64), a, b)
        assert torch.equal(conv.connectivity(), mask.bool())
        assert conv.complexity() == mask.sum()
        assert conv.used_parameters() == 9 * mask.sum()
        wanted = F.conv2d(x, conv.weight * mask[:, :, None, None], padding=1)
        torch.testing.assert_close(conv(x), wanted, **CLOSE)


def test_paper_widths():
    assert [len(DGConv2d(*widths, 1, device="meta").gates) for widths in ((16, 160), (160, 320))] == [4, 5]


def test_all_open_is_dense_and_all_closed_depthwise():
    x = image()
    for initial, groups in (("dense", 1), ("depthwise", 8)):
        conv = layer(stride=2, padding=1, initial=initial)
        like = nn.Conv2d(8, 8, 3, 2, 1, groups=groups, bias=False).double()
        with torch.no_grad():
            like.weight.copy_(conv.weight if groups == 1 else torch.einsum("oohw->ohw", conv.weight)[:, None])
        same_output(like, conv, x)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_groups_at_the_start_are_contiguous(groups):
    conv = layer(16, 8, padding=1, groups=groups)
    inference = conv.to_inference()
    assert type(inference) is nn.Conv2d
    assert inference.groups == groups == conv.channel_groups()


def test_random_start_draws_signs_of_the_given_scale():
    gates = torch.cat([DGConv2d(64, 64, 1, gate_scale=0.5).gates.detach() for _ in range(40)])
    assert torch.equal(gates.abs(), torch.full_like(gates, 0.5))
    assert 0.35 < (gates > 0).float().mean() < 0.65  # 240 fair draws: five standard deviations
    assert DGConv2d(8, 8, 1).gates.abs().tolist() == pytest.approx([1e-8] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_keep_their_side_in_any_type(dtype):
    """1e-8 is zero in float16, but zero has a sign."""
    conv = layer(64, 64, 1, dtype=torch.float32)
    wanted = conv.connectivity()
    assert 1 < conv.channel_groups() < 64
    assert torch.equal(conv.to(dtype).connectivity(), wanted)
    assert torch.equal(layer(64, 64, 1, dtype=dtype).connectivity(), wanted)


def test_a_gate_at_zero_is_open_or_closed_but_not_half():
    conv = layer(padding=1)
    with torch.no_grad():
        conv.gates.copy_(torch.tensor([0.0, -0.0, 0.0]))
    assert conv.channel_groups() == 2
    assert conv.complexity() == 32
    same_output(conv.to_inference(), conv, image())


def test_mask_is_exact_for_gates_of_any_size():
    """Straight-through written as g + (step - g) would leave a rounding."""
    for dtype in (torch.float32, torch.float64):
        conv = layer(dtype=dtype)
        with torch.no_grad():
            conv.gates.copy_(torch.tensor([0.1, -0.3, 1e17], dtype=dtype))
        assert conv.complexity() == 32


# Gradients.


@pytest.mark.parametrize(("n", "m", "a", "b", "number"), WIDTHS)
def test_gradients_of_gates_and_weight_are_those_of_the_kronecker_product(n, m, a, b, number):
    x = image(n)
    for gates in patterns(number):
        conv = layer(n, m, padding=1, gates=gates)
        numbers = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
        masked = conv.weight * kron_of(numbers, a, b)[:, :, None, None]
        loss = (F.conv2d(x, masked, padding=1)).square().sum()
        wanted = torch.autograd.grad(loss, [numbers, conv.weight, x])
        got = torch.autograd.grad(conv(x).square().sum(), [conv.gates, conv.weight, x])
        torch.testing.assert_close(got, wanted, **CLOSE)
        assert got[0].all()


def test_gradient_of_complexity_is_that_of_the_product():
    for gates in patterns(3):
        conv = layer(24, 8, gates=gates)
        numbers = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
        (wanted,) = torch.autograd.grad(kron_of(numbers, 3, 1).sum(), numbers)
        (got,) = torch.autograd.grad(conv.complexity(), conv.gates)
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_gradcheck_of_weight_input_and_real_gates():
    conv = layer(4, 8, gates=[1, 0], stride=2, padding=1)
    x = image(4, (4, 3))

    def output(x, weight):
        return torch.func.functional_call(conv, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(output, (x, conv.weight))
    gates = torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kronecker_mask, (gates,))


def test_training_moves_gates_across_the_threshold():
    """Towards a depthwise target: SGD closes gates, and forward writes nothing itself."""
    conv = layer(initial="dense", padding=1)
    target = copy.deepcopy(conv)
    nn.init.constant_(target.gates, -1)
    x = image().detach()
    with torch.no_grad():
        wanted = target(x)
    before = copy.deepcopy(conv.state_dict())
    loss = (conv(x) - wanted).square().mean()
    torch.testing.assert_close(conv.state_dict(), before, rtol=0, atol=0)
    loss.backward()
    torch.optim.SGD([conv.gates], lr=0.1).step()
    assert conv.channel_groups() > 1
    with torch.no_grad():
        assert (conv(x) - wanted).square().mean() < loss


def test_weight_decay_is_to_spare_the_gates():
    assert DGConv2d.undecayed == ("gates",)
    assert set(DGConv2d.undecayed) < {name for name, _ in layer().named_parameters()}


# The inference form.

widths = st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 4)).map(lambda t: (t[0] << t[2], t[1] << t[2]))
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None, database=None)
@given(
    widths=widths,
    gates=st.lists(st.booleans(), min_size=6, max_size=6),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
)
def test_inference_form_equals_training_form(widths, gates, kernel, stride, padding, dilation, formats):
    conv = layer(*widths, kernel, stride=stride, padding=padding, dilation=dilation)
    with torch.no_grad():
        conv.gates.copy_(torch.tensor([1.0 if g else -1.0 for g in gates[: len(conv.gates)]]))
    conv = conv.to(memory_format=formats[0])
    x = image(widths[0]).detach().contiguous(memory_format=formats[1])
    inference = conv.to_inference()
    same_output(inference, conv, x)
    convs = [module for module in inference.modules() if isinstance(module, nn.Conv2d)]
    assert [c.groups for c in convs] == [conv.channel_groups()]
    assert convs[0].weight.numel() == conv.used_parameters()
    closed_come_first = sorted(conv.gates) == conv.gates.tolist()
    assert (inference is convs[0]) == closed_come_first


@pytest.mark.parametrize("gates", [[1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 1, 0, 1, 0]])
def test_inference_form_keeps_channels_last(gates):
    """With the channel shuffle, which has a way of its own, and without."""
    conv = layer(32, 96, gates=gates, padding=1).to(memory_format=torch.channels_last)
    x = image(32).detach().contiguous(memory_format=torch.channels_last)
    inference = conv.to_inference()
    assert inference[1].weight.is_contiguous(memory_format=torch.channels_last)
    permuted = inference[0](x)
    assert torch.equal(permuted, x[:, inference[0].index])
    for y in (permuted, inference(x), conv(x)):
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_inference_form_is_frozen_and_apart():
    conv = layer(gates=[1, 0, 1], padding=1)
    x = image().detach()
    random = torch.get_rng_state()
    inference, wanted = conv.to_inference(), conv(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert not inference.training
    assert not any(p.requires_grad for p in inference.parameters())
    with torch.no_grad():
        conv.weight.zero_()
    torch.testing.assert_close(inference(x), wanted, **CLOSE)


# From other convolutions.


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_from_grouped_is_exact(groups):
    torch.manual_seed(0)
    options = {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1), "groups": groups, "bias": False}
    conv = nn.Conv2d(24, 16, (3, 2), **options).double().eval()
    made = DGConv2d.from_grouped(conv)
    same_output(conv, made, image(24))
    assert made.channel_groups() == groups
    assert made.used_parameters() == conv.weight.numel()
    assert not made.training
    torch.testing.assert_close(made.to_inference().weight, conv.weight, rtol=0, atol=0)
    # A closed gate is not dead: what it hides is drawn, so it has a gradient.
    made(image(24)).square().sum().backward()
    assert made.gates.grad.all()


def test_from_dense_is_exact():
    conv = nn.Conv2d(4, 8, 3, padding="same", bias=False)
    made, x = DGConv2d.from_dense(conv, gate_scale=0.5), image(4, dtype=torch.float32)
    assert torch.equal(made(x), conv(x))
    assert made.gates.tolist() == [0.5, 0.5]


# A drop-in for nn.Conv2d.


def test_state_dict_round_trip_and_deepcopy():
    conv = layer(4, 8, (2, 3))
    assert {name: tuple(t.shape) for name, t in conv.state_dict().items()} == {
        "weight": (8, 4, 2, 3),
        "gates": (2,),
    }
    other = DGConv2d(4, 8, (2, 3), initial="dense", dtype=torch.float64)
    other.load_state_dict(conv.state_dict())
    x = image(4)
    assert torch.equal(other(x), conv(x))
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))
    inference = layer(8, 8, gates=[1, 0, 1]).to_inference()
    assert torch.equal(copy.deepcopy(inference)(image()), inference(image()))


def test_initial_state_depends_on_the_seed_alone():
    with torch.device("meta"):
        model = nn.Sequential(DGConv2d(64, 64, 3), DGConv2d(64, 64, 3))
    drawn = initialize(model, 3, "cpu")
    torch.manual_seed(5)
    again = initialize(nn.Sequential(DGConv2d(64, 64, 3), DGConv2d(64, 64, 3)), 3)
    torch.testing.assert_close(drawn.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(drawn[0].gates, drawn[1].gates)
    # 36,864 draws: the deviation of the variance is 0.7 %, and this is five times that.
    assert abs(drawn[0].weight.var() * 64 * 9 / 2 - 1) < 0.037


def test_meta_device_gives_the_shape():
    conv = DGConv2d(8, 24, 3, 2, 1, device="meta")
    assert conv(torch.empty(2, 8, 9, 8, device="meta")).shape == (2, 24, 5, 4)
    with pytest.raises(UserError, match=r"^the gates are on the meta device and have no values"):
        conv.macs(20)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_format_of_weights_and_images_is_kept(memory_format):
    conv, x = layer(16, 16, gates=[1, 0, 1, 0], padding=1), image(16)
    wanted = conv(x).detach()
    conv, x = conv.to(memory_format=memory_format), x.detach().contiguous(memory_format=memory_format)
    y = conv(x.requires_grad_())
    torch.testing.assert_close(y, wanted, **CLOSE)
    y.square().sum().backward()
    for tensor in (y, x.grad, conv.weight.grad):
        assert tensor.is_contiguous(memory_format=memory_format)


def test_autocast_is_that_of_conv2d():
    """bfloat16 out, float32 gradients in, gates included."""
    conv, x = layer(16, 16, padding=1, dtype=torch.float32), image(16, dtype=torch.float32)
    wanted = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        z = conv.to_inference()(x)
    assert y.dtype == z.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == conv.weight.grad.dtype == conv.gates.grad.dtype == torch.float32
    for got in (y, z):  # weights, inputs and results are each rounded to 8 bits, to within 2**-9
        assert 0 < (got - wanted).norm() / wanted.norm() < 3 * 2**-9


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_both_forms_compile_whole(backend, memory_format):
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("the compiler of torch.compile needs a C++ compiler")
    conv = layer(8, 8, gates=[1, 1, 0], padding=1).to(memory_format=memory_format)
    x = image().detach().contiguous(memory_format=memory_format)
    wanted = torch.autograd.grad(conv(x).square().sum(), [conv.weight, conv.gates])
    compiled = torch.compile(conv, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(x).square().sum(), [conv.weight, conv.gates])
    torch.testing.assert_close(got, wanted, **CLOSE)
    inference = torch.compile(conv.to_inference(), fullgraph=True, backend=backend)
    same_output(inference, conv, x)
    assert inference(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DGConv2d(3, 64, 3),
            "3 -> 64 channels leave DGConv2d no gate to learn; use even numbers, or nn.Conv2d",
        ),
        (
            lambda: DGConv2d(8, 12, 3, groups=8),
            "groups=8 cannot be made by the 2 gates of 8 -> 12 channels; use one of 1, 2, 4",
        ),
        (
            lambda: DGConv2d(8, 8, 3, groups=3),
            "groups=3 cannot be made by the 3 gates of 8 -> 8 channels; use one of 1, 2, 4, 8",
        ),
        (lambda: DGConv2d(8, 8, 3, initial="dens"), "unknown initial 'dens'; did you mean dense?"),
        (
            lambda: DGConv2d(8, 8, 3, initial="dense", groups=2),
            "initial='dense' and groups=2 both say where the gates start; give one",
        ),
        (
            lambda: DGConv2d(8, 8, 3, gate_scale=0),
            "gate_scale=0 is not positive; use a small number such as 1e-8",
        ),
        (
            lambda: DGConv2d.from_dense(nn.Conv2d(8, 8, 3, groups=2, bias=False)),
            "a convolution with groups=2 is not dense; use from_grouped",
        ),
        (
            lambda: DGConv2d.from_dense(nn.Conv2d(8, 8, 3)),
            "the convolution has a bias, which DGConv2d does not support; use bias=False, zero padding",
        ),
        (
            lambda: DGConv2d.from_grouped(nn.Conv2d(8, 8, 3, padding_mode="reflect", bias=False)),
            "the convolution has padding_mode='reflect', which DGConv2d does not support; use bias=False, zero padding",
        ),
        (
            lambda: DGConv2d.from_grouped(nn.Conv2d(12, 12, 3, groups=3, bias=False)),
            "groups=3 cannot be made by the 2 gates of 12 -> 12 channels; use one of 1, 2, 4",
        ),
    ],
)
def test_error_says_what_was_wrong_and_what_would_do(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message
