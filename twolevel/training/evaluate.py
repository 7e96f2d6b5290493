"""Loss and error of a network over a test set."""

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.data.split import EvalSplit

if TYPE_CHECKING:
    from twolevel.training.strategies import Strategy

EVAL_BATCH = 500
ALL_BATCHES = 1 << 32
"""More batches than any test set has."""


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def batch_sums(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """[sum of losses, number right, number of images] of a batch with mean loss `loss`; no host wait."""
    right = (logits.argmax(1) == labels).sum()
    # Filled on the device: a copy from the host would be waited for.
    number = torch.full_like(loss, len(labels), dtype=torch.float64)
    return torch.stack([loss.detach().double() * number, right.double(), number])


@torch.no_grad()
def evaluate(
    model: nn.Module, test: EvalSplit, strategy: "Strategy", pause: Callable[[int], None] | None = None
) -> tuple[float, float]:
    """(mean cross-entropy, error in percent) over the test images, each counted once over all ranks.

    `model` is this rank's part of a network, as `strategy` placed it. `pause` is called before each batch with its
    number, and with ALL_BATCHES after the last; it may raise. Every rank must call this.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=strategy.device)
    with closing(strategy.eval_batches(model, test)) as batches:
        for number, (images, labels) in enumerate(batches):
            if pause is not None:
                pause(number)
            logits = strategy.logits(model, images)
            if logits is not None and len(labels):
                logits = logits if logits.dtype == torch.float64 else logits.float()
                sums += batch_sums(logits, labels, F.cross_entropy(logits, labels))
    if pause is not None:
        pause(ALL_BATCHES)
    model.train(training)
    loss, right, number = strategy.total(sums)
    return loss / number, 100 * (1 - right / number)
