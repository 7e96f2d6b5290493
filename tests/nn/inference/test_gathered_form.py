"""The inference form of FLGC by the C kernels: as drawn groups, no channel more, and a network's usual life."""

import copy
import re
import shutil

import pytest
import torch
from torch import nn

from twolevel.errors import UserError
from twolevel.nn import FLGConv2d
from twolevel.nn.inference.fold import fold_permutations
from twolevel.nn.inference.gathered import GatheredConv2d
from twolevel.ops.kernels.native import gathered

# float32: some hundred products, each rounded to 2^-24 of values of about 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LAST = torch.channels_last

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def layer(n=40, m=36, groups=3, **arguments) -> FLGConv2d:
    torch.manual_seed(0)
    return FLGConv2d(n, m, **{"kernel_size": 3, "padding": 1} | arguments, groups=groups).eval()


def image(n=40, size=(9, 8), batch=2) -> torch.Tensor:
    return torch.randn(batch, n, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def called(monkeypatch) -> list[torch.Size]:
    """The shapes that the C kernels were called with."""
    shapes, convolve = [], gathered.convolve_groups
    monkeypatch.setattr(
        gathered, "convolve_groups", lambda x, *others: shapes.append(x.shape) or convolve(x, *others)
    )
    return shapes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"stride": 2}, {"kernel_size": 1, "padding": 0}, {"groups": 1}, {"groups": 30}], ids=str
)
def test_form_equals_the_layer(called, arguments, memory_format):
    conv, x = layer(**arguments), image().to(memory_format=memory_format)
    form = conv.to_inference()
    assert isinstance(form, GatheredConv2d)
    assert sum(parameter.numel() for parameter in form.parameters()) >= conv.used_parameters()
    for given in (x, x[:1], x[:0], x[0]):
        y = form(given)
        torch.testing.assert_close(y, conv(given), **CLOSE)
    assert form(x).is_contiguous(memory_format=memory_format)
    assert len(called) == 5


@pytest.mark.parametrize("groups", [3, 30])
def test_torch_computes_the_same(called, groups):
    """For a gradient, another type, a compiler or an exporter."""
    conv, x = layer(groups=groups), image()
    form, wanted = conv.to_inference(), conv(x)
    of_x = [torch.autograd.grad(f(x.requires_grad_()).sum(), x)[0] for f in (form, conv)]
    torch.testing.assert_close(*of_x, **CLOSE)
    x.requires_grad_(False)
    torch.testing.assert_close(torch.export.export(form, (x,)).module()(x), wanted, **CLOSE)
    torch.testing.assert_close(copy.deepcopy(form).double()(x.double()), conv.double()(x.double()), **CLOSE)
    assert not called


def test_copies_moves_and_states(called):
    conv, x = layer(), image()
    form = conv.to_inference()
    wanted = form(x)
    assert torch.equal(copy.deepcopy(form)(x), wanted)
    assert torch.equal(copy.deepcopy(form).double().float()(x), wanted)
    assert torch.equal(copy.deepcopy(form).to(memory_format=LAST)(x), wanted)
    state = copy.deepcopy(form.state_dict())
    form.convolve.filters.zero_()
    assert not form(x).any()
    form.load_state_dict(state)
    assert torch.equal(form(x), wanted)
    assert len(called) == 6


@torch.no_grad()
def test_permutations_fold_into_the_layers_beside(called):
    conv, x = layer(), image(8)
    network = nn.Sequential(nn.Conv2d(8, 40, 1), conv.to_inference(), nn.ReLU(), nn.Conv2d(36, 5, 1)).eval()
    folding = fold_permutations(network)
    assert list(folding.folded) == ["1.take", "1.order"]
    assert not folding.kept
    torch.testing.assert_close(folding.model(x), network(x), **CLOSE)
    assert len(called) == 2
    assert called[0] == called[1]


def test_other_channels_are_refused():
    with pytest.raises(UserError, match=re.escape("the convolution takes [B, 40, H, W] or [40, H, W], got")):
        layer().to_inference()(image(41))
