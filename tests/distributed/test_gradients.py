"""The norm of all gradients, and clipping by it, are those of the single-process network."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from twolevel.distributed import clip_gradients_, gradient_norm, parallelize, replicate
from twolevel.models import create

# Float64: sums of some ten thousand squares, in another order.
CLOSE = {"rtol": 1e-12, "atol": 0.0}
CONVS = ["gc", "gc2l", "bgc"]


def with_gradients(conv, mesh=None, frozen=()):
    """WRN-10-1 after one backward; its bias, which every rank holds, has much of the norm."""
    model = create("wrn-10-1", conv=conv, groups=4).double()
    if mesh is not None:
        parallelize(model, mesh, sync_batch_norm=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = model
    if mesh is not None:
        images = images.chunk(mesh["data"].size())[mesh.get_local_rank("data")]
        network = replicate(model, mesh)
    # Each logit pulls the same way, so that the bias counts; a mean over images, as DDP expects.
    network(images).sum(1).mean().mul(10).backward()
    return model


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clip_on_ranks(conv, data, max_norm, frozen):
    shape = (data, dist.get_world_size() // data)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "group"))
    model = with_gradients(conv, mesh, frozen)
    norm = gradient_norm(model, mesh)
    return norm, clip_gradients_(model, mesh, max_norm), gradient_norm(model, mesh), grads_of(model)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize(("ranks", "data"), [(1, 1), (2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("conv", CONVS)
def test_norm_and_clipping_are_those_of_one_process(pool, conv, ranks, data, max_norm):
    model = with_gradients(conv)
    wanted = clip_grad_norm_(model.parameters(), max_norm)
    bias = model.classifier.bias.grad
    for norm, returned, after, grads in pool.run(clip_on_ranks, conv, data, max_norm, (), ranks=ranks):
        torch.testing.assert_close(norm, wanted, **CLOSE)
        torch.testing.assert_close(returned, wanted, **CLOSE)
        # torch divides by the norm plus 1e-6.
        torch.testing.assert_close(after, min(wanted, torch.tensor(max_norm)).to(after), rtol=1e-6, atol=0)
        torch.testing.assert_close(grads["classifier.bias"], bias, **CLOSE)


@pytest.mark.parametrize("frozen", [("stem", "stages"), ("classifier.bias",)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parameters_without_a_gradient_do_not_count(pool, ranks, frozen):
    model = with_gradients("gc2l", frozen=frozen)
    wanted = clip_grad_norm_(model.parameters(), 1.0)
    for norm, _, _, grads in pool.run(clip_on_ranks, "gc2l", 1, 1.0, frozen, ranks=ranks):
        torch.testing.assert_close(norm, wanted, **CLOSE)
        assert not [name for name in grads if name.startswith(frozen)]


def test_bias_has_enough_of_the_norm_to_be_noticed():
    """Counted P times it would change the norm by far more than the tolerance."""
    grads = grads_of(with_gradients("gc2l"))
    total = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert grads["classifier.bias"].norm() > 0.1 * total
