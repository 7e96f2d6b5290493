"""Counts against the published tables, against torch's own counter, and against arithmetic by hand."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from twolevel.analysis import Collective, count
from twolevel.analysis.report import count_table
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import BalancedConv2d, TwoLevelConv2d
from twolevel.nn.base import ReplicatedConv2d
from twolevel.nn.structure import ACTIVATIONS

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)

# Parameters of the whole network; WRN-28-k has 10 classes, the others 1000.
PARAMETERS = [
    ("wrn-28-10", "sc", 1, 36_479_194),
    ("wrn-28-10", "gc", 2, 18_251_994),
    ("wrn-28-10", "gc", 4, 9_138_394),
    ("wrn-28-10", "gc", 8, 4_581_594),
    ("wrn-28-10", "gc", 16, 2_303_194),
    ("wrn-28-10", "gc2l", 2, 18_347_674),
    ("wrn-28-10", "gc2l", 4, 9_254_234),
    ("wrn-28-10", "gc2l", 8, 4_737_754),
    ("wrn-28-10", "gc2l", 16, 2_539_994),
    # By hand: convolutions behind the stem have 36,454,400 parameters, of which BGC has 2/G, and all else is 24,794.
    ("wrn-28-10", "bgc", 2, 36_479_194),
    ("wrn-28-10", "bgc", 4, 18_251_994),
    ("wrn-28-10", "bgc", 8, 9_138_394),
    ("wrn-28-40", "sc", 1, 583_060_954),
    ("wrn-28-40", "gc2l", 2, 291_961_594),
    ("wrn-28-40", "gc2l", 4, 146_301_434),
    ("wrn-34-2", "sc", 1, 86_032_168),
    ("wrn-34-2", "gc", 4, 22_306_600),
    ("wrn-34-2", "gc2l", 2, 43_710_760),
    ("wrn-34-2", "gc2l", 8, 11_950_120),
    ("mobilenetv2", "sc", 1, 3_504_872),
    ("mobilenetv2", "gc", 2, 2_442_536),
    ("mobilenetv2", "gc2l", 2, 2_468_072),
    ("mobilenetv2", "gc2l", 4, 1_954_120),
]
# WRN-28-10 on one of G ranks, stem and classifier counted whole.
ONE_OF_G = [(2, 9_177_258), (4, 2_318_690), (8, 598_206), (16, 165_164)]
# WRN-28-10, millions of multiply-accumulates for one image of 32 x 32.
MACS = [("sc", 1, 5243.3)]
MACS += [("gc", 2, 2621.9), ("gc", 4, 1311.2), ("gc", 8, 655.8), ("gc", 16, 328.1)]
MACS += [("bgc", 2, 5243.3), ("bgc", 4, 2621.9), ("bgc", 8, 1311.2)]  # those of gc with half as many groups
MACS += [("gc2l", 2, 2645.9), ("gc2l", 4, 1340.3), ("gc2l", 8, 695.3), ("gc2l", 16, 388.3)]


def on_meta(*args, **options) -> nn.Module:
    with torch.device("meta"):
        return create(*args, **options)


@pytest.mark.parametrize(("name", "conv", "groups", "parameters"), PARAMETERS)
def test_parameters_of_the_published_tables(name, conv, groups, parameters):
    model = on_meta(name, conv=conv, groups=groups)
    counted = count(model, CIFAR if name.startswith("wrn-28") else IMAGENET)
    assert counted.parameters == parameters == sum(p.numel() for p in model.parameters())
    assert counted.groups == counted.ranks == groups


@pytest.mark.parametrize(("groups", "held"), ONE_OF_G)
def test_parameters_of_one_of_g_ranks(groups, held):
    assert count(on_meta("wrn-28-10", conv="gc2l", groups=groups), CIFAR).held_whole_ends == held


def test_parameters_of_balanced_convolutions_on_one_of_four_ranks():
    """By hand: a quarter of 18,227,200 in convolutions and of 17,952 in norms; stem 432 and classifier 6,410 whole."""
    held = count(on_meta("wrn-28-10", conv="bgc", groups=4), CIFAR).held_whole_ends
    assert held == 4_556_800 + 4_488 + 432 + 6_410


@pytest.mark.parametrize(("conv", "groups", "millions"), MACS)
def test_multiply_accumulates_of_the_published_table(conv, groups, millions):
    counted = count(on_meta("wrn-28-10", conv=conv, groups=groups), CIFAR)
    assert round(counted.macs / 1e6, 1) == millions


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_rank_holds_one_part_of_a_convolution(groups, kernel):
    n, m = 16, 24
    (layer,) = count(nn.Sequential(TwoLevelConv2d(n, m, kernel, groups=groups)), (n, 8, 8)).layers
    assert layer.held == kernel**2 * n * m // groups**2 + kernel**2 * n // groups + m
    assert layer.parameters == groups * layer.held


def test_layer_that_is_the_whole_network():
    conv = TwoLevelConv2d(16, 24, 3, groups=4)
    alone, inside = count(conv, (16, 8, 8)), count(nn.Sequential(conv), (16, 8, 8))
    assert (alone.parameters, alone.held, alone.macs) == (inside.parameters, inside.held, inside.macs)
    assert alone.collectives == inside.collectives


@pytest.mark.parametrize("conv", ["gc2l", "bgc"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rank_holds_its_groups_of_everything_but_the_bias(ranks, conv):
    counted = count(on_meta("wrn-10-1", conv=conv, groups=4), CIFAR, ranks=ranks)
    assert (counted.held - 10) * ranks == counted.parameters - 10
    assert counted.held_macs * ranks == counted.macs


@pytest.mark.parametrize(
    ("name", "conv", "options"),
    [
        ("wrn-10-2", "sc", {}),
        ("wrn-10-2", "gc", {"groups": 4}),
        *(
            ("wrn-10-2", "gc2l", {"groups": 4, "kernels": "grouped", "schedule": by})
            for by in ("overlapped", "fused")
        ),
        ("wrn-10-2", "bgc", {"groups": 4}),
        ("mobilenetv2", "sc", {}),
        ("mobilenetv2", "gc", {"groups": 4}),
    ],
)
def test_multiply_accumulates_are_half_of_the_flops_that_torch_counts(name, conv, options):
    def product(_, left, right, **__):  # of the shapes of its arguments
        return 2 * math.prod(left) * right[-1]

    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}  # which it does not know
    model, batch = create(name, conv=conv, **options), 2
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        model(torch.randn(batch, 3, 36, 36))
    assert count(model, (3, 36, 36)).macs * 2 * batch == counter.get_total_flops()


def test_layers_are_named_with_their_output():
    layers = {layer.name: layer for layer in count(on_meta("wrn-10-1", conv="gc2l", groups=4), CIFAR).layers}
    assert layers["stem"].output == (16, 32, 32)
    assert layers["stages.1.0.shortcut"].kind == "TwoLevelConv2d"
    assert layers["stages.2.0.conv2"].output == (64, 8, 8)
    assert layers["bn"].output == (64, 8, 8)
    assert layers["bn"].macs == 0
    assert layers["classifier"].output == (10,)
    assert next(iter(layers)) == "stem"
    assert next(reversed(layers)) == "classifier"


@pytest.mark.parametrize(
    ("dtype", "size", "logit_size"),
    [(torch.float64, 8, 8), (torch.float32, 4, 4), (torch.bfloat16, 2, 4)],
)
def test_collectives_of_a_layer_by_hand(dtype, size, logit_size):
    """8 maps of 6 x 6 for 5 images over 4 ranks: a ring sends 3/4 of them, of an all-reduce twice that."""
    model = nn.Sequential(TwoLevelConv2d(16, 16, 3, groups=8), nn.Flatten(), nn.Linear(16 * 36, 10))
    counted = count(model, (16, 8, 8), ranks=4, batch_size=5, dtype=dtype)
    maps, logits = 5 * 8 * 36 * size, 5 * 10 * logit_size
    assert counted.collectives == [
        Collective("all-gather", maps // 4, maps * 3 / 4),
        Collective("reduce-scatter", maps, maps * 3 / 4),
        Collective("all-reduce", logits, logits * 2 * 3 / 4),
    ]
    assert counted.bytes_sent == maps * 3 / 2 + logits * 3 / 2


def test_collectives_of_a_balanced_layer_by_hand():
    """The mean has 16 / 8 = 2 maps, of the input's 9 x 7, for 5 images: summed forward, and its gradient backward."""
    model = nn.Sequential(BalancedConv2d(16, 16, 3, 2, groups=8), nn.Flatten(), nn.Linear(16 * 12, 10))
    counted = count(model, (16, 9, 7), ranks=4, batch_size=5)
    maps, logits = 5 * 2 * 9 * 7 * 4, 5 * 10 * 4
    sums = [Collective("all-reduce", size, size * 2 * 3 / 4) for size in (maps, maps, logits)]
    assert counted.collectives == sums
    assert counted.elementwise == 16 * 9 * 7 + 10  # the mean reads every number once; the biases


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = BalancedConv2d(4, 4, 3, groups=2)

    def forward(self, x):
        return self.conv(x=x)


def test_a_layer_that_is_given_its_input_by_name_is_counted_too():
    first, second = count(ByName(), (4, 8, 8), ranks=2).collectives
    assert first == second == Collective("all-reduce", 2 * 8 * 8 * 4, 2 * 8 * 8 * 4)


@pytest.mark.parametrize(
    ("conv", "ranks", "kinds"),
    [
        ("gc2l", 4, {"all-gather": 27, "reduce-scatter": 27, "all-reduce": 1}),
        ("gc2l", 1, {}),
        ("bgc", 4, {"all-reduce": 2 * 27 + 1}),
        ("bgc", 1, {}),
        ("gc", 4, {"all-reduce": 1}),
    ],
)
def test_collectives_of_wrn_28(conv, ranks, kinds):
    model = on_meta("wrn-28-10", conv=conv, groups=4)
    assert count(model, CIFAR, ranks=ranks).collectives_by_kind() == kinds


@pytest.mark.parametrize("module", ACTIVATIONS.values())
def test_every_activation_is_an_operation_an_element(module):
    activation = module(*{nn.Threshold: (0.1, 0.2)}.get(module, ()))
    assert count(nn.Sequential(nn.Conv2d(3, 8, 3), activation), CIFAR).elementwise == 8 * 30 * 30


@pytest.mark.parametrize(("bias", "operations"), [(True, 5), (False, 0)])
def test_every_bias_of_a_linear_layer_is_an_operation(bias, operations):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 5, bias=bias))
    counted = count(model, CIFAR)
    assert (counted.elementwise, counted.macs) == (operations, 900 * (8 * 27 + 8 * 5))


def test_names_of_layers_are_printed_as_they_are(capsys):
    model = nn.Sequential(OrderedDict({"stem[/red]:fire:": nn.Conv2d(3, 4, 3)}))
    count_table(count(model, CIFAR))
    assert "stem[/red]:fire: " in capsys.readouterr().out


def test_model_is_left_as_it_was():
    model = create("wrn-10-1", conv="gc2l", groups=4)
    model.bn.eval()
    model.stem.register_forward_hook(lambda *_: None)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pointers = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    count(model, CIFAR)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == pointers
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_that_do_not_divide_the_groups_are_refused():
    model = on_meta("wrn-10-1", conv="gc2l", groups=4)
    with pytest.raises(UserError, match=r"^ranks=3 does not divide groups=4; use one of 1, 2, 4$"):
        count(model, CIFAR, ranks=3)
    with pytest.raises(UserError, match=r"^ranks=0 is not positive; use 1 or more$"):
        count(model, CIFAR, ranks=0)


class Uncounted(ReplicatedConv2d):
    def forward(self, x):
        return x.new_empty(len(x), self.out_channels, *x.shape[2:])


class OfValues(nn.Module):
    """Its shapes depend on what its input holds."""

    def forward(self, x):
        return x[x > 0]


def test_a_kind_that_does_not_say_how_it_counts_is_named_with_what_it_lacks():
    wanted = "1 is of Uncounted, whose work is unknown; define Uncounted.macs(pixels, *, nominal=False)"
    with pytest.raises(UserError) as raised:
        count(nn.Sequential(nn.Conv2d(3, 8, 1), Uncounted(8, 8, 1)), CIFAR)
    assert str(raised.value) == wanted


def test_a_network_whose_shapes_depend_on_values_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"^Sequential cannot be counted from shapes alone: .*nonzero"
    ) as raised:
        count(nn.Sequential(nn.Conv2d(3, 8, 1), OfValues()), CIFAR)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(8, 8, 2), nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 1))]
)
def test_convolutions_without_a_count_are_named_instead_of_counted_as_nothing(layer):
    with pytest.raises(UserError, match=r"^1(\.1)? is a Conv(Transpose2|1)d, which is not counted; "):
        count(nn.Sequential(nn.Conv2d(3, 8, 1), layer), CIFAR)
