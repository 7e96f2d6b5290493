"""A network whose filters are split over ranks is the single-process network, at the counted communication."""

import pytest
import torch
import torch.distributed as dist
from one_process import assert_learned_the_same, batch, join, train_alone, train_on_ranks
from test_exchange import Collectives
from torch import nn

from twolevel.distributed import init_mesh
from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.layers import gathered_convolutions
from twolevel.distributed.strategies.channel import split_channels
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import TwoLevelConv2d
from twolevel.training.step import make_step

# Float64; only the order of sums over channels and ranks differs.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LATER = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_training(pool, ranks):
    images, labels = batch(8, 12)
    alone = train_alone("wrn-10-2", images, labels)
    parts = pool.run(train_on_ranks, "wrn-10-2", images, labels, parallel="channel", ranks=ranks)
    assert_learned_the_same(parts, alone, close=CLOSE, later=LATER)


def test_training_of_a_network_with_shortcuts_and_pooling(pool):
    images, labels = batch(
        4, 64
    )  # at 32 x 32 its last maps have one pixel, whose statistics amplify rounding
    alone = train_alone("resnet18", images, labels, steps=1)
    parts = pool.run(train_on_ranks, "resnet18", images, labels, steps=1, parallel="channel", ranks=2)
    assert_learned_the_same(
        parts, alone, close={"rtol": 1e-8, "atol": 1e-10}, later={"rtol": 1e-6, "atol": 1e-8}
    )


def test_training_of_replicas_of_parts_with_accumulation_and_clipping(pool):
    """Two replicas of two parts; each sees a part of a batch at a time, as does the single process."""
    images, labels = batch(8, 12)
    alone = train_alone("wrn-10-1", images, labels, clip=1.0)
    options = {"data": 2, "clip": 1.0, "sync_batch_norm": True, "parallel": "channel"}
    ranks = pool.run(train_on_ranks, "wrn-10-1", images, labels, **options, ranks=4)
    for replica in (ranks[:2], ranks[2:]):
        assert_learned_the_same(replica, alone, close=CLOSE, later=LATER)
    alone = train_alone("wrn-10-1", images, labels, parts=2, clip=1.0)
    options = {"accumulate": 2, "clip": 1.0, "parallel": "channel"}
    parts = pool.run(train_on_ranks, "wrn-10-1", images, labels, **options, ranks=2)
    assert_learned_the_same(parts, alone, close=CLOSE, later=LATER)


def drawn(name, from_meta):
    mesh = init_mesh(device="cpu")
    if from_meta:
        with torch.device("meta"):
            model = create(name)
        split_channels(model, mesh, seed=3, device="cpu")
    else:
        model = split_channels(create(name, seed=3), mesh)
    return dict(model.state_dict()), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("from_meta", [True, False])
@pytest.mark.parametrize("name", ["wrn-16-2", "mobilenetv2-cifar"])
def test_a_part_starts_as_the_rows_of_the_whole(pool, name, from_meta):
    reference = create(name, seed=3)
    parts = pool.run(drawn, name, from_meta, ranks=4)
    joined = join([state for state, _ in parts], reference.state_dict())
    torch.testing.assert_close(joined, dict(reference.state_dict()), rtol=0, atol=0)
    total = sum(p.numel() for p in reference.parameters())
    bias = reference.classifier.bias.numel()
    assert {held for _, held in parts} == {(total - bias) // 4 + bias}


def logits(name, images):
    mesh = init_mesh(device="cpu")
    with torch.no_grad():
        return split_channels(create(name), mesh).double().eval()(images)


def test_depthwise_convolutions_stay_local(pool):
    images, _ = batch(3, 16)
    with torch.no_grad():
        expected = create("mobilenetv2-cifar").double().eval()(images)
    for got in pool.run(logits, "mobilenetv2-cifar", images, ranks=4):
        torch.testing.assert_close(got, expected, **CLOSE)


def collectives(precision, number, size):
    mesh = init_mesh(device="cpu")
    step = make_step("wrn-10-1", mesh, "cpu", parallel="channel", precision=precision)
    images, labels = batch(number, size)
    images = images.to(torch.float64 if precision == "float64" else torch.float32)
    with Collectives() as seen:
        step(images, labels)
    return seen.seen


@pytest.mark.parametrize(("precision", "width"), [("float64", 8), ("float32", 4), ("bf16", 2)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_gathers_every_activation_once_and_scatters_its_gradient(pool, ranks, precision, width):
    number, size = 3, 8
    # (channels, size) of what dense convolutions behind the stem read; a block's first and its shortcut read the same.
    read = [(16, size), (16, size), (16, size), (32, size // 2), (32, size // 2), (64, size // 4)]
    whole = [number * channels * s * s * width for channels, s in read]
    expected = [("all-gather", w // ranks) for w in whole]
    expected += [("all-reduce", number * 10 * max(width, 4))]  # logits are added in float32 at least
    expected += [("reduce-scatter", w) for w in reversed(whole)]
    for seen in pool.run(collectives, precision, number, size, ranks=ranks):
        assert seen == expected


def layers(*middle):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class Joined(nn.Module):
    """Two maps side by side: a rank's channels of the result are not consecutive ones."""

    def forward(self, x):
        return torch.cat([x, x], 1)


def one_weight_twice():
    model = layers(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[2].weight = model[1].weight
    return model


REFUSED = {
    "one parameter in two modules": (one_weight_twice, "1.weight and 2.weight are one parameter"),
    "normalisation across channels": (
        lambda: layers(nn.GroupNorm(2, 8)),
        "1 (GroupNorm) is not known to act channel by channel and cannot be split by parallel=channel; "
        "replicate the network with --data-parallel",
    ),
    "two-level convolution": (
        lambda: layers(TwoLevelConv2d(8, 8, 3, groups=4)),
        "1 (TwoLevelConv2d) is not known",
    ),
    "concatenation": (lambda: layers(Joined(), nn.Conv2d(16, 8, 1)), "the operation 'cat'"),
    "channels that do not divide": (
        lambda: layers(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)),
        "ranks=4 does not divide channels of 1=6; use one of 1, 2, 3, 6",
    ),
    "groups that do not divide": (
        lambda: layers(nn.Conv2d(8, 8, 1, groups=2)),
        "ranks=4 does not divide groups of 1=2; use one of 1, 2",
    ),
    "padding by name": (lambda: layers(nn.Conv2d(8, 8, 3, padding="same")), "1 (Conv2d) is not known"),
    "no classifier": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        "parallel=channel needs a dense first convolution and a linear classifier",
    ),
    "a network without a graph": (
        lambda: nn.ModuleList([nn.Linear(8, 8)]).append(nn.Conv2d(3, 8, 1)),
        "torch.fx cannot read its graph",
    ),
}


def refuse(case):
    model = REFUSED[case][0]()
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        split_channels(model, init_mesh(device="cpu"))
    return str(caught.value), before == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_why_and_leaves_the_network_as_it_was(pool, case):
    for message, untouched in pool.run(refuse, case, ranks=4):
        assert REFUSED[case][1] in message
        assert "\n" not in message
        assert untouched


def gradient_of_numbers():
    """x_p = p + 1 and every weight of rank p is p + 1, so that each answer can be worked out by hand."""
    rank = dist.get_rank()
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(2, 1))
    split_channels(model, init_mesh(device="cpu"))
    with torch.no_grad():
        for layer in (model[0], model[1]):
            layer.weight.fill_(rank + 1.0)
        model[1].bias.fill_(10.0 * (rank + 1))
        model[3].weight.fill_(1.0)
        model[3].bias.fill_(0.0)
    y = model(torch.ones(1, 1, 1, 1))
    y.sum().backward()
    return y.item(), model[0].weight.grad.item(), model[1].weight.grad.flatten().tolist()


def test_backward_of_the_gather_is_a_sum_over_ranks(pool):
    """x = (1, 2); y_p = (p + 1) (1 + 2) + 10 (p + 1); and dx_p is the sum of all weights, not this rank's own."""
    for y, g_stem, g_weight in pool.run(gradient_of_numbers, ranks=2):
        assert y == 3 + 6 + 10 + 20
        assert g_stem == 1 + 2
        assert g_weight == [1, 2]


def second_derivative():
    axis = MeshAxis(dist.group.WORLD)
    convs = tuple(nn.Conv2d(2 * axis.ranks, 3, 3, bias=False) for _ in range(2))
    x = torch.ones(1, 2, 5, 5, requires_grad=True)
    total = sum(y.sum() for y in gathered_convolutions(x, convs, axis))
    # A loss linear in y: the filters' gradients depend on x of every rank all the same.
    with pytest.raises(NotImplementedError, match="second derivatives across ranks are not supported"):
        torch.autograd.grad(total, convs[0].weight, create_graph=True)


def test_second_derivatives_are_refused_across_ranks(pool):
    pool.run(second_derivative, ranks=2)
