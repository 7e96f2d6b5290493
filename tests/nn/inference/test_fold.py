"""Channel permutations: what they compute, and how they vanish into neighbouring layers without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn.channels import PermuteChannels
from twolevel.nn.dgconv import DGConv2d
from twolevel.nn.inference.fold import fold_permutations
from twolevel.nn.structure import ACTIVATIONS

# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
INTERLEAVED, MIDDLE = [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]


def dgconv(gates, n=16, m=16, **options) -> nn.Module:
    conv = DGConv2d(n, m, 3, padding=1, **options)
    with torch.no_grad():
        conv.gates.copy_(torch.tensor(gates))
    return conv.to_inference()


def prepare(model: nn.Module) -> nn.Module:
    """In evaluation mode, with every tensor of a normalisation different for each channel."""
    torch.manual_seed(0)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 2)
    return model.eval()


def permutations(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PermuteChannels)]


def check(model: nn.Module, channels: int = 16):
    """Fold, and see that neither the outputs nor the network given have changed."""
    model = prepare(model)
    x = torch.randn(2, channels, 6, 5, dtype=torch.float64)
    wanted, before = model(x), copy.deepcopy(model.state_dict())
    folding = fold_permutations(model)
    torch.testing.assert_close(folding.model(x), wanted, **CLOSE)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model(x), wanted)
    assert sorted(folding.kept) == sorted(permutations(folding.model))
    assert sorted([*folding.folded, *folding.kept]) == sorted(permutations(model))
    assert type(folding.model) is type(model)
    return folding


class Bottleneck(nn.Module):
    """As in ResNeXt, with one ReLU that is called three times."""

    def __init__(self, conv2: nn.Module):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = conv2, nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + x)


@pytest.mark.parametrize("gates", [INTERLEAVED, MIDDLE])
def test_both_permutations_of_a_bottleneck_vanish(gates):
    model = nn.Sequential(Bottleneck(dgconv(gates)), Bottleneck(dgconv(gates)))
    folding = check(model, 8)
    assert not folding.kept
    assert folding.folded == {
        **{f"{block}.conv2.0": (f"{block}.bn1", f"{block}.conv1") for block in (0, 1)},
        **{f"{block}.conv2.2": (f"{block}.bn2", f"{block}.conv3") for block in (0, 1)},
    }


def test_biases_go_along_and_functions_are_passed():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(16, 16, 3), dgconv(MIDDLE), nn.Conv2d(16, 4, 3)

        def forward(self, x):
            return self.last(F.hardswish(self.middle(torch.relu(self.first(x)).sigmoid())))

    assert not check(Chain()).kept


def test_depthwise_convolutions_are_passed():
    """As in an inverted residual: expand, depthwise, project."""
    model = nn.Sequential(
        dgconv(INTERLEAVED, 16, 48),
        nn.BatchNorm2d(48),
        nn.ReLU6(),
        nn.Conv2d(48, 48, 3, 2, 1, groups=48),
        nn.BatchNorm2d(48),
        nn.SiLU(),
        nn.Conv2d(48, 8, 1, bias=False),
    )
    folding = check(model)
    assert folding.folded == {"0.2": ("1", "3", "4", "6")}
    assert folding.kept["0.0"].startswith("before it is the input of the network; after it is 0.1")


def test_opposite_permutations_cancel():
    """The second layer has the groups of the first, so its order is the one that is there already."""
    model = nn.Sequential(dgconv(MIDDLE), nn.BatchNorm2d(16), nn.ReLU(), dgconv(MIDDLE))
    assert set(check(model).folded) == {"0.2", "3.0"}


def test_neighbouring_permutations_become_one():
    model = nn.Sequential(dgconv(MIDDLE), nn.BatchNorm2d(16), nn.ReLU(), dgconv(INTERLEAVED))
    folding = check(model)
    assert set(folding.folded) == {"0.2"}
    assert set(folding.kept) == {"0.0", "3.0", "3.2"}


class Flipped(nn.BatchNorm2d):
    """Not the normalisation that its class derives from."""

    def forward(self, x):
        return super().forward(x).flip(1)


class Net(nn.Module):
    """Two convolutions around a DGConv, put together by `forward`."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(16, 16, 1), dgconv(MIDDLE), nn.Conv2d(16, 16, 1)
        self.bn, self.flipped = nn.BatchNorm2d(16), Flipped(16)
        self.grouped, self.wider = nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 32, 1, groups=16)
        self.narrower = nn.Conv2d(32, 16, 1)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


STOPS = {
    "an addition before": lambda net, x: net.last(net.conv(net.first(x) + x)),
    "an addition after": lambda net, x: net.last(net.conv(net.first(x)) + x),
    "a second user before": lambda net, x: (y := net.first(x)) * net.last(net.conv(y)),
    "a second user after": lambda net, x: (y := net.conv(net.first(x))) * net.last(y),
    "a convolution called twice": lambda net, x: net.last(net.last(net.conv(net.first(net.first(x))))),
    "a normalisation called twice": lambda net, x: net.last(net.bn(net.conv(net.bn(net.first(x))))),
    "the layer itself called twice": lambda net, x: net.last(net.conv(net.conv(net.first(x)))),
    "groups before": lambda net, x: net.last(net.conv(net.grouped(x))),
    "groups after": lambda net, x: net.grouped(net.conv(net.first(x))),
    "depthwise to more channels": lambda net, x: net.narrower(net.wider(net.conv(net.first(x)))),
    "a layer of another class": lambda net, x: net.last(net.flipped(net.conv(net.first(x)))),
    "an activation of two inputs": lambda net, x: net.last(F.hardtanh(net.conv(net.first(x)), 0, x.size(0))),
    "a softmax over channels": lambda net, x: net.last(net.conv(net.first(x)).softmax(1)),
    "a weight used elsewhere": lambda net, x: net.last(net.conv(net.first(x))) * net.last.weight[0],
    "the output": lambda net, x: net.conv(net.first(x)),
    "the input": lambda net, x: net.last(net.conv(x)),
}


# The permutations before and after the convolution are conv.0 and conv.2: those that stay, and why the first does.
STAYS = {
    "an addition before": (["conv.0"], "before it is add, a function"),
    "an addition after": (["conv.2"], "after it is add, a function"),
    "a second user before": (["conv.0"], "before it, first has 2 users"),
    "a second user after": (["conv.2"], "after it, conv_2 has 2 users"),
    "a convolution called twice": (["conv.0", "conv.2"], "first or a tensor of it is used more than once"),
    "a normalisation called twice": (["conv.0", "conv.2"], "bn or a tensor of it is used more than once"),
    "the layer itself called twice": (
        ["conv.0", "conv.2"],
        "conv.0 or a tensor of it is used more than once",
    ),
    "groups before": (["conv.0"], "before it is grouped, Conv2d of 2 groups"),
    "groups after": (["conv.2"], "after it is grouped, Conv2d of 2 groups"),
    "depthwise to more channels": (["conv.2"], "after it is wider, Conv2d of 16 groups"),
    "a layer of another class": (["conv.2"], "after it is flipped, Flipped"),
    "an activation of two inputs": (["conv.2"], "after it is hardtanh, a function"),
    "a softmax over channels": (["conv.2"], "after it is softmax, a method"),
    "a weight used elsewhere": (["conv.2"], "last or a tensor of it is used more than once"),
    "the output": (["conv.2"], "after it is the output of the network"),
    "the input": (["conv.0"], "before it is the input of the network"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_permutation_stays_at(stop):
    folding = check(Net(STOPS[stop]))
    stays, reason = STAYS[stop]
    assert sorted(folding.kept) == stays
    assert reason in folding.kept[stays[0]].split("; ")
    # What is not in the way of the other permutation lets it go into the layer beside it.
    assert folding.folded == {
        name: (layer,) for name, layer in {"conv.0": "first", "conv.2": "last"}.items() if name not in stays
    }
    assert all("\n" not in reason for reason in folding.kept.values())


def test_reason_names_what_is_in_the_way():
    reason = check(Net(STOPS["groups before"])).kept["conv.0"]
    assert reason == "before it is grouped, Conv2d of 2 groups; after it is conv.1, Conv2d of 4 groups"


def test_tied_weights_stay():
    net = Net(lambda net, x: net.last(net.conv(net.first(x))))
    net.first.weight = net.last.weight
    assert len(check(net).kept) == 2


@torch.no_grad()
def test_normalised_weights_stay():
    """Their weight is computed from other tensors at every call."""
    net = Net(lambda net, x: net.last(net.conv(net.first(x))))
    nn.utils.parametrizations.weight_norm(net.first)
    nn.utils.spectral_norm(net.last)
    assert len(check(net).kept) == 2


def test_network_that_cannot_be_traced_is_left_alone_with_a_warning():
    net = Net(lambda net, x: net.last(net.conv(net.first(x) if x.sum() > 0 else net.first(-x))))
    with pytest.warns(
        UserWarning, match=r"^no permutation is folded, as torch.fx cannot trace the network: "
    ):
        folding = check(net)
    assert not folding.folded


def test_training_form_is_named_and_left():
    model = prepare(nn.Sequential(nn.Conv2d(16, 16, 1), DGConv2d(16, 16, 3)))
    folding = fold_permutations(model)
    assert folding.kept == {"1": "DGConv2d in its training form; replace it by its to_inference()"}
    assert not folding.folded


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), dgconv(MIDDLE))
    with pytest.raises(
        UserError, match=r"^fold_permutations needs a network in evaluation mode; call model.eval"
    ):
        fold_permutations(model)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "index", [[0, 4, 1, 5, 2, 6, 3, 7], [0, 2, 4, 6, 1, 3, 5, 7], [0, 3, 1, 2], [3, 2, 1, 0]]
)
def test_permutation_is_indexing_and_keeps_the_memory_format(index, memory_format):
    """With the channel shuffles, which have a way of their own, and with others."""
    permute = PermuteChannels(torch.tensor(index))
    x = torch.randn(2, len(index), 3, 4).contiguous(memory_format=memory_format)
    assert torch.equal(permute(x), x[:, index])
    assert permute(x).is_contiguous(memory_format=memory_format)


def test_permutation_refuses_an_image_of_other_channels():
    """Which indexing alone would accept."""
    with pytest.raises(
        UserError, match=r"^PermuteChannels takes \[B, 4, H, W\] or \[4, H, W\], got \[2, 16, 6, 5\]$"
    ):
        PermuteChannels(torch.tensor([0, 2, 1, 3]))(torch.zeros(2, 16, 6, 5))


def test_loaded_permutation_is_the_one_that_runs():
    """Also when a shuffle is loaded over another permutation, or another over a shuffle."""
    x = torch.randn(2, 16, 3, 4).contiguous(memory_format=torch.channels_last)
    shuffle, other = dgconv(INTERLEAVED)[0], dgconv(MIDDLE)[0]
    wanted = shuffle(x), other(x)
    states = copy.deepcopy((shuffle.state_dict(), other.state_dict()))
    shuffle.load_state_dict(states[1])
    other.load_state_dict(states[0])
    assert torch.equal(shuffle(x), wanted[1])
    assert torch.equal(other(x), wanted[0])


@pytest.mark.parametrize("module", ACTIVATIONS.values())
def test_a_permutation_passes_every_activation(module):
    activation = module(*{nn.Threshold: (0.1, 0.2)}.get(module, ()))
    permutation = PermuteChannels(torch.arange(16).flip(0))
    folding = check(nn.Sequential(permutation, activation, nn.Conv2d(16, 8, 1)))
    assert folding.folded == {"0": ("2",)}
