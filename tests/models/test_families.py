"""ResNet, ResNeXt, CondenseNet, MobileNetV2: what is replaced, and the published counts."""

import pytest
import torch

from twolevel.analysis import count
from twolevel.errors import UserError
from twolevel.models import create, image_size
from twolevel.nn import KINDS, DGConv2d, DynamicGroupConv2d


def counted(name, **options):
    with torch.device("meta"):
        model = create(name, **options)
    return count(model, (3, image_size(name), image_size(name)))


# ALGORITHMS of the papers: name, xi, MACs in millions with the digits given, parameters.
DGC = [
    ("resnet18", 0.55, "890.40", 12_335_144),
    ("condensenet-74", 0.75, "549.27", 24_060_664),
    ("condensenet-50", 1 / 3, "50.99", 1_067_578),
    ("condensenet-50", 1 / 2, "42.6", 1_067_578),
    ("condensenet-50", 3 / 4, "30.0", 1_067_578),
    ("condensenet-50", 0, "67.8", 1_067_578),
]


@pytest.mark.parametrize(("name", "xi", "macs", "parameters"), DGC)
def test_dgc_networks_have_the_published_counts(name, xi, macs, parameters):
    got = counted(name, conv="dgc", groups=4, xi=xi)
    assert got.parameters == parameters
    digits = len(macs.partition(".")[2])
    assert f"{(got.macs + got.elementwise) / 1e6:.{digits}f}" == macs


def test_dense_resnet18_has_the_published_operations():
    got = counted("resnet18")
    assert got.parameters == 11_689_512
    assert round((got.macs + got.elementwise) / 1e6) == 1818


def test_published_flgc_parameters_leave_the_selection_out():
    model = create("wrn-16-1", conv="flgc", groups=4)
    got = count(model, (3, 32, 32))
    grouped = counted("wrn-16-1", conv="gc", groups=4)
    assert got.published_parameters == grouped.parameters < got.parameters
    assert got.macs == grouped.macs
    assert got.realised_macs > 0


def test_shuffle_costs_what_group_convolution_costs():
    shuffled, grouped = (counted("wrn-28-10", conv=conv, groups=8) for conv in ("shuffle", "gc"))
    assert (shuffled.parameters, shuffled.macs) == (grouped.parameters, grouped.macs)


@pytest.mark.parametrize(("name", "layers"), [("resnext50", 16), ("resnext101", 33)])
def test_groupnet_replaces_every_bottleneck_3x3(name, layers):
    with torch.device("meta"):
        model = create(name, conv="dgconv")
    gated = [m for m in model.modules() if isinstance(m, DGConv2d)]
    assert len(gated) == layers
    assert {m.kernel_size for m in gated} == {(3, 3)}


def test_dgc_replaces_the_projections_of_mobilenetv2():
    with torch.device("meta"):
        model = create("mobilenetv2", conv="dgc", groups=4)
    assert sum(isinstance(m, DynamicGroupConv2d) for m in model.modules()) == 17


@pytest.mark.parametrize("name", ["mobilenetv2-cifar", "resnet18", "condensenet-50", "wrn-10-1"])
@pytest.mark.parametrize("conv", KINDS)
def test_every_kind_runs_in_every_family(name, conv):
    groups = 1 if conv in ("sc", "dgconv") else 4
    model = create(name, conv=conv, groups=groups, num_classes=7)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = model(x)
    assert y.shape == (2, 7)
    y.sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_resnext_is_not_made_dense():
    with pytest.raises(UserError, match="resnext50 is made of group convolutions"):
        create("resnext50", conv="sc")


def test_condensenet_brings_no_second_norm_before_dgc():
    first = create("condensenet-50", conv="dgc", groups=4).features[1].layers[0]
    assert isinstance(first, DynamicGroupConv2d)
    other = create("condensenet-50", conv="gc", groups=4).features[1].layers[0]
    assert isinstance(other, torch.nn.BatchNorm2d)
