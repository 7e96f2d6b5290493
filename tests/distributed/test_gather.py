"""`gather` undoes `parallelize`: the network that was cut, with the values that ranks have trained."""

import threading

import pytest
import torch
from test_parallel_parity import batch, join, mesh_of, network, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from twolevel.distributed import gather, parallelize, replicate
from twolevel.distributed.strategies.channel import split_channels
from twolevel.errors import UserError
from twolevel.models import create

# Float64, and only the order of some sums differs between 1 and P ranks.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def classes(model: nn.Module) -> dict:
    return {name: (type(module), str(module)) for name, module in model.named_modules()}


def state(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gather_after(settings, size, steps):
    """This rank's part after so many steps, and of the gathered network its state, classes and logits."""
    model = parallelize(network(*settings), mesh := mesh_of())
    train(model, *batch(size), steps)
    whole = gather(model, mesh)
    assert whole.training and all(p.requires_grad and p.grad is None for p in whole.parameters())
    logits = [m.eval()(batch(size)[0]) for m in (model, whole)]
    return state(model), state(whole), classes(whole), logits


@pytest.mark.parametrize(
    ("settings", "size", "ranks"),
    [(("wrn-10-1", conv, 8), 8, ranks) for conv in ("gc2l", "bgc", "gc") for ranks in (1, 2, 4)]
    + [((name, "gc2l", 4), 64, 2) for name in ("mobilenetv2", "vgg11_bn")],
)
def test_the_gathered_network_is_the_one_that_was_cut(pool, settings, size, ranks):
    fresh = network(*settings)
    results = pool.run(gather_after, settings, size, 2, ranks=ranks)
    trained = join([part for part, *_ in results], dict(fresh.state_dict()))
    for _, whole, kinds, (on_ranks, alone) in results:
        torch.testing.assert_close(whole, trained, rtol=0, atol=0)
        assert [*whole] == [*fresh.state_dict()] and kinds == classes(fresh)
        torch.testing.assert_close(alone, on_ranks, **CLOSE)


def gather_replicas():
    """Of two replicas of two ranks: by the wrapper that averages gradients, and by a moving average."""
    model = parallelize(network("wrn-10-1", "gc2l", 4), mesh := mesh_of(2), sync_batch_norm=True)
    wrapped, average = replicate(model, mesh), AveragedModel(model)
    images, labels = (t.chunk(2)[mesh.get_local_rank("data")] for t in batch(8))
    train(wrapped, images, labels, 2)
    average.update_parameters(model)
    first, second = gather(wrapped, mesh), gather(average, mesh, rank=3)
    return state(first), classes(first), None if second is None else state(second), state(average.module)


def test_replicas_give_one_network_and_one_rank_may_keep_it_alone(pool):
    fresh = network("wrn-10-1", "gc2l", 4)
    results = pool.run(gather_replicas, ranks=4)
    for whole, kinds, _, _ in results:
        torch.testing.assert_close(whole, results[0][0], rtol=0, atol=0)
        assert kinds == classes(fresh)  # the batch norm of one process
    assert [average is None for *_, average, _ in results] == [True, True, True, False]
    averages = join([part for *_, part in results[2:]], dict(fresh.state_dict()))
    torch.testing.assert_close(results[3][2], averages, rtol=0, atol=0)


def cut_gather_and_cut_again():
    model = parallelize(network("wrn-10-1", "gc2l", 4), mesh := mesh_of())
    model.eval().stem.weight.requires_grad_(False)
    whole = gather(model, mesh)
    assert not whole.training and not whole.stem.weight.requires_grad
    before = state(model)
    again = parallelize(whole, mesh_of(2))  # by another number of ranks
    return before, state(again)


def test_a_gathered_network_can_be_cut_again_otherwise(pool):
    fresh = dict(network("wrn-10-1", "gc2l", 4).state_dict())
    results = pool.run(cut_gather_and_cut_again, ranks=4)
    for pair in (results[:2], results[2:]):
        torch.testing.assert_close(join([again for _, again in pair], fresh), fresh, rtol=0, atol=0)
    torch.testing.assert_close(join([before for before, _ in results], fresh), fresh, rtol=0, atol=0)


def refuse_others():
    said = []
    mesh = mesh_of()
    by_filters = create("wrn-10-1")
    split_channels(by_filters, mesh)
    locked = network("wrn-10-1", "gc2l", 4)
    locked.lock = threading.Lock()  # which nobody can copy
    for model in (by_filters, parallelize(locked, mesh)):
        with pytest.raises(UserError) as caught:
            gather(model, mesh)
        said.append(str(caught.value))
    return said


def test_what_cannot_be_gathered_is_said(pool):
    for by_filters, locked in pool.run(refuse_others, ranks=2):
        assert by_filters == "this WideResNet is a part that parallelize has not made; gather takes one"
        assert locked.startswith("WideResNet cannot be copied, so it cannot be gathered (cannot pickle")
