"""SyncedBatchNorm2d on ranks is nn.BatchNorm2d on all their images."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from twolevel.distributed import parallelize
from twolevel.distributed.batch_norm import SyncedBatchNorm2d
from twolevel.distributed.collectives import MeshAxis
from twolevel.nn.batch_norm import batch_norm_relu
from twolevel.ops.kernels import native

# Float32: the mean and the variance of about 100 numbers, and gradients that cancel to a tenth of their parts.
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
CHANNELS, STEPS = 6, 3
RANKS = [2, 4]


def images(rank: int, step: int, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank holds, and the gradient it gets; every rank has another number of images and another mean."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    shape = (rank + 1, CHANNELS, 3, 4)
    x, gy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (x * (step + 1) + rank).to(dtype), gy.to(dtype)


def module(dtype, **options) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS, dtype=torch.float64, **options)  # a generator draws differently by type
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(7))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(8))
    return norm.to(dtype)


def train(norm, batches, compute=nn.Module.__call__) -> list[dict]:
    """Output, gradients and statistics of every step, without an optimiser between."""
    results = []
    for x, gy in batches:
        norm.zero_grad()
        y = compute(norm, x.requires_grad_())
        y.backward(gy)
        grads = {name: parameter.grad.clone() for name, parameter in norm.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        results.append({"y": y.detach(), "x": x.grad, **grads, **buffers})
    return results


def synced(dtype, options) -> nn.BatchNorm2d:
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("data", "group"))
    norm = parallelize(module(dtype, **options), mesh, sync_batch_norm=True)
    assert type(norm) is SyncedBatchNorm2d
    return norm


def train_on_ranks(dtype, memory_format, options, compute=nn.Module.__call__, kernels="auto"):
    norm = synced(dtype, options)
    norm.kernels = kernels
    batches = [images(dist.get_rank(), step, dtype) for step in range(STEPS)]
    return train(norm, [(x.to(memory_format=memory_format), gy) for x, gy in batches], compute)


def join(parts: list[dict]) -> dict:
    """Images side by side; weight gradients, of which each rank has its images' share, added."""
    joined = {}
    for key, first in parts[0].items():
        tensors = [part[key] for part in parts]
        if key in ("y", "x"):
            joined[key] = torch.cat(tensors)
        elif key in ("weight", "bias"):
            joined[key] = torch.stack(tensors).sum(0)
        else:
            assert all(torch.equal(tensor, first) for tensor in tensors), key
            joined[key] = first
    return joined


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", RANKS)
def test_training_is_that_of_all_images(pool, ranks, options, memory_format, dtype):
    wanted = train(module(dtype, **options), together(ranks, dtype))
    results = pool.run(train_on_ranks, dtype, memory_format, options, ranks=ranks)
    got = [join(list(parts)) for parts in zip(*results, strict=True)]
    torch.testing.assert_close(got, wanted, **TOLERANCE[dtype])


def together(ranks, dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What all ranks hold."""
    return [
        tuple(
            torch.cat(tensors) for tensors in zip(*(images(r, s, dtype) for r in range(ranks)), strict=True)
        )
        for s in range(STEPS)
    ]


def composed(norm, x):
    return F.relu(norm(x))


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        pytest.param(
            "native",
            torch.float32,
            marks=pytest.mark.skipif(native.available() is not None, reason="no C compiler"),
        ),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
@pytest.mark.parametrize("compute", [nn.Module.__call__, batch_norm_relu], ids=["alone", "with ReLU"])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_set_of_kernels_normalises_over_ranks(
    pool, ranks, compute, options, memory_format, kernels, dtype
):
    wanted = train(
        module(dtype, **options),
        together(ranks, dtype),
        composed if compute is batch_norm_relu else compute,
    )
    results = pool.run(train_on_ranks, dtype, memory_format, options, compute, kernels, ranks=ranks)
    got = [join(list(parts)) for parts in zip(*results, strict=True)]
    torch.testing.assert_close(got, wanted, **TOLERANCE[dtype])


class Noted(TorchDispatchMode):
    """Names of the operations, and the numbers that each collective sends."""

    def __init__(self):
        super().__init__()
        self.names, self.sent = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        if function.name().startswith("c10d::"):
            tensors = args[0] if "reduce" in function.name() else args[1]
            self.sent.append(
                sum(t.numel() for t in tensors) if isinstance(tensors, list) else tensors.numel()
            )
        return function(*args, **(kwargs or {}))


def noted_on_ranks(kernels):
    norm = synced(torch.float32, {"momentum": None})
    norm.kernels = kernels
    x, gy = images(dist.get_rank(), 0, torch.float32)
    with Noted() as noted:
        batch_norm_relu(norm, x.requires_grad_()).backward(gy)
    return noted.names, noted.sent


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_two_collectives_and_nothing_that_waits_for_a_device(pool, kernels):
    """A number made on the host and copied to a GPU, or read from one, would make the host wait for it."""
    if kernels == "native" and native.available() is not None:
        pytest.skip("no C compiler")
    for names, sent in pool.run(noted_on_ranks, kernels, ranks=2):
        assert sent == [2 * CHANNELS + 1, 2 * CHANNELS]
        assert not {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::item"} & set(names), names


def evaluate_on_ranks(dtype):
    norm = synced(dtype, {})
    for step in range(STEPS):
        norm(images(dist.get_rank(), step, dtype)[0])
    before = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    # Alone: other ranks may have no image left to evaluate.
    y = norm.eval()(images(0, STEPS, dtype)[0]) if dist.get_rank() == 0 else None
    return y, before, dict(norm.state_dict())


def test_evaluation_uses_the_running_statistics_and_asks_no_other_rank(pool):
    norm = module(torch.float64)
    for step in range(STEPS):
        norm(torch.cat([images(rank, step, torch.float64)[0] for rank in range(2)]))
    (y, before, after), _ = pool.run(evaluate_on_ranks, torch.float64, ranks=2)
    torch.testing.assert_close(y, norm.eval()(images(0, STEPS, torch.float64)[0]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert before["num_batches_tracked"] == STEPS


def large_mean_on_ranks():
    norm = synced(torch.float32, {})
    x = 1e4 + torch.randn(64, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    return x, norm(x)


def test_variance_survives_a_large_mean(pool):
    """Sums of squares would lose it: 1e8 has no digit left in float32 for a variance of 1."""
    x, y = (torch.cat(tensors) for tensors in zip(*pool.run(large_mean_on_ranks, ranks=2), strict=True))
    wanted = module(torch.float64)(x.double())
    # x itself is rounded to 1e-3; the mean of a rank, rounded to that, shifts y by as much.
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=5e-3)


def bfloat16_on_ranks():
    norm = synced(torch.float32, {})
    x, gy = images(dist.get_rank(), 0, torch.bfloat16)
    return join([train(norm, [(x, gy)])[0]])


def test_bfloat16_images_with_float32_weights(pool):
    """As under autocast: images and their gradients stay bfloat16, everything kept is float32."""
    parts = pool.run(bfloat16_on_ranks, ranks=2)
    x, gy = (
        torch.cat(tensors) for tensors in zip(*(images(r, 0, torch.bfloat16) for r in range(2)), strict=True)
    )
    (wanted,) = train(module(torch.float32), [(x, gy)])
    got = join(parts)
    assert {key: t.dtype for key, t in got.items()} == {key: t.dtype for key, t in wanted.items()}
    # One rounding to 8 bits of numbers up to 4, on each side.
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)


def second_derivatives_on_ranks(frozen, compute=nn.Module.__call__):
    norm = synced(torch.float64, {})
    x, gy = images(dist.get_rank(), 0, torch.float64)
    x.requires_grad_("x" not in frozen), norm.weight.requires_grad_("weight" not in frozen)
    wanted = [t for t in (x, norm.weight) if t.requires_grad]
    if frozen == "x":  # then the output is linear in what is left
        (g_weight,) = torch.autograd.grad(compute(norm, x), wanted, gy, create_graph=True)
        assert not g_weight.requires_grad
        return
    with pytest.raises(NotImplementedError, match="second derivatives across ranks are not supported"):
        torch.autograd.grad(compute(norm, x), wanted, gy, create_graph=True)


@pytest.mark.parametrize("compute", [nn.Module.__call__, batch_norm_relu], ids=["alone", "with ReLU"])
@pytest.mark.parametrize("frozen", ["", "weight", "x"])
def test_second_derivatives_are_refused_across_ranks(pool, frozen, compute):
    pool.run(second_derivatives_on_ranks, frozen, compute, ranks=2)


def second_derivatives_on_one_rank():
    norm = module(torch.float64)
    norm.__class__, norm.axis = SyncedBatchNorm2d, MeshAxis(dist.group.WORLD)
    x = images(1, 0, torch.float64)[0].requires_grad_()

    def compute(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradgradcheck(compute, (x, norm.weight, norm.bias))


def test_second_derivatives_on_one_rank(pool):
    pool.run(second_derivatives_on_one_rank, ranks=1)
