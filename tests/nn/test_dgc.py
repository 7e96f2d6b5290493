"""DynamicGroupConv2d: which channels it keeps, what it computes of them, and what gets a gradient."""

import copy
import os
import shutil

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn.dgc import DynamicGroupConv2d
from twolevel.nn.init import initialize

# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
N, M, HEADS = 16, 12, 4

ARGUMENTS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 3), "padding": (0, 2)},
    {"kernel_size": (5, 1), "padding": "same", "dilation": (1, 3)},
]


def layer(n=N, m=M, *, progress=1.0, dtype=torch.float64, **arguments) -> DynamicGroupConv2d:
    """A layer no two channels of which are alike, in evaluation mode."""
    torch.manual_seed(0)
    if "kernel_size" not in arguments:
        arguments |= {"kernel_size": 3, "padding": 1}
    conv = DynamicGroupConv2d(n, m, **arguments, dtype=dtype)
    conv.set_progress(progress)
    with torch.no_grad():
        conv.offset.normal_(0.5, 0.5)
        conv.norm.weight.normal_()
        conv.norm.bias.normal_()
        conv.norm.running_mean.normal_()
        conv.norm.running_var.uniform_(0.5, 2)
    return conv.eval()


def image(n=N, size=(7, 6), batch=3, dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, n, *size, dtype=dtype)


def saliency(conv: DynamicGroupConv2d, x: torch.Tensor) -> torch.Tensor:
    """g [B, H, n] as a forward hook sees it."""
    seen = []
    hook = conv.saliency.register_forward_hook(lambda module, inputs, output: seen.append(output))
    conv(x)
    hook.remove()
    assert len(seen) == 1
    return seen[0]


def head_by_head(conv: DynamicGroupConv2d, x: torch.Tensor) -> torch.Tensor:
    """The paper in loops over images and heads: saliency, the kept channels, their convolution, its place."""
    t = conv.norm(x).relu()
    n, r, heads = conv.in_channels, conv.hidden, conv.groups
    outputs = conv.out_channels // heads
    images = []
    for one in t:
        p, places = one.mean((1, 2)), [None] * conv.out_channels
        for i in range(heads):
            hidden = (conv.squeeze[i * r : (i + 1) * r] @ p).relu()
            g = (conv.excite[i * n : (i + 1) * n] @ hidden + conv.offset[i]).relu()
            kept = g.argsort(stable=True)[int(conv.num_dropped()) :].sort().values
            part = one[kept] * g[kept, None, None].clamp(max=conv.saliency_bound or torch.inf)
            weight = conv.weight[i * outputs : (i + 1) * outputs][:, kept]
            for j, channel in enumerate(F.conv2d(part[None], weight, None, *conv.geometry)[0]):
                places[j * heads + i] = channel
        images.append(torch.stack(places))
    return torch.stack(images)


@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize("progress", [0, 0.4, 1])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_layer_is_the_heads_one_by_one(arguments, progress, bound):
    conv = layer(**arguments, progress=progress, saliency_bound=bound)
    assert bound is None or (saliency(conv, image()) > bound)[conv.kept(image())].any()
    torch.testing.assert_close(conv(image()), head_by_head(conv, image()), **CLOSE)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_nothing_dropped_and_saliency_one_is_a_shuffled_dense_convolution(arguments):
    conv, dense = layer(**arguments, xi=0), nn.Conv2d(N, M, **arguments, bias=False).double()
    with torch.no_grad():
        dense.weight.copy_(conv.weight)
        conv.excite.zero_()
        conv.offset.fill_(1)
    wanted = torch.channel_shuffle(dense(conv.norm(image()).relu()), HEADS)
    torch.testing.assert_close(conv(image()), wanted, **CLOSE)


@pytest.mark.parametrize(
    ("progress", "dropped"),
    [(0, 0), (1 / 12, 0), (0.2, 4), (5 / 12, 12), (0.65, 20), (3 / 4, 24), (1, 24)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropped_channels_rise_linearly_from_a_twelfth_to_three_quarters(progress, dropped, dtype):
    conv = layer(32, dtype=dtype)
    conv.set_progress(progress)
    assert int(conv.num_dropped()) == dropped
    conv.progress.fill_(progress)  # a training rule may do this itself
    assert int(conv.num_dropped()) == dropped


def formula(n: int, xi: float, progress: float) -> int:
    """The authors' schedule: rounded once, in float64."""
    if progress <= 1 / 12:
        return 0
    return round(n * xi * 3.0 / 2 * (progress - 1 / 12)) if progress < 3 / 4 else round(n * xi)


@pytest.mark.parametrize("xi", [1 / 3, 0.5, 0.55, 0.6, 0.65, 0.75, 0.85])
@pytest.mark.parametrize("steps", [144, 1000, 4680])
def test_dropped_channels_are_rounded_once_at_every_step_and_width(xi, steps):
    """With 144 steps, 72 i / 144 - 6 and its like are often a half, which the last bit of a product decides."""
    for n in range(4, 644, 20):
        conv = DynamicGroupConv2d(n, 4, 1, xi=xi, device="meta")
        conv.progress = torch.arange(steps + 1, dtype=torch.float64) / steps  # all at once
        assert conv.num_dropped().tolist() == [formula(n, xi, i / steps) for i in range(steps + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_layer_drops_what_the_layer_dropped(dtype):
    """At points whose float32 would drop another number too; the checkpoint holds the progress as it was set."""
    conv, resumed = (DynamicGroupConv2d(64, 8, 1, xi=0.75, dtype=dtype) for _ in range(2))
    differ = 0
    for i in range(145):
        conv.set_progress(i / 144)
        resumed.load_state_dict(conv.state_dict())
        assert int(conv.num_dropped()) == int(resumed.num_dropped()) == formula(64, 0.75, i / 144)
        differ += formula(64, 0.75, torch.tensor(i / 144).item()) != formula(64, 0.75, i / 144)
    assert differ


def test_number_of_dropped_channels_is_exact_in_half_precision():
    """Of 1000 channels, integers above 256 have no bfloat16 of their own."""
    conv = DynamicGroupConv2d(1000, 8, 1, xi=0.307)
    conv.set_progress(1)
    assert int(conv.to(torch.bfloat16).num_dropped()) == 307


@settings(max_examples=50, deadline=None)
@given(st.data(), st.floats(0, 1), st.floats(0, 0.95), st.booleans())
def test_exactly_the_least_salient_channels_drop(data, progress, xi, tied):
    """Of every image and head; of equal ones, such as zeros, those of lower index."""
    n = data.draw(st.integers(1, 6)) * HEADS
    if round(xi * n) == n:
        return
    conv = layer(n, xi=xi, progress=progress)
    with torch.no_grad():
        if tied:
            conv.excite.zero_()
            conv.offset.copy_(conv.offset.mul(2).round())  # below 0, several equal ones above
    kept, g = conv.kept(image(n)), saliency(conv, image(n))
    assert kept.shape == g.shape == (3, HEADS, n)
    dropped = int(conv.num_dropped())
    for of_image in zip(g.flatten(0, 1).tolist(), kept.flatten(0, 1).tolist(), strict=True):
        wanted = sorted(range(n), key=lambda c: (of_image[0][c], c))[dropped:]
        assert [c for c in range(n) if of_image[1][c]] == sorted(wanted)


def test_heads_and_images_keep_channels_of_their_own():
    kept = layer(64).kept(image(64))
    assert len(kept[0].unique(dim=0)) == HEADS
    assert len(kept.flatten(1).unique(dim=0)) == 3


@pytest.mark.parametrize("bound", [None, 0.7])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_the_formula(training, bound):
    """By finite differences, where no two saliencies tie: the mask is constant there, and takes no gradient."""
    conv = layer(8, 4, groups=2, xi=0.5, reduction=4, saliency_bound=bound).train(training)
    x = image(8, (4, 3), batch=2)
    g = saliency(conv, x)
    assert 0 < conv.kept(x).sum() < conv.kept(x).numel()
    assert g.sort().values.diff().abs()[g.sort().values[..., 1:] > 0].min() > 1e-3
    names = [name for name, _ in conv.named_parameters()]
    buffers = {name: value.clone() for name, value in conv.named_buffers()}

    def run(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return functional_call(conv, state | {k: v.clone() for k, v in buffers.items()}, (x,))

    inputs = [x, *(p.detach().clone() for p in conv.parameters())]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])


@pytest.mark.parametrize("threshold", ["head", "global"])
def test_a_bound_moves_neither_what_is_kept_nor_what_a_hook_reads(threshold):
    free, bounded = (layer(threshold=threshold, saliency_bound=bound) for bound in (None, 0.5))
    for conv in (free, bounded):
        if threshold == "global":
            conv.threshold.fill_(1)
    assert (saliency(free, image()) > 1).any()
    assert torch.equal(bounded.kept(image()), free.kept(image()))
    assert torch.equal(saliency(bounded, image()), saliency(free, image()))
    assert not torch.equal(bounded(image()), free(image()))
    assert bounded.state_dict().keys() == free.state_dict().keys()
    loose = layer(threshold=threshold, saliency_bound=1e3)
    if threshold == "global":
        loose.threshold.fill_(1)
    assert torch.equal(loose(image()), free(image()))


@pytest.mark.parametrize(("bound", "power"), [(None, 2), (6.0, 1)])
def test_output_grows_as_the_square_of_brightness_and_with_a_bound_as_itself(bound, power):
    """Where saliencies are far above their offsets, and above the bound."""
    conv, brighter = (layer(saliency_bound=bound) for _ in range(2))
    with torch.no_grad():
        for one, scale in ((conv, 1e8), (brighter, 1e12)):
            one.excite.abs_()
            one.squeeze.abs_()
            one.norm.weight.mul_(scale)
            one.norm.bias.mul_(scale)
    # Offsets are 1e-8 of the saliencies.
    torch.testing.assert_close(brighter(image()), conv(image()) * 1e4**power, rtol=1e-5, atol=0)


def test_saliency_learns_through_kept_channels_alone():
    conv = layer(32)
    conv(image(32)).square().sum().backward()
    shown = conv.norm(image(32)).relu().amax((2, 3))[:, None] > 0
    by_any = (conv.kept(image(32)) & (saliency(conv, image(32)) > 0) & shown).any(0)
    assert by_any.any()
    assert not by_any.all()
    assert torch.equal(conv.offset.grad != 0, by_any)
    rows = conv.excite.grad.view(HEADS, 32, -1)
    assert not rows[~by_any].any()
    assert rows[by_any].any()
    assert conv.squeeze.grad.any()
    # The filters of a channel that a head drops in every image are not used either.
    filters = conv.weight.grad.view(HEADS, -1, 32, 3, 3).abs().sum((1, 3, 4))
    assert torch.equal(filters != 0, by_any)


def test_hook_reads_saliency_with_its_gradient():
    conv = layer().train()
    g = saliency(conv, image())
    assert g.shape == (3, HEADS, N)
    assert (g >= 0).all()
    g.sum().backward()
    assert conv.squeeze.grad.any()


def test_global_threshold_cuts_in_evaluation_alone():
    conv = layer(32, threshold="global")
    g = saliency(conv, image(32))
    conv.threshold.copy_(g.median())
    kept = conv.kept(image(32))
    assert torch.equal(kept, g > conv.threshold)
    assert len(kept.sum(-1).unique()) > 1
    x = image(32)
    scaled = conv.norm(x).relu()[:, None] * (g * kept)[..., None, None]
    wanted = F.conv2d(scaled.flatten(1, 2), conv.weight, None, *conv.geometry, groups=HEADS)
    torch.testing.assert_close(conv(x), torch.channel_shuffle(wanted, HEADS), **CLOSE)
    by_head = layer(32)
    torch.testing.assert_close(conv.train()(x), by_head.train()(x), **CLOSE)
    conv.threshold.fill_(float("inf"))
    assert not conv.eval()(x).any()


@pytest.mark.parametrize("threshold", ["head", "global"])
def test_forward_in_evaluation_and_kept_change_no_state(threshold):
    conv = layer(threshold=threshold)
    before, attributes = copy.deepcopy(conv.state_dict()), set(vars(conv))
    conv(image())
    conv.kept(image())
    conv.train().kept(image())
    torch.testing.assert_close(conv.state_dict(), before, rtol=0, atol=0)
    assert set(vars(conv)) == attributes


def test_kept_is_what_evaluation_keeps_whatever_the_mode():
    conv = layer(threshold="global")
    conv.threshold.fill_(0.4)
    wanted = conv.kept(image())
    assert torch.equal(conv.train().kept(image()), wanted)


def test_state_dict_is_the_documented_one_and_goes_round():
    conv = DynamicGroupConv2d(32, 8, (2, 3), threshold="global")
    own = {name: tuple(value.shape) for name, value in conv.state_dict().items() if "norm." not in name}
    assert own == {
        "weight": (8, 32, 2, 3),
        "squeeze": (4 * 4, 32),
        "excite": (4 * 32, 4),
        "offset": (4, 32),
        "progress": (),
        "threshold": (),
    }
    assert {name for name in conv.state_dict() if "norm." in name} == {
        f"norm.{name}" for name in nn.BatchNorm2d(1).state_dict()
    }
    assert "threshold" not in DynamicGroupConv2d(32, 8, 1).state_dict()
    source, target = layer(progress=0.5), layer(progress=0)
    nn.init.normal_(target.weight)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(image()), source(image()))


def test_copy_is_equal_and_apart():
    conv = layer()
    twin = copy.deepcopy(conv)
    assert torch.equal(twin(image()), conv(image()))
    twin.set_progress(0)
    assert not torch.equal(twin(image()), conv(image()))


def test_drawing_parameters_starts_the_layer_anew():
    conv, other = layer(threshold="global", progress=0.5), layer(threshold="global")
    conv.threshold.fill_(3)
    state = torch.get_rng_state()
    for one in (conv, other):
        one.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("weight", "squeeze", "excite", "offset", "progress", "threshold"):
        assert torch.equal(getattr(conv, name), getattr(other, name)), name
    assert (conv.offset == 1).all()
    assert conv.progress == conv.threshold == 0
    assert not torch.equal(conv.weight.flatten()[:64], conv.squeeze.flatten()[:64])


def test_weights_start_as_he_et_al():
    conv = DynamicGroupConv2d(256, 256, 3)
    # Of at least 16,384 draws each: the standard deviation to 5 of its own standard errors.
    for weight, fan_in in ((conv.weight, 256 * 9), (conv.squeeze, 256), (conv.excite, 16)):
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)


def test_network_initialises_from_the_meta_device():
    """As a network does that is cut before it has memory: every parameter and buffer gets its first value."""
    drawn = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = nn.Sequential(DynamicGroupConv2d(16, 8, 3, threshold="global"))
        with torch.no_grad():
            drawn.append(initialize(model, 3, "cpu").state_dict())
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert (drawn[0]["0.offset"] == 1).all()
    assert drawn[0]["0.progress"] == 0


@pytest.mark.parametrize("threshold", ["head", "global"])
@pytest.mark.parametrize("training", [False, True])
def test_meta_device_gives_the_shape(threshold, training):
    with torch.device("meta"):
        conv = DynamicGroupConv2d(16, 12, 3, 2, 1, threshold=threshold).train(training)
    x = torch.empty(2, 16, 9, 8, device="meta")
    assert conv(x).is_meta
    assert conv(x).shape == (2, 12, 5, 4)
    assert conv.kept(x).shape == (2, 4, 16)


def test_channels_last_images_give_channels_last_results():
    conv, x = layer(), image().requires_grad_()
    wanted = torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()])
    last = image().to(memory_format=torch.channels_last).requires_grad_()
    y = conv.to(memory_format=torch.channels_last)(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    got = torch.autograd.grad(y.square().sum(), [last, *conv.parameters()])
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_autocast_computes_in_bfloat16_and_chooses_in_float32():
    conv, x = layer(64, dtype=torch.float32), image(64, dtype=torch.float32)
    wanted, g, kept = conv(x), saliency(conv, x), conv.kept(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        assert torch.equal(saliency(conv, x), g)
        assert torch.equal(conv.kept(x), kept)
    assert y.dtype == torch.bfloat16
    # Images, filters and results are each rounded to 8 bits, to within 2**-9 of their value.
    assert 0 < (y - wanted).norm() / wanted.norm() < 3 * 2**-9


def test_one_compiled_graph_serves_all_progress():
    """Whole, with the forward and backward of the eager layer, and not compiled again as channels drop."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    conv, x = layer(32).train(), image(32)
    compiled = torch.compile(copy.deepcopy(conv), fullgraph=True, backend=count)
    for progress in (0, 0.3, 0.6, 1):
        results = []
        for one in (conv, compiled):
            one.set_progress(progress)
            one.zero_grad()
            y = one(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in one.parameters())])
        torch.testing.assert_close(*results, **CLOSE)
    assert len(graphs) == 1


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="the compiler of torch.compile needs a C++ compiler",
)
def test_compiles_whole():
    conv, x = layer().train(), image()
    compiled = torch.compile(copy.deepcopy(conv), fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x), **CLOSE)


def test_resnet18_has_the_published_parameters():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
        replaced = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
        layers = [DynamicGroupConv2d(c.in_channels, c.out_channels, c.kernel_size) for c in replaced]
    assert len(layers) == 19
    dense = sum(p.numel() for p in model.parameters())
    gone = sum(c.weight.numel() for c in replaced)
    assert dense - gone + sum(conv.used_parameters() for conv in layers) == 12_335_144


def test_multiply_accumulates_fall_with_progress():
    """(n - n_off) k² m pixels for the heads, 2 n (n / d) H for their saliencies."""
    conv = DynamicGroupConv2d(96, 32, 3, xi=0.55)
    saliencies = 2 * 96 * 6 * 4
    assert conv.macs(10) == 96 * 9 * 32 * 10 + saliencies
    conv.set_progress(1)
    assert conv.macs(10) == (96 - 53) * 9 * 32 * 10 + saliencies
    assert conv.macs(10, nominal=True) == round(0.45 * 96 * 9 * 32 * 10) + saliencies
    untrained = DynamicGroupConv2d(96, 32, 3, xi=0.55, device="meta")
    assert untrained.macs(10) == 96 * 9 * 32 * 10 + saliencies
    assert conv.selection_operations() == 2 * 4 * 96


@pytest.mark.parametrize(
    ("n", "options", "hidden"),
    [
        (79, {}, 9),
        (80, {}, 5),
        (79, {"reduction": 8}, 19),
        (80, {"reduction": 8}, 10),
        (64, {"reduction": 4, "halved_below": 0}, 16),
        (99, {"halved_below": 100}, 12),
        (8, {"reduction": 1}, 8),
        (4, {}, 1),
    ],
)
def test_reduction_is_16_and_half_below_80_channels_unless_given(n, options, hidden):
    conv = DynamicGroupConv2d(n, 8, 1, groups=1, **options)
    assert conv.squeeze.shape == (hidden, n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 8, {"groups": 3}), "groups=3 does not divide in_channels=16; use one of 1, 2, 4, 8"),
        ((16, 8, {"threshold": "heads"}), "unknown threshold 'heads'; did you mean head?"),
        ((16, 8, {"xi": 1}), "xi=1 keeps no channel of 16; use 0 <= xi < 1, such as 0.75"),
        ((4, 4, {"xi": 0.9}), "xi=0.9 keeps no channel of 4; use 0 <= xi < 1, such as 0.75"),
        ((16, 8, {"xi": -0.1}), "xi=-0.1 keeps no channel of 16; use 0 <= xi < 1, such as 0.75"),
        *(
            (
                (16, 8, {"saliency_bound": bound}),
                f"saliency_bound={bound} is invalid; use a positive number, such as 6, or None",
            )
            for bound in (0, -1.0, float("inf"), float("nan"))
        ),
        ((16, 8, {"reduction": 0}), "reduction=0 is not positive; use 1 or more, such as 16"),
    ],
    ids=str,
)
def test_error_says_what_was_wrong_and_what_would_do(arguments, message):
    n, m, options = arguments
    with pytest.raises(UserError) as caught:
        DynamicGroupConv2d(n, m, 1, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_is_a_share(progress):
    conv = layer(progress=0.5)
    with pytest.raises(UserError, match=rf"progress={progress} is not a share of the training; use 0 to 1"):
        conv.set_progress(progress)
    assert conv.progress == 0.5


@pytest.mark.parametrize("shape", [(2, M, 9, 8), (M, 9, 8), (9, 8)])
def test_image_of_other_channels_is_refused(shape):
    for use in (layer(), layer().kept):
        with pytest.raises(UserError, match=rf"\[B, {N}, H, W\] or \[{N}, H, W\], got"):
            use(torch.zeros(shape, dtype=torch.float64))
