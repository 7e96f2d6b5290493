"""Inference forms by operations of torch alone: the same function, the same choice of channels for every image."""

import shutil

import pytest
import torch
from torch import nn

from twolevel.nn import (
    DGConv2d,
    DynamicGroupConv2d,
    FLGConv2d,
    LearnedGroupConv2d,
    ShuffleConv2d,
    for_inference,
)
from twolevel.nn.inference.dgc import DynamicGroupInference
from twolevel.nn.inference.exportable import DynamicGroupBatch, exportable
from twolevel.nn.inference.gathered import GatheredConv2d
from twolevel.nn.inference.kept import possible_forms

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
# Two hundred float64 products, in another order; float32, in which the C kernels are, three layers deep.
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}
OURS = (DynamicGroupInference, GatheredConv2d)

CONVS = {
    "narrow groups": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=4),
    "shuffle": lambda: ShuffleConv2d(8, 16, 3, padding=1, groups=4),
    "flgc": lambda: FLGConv2d(8, 16, 3, padding=1, groups=3),
    "flgc with an empty group": lambda: FLGConv2d(4, 16, 3, padding=1, groups=9),
    "flgc of large unequal groups": lambda: FLGConv2d(8, 80, 3, stride=2, padding=1, groups=2, logit_std=1),
    "dgconv": lambda: DGConv2d(8, 16, 3, padding=1),
    "lgc": lambda: LearnedGroupConv2d(8, 16, 3, padding=1, groups=4),
    "dgc": lambda: DynamicGroupConv2d(8, 16, 3, padding=1, groups=4),
    "dgc by a threshold": lambda: DynamicGroupConv2d(8, 16, 1, groups=2, threshold="global"),
    "dgc with a bound": lambda: DynamicGroupConv2d(8, 20, 3, padding=1, groups=2, saliency_bound=0.5),
    "dgc strided": lambda: DynamicGroupConv2d(8, 32, 3, stride=2, padding=1, groups=2),
}


@torch.no_grad()
def trained(conv: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network of the layer, its norm and a dense layer, in evaluation, with numbers unlike those at first."""
    torch.manual_seed(0)
    network = nn.Sequential(
        conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(), nn.Conv2d(conv.out_channels, 3, 1)
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.normal_()
            module.bias.normal_(0, 0.1)
        if isinstance(module, DynamicGroupConv2d | LearnedGroupConv2d):
            module.set_progress(1)
        if isinstance(module, DynamicGroupConv2d):
            module.offset.normal_(0.5, 0.5)
            if module.by_threshold:
                module.threshold.fill_(0.6)
    return network.to(dtype).eval()


def images(channels: int, dtype: torch.dtype = torch.float64, batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, channels, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", CONVS)
@torch.no_grad()
def test_a_network_of_torchs_operations_computes_what_it_did(name, dtype):
    conv = CONVS[name]()
    network, x = trained(conv, dtype), images(conv.in_channels, dtype)
    form = exportable(for_inference(network))
    assert not any(isinstance(module, OURS) for module in form.modules())
    torch.testing.assert_close(form(x), network(x), **CLOSE[dtype])


@pytest.mark.parametrize("name", CONVS)
def test_a_layer_alone_is_its_exportable_form(name):
    conv = trained(CONVS[name]())[0]
    x = images(conv.in_channels)
    with torch.no_grad():
        torch.testing.assert_close(exportable(for_inference(conv))(x), conv(x), **CLOSE[x.dtype])


@needs_compiler
@pytest.mark.parametrize("name", [name for name in CONVS if name.startswith(("narrow", "flgc", "lgc"))])
@torch.no_grad()
def test_outputs_that_no_neighbour_takes_keep_their_order_with_a_folded_norm(name):
    conv = CONVS[name]()
    network, x = trained(conv, torch.float32)[:-1].eval(), images(conv.in_channels, torch.float32)
    form = for_inference(network)
    assert [type(module) for module in form] == [GatheredConv2d]
    torch.testing.assert_close(exportable(form)(x), network(x), **CLOSE[x.dtype])


@pytest.mark.parametrize("kernel", [1, (3, 2)])
@torch.no_grad()
def test_the_weight_is_the_same_from_every_form(kernel):
    conv = trained(DynamicGroupConv2d(8, 12, kernel, groups=2))[0]
    forms = [DynamicGroupInference(conv, 3, form) for form in possible_forms(conv.kernel_size, conv.geometry)]
    for form in forms:
        torch.testing.assert_close(form.weight(), forms[0].weight(), rtol=0, atol=0)


@torch.no_grad()
def test_the_choice_of_channels_is_that_of_each_image():
    conv = trained(DynamicGroupConv2d(16, 8, 3, padding=1, groups=2))[0]
    nn.init.normal_(conv.squeeze, 0, 3)
    form, x = exportable(for_inference(conv)), images(16)
    assert len({str(kept.tolist()) for kept in conv.kept(x)}) > 2
    torch.testing.assert_close(form(x), torch.cat([conv(image) for image in x.split(1)]), **CLOSE[x.dtype])


@torch.no_grad()
def test_of_equal_saliencies_the_choice_is_that_of_the_layer():
    """As at first, where no hidden unit fires and the offsets are alike."""
    conv = trained(DynamicGroupConv2d(16, 8, 3, padding=1, groups=2))[0]
    conv.squeeze.zero_()
    conv.offset.copy_(torch.tensor([0.5, 1.0]).repeat(8).expand(2, -1))
    form, x = exportable(for_inference(conv)), images(16)
    assert isinstance(form, DynamicGroupBatch) and 0 < form.dropped < 8 + 8
    torch.testing.assert_close(form(x), conv(x), **CLOSE[x.dtype])
