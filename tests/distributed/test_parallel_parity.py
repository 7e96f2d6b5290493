"""A network cut over P ranks is the single-process network: outputs, gradients, parameters, statistics."""

import copy

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from twolevel.distributed import parallelize, replicate
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import BalancedConv2d, TwoLevelConv2d, convert, initialize, layout_of
from twolevel.ops.kernels import native

# Float64, and only the order of some sums differs between 1 and P ranks.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
GROUPS_AND_RANKS = [(groups, ranks) for groups in (4, 8) for ranks in (1, 2, 4)]


def mesh_of(data: int = 1):
    shape = (data, dist.get_world_size() // data)
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "group"))


def join(parts: list[dict], whole: dict) -> dict:
    """What ranks hold, put together along the dimension in which it is smaller than the whole.

    What every rank holds whole must be the same on all.
    """
    joined = {}
    for key, tensor in whole.items():
        pieces = [part[key] for part in parts]
        smaller = [d for d, size in enumerate(tensor.shape) if size != pieces[0].shape[d]]
        joined[key] = torch.cat(pieces, *smaller) if smaller else pieces[0]
        for piece in pieces:
            assert smaller or torch.equal(piece, pieces[0]), key
    return joined


# One layer.


def run_layer(
    stride,
    size,
    schedule,
    memory_format,
    groups,
    mesh=None,
    *,
    kernels="auto",
    dtype=torch.float64,
    n=16,
    m=24,
    representatives=1,
    make=TwoLevelConv2d,
) -> dict:
    """Output, and gradients of the input and of every weight, of this rank's channels or of all."""
    torch.manual_seed(0)
    more = {}
    if make is TwoLevelConv2d:
        more = {"representatives": representatives, "schedule": schedule, "kernels": kernels}
    conv = make(n, m, 3, stride, 1, groups=groups, **more).to(dtype)
    x, pixels = torch.randn(3, n, *size, dtype=dtype), [(s - 1) // stride + 1 for s in size]
    gy = torch.randn(3, m, *pixels, dtype=dtype)
    if mesh is not None:
        parallelize(conv, mesh)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        x, gy = x.chunk(ranks, 1)[rank], gy.chunk(ranks, 1)[rank]
    x = x.clone(memory_format=memory_format).requires_grad_()
    y = conv(x)
    y.backward(gy.clone(memory_format=memory_format))
    grads = {name: parameter.grad for name, parameter in conv.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


def layer_on_ranks(cases, **options) -> list[dict]:
    mesh = mesh_of()
    return [run_layer(*case, mesh, **options) for case in cases]


@pytest.mark.parametrize(
    ("make", "schedule"),
    [(TwoLevelConv2d, "overlapped"), (TwoLevelConv2d, "fused"), (BalancedConv2d, None)],
)
@pytest.mark.parametrize(("groups", "ranks"), GROUPS_AND_RANKS)
def test_layer(pool, groups, ranks, make, schedule):
    formats = (torch.contiguous_format, torch.channels_last)
    cases = [
        (stride, size, schedule, memory_format, groups)
        for stride in (1, 2)
        for size in ((7, 7), (8, 8), (6, 9))
        for memory_format in formats
    ]
    held = pool.run(layer_on_ranks, cases, make=make, ranks=ranks)
    for case, *parts in zip(cases, *held, strict=True):
        whole = run_layer(*case, make=make)
        torch.testing.assert_close(join(parts, whole), whole, **CLOSE, msg=lambda m, c=case: f"{c}: {m}")


def layer_by_kernels(schedule, options):
    return [run_layer(s, (7, 8), schedule, torch.channels_last, 8, mesh_of(), **options) for s in (1, 2)]


@pytest.mark.parametrize(
    ("schedule", "kernels", "representatives"),
    [("overlapped", kernels, 1) for kernels in ("products", "depthwise")]
    + [(s, k, r) for s in ("overlapped", "fused") for k in ("grouped", "native") for r in (1, 3)],
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layer_by_every_kind_of_kernel(pool, ranks, schedule, kernels, representatives):
    """Each against torch's group convolutions on one process."""
    in_c = kernels == "native"
    if in_c and native.available():
        pytest.skip(native.available())
    dtype = torch.float32 if in_c else torch.float64
    options = {"dtype": dtype, "n": 64, "m": 128, "representatives": representatives}
    held = pool.run(layer_by_kernels, schedule, options | {"kernels": kernels}, ranks=ranks)
    # float32: sums of some hundred products of normal numbers, in another order.
    close = {"rtol": 1e-4, "atol": 2e-4} if in_c else CLOSE
    for stride, *parts in zip((1, 2), *held, strict=True):
        whole = run_layer(stride, (7, 8), "overlapped", torch.channels_last, 8, kernels="grouped", **options)
        torch.testing.assert_close(join(parts, whole), whole, **close)


# Whole networks, trained.


def train(model, images, labels, steps, lr=0.05) -> tuple[dict, dict, list]:
    """The image's and the first gradients; the state after so many steps of SGD; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    images, first, losses = images.clone().requires_grad_(), {}, []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if not first:
            first = {name: p.grad.clone() for name, p in model.named_parameters()}
            first["image"] = images.grad.clone()
        losses.append(loss.detach())
        optimizer.step()
    return first, {key: t.clone() for key, t in model.state_dict().items()}, losses


def network(name, conv, groups):
    if name.startswith("vgg"):  # convolutions with a bias, a flattened map, and more than one linear layer
        model = getattr(torchvision.models, name)(num_classes=10)
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier[0] = nn.Linear(512 * 4, 64)
        model.classifier[3], model.classifier[6] = nn.Linear(64, 64), nn.Linear(64, 10)
        model = initialize(convert(model, conv, groups), 0)
    else:
        model = create(name, conv=conv, groups=groups, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # ranks draw their own masks
    return model.double()


def batch(size, number=4):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(number, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (number,), generator=generator)


def train_on_ranks(name, conv, groups, size, steps):
    model = parallelize(network(name, conv, groups), mesh_of())
    return train(model, *batch(size), steps)


@pytest.mark.parametrize("conv", ["gc2l", "bgc", "gc"])
@pytest.mark.parametrize(("groups", "ranks"), GROUPS_AND_RANKS)
def test_training(pool, groups, ranks, conv):
    settings = ("wrn-10-1", conv, groups)
    first, state, losses = train(network(*settings), *batch(8), 20)
    parts = pool.run(train_on_ranks, *settings, 8, 20, ranks=ranks)
    torch.testing.assert_close(join([part[0] for part in parts], first), first, **CLOSE)
    # Each step amplifies the rounding of those before it.
    torch.testing.assert_close(join([part[1] for part in parts], state), state, rtol=1e-10, atol=1e-10)
    for part in parts:
        torch.testing.assert_close(part[2], losses, **CLOSE)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("conv", ["gc2l", "bgc"])
@pytest.mark.parametrize("name", ["mobilenetv2", "resnet18", "vgg11_bn"])
def test_training_of_converted_and_depthwise_networks(pool, name, conv):
    # At 32 x 32 their last maps have one pixel, and batch norm over 4 numbers amplifies rounding beyond use.
    settings = (name, conv, 4)
    first, state, _ = train(network(*settings), *batch(64), 2)
    parts = pool.run(train_on_ranks, *settings, 64, 2, ranks=2)
    torch.testing.assert_close(join([part[0] for part in parts], first), first, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(join([part[1] for part in parts], state), state, rtol=1e-10, atol=1e-10)


def train_replicas(name, conv, groups, size, steps, data):
    """Each replica takes its share of the batch."""
    mesh = mesh_of(data)
    model = parallelize(network(name, conv, groups), mesh, sync_batch_norm=True)
    images, labels = (t.chunk(data)[mesh.get_local_rank("data")] for t in batch(size))
    first, _, losses = train(replicate(model, mesh), images, labels, steps)
    first = {key.removeprefix("module."): tensor for key, tensor in first.items()}
    return first, {key: t.clone() for key, t in model.state_dict().items()}, losses


@pytest.mark.parametrize("conv", ["gc2l", "bgc"])
@pytest.mark.parametrize(("data", "ranks"), [(2, 2), (2, 4), (4, 4)])
def test_training_of_replicas_with_batch_statistics_of_all_images(pool, data, ranks, conv):
    settings = ("wrn-10-1", conv, 4)
    first, state, losses = train(network(*settings), *batch(8), 20)
    results = pool.run(train_replicas, *settings, 8, 20, data, ranks=ranks)
    group = ranks // data
    replicas = [results[index : index + group] for index in range(0, ranks, group)]
    # The loss of a replica is the mean over its images alone, so that their gradients are data times as large.
    images = torch.cat([replica[0][0].pop("image") for replica in replicas]) / data
    torch.testing.assert_close(images, first.pop("image"), **CLOSE)
    for replica in replicas:
        torch.testing.assert_close(join([rank[0] for rank in replica], first), first, **CLOSE)
        joined = join([rank[1] for rank in replica], state)
        torch.testing.assert_close(joined, state, rtol=1e-10, atol=1e-10)
    mean = [
        torch.stack(losses_of_step).mean()
        for losses_of_step in zip(*(r[0][2] for r in replicas), strict=True)
    ]
    torch.testing.assert_close(mean, losses, **CLOSE)


# What parallelize does to a network besides, and what it refuses.


def layers(*middle):
    conv = TwoLevelConv2d(12, 12, 3, groups=6)
    return nn.Sequential(nn.Conv2d(3, 12, 3), conv, *middle, nn.Flatten(), nn.Linear(12, 10))


def linear_in_the_middle():
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Unflatten(1, (12, 1, 1)))
    return layers(inner, TwoLevelConv2d(12, 12, 1, groups=6))


def one_weight_twice():
    model = layers(nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 12, 3, groups=12))
    model[3].weight = model[2].weight
    return model


REFUSED = {  # the network, and the beginning of the message
    "dense network": (
        lambda: create("wrn-10-1"),
        "stages.0.0.conv1 is a dense convolution and cannot be split over group=4 ranks; "
        "use conv='gc', 'gc2l' or 'bgc', or replicate it with data=4, group=1",
    ),
    "ranks that do not divide the groups": (
        layers,
        "group=4 ranks do not divide groups=6; use one of 1, 2, 3, 6 ranks",
    ),
    "linear layer in the middle": (
        linear_in_the_middle,  # what follows it would read every channel
        "3, which reads what is whole on every rank, is not known to act within channel groups",
    ),
    "normalisation across groups": (
        lambda: layers(nn.GroupNorm(1, 12)),
        "2 (GroupNorm) is not known to act within channel groups and cannot be split over group=4 ranks; "
        "replicate the network with data=4, group=1",
    ),
    "dense schedule": (
        lambda: create("wrn-10-1", conv="gc2l", groups=4, schedule="dense"),
        "schedule='dense' needs every channel on one rank: stages.0.0.conv1 has 4",
    ),
    "one parameter in two modules": (
        one_weight_twice,
        "2.weight and 3.weight are one parameter, which cannot be split over ranks; "
        "give each module a parameter of its own",
    ),
    "part of a network": (
        lambda: parallelize(create("wrn-10-1", conv="gc2l", groups=4), mesh_of()),
        "this network is a part already; split a whole one",
    ),
}


def refuse(case):
    model = REFUSED[case][0]()
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        parallelize(model, mesh_of())
    return str(caught.value), before == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_why_and_leaves_the_network_as_it_was(pool, case):
    for message, untouched in pool.run(refuse, case, ranks=4):
        assert message.startswith(REFUSED[case][1])
        assert untouched


def train_a_copy():
    """A copy, such as a moving average, is a network of the same ranks with tensors of its own."""
    model = parallelize(network("wrn-10-1", "gc2l", 4), mesh_of())
    twin = copy.deepcopy(model)
    result = train(twin, *batch(8), 2)
    assert twin.stages[0][0].conv1.exchange is model.stages[0][0].conv1.exchange
    assert layout_of(twin) == layout_of(model)
    return result, model.state_dict()


def test_copy_trains_on_the_same_ranks_and_shares_no_tensor(pool):
    model = network("wrn-10-1", "gc2l", 4)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first, state, _ = train(model, *batch(8), 2)
    results = pool.run(train_a_copy, ranks=2)
    torch.testing.assert_close(join([twin[0] for twin, _ in results], first), first, **CLOSE)
    torch.testing.assert_close(join([twin[1] for twin, _ in results], state), state, **CLOSE)
    torch.testing.assert_close(join([kept for _, kept in results], before), before, rtol=0, atol=0)


def test_one_rank_leaves_the_network_whole(pool):
    (state,) = pool.run(cut_alone, ranks=1)
    torch.testing.assert_close(state, dict(network("wrn-10-1", "sc", 1).state_dict()), rtol=0, atol=0)


def cut_alone():
    mesh = mesh_of()
    model = parallelize(network("wrn-10-1", "sc", 1), mesh, sync_batch_norm=True)
    assert replicate(model, mesh) is model
    assert {type(m) for m in model.modules()} == {type(m) for m in create("wrn-10-1").modules()}
    return dict(model.state_dict())
