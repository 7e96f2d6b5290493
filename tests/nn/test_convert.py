"""Converting networks: what is replaced, what is left and why, and which weights are kept."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import twolevel
from twolevel.errors import UserError
from twolevel.nn import (
    KINDS,
    BalancedConv2d,
    DGConv2d,
    DynamicGroupConv2d,
    FLGConv2d,
    LearnedGroupConv2d,
    ShuffleConv2d,
    TwoLevelConv2d,
    initialize,
)

CLASSES = {
    "sc": nn.Conv2d,
    "gc": nn.Conv2d,
    "gc2l": TwoLevelConv2d,
    "bgc": BalancedConv2d,
    "shuffle": ShuffleConv2d,
    "flgc": FLGConv2d,
    "dgconv": DGConv2d,
    "dgc": DynamicGroupConv2d,
    "lgc": LearnedGroupConv2d,
}


def small(groups: int = 1, **options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=groups, **{"bias": False, "padding": 1} | options),
    )


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("conv", KINDS)
def test_every_kind_takes_the_place_of_a_convolution(conv):
    model = twolevel.convert(small(), conv=conv, groups=1 if conv in ("sc", "dgconv") else 4)
    assert type(model[2]) is CLASSES[conv]
    assert model(images(2, 3, 9, 9)).shape == (2, 16, 9, 9)


@pytest.mark.parametrize("conv", KINDS)
def test_stride_padding_and_dilation_are_copied(conv):
    model = small(stride=2, padding=(0, 3), dilation=(1, 2))
    shape = model(images(2, 3, 11, 12)).shape
    twolevel.convert(model, conv=conv, groups=1 if conv in ("sc", "dgconv") else 4)
    assert model(images(2, 3, 11, 12)).shape == shape


KEPT = [  # from a convolution of so many groups, to a kind with so many
    (1, "sc", 1),
    (4, "gc", 4),
    (1, "gc2l", 1),
    (4, "gc2l", 4),
    (1, "bgc", 1),
    (4, "bgc", 4),
    (1, "dgconv", 1),
    (2, "dgconv", 2),
    (1, "flgc", 1),
    (4, "flgc", 4),
    (1, "lgc", 4),
    (2, "lgc", 4),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("before", "conv", "groups"), KEPT)
def test_weights_are_kept_where_the_new_form_can_represent_them(before, conv, groups, bias):
    model, x = small(before, bias=bias).eval(), images(2, 3, 9, 9)
    wanted = model(x)
    twolevel.convert(model, conv=conv, groups=groups)
    assert "weights kept" in model.conversion.replaced["2"]
    # The same products in another order of addition, in float32.
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "conv", "groups"),
    [(1, "gc", 4), (1, "gc2l", 4), (1, "bgc", 4), (4, "shuffle", 4), (2, "flgc", 4), (1, "dgc", 4)],
)
def test_other_weights_are_drawn_from_seed_and_name(before, conv, groups):
    first, second, other = (
        twolevel.convert(small(before), conv=conv, groups=groups, seed=seed) for seed in (3, 3, 4)
    )
    assert first.conversion.replaced == {"2": "weights drawn anew"}
    weights = [dict(m[2].named_parameters()) for m in (first, second, other)]
    name = "local.weight" if conv in ("gc2l", "bgc") else "weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])


def test_what_is_left_is_listed_with_its_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(6, 8, 1, padding_mode="reflect", padding=1),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 1),
    )
    twolevel.convert(model, conv="gc", groups=4, skip=["4"])
    left = model.conversion.left
    assert [*model.conversion.replaced] == ["5"]
    assert left["0"] == "the stem"
    assert left["1"] == "depthwise"
    assert left["2"] == "groups=4 does not divide out_channels=6; use one of 1, 2"
    assert left["3"] == "padding_mode='reflect'"
    assert left["4"] == "skipped"
    assert "5: gc" in str(model.conversion) and "2: left, groups=4" in str(model.conversion)


def test_skip_may_be_a_function():
    model = twolevel.convert(
        torchvision.models.resnet18(), "gc", 4, skip=lambda name, module: module.kernel_size == (1, 1)
    )
    assert len(model.conversion.replaced) == 16
    assert {*model.conversion.left.values()} == {"the stem", "skipped"}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn", "densenet121", "regnet_y_400mf"])
def test_networks_of_torchvision_are_converted_and_run(name):
    model = getattr(torchvision.models, name)(num_classes=5)
    twolevel.convert(model, conv="gc2l", groups=4)
    assert any(isinstance(m, TwoLevelConv2d) for m in model.modules())
    y = model.eval()(images(1, 3, 64, 64))
    assert y.shape == (1, 5) and y.isfinite().all()


def test_our_own_convolutions_are_not_converted_again():
    model = twolevel.convert(small(), conv="gc2l", groups=4)
    with pytest.raises(UserError, match="no convolution was replaced by conv='gc', groups=4: 0: the stem"):
        twolevel.convert(model, conv="gc", groups=4)


def test_training_mode_type_and_requires_grad_survive():
    model = small().double().eval()
    twolevel.convert(model, conv="gc2l", groups=4)
    assert not model[2].training
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_network_on_the_meta_device_is_drawn_later():
    with torch.device("meta"):
        model = twolevel.convert(small(), conv="dgconv", groups=1)
    assert all(p.is_meta for p in model.parameters())
    initialize(model, 0, "cpu")
    assert model(images(2, 3, 9, 9)).isfinite().all()


def test_unknown_kinds_are_refused_with_the_near_names():
    with pytest.raises(UserError, match="unknown conv 'shufle'; did you mean shuffle"):
        twolevel.convert(small(), conv="shufle")


def test_one_pattern_may_stand_alone():
    model = torchvision.models.resnet18()
    twolevel.convert(model, "gc", 4, skip="layer1.*")
    assert model.conversion.left["layer1.0.conv1"] == "skipped"
    assert "layer2.0.conv1" in model.conversion.replaced


def test_a_convolution_under_two_names_stays_one():
    shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.Sequential(shared))
    twolevel.convert(model, "gc2l", 4)
    assert isinstance(model[1], TwoLevelConv2d) and model[2][0] is model[1]
    assert model.conversion.replaced == {"1": "weights drawn anew", "2.0": "shared"}


def test_a_class_of_its_own_is_left_and_named():
    class Scaled(nn.Conv2d):
        pass

    model = twolevel.convert(nn.Sequential(nn.Conv2d(3, 8, 3), Scaled(8, 8, 1), nn.Conv2d(8, 8, 1)), "gc", 4)
    assert model.conversion.left["1"] == "a Scaled, which may do more than a Conv2d"


def beside(*convolutions: nn.Module) -> nn.Sequential:
    """A network of these between a stem and a convolution that is always replaced."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), *convolutions, nn.Conv2d(8, 8, 1))


def test_a_convolution_skipped_under_one_of_its_names_is_left_under_all():
    for skip in ("1", "2.*"):
        shared = nn.Conv2d(8, 8, 3, padding=1)
        model = twolevel.convert(beside(shared, nn.Sequential(shared)), "gc", 4, skip=skip)
        assert model[1] is shared and model[2][0] is shared
        assert model.conversion.left == {"0": "the stem", "1": "skipped", "2.0": "skipped"}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_convolutions_that_share_a_parameter_are_left_sharing_it(name):
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    setattr(second, name, getattr(first, name))
    model = twolevel.convert(beside(first, second), "gc", 4)
    assert model[1] is first and model[2] is second
    assert model.conversion.left["1"] == f"its {name} is shared with 2"
    assert model.conversion.left["2"] == f"its {name} is shared with 1"


def test_a_weight_that_the_network_itself_holds_too_is_left():
    model = beside(conv := nn.Conv2d(8, 8, 1))
    model.register_parameter("again", conv.weight)
    twolevel.convert(model, "gc", 4)
    assert model[1] is conv and model[1].weight is model.again
    assert model.conversion.left["1"] == "its weight is shared with the network itself"


@pytest.mark.parametrize(
    "register",
    [
        lambda conv: conv.register_forward_hook(lambda *_: None),
        lambda conv: conv.register_forward_pre_hook(lambda *_: None),
        lambda conv: conv.register_full_backward_hook(lambda *_: None),
        lambda conv: conv.register_full_backward_pre_hook(lambda *_: None),
        lambda conv: conv.register_load_state_dict_post_hook(lambda *_: None),
    ],
    ids="forward pre backward backward_pre load".split(),
)
def test_hooks_stay_where_they_are(register):
    hooked = nn.Conv2d(8, 8, 1)
    register(hooked)
    model = twolevel.convert(beside(hooked), "gc", 4)
    assert model[1] is hooked
    assert (
        model.conversion.left["1"] == "it has hooks, which belong to it; register them after the conversion"
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (nn.utils.parametrizations.weight_norm, "its weight is parametrized"),
        (nn.utils.parametrizations.spectral_norm, "its weight is parametrized"),
        (nn.utils.weight_norm, "it has tensors of its own: weight_g, weight_v"),
        (nn.utils.spectral_norm, "it has tensors of its own: weight_orig, weight_u, weight_v"),
        (prune.identity, "it has tensors of its own: weight_mask, weight_orig"),
    ],
)
def test_a_weight_that_is_computed_from_others_is_left(compute, said):
    conv = nn.Conv2d(8, 8, 1)
    compute(conv, "weight")
    names = {*conv.state_dict()}
    model = twolevel.convert(beside(conv), "gc", 4)
    assert model[1] is conv and {*conv.state_dict()} == names
    assert model.conversion.left["1"] == said


@pytest.mark.parametrize(("before", "conv", "groups"), KEPT)
def test_frozen_weights_that_are_kept_stay_frozen(before, conv, groups):
    model = small(before, bias=True)
    model[2].weight.requires_grad_(False)
    twolevel.convert(model, conv, groups)
    assert {name for name, p in model[2].named_parameters() if p.requires_grad} == {"1.bias"}
    model = small(before, bias=True)
    model[2].bias.requires_grad_(False)
    twolevel.convert(model, conv, groups)
    assert {name for name, p in model[2].named_parameters() if not p.requires_grad} == {"1.bias"}


def test_frozen_weights_that_cannot_be_kept_are_left():
    frozen = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    model = twolevel.convert(beside(frozen), "gc2l", 4)
    assert model[1] is frozen
    assert model.conversion.left["1"] == "its weight is frozen, and gc2l of groups=4 cannot represent it"


def test_a_replaced_forward_is_left():
    conv = nn.Conv2d(8, 8, 1)
    conv.forward = lambda x: 2 * x
    model = twolevel.convert(beside(conv), "gc", 4)
    assert model[1] is conv and model.conversion.left["1"] == "its forward was replaced"


def test_the_inference_forms_of_our_convolutions_are_not_converted():
    """Whose convolutions lie deeper than their own children."""
    form = FLGConv2d(16, 16, 3, padding=1, groups=2, dtype=torch.float64).eval().to_inference()
    before, classes = form.state_dict(), [type(m) for m in form.modules()]
    assert nn.Conv2d in classes
    model = nn.Sequential(nn.Conv2d(3, 16, 3), form, nn.Conv2d(16, 8, 1))
    twolevel.convert(model, "gc", 1)
    assert [*model.conversion.replaced] == ["2"] and [*model.conversion.left] == ["0"]
    assert [type(m) for m in form.modules()] == classes
    torch.testing.assert_close(form.state_dict(), before, rtol=0, atol=0)


def test_the_memory_format_is_kept():
    model = small().to(memory_format=torch.channels_last)
    twolevel.convert(model, "gc2l", 4)
    assert model[2].local.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_lone_convolution_is_refused_by_what_it_is():
    with pytest.raises(UserError, match=r"groups=4: the network itself: the stem$"):
        twolevel.convert(nn.Conv2d(8, 8, 1), "gc", 4)


def test_other_convolutions_are_listed_as_left():
    model = nn.Sequential(*small(), nn.ConvTranspose2d(16, 8, 2), nn.Flatten(2), nn.Conv1d(8, 8, 1))
    left = twolevel.convert(model, groups=2).conversion.left
    assert left["3"] == "a ConvTranspose2d, not a Conv2d"
    assert left["5"] == "a Conv1d, not a Conv2d"


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_convolution_whose_weight_has_a_hook_is_left(register):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    getattr(model[1].weight, register)(lambda _: None)
    twolevel.convert(model, groups=2)
    assert type(model[1]) is nn.Conv2d and "its weight has hooks" in model.conversion.left["1"]
    assert [*model.conversion.replaced] == ["2"]


def test_names_to_skip_may_come_from_an_iterator():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    twolevel.convert(model, groups=2, skip=(name for name in ["2", "3"]))
    assert [*model.conversion.replaced] == ["1"]
