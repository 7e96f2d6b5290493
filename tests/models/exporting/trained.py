"""Networks as training leaves them, at sizes that export in seconds."""

import copy

import torch
from torch import nn

from twolevel import models
from twolevel.nn import DGConv2d, DynamicGroupConv2d, LearnedGroupConv2d

SIZE = 16
CLASSES = 5


def images(batch: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def trained(model: nn.Module, size: int = SIZE) -> nn.Module:
    """In evaluation, with norms that follow the activations, groups that are chosen and channels that are dropped."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
            module.momentum = None  # the mean over all batches
        if isinstance(module, DynamicGroupConv2d):
            nn.init.uniform_(module.offset, 0.5, 1.5)
        if isinstance(module, DynamicGroupConv2d | LearnedGroupConv2d):
            module.set_progress(1)
        if isinstance(module, DGConv2d):
            module.gates[-1] = -1  # groups that are spread over the channels
    model.train()(images(8, size))
    return model.eval()


def network(name: str, conv: str, size: int = SIZE, **options) -> nn.Module:
    groups = {} if conv in ("sc", "dgconv") else {"groups": 4}
    return trained(models.create(name, conv=conv, num_classes=CLASSES, **groups, **options), size)


def check_close(got: torch.Tensor, model: nn.Module, x: torch.Tensor) -> None:
    """Float32 against the network in float64: as far from it as the network itself, whose rounding depends on how
    deep it is and on its norms, times 20, since sums are added in another order and norms are folded; and at least a
    few times the precision of its largest output."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        rounding = float((model(x) - exact).abs().max())
    assert got.shape == exact.shape
    eps = torch.finfo(torch.float32).eps * float(exact.abs().max())
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=20 * rounding + 10 * eps)
