"""A network in stages, one a rank, is the single-process network that sees a microbatch at a time."""

import itertools

import pytest
import torch
import torch.distributed as dist
from one_process import assert_learned_the_same, batch, train_alone, train_on_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from twolevel.analysis import count
from twolevel.distributed import init_mesh
from twolevel.distributed.strategies.stages import cut_stages
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.nn import initialize
from twolevel.training.step import make_step

# Float64, the same operations in the same order on one rank after the other: only memory layouts differ.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LATER = {"rtol": 1e-9, "atol": 1e-10}

# Schedule, microbatches asked for, ranks, and parts of a batch that the single process takes.
RUNS = [("naive", None, 1, 1), ("naive", None, 2, 1), ("naive", None, 4, 1)]
RUNS += [("gpipe", None, 2, 2), ("gpipe", 8, 2, 8), ("gpipe", 2, 4, 2)]
RUNS += [("1f1b", None, 4, 4), ("1f1b", 8, 2, 8), ("1f1b", 4, 1, 4)]


@pytest.mark.parametrize(("schedule", "microbatches", "ranks", "parts"), RUNS)
def test_training(pool, schedule, microbatches, ranks, parts):
    images, labels = batch(8, 12)
    alone = train_alone("wrn-10-1", images, labels, parts=parts, clip=1.0)
    options = {"parallel": schedule, "microbatches": microbatches, "clip": 1.0}
    stages = pool.run(train_on_ranks, "wrn-10-1", images, labels, **options, ranks=ranks)
    assert_learned_the_same(stages, alone, close=CLOSE, later=LATER)


@pytest.mark.parametrize(("conv", "groups"), [("gc2l", 4), ("bgc", 4), ("shuffle", 4)])
def test_training_of_group_convolutions_in_accumulated_parts(pool, conv, groups):
    images, labels = batch(8, 12)
    network = {"conv": conv, "groups": groups}
    alone = train_alone("wrn-10-2", images, labels, parts=4, **network)
    options = {"parallel": "gpipe", "microbatches": 2, "accumulate": 2, **network}
    stages = pool.run(train_on_ranks, "wrn-10-2", images, labels, **options, ranks=2)
    assert_learned_the_same(stages, alone, close=CLOSE, later=LATER)


def test_training_of_a_network_with_activations_in_place(pool):
    images, labels = batch(
        4, 64
    )  # at 32 x 32 its last maps have one pixel, whose statistics amplify rounding
    alone = train_alone("resnet18", images, labels, steps=1, parts=2)
    stages = pool.run(train_on_ranks, "resnet18", images, labels, steps=1, parallel="1f1b", ranks=2)
    assert_learned_the_same(
        stages, alone, close={"rtol": 1e-8, "atol": 1e-10}, later={"rtol": 1e-6, "atol": 1e-8}
    )


# Where it is cut.

NETWORKS = [("wrn-10-1", 3, 12), ("wrn-16-2", 4, 32), ("resnet18", 4, 64), ("mobilenetv2", 4, 64)]
NETWORKS += [("condensenet-50", 2, 32), ("resnet50", 8, 64)]


@pytest.mark.parametrize(("name", "stages", "size"), NETWORKS)
def test_stages_make_up_the_network(name, stages, size):
    model = create(name).eval()
    state = model.state_dict()
    cut = cut_stages(model, stages, (3, size, size))
    names = [key for stage in cut for key in stage.network.state_dict()]
    assert sorted(names) == sorted(state)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        x = images
        for stage in cut:
            assert x.shape[1:] == stage.received
            x = stage.network(x)
            assert x.shape[1:] == stage.sent
        assert torch.equal(x, model(images))
    assert sum(stage.macs for stage in cut) == count(model, (3, size, size)).macs


def test_the_largest_stage_has_the_least_work_possible():
    model = create("wrn-22-1").to("meta")
    counted = count(model, (3, 32, 32))
    macs = {layer.name: layer.macs for layer in counted.layers}
    # The network can be cut behind the stem and behind every block.
    blocks = [f"stages.{i}.{j}" for i in range(3) for j in range(3)]
    work = [macs["stem"]] + [sum(m for n, m in macs.items() if n.startswith(f"{b}.")) for b in blocks]
    work[-1] += macs["classifier"]
    for stages in (2, 3, 4, 5):
        best = min(
            max(sum(work[i:j]) for i, j in itertools.pairwise((0, *cuts, len(work))))
            for cuts in itertools.combinations(range(1, len(work)), stages - 1)
        )
        # Within a block only its first convolution and shortcut part from what follows, which is no single tensor,
        # unless there is no shortcut over them: so nothing better can be found.
        assert max(stage.macs for stage in cut_stages(model, stages, (3, 32, 32))) == best


def test_a_stage_is_drawn_as_it_is_in_the_whole():
    reference = create("wrn-10-2", conv="gc2l", groups=4, seed=3).state_dict()
    with torch.device("meta"):
        model = create("wrn-10-2", conv="gc2l", groups=4)
    for stage in cut_stages(model, 3, (3, 32, 32)):
        initialize(stage.network, 3, "cpu")
        for key, tensor in stage.network.state_dict().items():
            assert torch.equal(tensor, reference[key]), key


class Functional(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.conv, self.operation, self.fc = nn.Conv2d(3, 4, 3), operation, nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.operation(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "torch.fx cannot read its graph"),
        (lambda x: F.dropout(x, 0.5), "calls F.dropout, which parallel=pipeline cannot split"),
        (F.relu, "stages=5: Functional can be cut in 1 places, into 2 stages at most"),
    ],
)
def test_what_cannot_be_cut_is_refused(operation, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        cut_stages(Functional(operation), 5, (3, 8, 8))
    assert message in str(raised.value)


def test_stages_that_would_share_a_parameter_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    assert len(cut_stages(model, 2, (3, 8, 8))) == 2
    model[2].weight = model[0].weight
    with pytest.raises(
        UserError, match=r"^stages 0 and 1 share 2\.weight, of which each rank would train its own; "
    ):
        cut_stages(model, 2, (3, 8, 8))
    model[2] = model[0]
    with pytest.raises(UserError, match=r"^stages 0 and 1 share "):
        cut_stages(model, 2, (3, 8, 8))


def test_a_stage_does_not_begin_with_a_change_in_place():
    """What it received is a leaf of autograd, which must not be changed."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    first, second = cut_stages(model, 2, (3, 8, 8))
    assert [*first.network.state_dict()] == ["0.weight", "0.bias"]
    assert "relu" not in second.network.code and [m for m in second.network.children() if m is model[2]]
    assert first.network.get_submodule("1") is model[1]


# What crosses.


def strict_step(precision, memory_format, size, microbatches):
    """A step in which torch compares all that enters, crosses and leaves with what it was told of beforehand."""
    mesh = init_mesh(device="cpu")
    network = {"parallel": "1f1b", "precision": precision, "image_shape": (3, size, size)}
    step = make_step("wrn-10-1", mesh, "cpu", microbatches=microbatches, **network)
    images, labels = batch(8, size)
    images = images.to(torch.float64 if precision == "float64" else torch.float32)
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # newer versions compare only then, older ones always
    try:
        step(images.contiguous(memory_format=memory_format), labels)
    finally:
        dist.set_debug_level(level)


# Of 4 x 4 the last maps have one pixel. The strides of a size of one are ambiguous.
@pytest.mark.parametrize(("size", "microbatches"), [(8, 8), (4, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("precision", ["float64", "float32", "bf16"])
def test_shape_strides_and_type_are_those_agreed_on(pool, precision, memory_format, size, microbatches):
    pool.run(strict_step, precision, memory_format, size, microbatches, ranks=3)


class Sent(TorchDispatchMode):
    """The bytes of every message that this rank sends."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name() == "c10d::send":
            self.bytes += [t.numel() * t.element_size() for t in args[0]]
        return op(*args, **(kwargs or {}))


def messages(schedule, microbatches, precision):
    mesh = init_mesh(device="cpu")
    step = make_step(
        "wrn-10-1",
        mesh,
        "cpu",
        parallel=schedule,
        microbatches=microbatches,
        precision=precision,
        image_shape=(3, 8, 8),
    )
    images, labels = batch(8, 8)
    images = images.to(torch.float64 if precision == "float64" else torch.float32)
    step(images, labels)
    with Sent() as sent:
        step(images, labels)
    stage = step.placed.stage
    return sent.bytes, stage.received, stage.sent


@pytest.mark.parametrize(("precision", "width"), [("float64", 8), ("float32", 4), ("bf16", 2)])
@pytest.mark.parametrize(("schedule", "microbatches"), [("naive", None), ("gpipe", 4), ("1f1b", 4)])
def test_one_tensor_crosses_forward_and_its_gradient_back(pool, schedule, microbatches, precision, width):
    number = microbatches or 1
    first, second, third = pool.run(messages, schedule, microbatches, precision, ranks=3)
    for one, next_one in ((first, second), (second, third)):
        assert one[2] == next_one[1]
    one, two = (torch.Size(stage[2]).numel() * 8 // number * width for stage in (first, second))
    assert first[0] == [one] * number
    assert sorted(second[0]) == sorted([one, two] * number)
    assert third[0] == [two] * number


def bf16_loss(parallel):
    mesh = init_mesh(device="cpu")
    step = make_step("wrn-10-1", mesh, "cpu", parallel=parallel, precision="bf16", image_shape=(3, 8, 8))
    images, labels = batch(8, 8)
    images = images.float().contiguous(memory_format=torch.channels_last)
    return [step.placed.total(step(images, labels))[0] for _ in range(3)]


def test_stages_round_to_bf16_where_one_process_does(pool):
    (alone,) = pool.run(bf16_loss, "group", ranks=1)
    for rank in pool.run(bf16_loss, "naive", ranks=2):
        # The map that crosses is one that autocast has in bf16 anyway.
        assert rank == pytest.approx(alone, rel=1e-6)


def logits(number):
    mesh = init_mesh(device="cpu")
    step = make_step("wrn-10-1", mesh, "cpu", parallel="gpipe", precision="float64", image_shape=(3, 8, 8))
    images, _ = batch(number, 8)
    return step.placed.logits(step.placed.model.eval(), images)


def test_any_number_of_images_can_be_tested(pool):
    images, _ = batch(7, 8)
    with torch.no_grad():
        expected = create("wrn-10-1").double().eval()(images)
    *others, last = pool.run(logits, 7, ranks=3)
    assert others == [None, None]
    torch.testing.assert_close(last, expected, **CLOSE)


def too_few(schedule):
    with pytest.raises(UserError) as caught:
        make_step("wrn-10-1", init_mesh(device="cpu"), "cpu", parallel=schedule, microbatches=1)
    return str(caught.value)


def test_1f1b_says_how_many_microbatches_it_needs(pool):
    for message in pool.run(too_few, "1f1b", ranks=2):
        assert message == (
            "microbatches=1 is fewer than the 2 stages, which parallel=1f1b cannot schedule; use 2 or more, or gpipe"
        )
