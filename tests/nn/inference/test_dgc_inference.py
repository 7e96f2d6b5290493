"""The inference form of DynamicGroupConv2d: the same outputs as the layer's, from the kept channels alone."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from twolevel.errors import UserError
from twolevel.nn.dgc import DynamicGroupConv2d
from twolevel.nn.inference.dgc import DynamicGroupInference
from twolevel.nn.inference.kept import fastest_form, possible_forms
from twolevel.ops import Geometry

# The same sums of at most some thousand float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
FORMATS = [torch.contiguous_format, torch.channels_last]
# One of each: a product; transposed; transposed in channels_last, for 16 and for odd outputs; forward, both ways.
LAYERS = [
    (32, 64, {"kernel_size": 1, "stride": 2}),
    (32, 64, {"kernel_size": 3, "padding": 1}),
    (32, 256, {"kernel_size": 3, "padding": 1}),
    (32, 24, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    (32, 64, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (32, 24, {"kernel_size": (2, 3), "stride": (1, 3), "padding": (2, 0)}),
]
ids = [f"{n}-{m}-{arguments}" for n, m, arguments in LAYERS]


def layer(n, m, *, progress=1.0, dtype=torch.float64, seed=0, **arguments) -> DynamicGroupConv2d:
    """A layer no two channels of which are alike, in evaluation mode."""
    torch.manual_seed(seed)
    conv = DynamicGroupConv2d(n, m, **arguments, dtype=dtype)
    conv.set_progress(progress)
    with torch.no_grad():
        conv.offset.normal_(0.5, 0.5)
        conv.norm.weight.normal_()
        conv.norm.bias.normal_()
        conv.norm.running_mean.normal_()
        conv.norm.running_var.uniform_(0.5, 2)
    return conv.eval()


def image(n, size=(9, 8), batch=2, dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, n, *size, dtype=dtype)


def forms(conv: DynamicGroupConv2d) -> list[DynamicGroupInference]:
    """The inference form as it is chosen, and every other that this convolution has."""
    kept = conv.in_channels - int(conv.num_dropped())
    others = possible_forms(conv.kernel_size, conv.geometry)
    return [conv.to_inference(), *(DynamicGroupInference(conv, kept, form) for form in others)]


def all_agree(conv: DynamicGroupConv2d, x: torch.Tensor) -> None:
    wanted = conv(x)
    for inference in forms(conv):
        torch.testing.assert_close(
            inference(x), wanted, **CLOSE, msg=lambda text, of=inference: f"{of}: {text}"
        )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_form_equals_the_layer(data):
    """For any sizes, kernel, stride, padding, dilation, batch, share of kept channels, threshold and bound."""
    draw = data.draw
    heads = draw(st.sampled_from([1, 2, 4]), "groups")
    n, m = (heads * draw(st.integers(1, 20), name) for name in ("n", "m"))
    arguments = {
        name: tuple(draw(st.integers(low, high), name) for _ in range(2))
        for name, low, high in [
            ("kernel_size", 1, 3),
            ("stride", 1, 3),
            ("padding", 0, 3),
            ("dilation", 1, 2),
        ]
    }
    xi = draw(st.floats(0, 1 - 1 / n), "xi")
    if round(xi * n) == n:
        return
    threshold = draw(st.sampled_from(["head", "global"]), "threshold")
    choice = {"threshold": threshold, "saliency_bound": draw(st.none() | st.floats(0.1, 2), "saliency_bound")}
    conv = layer(n, m, **arguments, groups=heads, xi=xi, **choice, progress=draw(st.floats(0, 1)))
    if threshold == "global":
        conv.threshold.fill_(draw(st.floats(0, 2)))
    sizes = [draw(st.integers(5, 9), "size") for _ in range(2)]
    all_agree(conv, image(n, sizes, draw(st.integers(1, 3), "batch")))


@pytest.mark.parametrize(("n", "m", "arguments"), LAYERS, ids=ids)
def test_layers_as_they_start_agree(n, m, arguments):
    """All offsets are 1: where no hidden unit fires, all channels tie at 1."""
    for bound in (None, 0.5, 1.25):
        torch.manual_seed(0)
        conv = DynamicGroupConv2d(n, m, **arguments, saliency_bound=bound, dtype=torch.float64).eval()
        conv.set_progress(1)
        all_agree(conv, image(n))
        nn.init.zeros_(conv.excite)
        all_agree(conv, image(n))


def test_scales_of_any_sign_and_zero_agree():
    conv = layer(32, 64, kernel_size=3, padding=1)
    with torch.no_grad():
        for value in (1.0, -1.0, 0.0, 1e-320, None):
            scale = conv.norm.weight if value is None else torch.full((32,), value, dtype=torch.float64)
            conv.norm.weight.copy_(scale)
            conv.norm.weight[::5] = 0
            all_agree(conv, image(32))
            conv.norm.weight.copy_(scale)
            all_agree(conv, image(32))


@pytest.mark.parametrize(("n", "m", "arguments"), LAYERS, ids=ids)
def test_no_channel_above_the_threshold_gives_zeros(n, m, arguments):
    conv = layer(n, m, **arguments, threshold="global")
    conv.threshold.fill_(1e6)
    for inference in forms(conv):
        y = inference(image(n))
        assert y.shape == conv(image(n)).shape
        assert not y.any()


@pytest.mark.parametrize(("n", "m", "arguments"), LAYERS, ids=ids)
def test_float32_agrees_to_its_rounding(n, m, arguments):
    conv, x = layer(n, m, **arguments, dtype=torch.float32), image(n, dtype=torch.float32)
    exact = copy.deepcopy(conv).double()
    assert torch.equal(conv.kept(x), exact.kept(x.double()))  # else a tie, and the tests need another seed
    for inference in forms(conv):
        # A few hundred products, each rounded to within 2**-24 of its value, that add up mostly at random.
        assert (inference(x) - exact(x.double())).norm() < 20 * 2**-24 * exact(x.double()).norm()


@pytest.mark.parametrize(("n", "m", "arguments"), LAYERS, ids=ids)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_output_has_the_memory_format_of_the_input(n, m, arguments, memory_format):
    conv, x = layer(n, m, **arguments), image(n).to(memory_format=memory_format)
    for inference in forms(conv):
        y = inference(x)
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, conv(x), **CLOSE)


def test_strided_input_is_taken_as_it_is():
    conv, x = layer(32, 64, kernel_size=3, padding=1), image(64, (12, 9))
    part = x[:, ::2, 1:10, 2:]
    torch.testing.assert_close(conv.to_inference()(part), conv(part), **CLOSE)


@pytest.mark.parametrize(("n", "m", "arguments"), LAYERS, ids=ids)
@pytest.mark.parametrize("progress", [0, 1])
def test_work_is_that_of_the_kept_channels(n, m, arguments, progress):
    """The operators multiply what `macs` says: a dense layer's filters, or with half the channels half of that."""
    # 32 or 16 channels are kept: no form adds others to fill its kernels.
    conv, x = layer(n, m, **arguments, xi=0.5, progress=progress), image(n, batch=1)
    y = conv(x)
    wanted = conv.macs(y.shape[2] * y.shape[3])
    for inference in forms(conv):
        with FlopCounterMode(display=False) as counter:
            inference(x)
        assert counter.get_total_flops() == 2 * wanted
    heads = wanted - conv.squeeze.numel() - conv.excite.numel()
    assert heads == conv.weight.numel() * y[0, 0].numel() / (2 if progress else 1)


def test_channels_in_excess_fill_the_lanes_of_contiguous_kernels():
    """29 of 64 channels are kept; kernels for contiguous images compute 32 in less time."""
    conv = layer(64, 64, xi=0.55, kernel_size=3, padding=1)
    used = {inference.form: inference.used for inference in forms(conv)}
    assert used == {"transposed": 32, "forward": 32, "transposed_last": 29, "forward_last": 29}
    few = layer(20, 64, xi=0.1, kernel_size=3, padding=1)
    assert few.to_inference().used == 20


def test_form_stays_as_it_was_made():
    conv = layer(32, 64, kernel_size=3, padding=1)
    inference, wanted = conv.to_inference(), conv(image(32))
    with torch.no_grad():
        for tensor in conv.state_dict().values():
            tensor.zero_()
    torch.testing.assert_close(inference(image(32)), wanted, **CLOSE)


@pytest.mark.parametrize("progress", [0, 0.3, 0.6])
def test_form_drops_what_the_layer_drops_at_this_progress(progress):
    conv = layer(32, 64, kernel_size=3, padding=1, progress=progress)
    assert conv.to_inference().kept == conv.kept(image(32))[0, 0].sum()
    all_agree(conv, image(32))


def test_form_is_frozen():
    inference = layer(32, 64, kernel_size=3, padding=1).to_inference()
    assert not list(inference.parameters())
    assert not inference.training
    before = copy.deepcopy(inference.state_dict())
    x = image(32).requires_grad_()
    kept_x = x.detach().clone()
    assert not inference(x).requires_grad
    torch.testing.assert_close(inference.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(x, kept_x)
    inference.train()
    assert torch.equal(inference(x), inference.eval()(x))


@pytest.mark.parametrize(("n", "m", "arguments"), LAYERS, ids=ids)
def test_autocast_changes_nothing(n, m, arguments):
    conv, x = layer(n, m, **arguments, dtype=torch.float32), image(n, dtype=torch.float32)
    inference = conv.to_inference()
    wanted = inference(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inference(x), wanted)
        rounded = x.bfloat16()  # as a convolution before it leaves it
        assert torch.equal(inference(rounded), inference(rounded.float()))


def test_copies_and_types():
    inference = layer(32, 64, kernel_size=3, padding=1).to_inference()
    x, wanted = image(32), inference(image(32))
    twin = copy.deepcopy(inference)
    inference.parts()["rows"].zero_()
    assert torch.equal(twin(x), wanted)
    inference.load_state_dict(twin.state_dict())
    assert torch.equal(inference(x), wanted)
    single = twin.float()(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=1e-4, atol=1e-4)  # 24 bits


@pytest.mark.parametrize(
    ("outputs", "kernel", "stride", "padding", "form"),
    [
        (16, 1, 2, 0, "product"),
        (16, 1, 1, 1, "forward"),
        (16, 3, 1, 1, "transposed"),
        (64, 3, 1, 1, "transposed_last"),
        (10, 3, 1, 1, "transposed_last"),
        (64, 3, 2, 1, "forward"),
        (10, 3, 2, 1, "forward_last"),
        (64, 3, 1, 3, "forward"),
    ],
)
def test_form_is_chosen_by_shape(outputs, kernel, stride, padding, form):
    geometry = Geometry((stride, stride), (padding, padding))
    assert fastest_form(outputs, (kernel, kernel), geometry) == form
    conv = layer(16, 2 * outputs, groups=2, kernel_size=kernel, stride=stride, padding=padding)
    assert conv.to_inference().form == form


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("transpose", "unknown form 'transpose'; did you mean transposed or transposed_last"),
        (
            "product",
            "form='product' cannot compute kernel_size=(3, 3), stride=(2, 2), padding=(1, 1); "
            "use forward or forward_last",
        ),
    ],
)
def test_form_that_cannot_be_is_refused(form, message):
    with pytest.raises(UserError, match=re.escape(message)):
        DynamicGroupInference(layer(32, 64, kernel_size=3, stride=2, padding=1), 8, form)
