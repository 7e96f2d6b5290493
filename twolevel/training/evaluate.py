"""Loss and error of a network over a test set."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.nn import functional as F

from twolevel.data.split import EvalSplit

EVAL_BATCH = 500


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def batch_sums(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """[sum of losses, number right, number of images] of a batch with mean loss `loss`; no host wait."""
    right = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.detach().double() * len(labels), right.double(), right.new_tensor(len(labels)).double()]
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, test: EvalSplit, mesh: DeviceMesh, precision: str, device: torch.device
) -> tuple[float, float]:
    """(mean cross-entropy, error in percent) over the test images, each counted once over all replicas."""
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in test.eval_batches(EVAL_BATCH):
        with autocast(device, precision):
            logits = model(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        sums += batch_sums(logits, labels, F.cross_entropy(logits, labels))
    model.train(training)
    loss, right, number = sum_over_data(sums, mesh)
    return loss / number, 100 * (1 - right / number)


def sum_over_data(sums: Tensor, mesh: DeviceMesh) -> list[float]:
    """The sum over replicas, on the host."""
    if mesh["data"].size() > 1:
        sums = sums.clone()
        dist.all_reduce(sums, group=mesh.get_group("data"))
    return sums.tolist()
