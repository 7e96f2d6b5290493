"""ResNet, ResNeXt, CondenseNet, MobileNetV2: what is replaced, and the published counts."""

import functools
import math

import pytest
import torch

from twolevel.analysis import count
from twolevel.errors import UserError
from twolevel.models import create, image_size
from twolevel.nn import (
    KINDS,
    BalancedConv2d,
    DGConv2d,
    DynamicGroupConv2d,
    FLGConv2d,
    LearnedGroupConv2d,
    ShuffleConv2d,
    TwoLevelConv2d,
)


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


def test_learned_group_convolution_at_66m_is_the_dense_network():
    """DGC's paper compares with it at condensation 1, where no 1x1 convolution has groups."""
    got = counted("condensenet-50", conv="sc")
    assert round((got.macs + got.elementwise) / 1e6) == 66
    learned = counted("condensenet-50", conv="lgc", groups=4, condensation=1)
    assert (learned.macs, learned.elementwise) == (got.macs, got.elementwise)
    grouped = counted("condensenet-50", conv="gc", groups=4)  # what condensation 4 would cost
    assert round((grouped.macs + grouped.elementwise) / 1e6) == 29


# Of the paper: name, groups and condensation, parameters in millions; the operations that its authors' code counts.
LGC = [
    ("condensenet-74", 4, "4.8", 529_328_264),
    ("condensenet-74", 8, "2.9", 274_233_480),
]


@pytest.mark.parametrize(("name", "groups", "parameters", "operations"), LGC)
def test_condensenet_has_the_published_counts(name, groups, parameters, operations):
    """Its classifier is condensed too, after training, and takes the half of its features. Ours takes them all."""
    got = counted(name, conv="lgc", groups=groups, groups_3x3=groups)
    dropped = 2064 // 2 * 1000
    assert got.macs - dropped + got.elementwise == operations
    assert f"{(got.published_parameters - dropped) / 1e6:.1f}" == parameters


def test_condensenet_86_has_the_published_counts():
    """0.52M parameters and 65M operations, without the fraction."""
    got = counted("condensenet-86", conv="lgc", groups=4)
    assert f"{got.published_parameters / 1e6:.2f}" == "0.52"
    assert (got.macs + got.elementwise) // 10**6 == 65
    dense = counted("condensenet-86", conv="sc")
    assert (got.realised_macs, got.parameters) == (dense.macs, dense.parameters)  # untrained


def test_groups_of_the_3x3_convolutions_that_do_not_divide_the_growth_are_refused():
    with pytest.raises(UserError, match="groups_3x3=16 does not divide growth=8; use one of 1, 2, 4, 8"):
        create("condensenet-50", conv="lgc", groups=4, groups_3x3=16)


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


FAMILIES = ["mobilenetv2-cifar", "resnet18", "condensenet-50", "wrn-10-1"]
CLASSES = {
    "gc": torch.nn.Conv2d,
    "gc2l": TwoLevelConv2d,
    "bgc": BalancedConv2d,
    "shuffle": ShuffleConv2d,
    "flgc": FLGConv2d,
    "dgconv": DGConv2d,
    "dgc": DynamicGroupConv2d,
    "lgc": LearnedGroupConv2d,
}


def groups_of(conv: str) -> int:
    return 1 if conv in ("sc", "dgconv") else 4


def parameters_of(layer: torch.nn.Module, conv: str) -> int:
    """Parameters of a layer n -> m of 4 groups or heads, by the formulas of the papers."""
    n, m, k = layer.in_channels, layer.out_channels, layer.kernel_size[0]
    dense = m * n * k * k
    if conv == "gc2l":
        return dense // 4 + n * k * k + 4 * m  # local, restriction, coarse
    if conv == "bgc":
        return 2 * (dense // 4)  # local, mean
    if conv == "flgc":
        return dense + 4 * (n + m)  # a logit for each channel and group
    if conv == "lgc":
        return dense
    if conv == "dgconv":
        return dense + layer.gates.numel()
    if conv == "dgc":
        hidden = max(1, n // (8 if n < 80 else 16))
        return dense + 4 * (2 * n * hidden + n) + 2 * n  # a saliency network for each head, batch norm
    return dense // 4


@functools.cache
def loss_of(name: str, conv: str) -> tuple[torch.nn.Module, float]:
    """A network after a backward from the loss of four images of different classes, and that loss."""
    torch.manual_seed(0)
    model = create(name, conv=conv, groups=groups_of(conv), num_classes=7)
    for module in model.modules():
        if isinstance(module, LearnedGroupConv2d):
            module.set_progress(1)  # before, it is dense
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    assert logits.shape == (4, 7) and logits.isfinite().all()
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    loss.backward()
    return model, loss.item()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("conv", KINDS)
def test_every_kind_runs_in_every_family(name, conv):
    model, loss = loss_of(name, conv)
    assert math.isfinite(loss)
    unreached = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not (p.grad.isfinite().all() and p.grad.any())
    ]
    assert not unreached
    # Each kind computes something of its own, in every family.
    assert loss not in [loss_of(name, other)[1] for other in KINDS if other != conv]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("conv", CLASSES)
def test_every_kind_has_the_parameters_of_its_formula_in_every_family(name, conv):
    with torch.device("meta"):
        dense = create(name, conv="sc", num_classes=7)
    model = create(name, conv=conv, groups=groups_of(conv), num_classes=7)
    # Left out: group convolutions that the dense network has too, such as CondenseNet's 3x3.
    of_4 = {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 4}
    layers = [
        m
        for n, m in model.named_modules()
        if isinstance(m, CLASSES[conv]) and getattr(m, "groups", 4) == 4 and not (conv == "gc" and n in of_4)
    ]
    expected = sum(p.numel() for p in dense.parameters())
    for layer in layers:
        n, m, k = layer.in_channels, layer.out_channels, layer.kernel_size[0]
        expected += parameters_of(layer, conv) - m * n * k * k
        if conv == "dgc" and name == "condensenet-50":
            expected -= 2 * n  # the network's own norm before the layer is left out
    if conv == "gc2l" and name == "mobilenetv2-cifar":
        expected -= (
            320 * 1280 * 3 // 4
        )  # the last convolution is plain gc: as in the paper it has no coarse part
    assert len(layers) > 3
    assert sum(p.numel() for p in model.parameters()) == expected


def test_resnext_is_not_made_dense():
    with pytest.raises(UserError, match="resnext50 is made of group convolutions"):
        create("resnext50", conv="sc")


def test_condensenet_brings_no_second_norm_before_dgc():
    first = create("condensenet-50", conv="dgc", groups=4).features[1].layers[0]
    assert isinstance(first, DynamicGroupConv2d)
    other = create("condensenet-50", conv="gc", groups=4).features[1].layers[0]
    assert isinstance(other, torch.nn.BatchNorm2d)
