"""A network starts from the weights of a trained one, whose convolutions may be of another kind."""

import pytest
import torch

from twolevel import models, nn
from twolevel.errors import UserError
from twolevel.nn import initialize, transfer

GROUPED = ("gc", "gc2l", "bgc")


def made(conv: str, seed: int = 0, name: str = "wrn-10-1", **options) -> torch.nn.Module:
    options = {"groups": 1 if conv == "sc" else 4} | options
    return initialize(models.create(name, conv=conv, **options), seed)


def trained(conv: str = "sc", **options) -> torch.nn.Module:
    """With statistics of batch norm that are those of no fresh network."""
    network = made(conv, seed=1, **options).train()
    network(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return network


@pytest.mark.parametrize("conv", sorted(nn.KINDS))
def test_a_network_of_the_same_kind_becomes_the_trained_one(conv):
    old, new = trained(conv), made(conv, seed=2)
    done = transfer(new, old)
    assert done.copied == len(new.state_dict()) and not done.errors and not done.drawn
    for key, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[key], tensor), key


@pytest.mark.parametrize("conv", GROUPED)
def test_another_kind_takes_the_nearest_weights_as_convert_does(conv):
    old, new = trained(), made(conv, seed=2)
    done = transfer(new, old)
    same = nn.convert(trained(), conv, groups=4, nearest=True)
    assert done.errors == same.conversion.errors and 0 < max(done.errors.values()) < 1
    for key, tensor in same.state_dict().items():
        assert torch.equal(new.state_dict()[key], tensor), key


def test_group_convolutions_become_two_level_ones_without_error():
    old, new = trained("gc").eval(), made("gc2l", seed=2).eval()
    done = transfer(new, old)
    assert max(done.errors.values()) < 1e-6  # rounding of the squares that are left
    images = torch.randn(2, 3, 32, 32)
    # The coarse term is zero up to rounding.
    torch.testing.assert_close(new(images), old(images), rtol=1e-4, atol=1e-4)


def test_a_classifier_of_other_classes_keeps_what_it_had():
    old, new = trained(), made("gc2l", seed=2, num_classes=7)
    before = {key: tensor.clone() for key, tensor in new.state_dict().items()}
    done = transfer(new, old)
    assert done.drawn == ["classifier.weight", "classifier.bias"]
    for key in done.drawn:
        assert torch.equal(new.state_dict()[key], before[key])
    assert "classifier.weight, classifier.bias drawn anew" in str(done)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ({"conv": "sc", "name": "wrn-16-1"}, {"conv": "sc"}, "only the trained network has stages.0.1"),
        ({"conv": "sc"}, {"conv": "sc", "name": "wrn-16-1"}, "only the new network has stages.0.1"),
        ({"conv": "sc", "name": "wrn-10-2"}, {"conv": "sc"}, "in the trained network"),
        ({"conv": "sc", "name": "wrn-10-2"}, {"conv": "gc2l"}, "takes 16 channels to 16"),
        ({"conv": "gc2l"}, {"conv": "sc"}, "nearest weights are known from sc and gc alone"),
        ({"conv": "sc"}, {"conv": "dgc"}, "known for gc, gc2l, bgc, not for a Dynamic"),
        ({"conv": "gc2l"}, {"conv": "gc2l", "representatives": 2}, "in the trained network"),
    ],
)
def test_networks_that_differ_are_refused(old, new, what):
    with pytest.raises(UserError, match=what):
        transfer(made(**new), trained(**old))
