"""What learned and dynamic group convolutions chose: kept channels, connections, numbers of groups."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d, LearnedGroupConv2d

T = TypeVar("T")


def layers_of(model: nn.Module, kind: type[T]) -> dict[str, T]:
    """The layers of that kind by name, in the order of their definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def spread(layers: dict[str, T], at_most: int = 6) -> dict[str, T]:
    """The first of the layers, the last, and evenly from between: no more than fit beside each other."""
    if len(layers) <= at_most:
        return layers
    names, last = [*layers], len(layers) - 1
    chosen = [names[round(i * last / (at_most - 1))] for i in range(at_most)]
    return {name: layers[name] for name in chosen}


@dataclass(frozen=True)
class Patterns:
    """What the heads of DGC layers kept of some test images, and how often they dropped each channel.

    images  `[N, 3, H, W]`, as the network saw them      labels  `[N]`, all different
    kept    by layer, bool `[N, heads, n]`: which channels a head kept of the image
    dropped by layer, float64 `[heads, n]`: the share, in [0, 1], of `num_images` images of which it was dropped
    """

    images: Tensor
    labels: Tensor
    kept: dict[str, Tensor]
    dropped: dict[str, Tensor]
    num_images: int


@torch.no_grad()
def kept_patterns(
    model: nn.Module,
    layers: dict[str, DynamicGroupConv2d],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_shown: int,
) -> Patterns:
    """Record what `layers`, all of them part of `model`, keep in evaluation of the images of at least one batch.

    The images shown are the first of each class, in their order, until there are `num_shown`; all are counted.
    The model is left as it was. What is returned is on the CPU.
    """
    modes = [(module, module.training) for module in model.modules()]
    images_shown: list[Tensor] = []
    labels_shown: list[int] = []
    kept_shown: dict[str, list[Tensor]] = {name: [] for name in layers}
    drops = {
        name: torch.zeros(layer.groups, layer.in_channels, dtype=torch.int64)
        for name, layer in layers.items()
    }
    num_images = 0
    model.eval()
    try:
        with watch_kept(layers) as kept:
            for images, labels in batches:
                model(images)
                num_images += len(images)
                new = _first_of_new_classes(labels.tolist(), labels_shown)[: num_shown - len(labels_shown)]
                images_shown.append(images[new].cpu())
                labels_shown += labels[new].tolist()
                for name in layers:
                    drops[name] += kept[name].logical_not().sum(0).cpu()
                    kept_shown[name].append(kept[name][new].cpu())
    finally:
        for module, training in modes:
            module.training = training
    return Patterns(
        torch.cat(images_shown),
        torch.tensor(labels_shown),
        {name: torch.cat(parts) for name, parts in kept_shown.items()},
        {name: number.double() / num_images for name, number in drops.items()},
        num_images,
    )


@contextmanager
def watch_kept(layers: dict[str, DynamicGroupConv2d]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, each forward leaves in the dict what every layer keeps of its input, bool `[B, heads, n]`."""
    kept: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[DynamicGroupConv2d, tuple[Tensor]], None]:
        def record(layer: DynamicGroupConv2d, inputs: tuple[Tensor]) -> None:
            kept[name] = layer.kept(*inputs)

        return record

    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _first_of_new_classes(labels: list[int], seen: list[int]) -> list[int]:
    """The positions of labels that are neither in `seen` nor earlier in the list."""
    return [at for at, label in enumerate(labels) if label not in seen and label not in labels[:at]]


def connections(layer: DGConv2d | FLGConv2d | LearnedGroupConv2d) -> Tensor:
    """Which input reaches which output now, bool `[m, n]`, on the CPU."""
    if isinstance(layer, DGConv2d):
        return layer.connectivity()
    if isinstance(layer, LearnedGroupConv2d):
        return layer.mask().cpu()
    inputs, outputs = (group.cpu() for group in layer.groups_of())
    return outputs[:, None] == inputs


def by_group(connected: Tensor) -> tuple[Tensor, Tensor]:
    """The orders of outputs `[m]` and inputs `[n]` that make each group of a mask `[m, n]` one block.

    Blocks lie along the diagonal, in the order of their first inputs; what is connected to nothing comes last. Groups
    that share inputs are blocks of rows.
    """
    rows = _alike_together(connected)
    return rows, _alike_together(connected[rows].t())


def _alike_together(mask: Tensor) -> Tensor:
    """The order in which equal rows follow each other, those whose first True comes first in front."""
    kind = mask.int().unique(dim=0, return_inverse=True)[1]
    return kind.argsort(descending=True, stable=True)


def group_numbers(epochs: list[dict[str, Any]]) -> dict[str, list[int]]:
    """By layer, the number of groups in each epoch: 2^(closed gates) of the "dgconv_gates" of its record."""
    return {
        name: [2 ** epoch["dgconv_gates"][name].count(False) for epoch in epochs]
        for name in epochs[0]["dgconv_gates"]
    }


def group_sizes(epochs: list[dict[str, Any]]) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, how many inputs and outputs each group has: two `[epochs, G]`, of "flgc_groups"."""

    def sizes(name: str, end: int) -> Tensor:
        return torch.tensor([epoch["flgc_groups"][name][end] for epoch in epochs])

    return {name: (sizes(name, 0), sizes(name, 1)) for name in epochs[0]["flgc_groups"]}
