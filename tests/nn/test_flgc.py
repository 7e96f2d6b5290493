"""FLGC is a masked dense convolution that learns its mask; its inference form computes the groups alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn.flgc import FLGConv2d, one_hot_rows
from twolevel.nn.inference.fold import fold_permutations

CL = torch.channels_last
# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ALWAYS_THE_SAME = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def choose(conv: FLGConv2d, inputs, outputs) -> FLGConv2d:
    """Put input and output channels into these groups."""
    with torch.no_grad():
        for logits, chosen in ((conv.input_logits, inputs), (conv.output_logits, outputs)):
            logits.copy_(F.one_hot(torch.as_tensor(chosen), conv.groups))
    return conv


@st.composite
def layers(draw) -> FLGConv2d:
    """Layers of every geometry with drawn groups: few channels in up to 5 groups, so that many are empty."""
    groups, n, m = draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
    conv = FLGConv2d(
        n,
        m,
        draw(st.sampled_from([1, 3, (2, 3)])),
        draw(pairs),
        draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        groups=groups,
        dilation=draw(pairs),
        dtype=torch.float64,
    )
    inputs, outputs = (draw(st.lists(st.integers(0, groups - 1), min_size=c, max_size=c)) for c in (n, m))
    return choose(conv, inputs, outputs).to(
        memory_format=draw(st.sampled_from([torch.contiguous_format, CL]))
    )


def layer(**options) -> FLGConv2d:
    torch.manual_seed(0)
    return FLGConv2d(8, 12, 3, 2, 1, groups=4, **options)


def image(channels=8, dtype=torch.float32, memory_format=torch.contiguous_format) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, 9, 8, dtype=dtype).to(memory_format=memory_format).requires_grad_()


def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of x and of every parameter for a gradient that is the same each time."""
    y = module(x)
    gy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], gy)]


def masked_weight(conv: FLGConv2d) -> torch.Tensor:
    """W with the entries across groups at zero, entry by entry."""
    inputs, outputs = (of.tolist() for of in conv.groups_of())
    weight = conv.weight.detach().clone()
    for o, of_output in enumerate(outputs):
        for i, of_input in enumerate(inputs):
            if of_output != of_input:
                weight[o, i] = 0
    return weight


# ---- the training form


@ALWAYS_THE_SAME
@given(layers())
def test_training_form_is_a_dense_convolution_without_entries_across_groups(conv):
    x = image(conv.in_channels, torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, masked_weight(conv), None, *conv.geometry), **CLOSE)


@ALWAYS_THE_SAME
@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_rows_are_one_hot_exactly(rows):
    """Also for ties, and where adding and subtracting the softmax would leave a rounding error."""
    logits = torch.tensor(rows, requires_grad=True)
    hard = one_hot_rows(logits)
    assert torch.equal(hard, F.one_hot(logits.softmax(1).argmax(1), 3).float())


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5])
def test_ties_choose_one_group(value):
    assert one_hot_rows(torch.full((5, 4), value)).sum(1).tolist() == [1] * 5


def test_gradient_of_rows_is_the_jacobian_of_softmax():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    arriving = torch.randn(6, 4, dtype=torch.float64)
    (got,) = torch.autograd.grad(one_hot_rows(logits), logits, arriving)
    for row, p, g in zip(got, logits.softmax(1).detach(), arriving, strict=True):
        torch.testing.assert_close(row, (torch.diag(p) - torch.outer(p, p)) @ g, **CLOSE)


def test_gradient_of_logits_is_that_of_the_mask():
    """With gM[o, i] = sum over the kernel of gW' W: dL/dS = gM^T T and dL/dT = gM S, then softmax's Jacobian."""
    conv, x = layer(dtype=torch.float64), image(dtype=torch.float64)
    _, _, _, of_inputs, of_outputs = run(conv, x)

    weight = masked_weight(conv).requires_grad_()
    y = F.conv2d(x, weight, None, *conv.geometry)
    gy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    g_mask = (torch.autograd.grad(y, weight, gy)[0] * conv.weight).sum((2, 3))
    s, t = (F.one_hot(of, conv.groups).double() for of in conv.groups_of())
    for got, logits, g in (
        (of_inputs, conv.input_logits, g_mask.t() @ t),
        (of_outputs, conv.output_logits, g_mask @ s),
    ):
        p = logits.softmax(1)
        torch.testing.assert_close(got, p * (g - (p * g).sum(1, keepdim=True)), **CLOSE)
        assert (got.norm(dim=1) > 0).all()


def test_training_moves_channels_to_other_groups():
    """A first public version gave the logits no gradient, and its groups never changed."""
    conv, x = layer(), image()
    target = FLGConv2d(8, 12, 3, 2, 1, groups=4)(x).detach()
    before = conv.groups_of()
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(conv(x), target).backward()
        optimizer.step()
    for old, new in zip(before, conv.groups_of(), strict=True):
        assert not torch.equal(old, new)


def test_gradients_of_image_and_weight_are_numerically_right():
    conv = choose(FLGConv2d(3, 4, 2, groups=2, dtype=torch.float64), [0, 1, 0], [1, 1, 0, 0])
    x = torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)

    def output(x, weight):
        return torch.func.functional_call(conv, {"weight": weight}, x)

    assert torch.autograd.gradcheck(output, (x, conv.weight))


# ---- the inference form


@ALWAYS_THE_SAME
@given(layers(), st.booleans())
def test_inference_form_equals_training_form(conv, channels_last):
    x = image(conv.in_channels, torch.float64, CL if channels_last else torch.contiguous_format)
    frozen = conv.to_inference()
    torch.testing.assert_close(frozen(x), conv(x), **CLOSE)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def shuffled_groups(sizes: list[int]) -> torch.Tensor:
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize(
    ("inputs", "outputs", "weights"),
    [
        ([10, 10, 10], [7, 7, 7], [(21, 10)]),  # equal: as they are
        ([10, 10, 10, 0], [7, 7, 7, 0], [(21, 10)]),  # empty groups are left out
        ([10, 10, 10], [21, 0, 0], [(21, 10)]),  # so are inputs that nothing reads
        ([22, 20, 24], [31, 30, 32], [(3 * 32, 32)]),  # nearly equal: up to the next multiple of 16
        ([10, 20, 3], [12, 14, 7], [(12, 10), (14, 20), (7, 3)]),  # unequal: each on its own
        ([20, 20, 0], [12, 9, 2], [(12, 20), (9, 20), (2, 1)]),  # outputs without inputs: a zero filter
        ([9, 0], [0, 5], [(5, 1)]),
    ],
)
def test_inference_form_suits_the_groups(inputs, outputs, weights):
    conv = FLGConv2d(sum(inputs), sum(outputs), 3, groups=len(inputs), dtype=torch.float64)
    choose(conv, shuffled_groups(inputs), shuffled_groups(outputs))
    frozen, x = conv.to_inference(), image(conv.in_channels, torch.float64)
    assert [tuple(weight.shape[:2]) for weight in frozen.parameters()] == weights
    torch.testing.assert_close(frozen(x), conv(x), **CLOSE)


def test_inference_form_keeps_its_values_when_training_goes_on():
    conv, x = layer(), image()
    frozen, before = conv.to_inference(), conv(x)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.neg_()
    torch.testing.assert_close(frozen(x), before)


@pytest.mark.parametrize(
    ("inputs", "outputs", "vanished"),
    [
        ([4, 4], [4, 4], ["1.parts.0.0", "1.order"]),
        ([4, 4], [5, 3], ["1.order"]),  # each group takes some channels
        ([16, 14, 2], [16, 15, 0], []),  # 32 of 32 inputs, but some twice and some not at all
    ],
)
def test_permutations_vanish_into_dense_layers_beside(inputs, outputs, vanished):
    n, m = sum(inputs), sum(outputs)
    conv = choose(FLGConv2d(n, m, 3, groups=len(inputs)), shuffled_groups(inputs), shuffled_groups(outputs))
    parts = nn.Conv2d(8, n, 1), conv.double().to_inference(), nn.ReLU(), nn.Conv2d(m, 5, 1)
    network, x = nn.Sequential(*parts).double().eval(), image(dtype=torch.float64)
    folding = fold_permutations(network)
    assert (list(folding.folded), folding.kept) == (vanished, {})
    torch.testing.assert_close(folding.model(x), network(x), **CLOSE)


def test_inference_forms_state_goes_into_another_of_the_same_groups():
    conv, other, x = layer(), layer(), image()
    nn.init.zeros_(other.weight)
    frozen = other.to_inference()
    frozen.load_state_dict(conv.to_inference().state_dict())
    assert torch.equal(frozen(x), conv.to_inference()(x))
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))


@pytest.mark.parametrize("form", [lambda conv: conv, FLGConv2d.to_inference], ids=["training", "inference"])
def test_outputs_without_inputs_are_zero_and_inputs_without_outputs_unused(form):
    conv = form(choose(FLGConv2d(3, 3, 1, groups=3), [0, 0, 2], [0, 1, 1]))
    x = image(3)
    y = conv(x)
    assert torch.equal(y[:, 1:], torch.zeros(2, 2, 9, 8))
    (reach,) = torch.autograd.grad(y.sum(), x)
    assert (reach.abs().sum((0, 2, 3)) > 0).tolist() == [True, True, False]


# ---- counts, initial values, group convolutions


def test_realised_work_is_that_of_the_groups_and_nominal_that_of_balance():
    conv = choose(FLGConv2d(4, 6, (2, 3), groups=3), [0, 0, 0, 2], [0, 0, 1, 1, 1, 2])
    assert conv.used_parameters() == 6 * (3 * 2 + 0 * 3 + 1 * 1)
    assert conv.macs(10) == 10 * conv.used_parameters()
    assert conv.used_parameters(nominal=True) == 6 * 4 * 6 // 3
    assert conv.macs(10, nominal=True) == 10 * 6 * 4 * 6 // 3


def test_parameters_of_separate_groups_are_the_used_ones():
    conv = choose(FLGConv2d(33, 33, 3, groups=3), shuffled_groups([10, 20, 3]), shuffled_groups([12, 14, 7]))
    assert sum(weight.numel() for weight in conv.to_inference().parameters()) == conv.used_parameters()


def test_groups_start_random_and_about_balanced():
    conv = FLGConv2d(4000, 4000, 1, groups=4)
    for groups in conv.groups_of():
        # 1000 expected of 4000 draws with probability 1/4: the standard deviation is 27.
        assert (groups.bincount(minlength=4) - 1000).abs().max() < 5 * 27
        assert (groups[1:] != groups[:-1]).float().mean() > 0.6


def test_initial_values_have_the_stated_size_and_follow_the_generator():
    conv = FLGConv2d(64, 256, 3, groups=4, logit_std=0.5)
    conv.reset_parameters(torch.Generator().manual_seed(5))
    first = copy.deepcopy(conv.state_dict())
    # 147,456 weights; 1,024 logits, whose standard deviation has a relative error of about 2 %.
    assert conv.weight.var().item() == pytest.approx(2 / (64 / 4 * 9), rel=0.05)
    assert conv.output_logits.std().item() == pytest.approx(0.5, rel=0.1)
    torch.manual_seed(77)
    conv.reset_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(value, first[name]) for name, value in conv.state_dict().items())


def test_weight_decay_spares_the_logits_unless_wanted():
    assert layer().undecayed == ("input_logits", "output_logits")
    assert layer(decay_logits=True).undecayed == ()


@ALWAYS_THE_SAME
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1, "same"]))
def test_group_convolution_is_represented_exactly(groups, inputs, outputs, padding):
    grouped = nn.Conv2d(groups * inputs, groups * outputs, 3, 1, padding, 2, groups, bias=False).double()
    conv, x = FLGConv2d.from_grouped(grouped.eval()), image(groups * inputs, torch.float64)
    torch.testing.assert_close(conv(x), grouped(x), **CLOSE)
    assert not conv.training
    frozen = conv.to_inference()
    torch.testing.assert_close(frozen(x), grouped(x), **CLOSE)
    assert not list(frozen.buffers()), "contiguous groups need no reordering"
    # What the mask hides is there to be found.
    assert (conv.weight != 0).all()
    assert conv.used_parameters() == grouped.weight.numel()


# ---- a drop-in for nn.Conv2d


def test_state_round_trip_and_deepcopy_give_the_same_outputs():
    conv, other, x = layer(), FLGConv2d(8, 12, 3, 2, 1, groups=4), image()
    assert not torch.equal(other(x), conv(x))
    assert {name: tuple(tensor.shape) for name, tensor in conv.state_dict().items()} == {
        "weight": (12, 8, 3, 3),
        "input_logits": (8, 4),
        "output_logits": (12, 4),
    }
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(x), conv(x))
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))


def test_forward_writes_no_state():
    conv = layer()
    versions = [tensor._version for tensor in conv.state_dict(keep_vars=True).values()]
    attributes = dict(vars(conv))
    conv(image()).sum().backward()
    assert [tensor._version for tensor in conv.state_dict(keep_vars=True).values()] == versions
    assert vars(conv) == attributes


def test_meta_device_gives_the_shape_and_the_nominal_work_alone():
    with torch.device("meta"):
        conv = layer()
        assert conv(torch.empty(2, 8, 9, 8)).shape == (2, 12, 5, 4)
    assert conv.macs(1, nominal=True) == 12 * 8 * 9 // 4
    with pytest.raises(UserError, match="on the meta device are unknown"):
        conv.macs(1)


def test_channels_last_weights_and_images_give_channels_last_results():
    wanted = run(layer(dtype=torch.float64), image(dtype=torch.float64))
    conv = layer(dtype=torch.float64).to(memory_format=CL)
    x = image(dtype=torch.float64, memory_format=CL)
    got = run(conv, x)
    torch.testing.assert_close(got, wanted, **CLOSE)
    frozen = conv.to_inference()
    maps = [tensor for tensor in [*got, frozen(x), *frozen.parameters()] if tensor.dim() == 4]
    assert all(tensor.is_contiguous(memory_format=CL) for tensor in maps)


def test_autocast_is_that_of_conv2d():
    """bfloat16 out, float32 gradients in."""
    conv, wanted = layer(), run(layer(), image())
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = run(conv, image())
        assert conv.to_inference()(image()).dtype == y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    for value, exact in zip([y, *grads], wanted, strict=True):
        # Each tensor on the way is rounded to 8 bits, to within 2**-9 of its value; logits are 5 such away.
        assert 0 < (value - exact).norm() / exact.norm() < 8 * 2**-9


def test_traces_whole():
    conv, x = layer(dtype=torch.float64), image(dtype=torch.float64)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), run(conv, x), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups=0 is not positive; use 1 or more"),
        ({"groups": 2, "logit_std": -1.0}, "logit_std=-1.0 is negative; use 0 or more, such as 0.1"),
    ],
)
def test_error_says_what_was_wrong_and_what_would_do(options, message):
    with pytest.raises(UserError) as caught:
        FLGConv2d(8, 8, 3, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("conv", "options", "message"),
    [
        (nn.Conv2d(4, 4, 1), {}, "has a bias"),
        (nn.Conv2d(4, 4, 1, bias=False, padding_mode="reflect"), {}, "has padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 1, bias=False), {"logit": 0.0}, "logit=0.0 does not choose a group"),
    ],
)
def test_convolution_that_cannot_be_represented_is_refused(conv, options, message):
    with pytest.raises(UserError, match=message):
        FLGConv2d.from_grouped(conv, **options)


@pytest.mark.parametrize("form", [lambda conv: conv, FLGConv2d.to_inference], ids=["training", "inference"])
def test_image_of_other_shape_is_refused(form):
    with pytest.raises(UserError, match=r"takes \[B, 8, H, W\].*, got \[2, 12, 9, 8\]"):
        form(layer())(torch.zeros(2, 12, 9, 8))
