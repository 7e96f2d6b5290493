"""What a single process makes of a batch, and the same from ranks: the reference of every way to share a network."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from twolevel.distributed import init_mesh
from twolevel.models import create
from twolevel.training.config import OptimiserConfig
from twolevel.training.step import make_step

RULE = {"learning_rate": 0.05, "weight_decay": 5e-4}


@dataclass
class Learned:
    """Losses of the steps, gradients of the first, and the state after the last."""

    losses: list[float]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def batch(number: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(number, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (number,), generator=generator)


def train_alone(name: str, images, labels, *, steps=3, parts=1, conv="sc", groups=1, clip=None) -> Learned:
    """SGD written out, a batch in `parts` one after the other."""
    model = create(name, conv=conv, groups=groups, num_classes=10).double().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    learned = Learned([], {}, {})
    for _ in range(steps):
        optimiser.zero_grad()
        losses = []
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            losses.append(F.cross_entropy(model(x), y))
            (losses[-1] / parts).backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        learned.gradients = learned.gradients or {k: p.grad.clone() for k, p in model.named_parameters()}
        learned.losses.append(torch.stack(losses).mean().item())
        optimiser.step()
    learned.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return learned


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_on_ranks(
    name: str, images, labels, *, data=1, steps=3, accumulate=1, clip=None, **options
) -> Learned:
    """The same through `make_step` on all ranks; the gradients and state of what this rank has of the network."""
    mesh = init_mesh(data, device="cpu")
    rule = OptimiserConfig(**RULE, accumulate=accumulate, clip_norm=clip)
    size = images.shape[-1]
    step = make_step(
        name, mesh, "cpu", image_shape=(3, size, size), precision="float64", optimiser=rule, **options
    )
    images, labels = (t.chunk(data)[mesh.get_local_rank("data")] for t in (images, labels))
    images = images.contiguous(memory_format=torch.channels_last)
    learned = Learned([], {}, {})
    for _ in range(steps):
        loss, _, number = step.placed.total(step(images, labels))
        learned.losses.append(loss / number)
        learned.gradients = learned.gradients or {
            k: whole(p.grad) for k, p in step.placed.model.named_parameters()
        }
    learned.state = {key: whole(tensor) for key, tensor in step.placed.model.state_dict().items()}
    return learned


def join(parts: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ranks hold, put together: along the dimension in which it is smaller, or from the rank that has it.

    What several ranks hold whole must be the same on all.
    """
    joined = {}
    for key, tensor in reference.items():
        pieces = [part[key] for part in parts if key in part]
        smaller = [d for d, size in enumerate(tensor.shape) if size != pieces[0].shape[d]]
        joined[key] = torch.cat(pieces, *smaller) if smaller else pieces[0]
        for piece in pieces:
            assert smaller or torch.equal(piece, pieces[0]), key
    assert set().union(*parts) == reference.keys()
    return joined


def assert_learned_the_same(ranks: list[Learned], alone: Learned, *, close: dict, later: dict) -> None:
    """`close` for the first step, `later` for what follows, where every step amplifies rounding."""
    gradients = join([rank.gradients for rank in ranks], alone.gradients)
    torch.testing.assert_close(gradients, alone.gradients, **close)
    for rank in ranks:
        torch.testing.assert_close(rank.losses, alone.losses, **later)
    state = join([rank.state for rank in ranks], alone.state)
    torch.testing.assert_close(state, alone.state, **later)
