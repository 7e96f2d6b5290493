"""What an LGC layer counts, what its state is, and what its weights start with."""

import copy

import pytest
import torch
from torch import nn

import twolevel
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import LearnedGroupConv2d, initialize

# The same sums of at most some hundred float64 products, in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
N, M, G = 8, 12, 4


def layer(stage=0, kernel_size=3, condensation=None) -> LearnedGroupConv2d:
    torch.manual_seed(0)
    conv = LearnedGroupConv2d(
        N, M, kernel_size, 2, 1, groups=G, condensation=condensation, dtype=torch.float64
    )
    conv.condense(stage)
    return conv


def image() -> torch.Tensor:
    return torch.randn(2, N, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("stage", "kept"), [(0, 8), (1, 6), (2, 4), (3, 2)])
def test_work_is_that_of_kept_inputs_and_nominal_that_of_the_end(stage, kept):
    conv = layer(stage=stage, kernel_size=(2, 3))
    assert conv.used_parameters() == kept * 12 * 6
    assert conv.macs(10) == 10 * kept * 12 * 6
    assert conv.macs(10, nominal=True) == 10 * 2 * 12 * 6
    assert conv.used_parameters(nominal=True) == 2 * 12 * 6


@pytest.mark.parametrize(("options", "share"), [({}, 4), ({"condensation": 2}, 2), ({"condensation": 1}, 1)])
def test_condensation_is_that_of_groups_unless_given(options, share):
    conv = layer(**options)
    assert (conv.condensation, conv.used_parameters(nominal=True)) == (share, 8 // share * 12 * 9)


def test_state_is_the_weight_and_what_is_kept_and_goes_round():
    conv, other, x = layer(stage=2), layer(), image()
    nn.init.normal_(other.weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in conv.state_dict().items()} == {
        "weight": ((M, N, 3, 3), torch.float64),
        "kept": ((G, N), torch.bool),
    }
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(x), conv(x))
    for one in (conv, other):
        one.set_progress(0.5)
    assert torch.equal(other.kept, conv.kept)
    assert conv.kept.sum() == G * 2
    twin = copy.deepcopy(conv)
    assert torch.equal(twin(x), conv(x))
    twin.reset_parameters()
    assert twin.kept.all() and not conv.kept.all()


def test_forward_writes_no_state():
    conv = layer(stage=1)
    versions = [tensor._version for tensor in conv.state_dict(keep_vars=True).values()]
    attributes = dict(vars(conv))
    conv(image()).sum().backward()
    assert [tensor._version for tensor in conv.state_dict(keep_vars=True).values()] == versions
    assert vars(conv) == attributes


def test_drawing_parameters_starts_the_layer_anew_and_follows_the_generator():
    conv = LearnedGroupConv2d(64, 256, 3, groups=4)
    conv.set_progress(1)
    conv.reset_parameters(torch.Generator().manual_seed(5))
    first = conv.weight.detach().clone()
    assert conv.kept.all()
    # 147,456 weights: their variance has a relative error of about 0.4 %.
    assert first.var().item() == pytest.approx(2 / (64 * 9), rel=0.03)
    torch.manual_seed(77)
    conv.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(conv.weight, first)


def test_network_initialises_from_the_meta_device():
    with torch.device("meta"):
        model = create("wrn-10-1", conv="lgc", groups=4)
    drawn = initialize(model, 3, "cpu").state_dict()
    whole = create("wrn-10-1", conv="lgc", groups=4, seed=3).state_dict()
    torch.testing.assert_close(drawn, whole, rtol=0, atol=0)
    assert all(t.all() for name, t in drawn.items() if name.endswith("kept"))


def test_meta_device_gives_the_shape_and_the_work_of_an_untrained_layer():
    with torch.device("meta"):
        conv = layer()
        conv.set_progress(1)
        assert conv(torch.empty(2, 8, 9, 8)).shape == (2, 12, 5, 4)
    assert (conv.macs(1), conv.macs(1, nominal=True)) == (12 * 8 * 9, 12 * 2 * 9)
    with pytest.raises(UserError, match="keeps are unknown on the meta device"):
        conv.to_inference()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_converted_convolution_keeps_its_function_and_may_be_frozen(groups):
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, dtype=torch.float64)
    conv.weight.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, dtype=torch.float64), conv)
    wanted = model(image())
    twolevel.convert(model, conv="lgc", groups=4, condensation=2)
    torch.testing.assert_close(model(image()), wanted, **CLOSE)
    new = model[1][0]
    assert (new.groups, new.condensation, new.weight.requires_grad) == (4, 2, False)
