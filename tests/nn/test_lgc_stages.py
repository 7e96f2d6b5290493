"""LGC drops inputs at the stages of its training: which, how many and when."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from twolevel.nn import LearnedGroupConv2d

G = 4


def layer(groups=G, n=16, m=12, kernel_size=3, condensation=None, dtype=torch.float64) -> LearnedGroupConv2d:
    torch.manual_seed(0)
    return LearnedGroupConv2d(n, m, kernel_size, groups=groups, condensation=condensation, dtype=dtype)


def demanded(progress: Fraction, condensation: int) -> int:
    """The number of s in 1 .. C - 1 with 2 progress >= s / (C - 1)."""
    return len([s for s in range(1, condensation) if 2 * progress >= Fraction(s, condensation - 1)])


@pytest.mark.parametrize("condensation", [1, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("steps", [24, 1200, 117_300])
def test_stages_are_entered_at_their_steps(condensation, steps):
    conv = layer(groups=1, n=24 * condensation, condensation=condensation, kernel_size=1)
    assert conv.stages == condensation - 1
    borders = [Fraction(s * steps, 2 * (condensation - 1)) for s in range(1, condensation)]
    around = {math.floor(border) + d for border in borders for d in (-1, 0, 1)} | {0, steps}
    for step in sorted(around):
        assert conv.stage_at(step / steps) == demanded(Fraction(step, steps), condensation)
    for s, border in enumerate(borders, 1):
        first = math.ceil(border)
        assert conv.stage_at((first - 1) / steps) == s - 1 and conv.stage_at(first / steps) == s
    assert conv.stage_at(0) == 0 and conv.stage_at(0.5) == conv.stage_at(1) == conv.stages


def least(conv: LearnedGroupConv2d, kept: list[set[int]], share: int) -> list[set[int]]:
    """What groups keep after each has dropped `share` more inputs: in plain Python, from the weights as they are."""
    weight, left = conv.weight.tolist(), []
    for group, inputs in enumerate(kept):
        sums = {
            j: math.fsum(
                abs(tap)
                for o in range(group, conv.out_channels, conv.groups)
                for row in weight[o][j]
                for tap in row
            )
            for j in inputs
        }
        left.append(inputs - set(sorted(inputs, key=lambda j: (sums[j], j))[:share]))
    return left


def kept_of(conv: LearnedGroupConv2d) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in conv.kept]


@pytest.mark.parametrize("kernel_size", [1, 3, (2, 3)])
@pytest.mark.parametrize(("groups", "condensation"), [(4, 4), (2, 4), (4, 2), (1, 8), (4, 8), (4, 1)])
def test_each_stage_drops_the_least_important_of_those_still_kept(groups, condensation, kernel_size):
    conv = layer(groups, condensation=condensation, kernel_size=kernel_size)
    kept, share = [set(range(16))] * groups, 16 // condensation
    assert kept_of(conv) == kept
    for stage in range(1, condensation):
        torch.manual_seed(stage)
        nn.init.normal_(conv.weight)  # what was dropped may have become large
        border = stage / (2 * (condensation - 1))
        conv.set_progress(math.nextafter(border, 0))
        assert kept_of(conv) == kept
        kept = least(conv, kept, share)
        conv.set_progress(border)
        assert kept_of(conv) == kept
        conv.set_progress(math.nextafter(border, 1))
        assert kept_of(conv) == kept
    assert conv.kept.sum(1).tolist() == [share] * groups


@pytest.mark.parametrize(("first", "then"), [(0, 1), (0, 2), (0, 3), (1, 3)])
def test_stages_that_are_passed_drop_together_what_they_demand(first, then):
    conv = layer()
    conv.condense(first)
    kept = kept_of(conv)
    nn.init.normal_(conv.weight)
    conv.set_progress(then / 6)
    assert kept_of(conv) == least(conv, kept, (then - first) * 4)


def test_nothing_dropped_comes_back():
    conv = layer()
    conv.condense(3)
    kept = conv.kept.clone()
    for progress in (0.2, 0, 1):
        nn.init.normal_(conv.weight)
        conv.set_progress(progress)
        assert torch.equal(conv.kept, kept)


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_of_equal_inputs_the_first_are_dropped_and_no_more(value):
    conv = layer()
    nn.init.constant_(conv.weight, value)
    for stage, first in ((1, 4), (2, 8), (3, 12)):
        conv.condense(stage)
        assert kept_of(conv) == [set(range(first, 16))] * G


def test_importance_is_summed_over_taps_and_filters_of_a_group():
    """Input 0 has the largest weight, but the smallest sum; signs do not cancel."""
    conv = layer(2, n=2, m=4, kernel_size=3)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[::2, 0, 1, 1] = 3.0
        conv.weight[::2, 1] = torch.tensor([1.0, -1.0, 1.0])
        conv.weight[1::2, 0] = 0.1
        conv.weight[1, 1] = 0.05
        conv.weight[3, 1] = 0.05
    conv.condense(1)
    assert kept_of(conv) == [{1}, {0}]


def test_groups_are_interleaved():
    """Group g has outputs g, G + g, ...: an output reads what its group keeps."""
    conv = layer(4, n=4, m=8, kernel_size=1)
    with torch.no_grad():
        conv.weight.fill_(0.5)
        for o in range(8):
            conv.weight[o, o % 4] = 1.0
    conv.condense(3)
    reached = conv(torch.eye(4, dtype=torch.float64)[:, :, None, None])[:, :, 0, 0].t() != 0
    assert reached.int().argmax(1).tolist() == [0, 1, 2, 3] * 2 and (reached.sum(1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exactly_a_share_is_dropped_in_every_type(dtype):
    conv = layer(n=64, kernel_size=1, dtype=dtype)
    for stage in range(4):
        conv.condense(stage)
        assert conv.kept.sum(1).tolist() == [64 - 16 * stage] * G
