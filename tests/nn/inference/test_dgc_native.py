"""The C kernels of DGC's inference form choose the layer's channels, ties included, and compute its outputs."""

import copy
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from twolevel.nn.dgc import DynamicGroupConv2d
from twolevel.nn.inference.dgc import DynamicGroupInference
from twolevel.nn.inference.kept import possible_forms
from twolevel.ops.kernels.native import dynamic, gathered

LAST = torch.channels_last
FORMATS = [torch.contiguous_format, LAST]
RULES = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def called(kernels, monkeypatch) -> list[torch.Size]:
    """The shapes that the C kernels were called with, as compiled for one processor or another."""
    shapes, convolve = [], dynamic.convolve_kept
    monkeypatch.setattr(
        dynamic, "convolve_kept", lambda x, *others: shapes.append(x.shape) or convolve(x, *others)
    )
    return shapes


@pytest.fixture
def by_torch(monkeypatch):
    """A function (form, x) that computes by torch alone."""

    def compute(form: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(gathered, "available", lambda: "not to be used")
            return form(x)

    return compute


def layer(n, m, *, progress=1.0, seed=0, **arguments) -> DynamicGroupConv2d:
    """A layer no two channels of which are alike, in evaluation mode."""
    torch.manual_seed(seed)
    conv = DynamicGroupConv2d(n, m, **{"kernel_size": 1, "groups": 4} | arguments)
    conv.set_progress(progress)
    with torch.no_grad():
        conv.offset.copy_(
            torch.randperm(conv.offset.numel()).view(conv.offset.shape) / conv.offset.numel() + 0.2
        )
        conv.norm.weight.normal_()
        conv.norm.bias.normal_()
        conv.norm.running_mean.normal_()
        conv.norm.running_var.uniform_(0.5, 2)
    return conv.eval()


def image(n, size=(9, 8), batch=2) -> torch.Tensor:
    return torch.randn(batch, n, *size, generator=torch.Generator().manual_seed(1))


def assert_close(y, wanted):
    """Equal to float32's rounding: of some hundred products and of the saliencies, which grow it by a few."""
    torch.testing.assert_close(
        y, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item() if wanted.numel() else 0
    )


def exact(conv, x):
    """The layer in float64, and whether float32 can tell all its saliencies apart."""
    conv, x = copy.deepcopy(conv).double(), x.double()
    saliencies = []
    conv.saliency.register_forward_hook(lambda module, inputs, g: saliencies.append(g))
    wanted = conv(x).float()
    g = saliencies[0].sort().values
    distances = torch.cat(
        [g.diff().flatten(), (g - conv.threshold).abs().flatten()] if conv.by_threshold else [g.diff()]
    )
    return wanted, bool((distances[distances > 0] > 1e-4 * g.max()).all())


@RULES
@given(st.data())
def test_any_layer(called, data):
    """Any sizes, kernel, stride, padding, dilation, memory format, share of kept channels, threshold and bound."""
    draw, pair = data.draw, lambda low, high: st.tuples(*[st.integers(low, high)] * 2)
    heads = draw(st.sampled_from([1, 2, 4]))
    n, m = heads * draw(st.integers(1, 20)), heads * draw(st.integers(1, 20))
    arguments = {"kernel_size": draw(pair(1, 3)), "stride": draw(pair(1, 3)), "padding": draw(pair(0, 3))}
    xi = draw(st.floats(0, 1 - 1 / n))
    threshold = draw(st.sampled_from(["head", "global"]))
    bound = draw(st.none() | st.floats(0.1, 2))
    if round(xi * n) == n:
        return
    conv = layer(
        *(n, m),
        **arguments,
        dilation=draw(pair(1, 2)),
        groups=heads,
        xi=xi,
        threshold=threshold,
        saliency_bound=bound,
        progress=draw(st.floats(0, 1)),
    )
    if conv.by_threshold:
        conv.threshold.fill_(draw(st.floats(0, 1)))
    x = image(n, draw(pair(5, 20)), draw(st.integers(1, 2))).to(memory_format=draw(st.sampled_from(FORMATS)))
    wanted, told_apart = exact(conv, x)
    form = draw(st.sampled_from(possible_forms(conv.kernel_size, conv.geometry)))
    y = DynamicGroupInference(conv, n - int(conv.num_dropped()), form)(x)
    assert called.pop() == x.shape
    assert y.is_contiguous() if x.is_contiguous() else y.is_contiguous(memory_format=LAST)
    if told_apart:
        assert_close(y, wanted)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("n", [24, 40, 120, 352])
def test_ties_drop_the_channels_of_lower_index(called, n, kernel, memory_format):
    """All offsets are 1; where no hidden unit fires, all channels tie at 1, and all below 0 tie at 0."""
    torch.manual_seed(0)
    conv = DynamicGroupConv2d(n, 32, kernel, padding=kernel // 2, saliency_bound=0.5, xi=0.4).eval()
    conv.set_progress(1)
    x = image(n, (8, 8)).to(memory_format=memory_format)
    for offset in (1.0, -1.0, 0.0):
        nn.init.constant_(conv.offset, offset)
        nn.init.zeros_(conv.excite)
        assert_close(conv.to_inference()(x), conv(x))
    some = conv.offset.view(-1)[::3]
    with torch.no_grad():
        some.fill_(0.25)
    assert_close(conv.to_inference()(x), conv(x))
    assert len(called) == 4


@pytest.mark.parametrize(
    "arguments", [{}, {"kernel_size": 3, "padding": 1}, {"threshold": "global"}], ids=str
)
def test_torch_computes_the_same(called, by_torch, arguments):
    conv, x = layer(64, 32, **arguments), image(64)
    if conv.by_threshold:
        conv.threshold.fill_(0.6)
    form = conv.to_inference()
    wanted = by_torch(form, x)
    assert not called
    assert_close(form(x), wanted)
    assert_close(form(x[0]), wanted[0])
    assert_close(form(x[:0]), wanted[:0])
    assert len(called) == 3
    exported = torch.export.export(form, (x[:1],), strict=False) if not conv.by_threshold else None
    if exported:
        assert_close(exported.module()(x[:1]), wanted[:1])


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_no_bit(monkeypatch, batch, memory_format):
    conv = layer(64, 64, kernel_size=3, padding=1)
    form, x = conv.to_inference(), image(64, (40, 40), batch).to(memory_format=memory_format)
    alone = form(x)
    for threads in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(form(x), alone)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_not_a_number_reaches_every_output(called, memory_format):
    """One pixel makes its channel's mean, and so all saliencies."""
    x = image(32).to(memory_format=memory_format)
    x[:, 3, 2, 2] = torch.nan
    conv = layer(32, 16)
    nn.init.ones_(conv.norm.weight)
    assert conv(x).isnan().all()
    assert conv.to_inference()(x).isnan().all()
    assert called


def test_form_gives_no_gradient_and_keeps_its_input(called):
    x = image(32).requires_grad_()
    before = x.detach().clone()
    assert not layer(32, 16).to_inference()(x).requires_grad
    assert torch.equal(x, before)
    assert called
