"""Loss and error of a network over a test set."""

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.data.split import EvalSplit
from twolevel.distributed.strategies import Placed

ALL_BATCHES = 1 << 32
"""More batches than any test set has."""


def batch_sums(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """[sum of losses, number right, number of images] of a batch with mean loss `loss`; no host wait."""
    right = (logits.argmax(1) == labels).sum()
    # Filled on the device: a copy from the host would be waited for.
    number = torch.full_like(loss, len(labels), dtype=torch.float64)
    return torch.stack([loss.detach().double() * number, right.double(), number])


class Tested(NamedTuple):
    """The result of a test; an image is finite where its loss and all its logits are.

    `loss` is the mean cross-entropy of the finite images: one that is not would make any mean say nothing of the
    others. It is None where no image is finite, or their losses have no finite sum. `error`, in percent, is over
    all `images`; those that are `not_finite` count as wrong. `mirrored_error` is that of the mean of the logits of an
    image and its mirror image, where that was asked for.
    """

    loss: float | None
    error: float
    images: int
    not_finite: int
    mirrored_error: float | None = None

    def record(self, prefix: str = "") -> dict[str, Any]:
        """As the record of an epoch holds it; `prefix` says of which weights."""
        values = self._asdict()
        if self.mirrored_error is None:
            del values["mirrored_error"]
        return {f"{prefix}test_{name}": value for name, value in values.items()}


@torch.no_grad()
def evaluate(
    placed: Placed,
    test: EvalSplit,
    model: nn.Module | None = None,
    *,
    mirrored: bool = False,
    pause: Callable[[int], None] | None = None,
) -> Tested:
    """Loss and error over the test images, each counted once over all ranks; with `mirrored` another error too.

    `model` is this rank's part of the network unless given, as its moving average may be. `pause` is called before
    each batch with its number, and with ALL_BATCHES after the last; it may raise. Every rank must call this.
    """
    model = placed.model if model is None else model
    training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=placed.device)
    with closing(placed.eval_batches(model, test)) as batches:
        for number, (images, labels) in enumerate(batches):
            if pause is not None:
                pause(number)
            logits = placed.logits(model, images)
            others = placed.logits(model, images.flip(3)) if mirrored else logits
            if logits is not None and others is not None and len(labels):
                sums += _sums(logits, others, labels)
    if pause is not None:
        pause(ALL_BATCHES)
    model.train(training)
    loss, right, both_right, finite, number = placed.total(sums)
    mean = loss / finite if finite else math.inf
    return Tested(
        mean if math.isfinite(mean) else None,
        100 * (1 - right / number),
        int(number),
        int(number - finite),
        100 * (1 - both_right / number) if mirrored else None,
    )


def _sums(logits: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """Of the finite images of a batch [sum of losses, number right, number right with the others', number finite],
    and the number of all; no host wait."""
    if logits.dtype != torch.float64:
        logits, others = logits.float(), others.float()
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    finite = losses.isfinite() & logits.isfinite().all(1)
    right = finite & (logits.argmax(1) == labels)
    both_right = finite & others.isfinite().all(1) & ((logits + others).argmax(1) == labels)
    number = torch.full_like(losses[0], len(labels))
    counts = [count.sum().double() for count in (right, both_right, finite)]
    return torch.stack([losses.where(finite, 0).sum(), *counts, number])
