"""Nearest weights: they are the least-squares fit, the error is theirs, and `convert` starts from them."""

import pytest
import torch
from torch import nn

import twolevel
from twolevel.errors import UserError
from twolevel.nn import make_conv
from twolevel.nn.nearest import HAVE_NEAREST, set_nearest_
from twolevel.ops import dense_weight

# Rounding of float64 over the few hundred terms of these sums.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
KINDS = [("gc", {}), ("bgc", {}), ("gc2l", {}), ("gc2l", {"representatives": 2})]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(conv: str, groups: int = 4, **options) -> nn.Module:
    return make_conv(conv, 12, 16, 3, padding=1, groups=groups, **options).double()


def dense_of(new: nn.Module) -> torch.Tensor:
    """The dense weight `[m, n, k, k]` of a layer, from its responses to images of one pixel."""
    rows = new(nn.functional.pad(torch.eye(12, dtype=torch.float64)[:, :, None, None], (2, 2, 2, 2)))
    return rows[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1)


@pytest.mark.parametrize(("conv", "options"), KINDS)
def test_the_fit_cannot_be_bettered_and_the_error_is_its(conv, options):
    weight, new = draw(16, 12, 3, 3), layer(conv, **options)
    error = set_nearest_(new, weight)
    distance = dense_of(new) - weight
    torch.testing.assert_close(
        torch.tensor(error, dtype=torch.float64), distance.norm() / weight.norm(), **ROUNDING
    )
    distance.square().sum().backward()
    for parameter in new.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), **ROUNDING)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_no_representatives_reach_what_the_next_singular_values_have(kept):
    weight, new = draw(16, 12, 3, 3), layer("gc2l", representatives=kept)
    error = set_nearest_(new, weight)
    missed = 0.0
    for h in range(4):
        others = [row for row in range(16) if row // 4 != h]
        values = torch.linalg.svdvals(weight[others][:, 3 * h : 3 * h + 3].flatten(1))
        missed += values[kept:].square().sum()
    torch.testing.assert_close(
        torch.tensor(error, dtype=torch.float64), missed.sqrt() / weight.norm(), **ROUNDING
    )


@pytest.mark.parametrize(("conv", "options"), KINDS)
def test_a_weight_of_the_form_is_reached(conv, options):
    weight, new = dense_of(layer(conv, **options)).detach(), layer(conv, **options)
    assert set_nearest_(new, weight) < 1e-7  # the root of squares that vanish to rounding
    torch.testing.assert_close(dense_of(new), weight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("conv", HAVE_NEAREST)
def test_a_zero_weight_and_any_groups_have_a_fit(conv, groups):
    new = layer(conv, groups)
    assert set_nearest_(new, torch.zeros(16, 12, 3, 3)) == 0
    assert all(parameter.isfinite().all() for parameter in new.parameters())


def test_more_representatives_than_a_group_has_directions_are_kept_as_drawn():
    new = make_conv("gc2l", 8, 8, 1, groups=4, representatives=4).double()
    before = new.restriction.weight.clone()
    assert set_nearest_(new, draw(8, 8, 1, 1)) < 1e-7
    kept = new.restriction.weight.unflatten(0, (4, 4))[:, 2:]
    assert torch.equal(kept, before.unflatten(0, (4, 4))[:, 2:])
    assert dense_weight(new.local.weight, new.restriction.weight, new.coarse.weight, 4).isfinite().all()


def network(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, **options), nn.ReLU())


@pytest.mark.parametrize("conv", HAVE_NEAREST)
def test_a_converted_network_is_nearer_than_one_drawn_anew(conv):
    x = draw(4, 3, 9, 9).float()
    wanted = network()(x)
    nearest, drawn = (twolevel.convert(network(), conv, 4, nearest=choice) for choice in (True, False))
    assert (nearest(x) - wanted).norm() < 0.8 * (drawn(x) - wanted).norm()
    error = nearest.conversion.errors["2"]
    assert 0.3 < error < 1 and f"2: {conv}, nearest weights, relative error {error:.3f}" in str(
        nearest.conversion
    )
    assert drawn.conversion.errors == {}


def test_a_network_of_the_same_groups_is_still_kept_exactly():
    model = twolevel.convert(network(groups=4), "gc2l", 4, nearest=True)
    assert model.conversion.replaced == {"2": "weights kept, C = 0"} and model.conversion.errors == {}


def test_a_network_of_other_groups_is_fitted_as_the_dense_one_that_it_is():
    coarser, dense = network(groups=2), network()
    with torch.no_grad():
        dense[2].weight.zero_()
        dense[2].weight[:8, :4], dense[2].weight[8:, 4:] = coarser[2].weight.chunk(2)
    errors = [
        twolevel.convert(model, "gc2l", 4, nearest=True).conversion.errors for model in (coarser, dense)
    ]
    assert errors[0] == errors[1] != {}


def test_frozen_weights_are_not_fitted():
    model = network().append(nn.Conv2d(16, 16, 3))
    model[2].weight.requires_grad_(False)
    twolevel.convert(model, "gc2l", 4, nearest=True)
    assert "is frozen" in model.conversion.left["2"] and [*model.conversion.errors] == ["4"]


def test_kinds_without_a_fit_and_networks_without_values_are_refused():
    with pytest.raises(UserError, match="nearest=True is invalid for conv='flgc'; use one of gc, gc2l, bgc"):
        twolevel.convert(network(), "flgc", 4, nearest=True)
    with torch.device("meta"):
        model = network()
    with pytest.raises(UserError, match="nearest=True needs the network's weights"):
        twolevel.convert(model, "gc2l", 4, nearest=True)
    with pytest.raises(
        UserError, match="nearest weights are known for gc, gc2l, bgc, not for a ShuffleConv2d"
    ):
        set_nearest_(layer("shuffle"), draw(16, 12, 3, 3))
