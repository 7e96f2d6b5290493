"""A network prepared for inference computes what it did, by fewer layers."""

import copy
import shutil

import pytest
import torch
from torch import nn

from twolevel import models
from twolevel.errors import UserError
from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d, LearnedGroupConv2d, ShuffleConv2d
from twolevel.nn.inference.dgc import DynamicGroupInference
from twolevel.nn.inference.gathered import GatheredConv2d
from twolevel.nn.inference.grouped import RegroupedConv2d
from twolevel.nn.inference.network import for_inference

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
LAST = torch.channels_last
# float32, some layers deep; float64.
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


@torch.no_grad()
def trained(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In evaluation mode, with normalisations unlike any that training starts with, and no two saliencies alike."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.uniform_(-1, 1)
                module.bias.normal_(0, 0.1)
        if isinstance(module, DynamicGroupConv2d):
            module.set_progress(1)
            module.offset.copy_(
                torch.randperm(module.offset.numel()).view(module.offset.shape) / module.offset.numel()
            )
        if isinstance(module, LearnedGroupConv2d):
            module.set_progress(1)
    return network.to(dtype).eval()


def images(channels: int = 8, size: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def kinds(network: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in network.modules()]


@torch.no_grad()
def prepared(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """The network for inference, whose outputs are the network's; the network has not changed."""
    before, y = copy.deepcopy(network.state_dict()), network(x)
    form = for_inference(network)
    torch.testing.assert_close(form(x), y, **CLOSE[x.dtype])
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in form.modules())
    return form


CONVS = {
    "dense": lambda: nn.Conv2d(8, 16, 3, padding=1),
    "narrow": lambda: nn.Conv2d(8, 16, 3, padding="same", groups=4, bias=False),
    "narrow with a bias": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=4),
    "wide groups": lambda: nn.Conv2d(8, 64, 3, padding=1, groups=4),
    "shuffle": lambda: ShuffleConv2d(8, 16, 3, padding=1, groups=4),
    "flgc": lambda: FLGConv2d(8, 16, 3, padding=1, groups=3),
    "dgconv": lambda: DGConv2d(8, 16, 3, padding=1),
    "lgc": lambda: LearnedGroupConv2d(8, 16, 3, padding=1, groups=4),
    "dgc": lambda: DynamicGroupConv2d(8, 16, 3, padding=1, groups=4),
    "dgc 1x1": lambda: DynamicGroupConv2d(8, 16, 1, groups=2, threshold="global"),
    "dgc transposed_last": lambda: DynamicGroupConv2d(8, 20, 3, padding=1, groups=2, saliency_bound=0.5),
    "dgc strided": lambda: DynamicGroupConv2d(8, 32, 3, stride=2, padding=1, groups=2),
}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_what_follows_a_convolution_is_folded_into_it(name, affine, memory_format, dtype):
    torch.manual_seed(0)
    conv = CONVS[name]()
    width = conv.out_channels
    network = trained(
        nn.Sequential(conv, nn.BatchNorm2d(width, affine=affine), nn.ReLU(), nn.Conv2d(width, 5, 1)), dtype
    ).to(memory_format=memory_format)
    form = prepared(network, images(dtype=dtype).to(memory_format=memory_format))
    # A permutation, or several convolutions, may stand between.
    if name not in ("shuffle", "dgconv") and RegroupedConv2d not in kinds(form):
        assert nn.BatchNorm2d not in kinds(form)
    ours = any(isinstance(module, DynamicGroupInference | GatheredConv2d) for module in form.modules())
    assert (nn.ReLU in kinds(form)) != ours
    assert nn.Identity not in [type(module) for module in form.children()]


@needs_compiler
@pytest.mark.parametrize(("groups", "stride", "outputs", "gathered"), [
    (4, 1, 16, True), (4, 1, 32, True), (4, 1, 36, False), (4, 2, 16, False), (8, 1, 8, False), (1, 1, 8, False),
])  # fmt: skip
def test_group_convolutions_of_few_channels_are_gathered(groups, stride, outputs, gathered):
    network = trained(nn.Sequential(nn.Conv2d(8, outputs, 3, stride, 1, groups=groups)))
    assert (GatheredConv2d in kinds(prepared(network, images()))) == gathered
    network.double()
    assert GatheredConv2d not in kinds(prepared(network, images(dtype=torch.float64)))


class Shared(nn.Module):
    """A convolution whose output has two users, a normalisation that is called twice, and a shared weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 8, 1)
        self.third.weight = self.second.weight
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x):
        y = self.first(x)
        y = self.norms[0](y) + y
        y = self.norms[1](self.second(y)) + self.norms[1](y)
        return self.norms[2](self.third(y)) + self.norms[3](y)


def test_what_others_use_is_left():
    network = trained(Shared())
    form = prepared(network, images())
    assert kinds(form) == kinds(network)


@pytest.mark.parametrize("conv", ["sc", "dgc"])
def test_a_condensenet_has_one_module_less_for_every_fold(conv):
    options = {"groups": 4, "xi": 0.5, "saliency_bound": 1.0} if conv == "dgc" else {}
    network = trained(models.create("condensenet-50", conv=conv, **options))
    form = prepared(network, images(3, 32))
    # The normalisations that stand before a 1x1 convolution or the classifier stay: nothing comes before them alone.
    assert kinds(form).count(nn.BatchNorm2d) == (1 if conv == "dgc" else 25)
    assert kinds(form).count(DynamicGroupInference) == (24 if conv == "dgc" else 0)


def test_one_layer_is_its_inference_form():
    conv = trained(DynamicGroupConv2d(8, 16, 1))
    assert isinstance(prepared(conv, images()), DynamicGroupInference)


@pytest.mark.filterwarnings("ignore:no permutation is folded")
def test_a_network_that_cannot_be_traced_keeps_its_normalisations():
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    network = trained(Branching(FLGConv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)))
    with pytest.warns(UserWarning, match="no normalisation is folded, as torch.fx cannot trace the network"):
        form = for_inference(network)
    assert nn.BatchNorm2d in kinds(form)
    assert FLGConv2d not in kinds(form)


def test_training_mode_is_refused():
    with pytest.raises(UserError, match="for_inference needs a network in evaluation mode"):
        for_inference(nn.Sequential(nn.Conv2d(3, 3, 1)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_prepared_network_is_exported_by_torch_alone():
    network = trained(models.create("condensenet-50", conv="dgc", groups=4, xi=0.5, saliency_bound=1.0))
    form, x = for_inference(network), images(3, 32)[:1]
    exported = torch.export.export(form, (x,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), network(x), **CLOSE[x.dtype])
