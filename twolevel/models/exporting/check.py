"""What an exported file computes, against the network that it was made of."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from twolevel.errors import UserError
from twolevel.models.exporting.prepare import TRACED_BATCH, Source
from twolevel.nn import DynamicGroupConv2d

Run = Callable[[Tensor], Tensor]

IMAGES = TRACED_BATCH + 1
CANDIDATES = 8
"""Images of which a network with dynamic groups is given the IMAGES whose choices are the clearest."""

ROUNDING = 30
"""How many times the rounding of the network itself a file may differ. Sums in another order and folded norms make it
one to four times; a wrong graph differs by as much as the outputs."""


class Difference(NamedTuple):
    """The largest difference of a file's outputs from those of its network, and the largest output."""

    largest: float
    output: float

    def __str__(self) -> str:
        return f"{self.largest:.2g}, of outputs up to {self.output:.3g}"


@torch.no_grad()
def compare(source: Source, run: Run) -> Difference:
    """Raises UserError where they differ by more than rounding, or the network's outputs are not finite."""
    images = _images(source)
    wanted = source.outputs(images)
    if not wanted.isfinite().all():
        raise UserError(
            "the network's outputs for random images are not finite, so a file cannot be checked; is it trained?"
        )
    got = run(images)
    if got.shape != wanted.shape:
        raise UserError(
            f"what was written computes {[*got.shape]} where the network computes {[*wanted.shape]}; it is removed"
        )
    found = Difference(float((got - wanted).abs().max()), float(wanted.abs().max()))
    exact = copy.deepcopy(source.model).double()(images.double())
    rounding = float((wanted - exact).abs().max()) + torch.finfo(torch.float32).eps * found.output
    if not found.largest <= ROUNDING * rounding:
        raise UserError(f"what was written differs from the network by up to {found}; it is removed")
    return found


def _images(source: Source) -> Tensor:
    """Random images `[IMAGES, C, H, W]`, of another number than was traced.

    A dynamic group convolution chooses channels by saliencies that differ by rounding from one program to another.
    Where two are nearly equal at the border, another choice would be as good, but not the same: such images say
    nothing.
    """
    generator = torch.Generator().manual_seed(0)
    layers = [module for module in source.model.modules() if isinstance(module, DynamicGroupConv2d)]
    number = CANDIDATES if layers else IMAGES
    images = torch.randn(number, *source.image_shape, generator=generator)
    if not layers:
        return images
    with _margins(layers) as margins:
        source.outputs(images)
    clearest = torch.stack(margins).amin(0).argsort(descending=True)[:IMAGES]
    return images[clearest]


@contextmanager
def _margins(layers: list[DynamicGroupConv2d]) -> Iterator[list[Tensor]]:
    """Inside, each call of a layer adds the margin of its choice for every image, `[B]`, to the list."""
    margins: list[Tensor] = []

    def record(layer: DynamicGroupConv2d) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, g: Tensor) -> None:
            margins.append(_margin(layer, g))

        return hook

    handles = [layer.saliency.register_forward_hook(record(layer)) for layer in layers]
    try:
        yield margins
    finally:
        for handle in handles:
            handle.remove()


def _margin(layer: DynamicGroupConv2d, g: Tensor) -> Tensor:
    """How far the choice of the channels of each image is from another one: `[B, H, n] -> [B]`, of the largest g.

    Infinite where it is not by the values: nothing is dropped, or saliencies are equal, of which the index decides.
    """
    if layer.by_threshold:
        gaps = (g - layer.threshold).abs().where(g > 0, torch.inf).amin(2)
    else:
        border = int(layer.num_dropped())
        if not border:
            return g.new_full((len(g),), torch.inf)
        ordered = g.sort(-1).values
        gaps = ordered[..., border] - ordered[..., border - 1]
        gaps = gaps.where(gaps > 0, torch.inf)
    return (gaps / g.amax(2)).amin(1)
