"""A network whose parameters are sharded is the single-process network, and no rank keeps the whole of it."""

from unittest import mock

import pytest
import torch
from one_process import assert_learned_the_same, batch, train_alone, train_on_ranks, whole
from test_exchange import Collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from twolevel.distributed import init_mesh
from twolevel.distributed.strategies import fsdp
from twolevel.distributed.strategies.fsdp import shard_parameters
from twolevel.errors import UserError
from twolevel.models import create
from twolevel.training.config import OptimiserConfig
from twolevel.training.evaluate import evaluate
from twolevel.training.step import make_step

# Float64; sums over replicas are added in another order, and each step amplifies the rounding of those before it.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LATER = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc2l", 4), ("bgc", 4)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_training_with_batch_statistics_of_all_images(pool, ranks, conv, groups):
    images, labels = batch(8, 12)
    network = {"conv": conv, "groups": groups}
    alone = train_alone("wrn-10-1", images, labels, clip=1.0, **network)
    options = {"data": ranks, "parallel": "fsdp", "sync_batch_norm": True, "clip": 1.0, **network}
    learned = pool.run(train_on_ranks, "wrn-10-1", images, labels, **options, ranks=ranks)
    # Clipping divides by the norm plus 1e-6 and so amplifies nothing.
    assert_learned_the_same(learned, alone, close=CLOSE, later=LATER)


def test_training_of_a_network_with_shortcuts_and_pooling(pool):
    images, labels = batch(
        4, 64
    )  # at 32 x 32 its last maps have one pixel, whose statistics amplify rounding
    alone = train_alone("resnet18", images, labels, steps=1)
    options = {"data": 2, "steps": 1, "parallel": "fsdp", "sync_batch_norm": True}
    learned = pool.run(train_on_ranks, "resnet18", images, labels, **options, ranks=2)
    assert_learned_the_same(
        learned, alone, close={"rtol": 1e-8, "atol": 1e-10}, later={"rtol": 1e-6, "atol": 1e-8}
    )


def test_own_batch_statistics_are_those_of_parts_one_after_the_other(pool):
    """Two replicas of two parts are four parts of a batch; the running statistics are each rank's own."""
    images, labels = batch(8, 12)
    alone = train_alone("wrn-10-1", images, labels, parts=4)
    options = {"data": 2, "accumulate": 2, "parallel": "fsdp"}
    learned = pool.run(train_on_ranks, "wrn-10-1", images, labels, **options, ranks=2)
    parameters = [*alone.gradients]
    for one in (*learned, alone):
        one.state = {key: one.state[key] for key in parameters}
    assert_learned_the_same(learned, alone, close=CLOSE, later=LATER)


def drawn(name, conv, groups, from_meta):
    mesh = init_mesh(data=4, device="cpu")
    if from_meta:
        with torch.device("meta"):
            model = create(name, conv=conv, groups=groups)
        shard_parameters(model, mesh, seed=3, device="cpu")
    else:
        model = shard_parameters(create(name, conv=conv, groups=groups, seed=3), mesh)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    return {key: whole(tensor) for key, tensor in model.state_dict().items()}, held


@pytest.mark.parametrize("from_meta", [True, False])
@pytest.mark.parametrize(
    ("name", "conv", "groups"),
    [("wrn-16-2", "gc2l", 4), ("wrn-16-2", "bgc", 4), ("mobilenetv2-cifar", "sc", 1)],
)
def test_shards_start_as_those_of_the_whole(pool, name, conv, groups, from_meta):
    reference = create(name, conv=conv, groups=groups, seed=3)
    total = sum(p.numel() for p in reference.parameters())
    ranks = pool.run(drawn, name, conv, groups, from_meta, ranks=4)
    for state, held in ranks:
        torch.testing.assert_close(state, dict(reference.state_dict()), rtol=0, atol=0)
        # Rows are dealt out whole: those of the classifier, 10 over 4 ranks, are the only uneven ones.
        assert abs(held - total / 4) < reference.classifier.weight.shape[1] * 2
    assert sum(held for _, held in ranks) == total


def collectives(accumulate):
    mesh = init_mesh(data=2, device="cpu")
    rule = OptimiserConfig(accumulate=accumulate)
    step = make_step("wrn-10-1", mesh, "cpu", parallel="fsdp", optimiser=rule)
    units = sum(isinstance(module, FSDPModule) for module in step.placed.model.modules())
    images, labels = batch(4, 8)
    step(images.float(), labels)
    with Collectives() as seen:
        step(images.float(), labels)
    return units, [kind for kind, _ in seen.seen]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_reduced_once_a_step_and_parameters_gathered_twice_a_pass(pool, accumulate):
    for units, seen in pool.run(collectives, accumulate, ranks=2):
        assert units == 4  # three blocks, and what is in none
        assert seen.count("reduce-scatter") == units
        # The outermost keeps its parameters between forward and backward.
        assert seen.count("all-gather") == accumulate * (2 * units - 1)


class Images:
    """A test split of seven images, of which ranks have shares that differ by one."""

    def __init__(self, rank, ranks):
        self.images, self.labels = batch(7, 8)
        self.own = slice(7 * rank // ranks, 7 * (rank + 1) // ranks)

    def __len__(self):
        return 7

    def eval_batches(self, size):
        yield from zip(self.images[self.own].split(size), self.labels[self.own].split(size), strict=True)


def evaluate_on_ranks(eval_batch):
    mesh = init_mesh(data=4, device="cpu")
    step = make_step("wrn-10-1", mesh, "cpu", parallel="fsdp", precision="float64")
    with mock.patch.object(fsdp, "EVAL_BATCH", eval_batch):
        result = evaluate(step.placed, Images(mesh.get_local_rank("data"), 4))
    assert step.placed.model.training
    assert all(
        isinstance(parameter, DTensor) for parameter in step.placed.model.parameters()
    )  # no rank keeps the whole
    return result


@pytest.mark.parametrize("eval_batch", [1, 2, 500])
def test_ranks_with_fewer_test_images_wait_for_none(pool, eval_batch):
    images, labels = batch(7, 8)
    with torch.no_grad():
        expected = create("wrn-10-1").double().eval()(images)
    loss = F.cross_entropy(expected, labels).item()
    error = 100 * (expected.argmax(1) != labels).double().mean().item()
    for result in pool.run(evaluate_on_ranks, eval_batch, ranks=4):
        assert result[:4] == (pytest.approx(loss, rel=1e-12), pytest.approx(error, rel=1e-12), 7, 0)


def refused(conv, data):
    ranks = 2
    mesh = init_device_mesh("cpu", (data, ranks // data), mesh_dim_names=("data", "group"))
    with pytest.raises(UserError) as caught:
        shard_parameters(create("wrn-10-1", conv=conv, groups=4 if conv != "sc" else 1), mesh)
    return str(caught.value)


def test_what_cannot_be_sharded_is_named(pool):
    for message in pool.run(refused, "sc", 1, ranks=2):
        assert message == "parallel=fsdp shards over the data axis alone, not over group=2 ranks as well"
    for message in pool.run(refused, "flgc", 2, ranks=2):
        assert message.startswith("stages.0.0.conv1 is a FLGConv2d, which parallel=fsdp cannot shard")
