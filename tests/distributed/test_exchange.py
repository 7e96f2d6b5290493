"""What crosses ranks: each collective's answer and gradient by hand, and the list of all of them in a step."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from twolevel.analysis import count
from twolevel.distributed import MeshAxis, clip_gradients_, parallelize
from twolevel.models import create
from twolevel.nn import BalancedConv2d, TwoLevelConv2d
from twolevel.ops import Geometry, balanced_conv2d, two_level_conv2d

# By hand. Rank p holds the number p + 1, and TOTAL[P] = 1 + ... + P.
TOTAL = {1: 1, 2: 3, 4: 10}
RANKS = [1, 2, 4]


def exchange_numbers():
    """gather, scatter_sum and sum, of one row a rank and of two."""
    axis, rank = MeshAxis(dist.group.WORLD), dist.get_rank()
    assert axis.ranks == dist.get_world_size()
    gathered, summed, totals = [], [], []
    for rows in (1, 2):
        own = torch.full((rows, 2), rank + 1.0)
        gathered.append(axis.gather(own).wait())
        # Row r of rank p is (p + 1) (r + 1), so that the sum over ranks tells the rows apart.
        parts = (rank + 1.0) * torch.arange(1.0, rows * axis.ranks + 1)[:, None].expand(-1, 2).contiguous()
        summed.append(axis.scatter_sum(parts).wait())
        totals.append(axis.sum(parts.clone()).wait())
    return gathered, summed, totals


@pytest.mark.parametrize("ranks", RANKS)
def test_gather_is_in_order_of_rank_scatter_sums_and_sum_is_whole_on_each(pool, ranks):
    for rank, found in enumerate(pool.run(exchange_numbers, ranks=ranks)):
        for rows, z, gz, total in zip((1, 2), *found, strict=True):
            assert z[:, 0].tolist() == [p + 1 for p in range(ranks) for _ in range(rows)]
            assert gz[:, 1].tolist() == [TOTAL[ranks] * (rank * rows + r + 1) for r in range(rows)]
            assert total[:, 1].tolist() == [TOTAL[ranks] * (r + 1) for r in range(rows * ranks)]


def layer_of_numbers(schedule):
    """One channel a rank: A = 0, r = 1, C = p + 1 for every representative, x = p + 1."""
    axis, number = MeshAxis(dist.group.WORLD), dist.get_rank() + 1.0
    x = torch.full((1, 1, 1, 1), number, requires_grad=True)
    local = torch.zeros(1, 1, 1, 1, requires_grad=True)
    restriction = torch.ones(1, 1, 1, 1, requires_grad=True)
    coarse = torch.full((1, axis.ranks, 1, 1), number, requires_grad=True)
    y = two_level_conv2d(x, local, restriction, coarse, Geometry(), schedule=schedule, exchange=axis)
    y.sum().backward()
    return [t.flatten().tolist() for t in (y, x.grad, local.grad, restriction.grad, coarse.grad)]


@pytest.mark.parametrize("schedule", ["overlapped", "fused"])
@pytest.mark.parametrize("ranks", RANKS)
def test_backward_of_gather_is_reduce_scatter(pool, ranks, schedule):
    """y_p = C_p sum of all x; so dx_p is the sum of every rank's C, and not this rank's own."""
    total = TOTAL[ranks]
    for rank, (y, gx, g_local, g_restriction, g_coarse) in enumerate(
        pool.run(layer_of_numbers, schedule, ranks=ranks)
    ):
        number = rank + 1
        assert y == [number * total]
        assert gx == [total]
        assert g_local == [number]
        assert g_restriction == [total * number]
        assert g_coarse == [other + 1 for other in range(ranks)]


def balanced_layer_of_numbers():
    """One channel a rank: A = 10 p + 10, B = p + 1, x = p + 1."""
    axis, number = MeshAxis(dist.group.WORLD), dist.get_rank() + 1.0
    x = torch.full((1, 1, 1, 1), number, requires_grad=True)
    local = torch.full((1, 1, 1, 1), 10 * number, requires_grad=True)
    mean = torch.full((1, 1, 1, 1), number, requires_grad=True)
    y = balanced_conv2d(x, local, mean, Geometry(), exchange=axis)
    y.sum().backward()
    return [t.item() for t in (y, x.grad, local.grad, mean.grad)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_backward_of_the_mean_is_the_mean_over_ranks_of_their_gradients(pool, ranks):
    """y_p = A_p x_p + B_p mean(x); so dx_p is A_p and the mean of every rank's B, and not this rank's own."""
    mean = TOTAL[ranks] / ranks
    for rank, (y, gx, g_local, g_mean) in enumerate(pool.run(balanced_layer_of_numbers, ranks=ranks)):
        number = rank + 1
        assert y == 10 * number**2 + number * mean
        assert gx == 10 * number + mean
        assert g_local == number
        assert g_mean == mean


def frozen_balanced_layer():
    """What is exchanged where x, A or B takes no gradient, and which gradients there are."""
    axis, found = MeshAxis(dist.group.WORLD), []
    for frozen in range(3):
        torch.manual_seed(0)
        tensors = [
            torch.randn(shape, requires_grad=True) for shape in ((2, 2, 4, 4), (3, 2, 3, 3), (3, 2, 3, 3))
        ]
        whole = torch.autograd.grad(balanced_conv2d(*tensors, Geometry(), exchange=axis).sum(), tensors)
        tensors[frozen].requires_grad_(False)
        with Collectives() as collectives:
            balanced_conv2d(*tensors, Geometry(), exchange=axis).sum().backward()
        assert tensors[frozen].grad is None
        for index, tensor in enumerate(tensors):
            assert index == frozen or torch.equal(tensor.grad, whole[index])
        found.append(len(collectives.seen))
    return found


def test_an_input_without_a_gradient_costs_no_sum_in_backward(pool):
    assert pool.run(frozen_balanced_layer, ranks=2) == [[1, 2, 2]] * 2


def no_images():
    axis, x = MeshAxis(dist.group.WORLD), torch.zeros(0, 2, 4, 4, requires_grad=True)
    weights = [torch.ones(3, 2, 3, 3, requires_grad=True) for _ in range(2)]
    y = balanced_conv2d(x, *weights, Geometry(), exchange=axis)
    y.sum().backward()
    return [tuple(t.shape) for t in (y, x.grad)], [t.grad.any().item() for t in weights]


def test_no_images_over_ranks_give_no_images(pool):
    assert pool.run(no_images, ranks=2) == [([(0, 3, 2, 2), (0, 2, 4, 4)], [False, False])] * 2


def in_other_memory():
    """The layer where the first rank's images lie in channels_last memory and the others' do not."""
    axis, rank = MeshAxis(dist.group.WORLD), dist.get_rank()
    torch.manual_seed(0)
    x, *weights = (torch.randn(shape) for shape in ((2, 2 * axis.ranks, 4, 5), (3, 2, 3, 3), (3, 2, 3, 3)))
    x = x.chunk(axis.ranks, 1)[rank]
    formats = (torch.contiguous_format, torch.channels_last if rank == 0 else torch.contiguous_format)
    found = []
    for memory_format in formats:
        own = x.clone(memory_format=memory_format).requires_grad_()
        y = balanced_conv2d(own, *weights, Geometry(), exchange=axis)
        y.square().sum().backward()
        found.append((y.detach(), own.grad))
    return found


def test_ranks_whose_memory_formats_differ_add_up_the_same_channels(pool):
    for alike, other in pool.run(in_other_memory, ranks=2):
        torch.testing.assert_close(alike, other)


def sum_numbers():
    axis, number = MeshAxis(dist.group.WORLD), dist.get_rank() + 1.0
    partial = torch.full((2, 3), number, requires_grad=True)
    logits = axis.sum_logits(partial)
    (7 * logits).sum().backward()
    image = torch.full((2, 3), 5.0, requires_grad=True)
    shared = axis.share_input(image)
    (number * shared).sum().backward()
    return logits, partial.grad, partial, shared, image.grad


@pytest.mark.parametrize("ranks", RANKS)
def test_gradient_of_the_sum_of_logits_is_the_identity_and_of_the_shared_image_the_sum(pool, ranks):
    for rank, (logits, g_partial, partial, shared, g_image) in enumerate(pool.run(sum_numbers, ranks=ranks)):
        filled = {"logits": logits, "partial": partial, "g_partial": g_partial}
        filled |= {"shared": shared, "g_image": g_image}
        for tensor in filled.values():
            assert tensor.shape == (2, 3)
            assert tensor.unique().numel() == 1
        numbers = {name: tensor[0, 0].item() for name, tensor in filled.items()}
        assert numbers == {
            "logits": TOTAL[ranks],
            "partial": rank + 1,  # summed in a copy
            "g_partial": 7,  # and not 7 P
            "shared": 5,
            "g_image": TOTAL[ranks],
        }


# Every collective of a step.

KINDS = {
    "c10d::_allgather_base_": ("all-gather", 1),  # (result, own part, group, ...)
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::alltoall_base_": ("reduce-scatter", 1),  # (received, parts, ...); ranks add up what they got
    "c10d::allreduce_": ("all-reduce", 0),  # (tensors, group, ...)
    "c10d::broadcast_": ("broadcast", 0),  # of replicas' buffers
}


class Collectives(TorchDispatchMode):
    """Lists the kind and the bytes handed over of every collective, whoever calls it."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional"):
            kind, position = KINDS[op.name()]
            given = args[position]
            tensors = given if isinstance(given, list | tuple) else [given]
            self.seen.append((kind, sum(t.numel() * t.element_size() for t in tensors)))
        return op(*args, **(kwargs or {}))


def step(conv, groups, dtype, batch, size, *, autocast=False, image_grad=False, clip=False):
    """The collectives of one training step of WRN-10-1."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "group"))
    model = parallelize(create("wrn-10-1", conv=conv, groups=groups).to(dtype), mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch, 3, size, size, dtype=dtype, requires_grad=image_grad)
    with Collectives() as collectives:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
        F.cross_entropy(logits, torch.arange(batch) % 10).backward()
        if clip:
            clip_gradients_(model, mesh, 1.0)
        optimizer.step()
    return collectives.seen


def counted(conv, groups, dtype, batch, size, ranks):
    model = create("wrn-10-1", conv=conv, groups=groups)
    result = count(model, (3, size, size), ranks=ranks, batch_size=batch, dtype=dtype)
    return model, [(c.kind, c.bytes_in) for c in result.collectives]


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float64, False), (torch.float32, True)]
)
@pytest.mark.parametrize(("groups", "ranks"), [(4, 2), (4, 4), (8, 4)])
def test_step_has_the_counted_collectives_and_no_other(pool, groups, ranks, dtype, autocast):
    """One all-gather and one reduce-scatter a two-level convolution, one all-reduce for the logits."""
    settings = ("gc2l", groups, dtype, 3, 9)
    activations = torch.bfloat16 if autocast else dtype
    model, expected = counted("gc2l", groups, activations, 3, 9, ranks)
    convs = sum(isinstance(module, TwoLevelConv2d) for module in model.modules())
    assert Counter(kind for kind, _ in expected) == {
        "all-gather": convs,
        "reduce-scatter": convs,
        "all-reduce": 1,
    }
    for seen in pool.run(step, *settings, autocast=autocast, ranks=ranks):
        assert Counter(seen) == Counter(expected)
        gathers = [c for c in seen if c[0] == "all-gather"]
        assert gathers == [c for c in expected if c[0] == "all-gather"]  # in the order of the layers
        assert seen[convs][0] == "all-reduce"  # after all of forward, before all of backward


@pytest.mark.parametrize(
    "schedule_of_types", [(torch.float32, False), (torch.float64, False), (torch.float32, True)]
)
@pytest.mark.parametrize(("groups", "ranks"), [(4, 2), (4, 4), (8, 4)])
def test_step_of_balanced_convolutions_has_the_counted_sums_and_no_other(
    pool, groups, ranks, schedule_of_types
):
    """Two all-reduces a balanced convolution, one all-reduce for the logits."""
    dtype, autocast = schedule_of_types
    model, expected = counted("bgc", groups, torch.bfloat16 if autocast else dtype, 3, 9, ranks)
    convs = sum(isinstance(module, BalancedConv2d) for module in model.modules())
    assert Counter(kind for kind, _ in expected) == {"all-reduce": 2 * convs + 1}
    *by_layer, logits = expected
    for seen in pool.run(step, "bgc", groups, dtype, 3, 9, autocast=autocast, ranks=ranks):
        assert Counter(seen) == Counter(expected)
        assert seen[: convs + 1] == [*by_layer[::2], logits]  # forward, in the order of the layers


@pytest.mark.parametrize("ranks", [2, 4])
def test_group_convolution_adds_the_logits_and_nothing_else(pool, ranks):
    _, expected = counted("gc", 4, torch.float64, 3, 8, ranks)
    assert expected == [("all-reduce", 3 * 10 * 8)]
    for seen in pool.run(step, "gc", 4, torch.float64, 3, 8, ranks=ranks):
        assert seen == expected


@pytest.mark.parametrize("conv", ["gc", "gc2l", "bgc"])
def test_one_rank_sends_nothing(pool, conv):
    assert counted(conv, 4, torch.float32, 3, 8, 1)[1] == []
    assert pool.run(step, conv, 4, torch.float32, 3, 8, clip=True, ranks=1) == [[]]


def test_image_that_needs_a_gradient_costs_one_more_all_reduce(pool):
    _, expected = counted("gc", 4, torch.float32, 3, 8, 2)
    for seen in pool.run(step, "gc", 4, torch.float32, 3, 8, image_grad=True, ranks=2):
        assert seen == [*expected, ("all-reduce", 3 * 3 * 8 * 8 * 4)]


def test_clipping_costs_one_number(pool):
    _, expected = counted("gc", 4, torch.float32, 3, 8, 2)
    for seen in pool.run(step, "gc", 4, torch.float32, 3, 8, clip=True, ranks=2):
        assert seen == [*expected, ("all-reduce", 4)]


def second_derivative(schedule, compiled):
    axis, x = MeshAxis(dist.group.WORLD), torch.ones(1, 1, 3, 3, requires_grad=True)
    weights = [torch.ones(1, 1, 1, 1, requires_grad=True), torch.ones(1, 1, 1, 1, requires_grad=True)]
    coarse = torch.ones(1, axis.ranks, 1, 1, requires_grad=True)

    def compute(x):
        return two_level_conv2d(x, *weights, coarse, Geometry(), schedule=schedule, exchange=axis)

    # The compilers behind AOTAutograd refuse any second derivative themselves.
    y = (torch.compile(compute, backend="eager", fullgraph=True) if compiled else compute)(x)
    with pytest.raises(NotImplementedError, match="second derivatives across ranks are not supported"):
        torch.autograd.grad((y**2).sum(), x, create_graph=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("schedule", ["overlapped", "fused"])
def test_second_derivatives_are_refused_across_ranks(pool, schedule, compiled):
    pool.run(second_derivative, schedule, compiled, ranks=2)


def second_derivative_of_a_balanced_layer(compiled):
    axis, x = MeshAxis(dist.group.WORLD), torch.ones(1, 1, 3, 3, requires_grad=True)
    weights = [torch.ones(1, 1, 1, 1, requires_grad=True) for _ in range(2)]

    def compute(x):
        return balanced_conv2d(x, *weights, Geometry(), exchange=axis)

    y = (torch.compile(compute, backend="eager", fullgraph=True) if compiled else compute)(x)
    for wanted in ([x], weights):
        with pytest.raises(NotImplementedError, match="second derivatives across ranks are not supported"):
            torch.autograd.grad((y**2).sum(), wanted, create_graph=True, retain_graph=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_of_a_balanced_layer_are_refused_across_ranks(pool, compiled):
    pool.run(second_derivative_of_a_balanced_layer, compiled, ranks=2)


def second_derivative_of_logits(compiled):
    axis, partial = MeshAxis(dist.group.WORLD), torch.ones(2, 3, requires_grad=True)
    add = torch.compile(axis.sum_logits, backend="eager", fullgraph=True) if compiled else axis.sum_logits
    (grad,) = torch.autograd.grad(add(partial).sum(), partial, create_graph=True)
    assert torch.equal(grad, torch.ones(2, 3))  # nothing is left to differentiate
    with pytest.raises(NotImplementedError, match="second derivatives across ranks are not supported"):
        torch.autograd.grad((add(partial) ** 2).sum(), partial, create_graph=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_by_way_of_the_logits_are_refused(pool, compiled):
    """Each rank would see its own share alone of how a function of all gradients depends on the logits."""
    pool.run(second_derivative_of_logits, compiled, ranks=2)
