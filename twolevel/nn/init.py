"""Initial parameters that do not depend on the number of processors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twolevel.nn.base import ReplicatedConv2d
from twolevel.nn.layout import Layout, layout_of
from twolevel.streams import stream


@torch.no_grad()
def initialize(
    model: nn.Module,
    seed: int = 0,
    device: torch.device | str | None = None,
    *,
    prefix: str = "",
    layout: Layout | None = None,
) -> nn.Module:
    """Draw a network's parameters, whole or in part, from (seed, parameter name, channel group).

    Weights of convolutions and linear layers are normal with variance 2 / fan-in (He et al.,
    arXiv 1502.01852), normalisations start at scale 1, everything else at 0. Each channel group has its
    own stream, always drawn on the CPU in float32, so that any rank of any number of ranks gets the same
    values and draws no others. With `device`, a model on the meta device is first given memory there. On the meta
    device nothing is drawn.
    `prefix` is the name of `model` within a larger network, and `layout` the part of that network's layout which is
    about `model`: so a network is drawn piece by piece, with the values of the whole.
    """
    if device is not None:
        model.to_empty(device=device)
    layout = layout or layout_of(model)
    start = f"{prefix}." if prefix else ""
    for path, module in model.named_modules():
        if isinstance(module, ReplicatedConv2d):
            module.reset_parameters(stream(seed, start + path))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            key = f"{path}.{name}" if path else name
            if isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
                _draw_he_normal(parameter, layout, key, seed, start + key)
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def _draw_he_normal(weight: Tensor, layout: Layout, name: str, *key: int | str) -> None:
    if weight.is_meta:
        return
    std = math.sqrt(2 / math.prod(layout.whole_shape(name, weight)[1:]))
    dim = layout.dims[name]
    if dim is None:
        weight.copy_(_normal(weight.shape, *key, 0) * std)
        return
    held = layout.held_groups()
    for group, part in zip(held, weight.chunk(len(held), dim), strict=True):
        part.copy_(_normal(part.shape, *key, group) * std)


def _normal(shape: Sequence[int], *key: int | str) -> Tensor:
    return torch.randn(shape, generator=stream(*key), dtype=torch.float32, device="cpu")
