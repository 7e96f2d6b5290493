"""Which dimension of every tensor of a network divides by channel group.

This is a fact about the network, whoever holds it: initialisation draws each group's part from its own
stream, and `twolevel.distributed.parallelize` gives each rank the parts of its groups.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from twolevel.nn.base import ShardedConv2d
from twolevel.nn.structure import convolutions, ends, own_tensors


@dataclass(frozen=True)
class Layout:
    """The part of a network that is held: of P equal parts along the channel groups, the one at `index`.

    `dims` maps each name of the single-process `state_dict()` to the dimension that divides by channel
    group, or to None for a tensor that every rank holds whole. A part has `groups / parts` groups.
    """

    groups: int
    dims: dict[str, int | None]
    index: int = 0
    parts: int = 1

    def part(self, index: int, parts: int) -> "Layout":
        return replace(self, index=index, parts=parts)

    def is_split(self, name: str) -> bool:
        """Whether ranks hold different parts of this tensor."""
        return self.parts > 1 and self.dims[name] is not None

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This part of a whole tensor, a view."""
        dim = self.dims[name]
        return whole if dim is None else whole.chunk(self.parts, dim)[self.index]

    def whole_shape(self, name: str, held: Tensor) -> list[int]:
        """The shape in the single-process model of a tensor of which this part is held."""
        shape, dim = list(held.shape), self.dims[name]
        if dim is not None:
            shape[dim] *= self.parts
        return shape

    def within(self, name: str) -> "Layout":
        """The layout of the module called `name`, by the module's own names."""
        start = f"{name}." if name else ""
        dims = {key.removeprefix(start): dim for key, dim in self.dims.items() if key.startswith(start)}
        return replace(self, dims=dims)

    def held_groups(self) -> range:
        """The channel groups of this part."""
        held = self.groups // self.parts
        return range(self.index * held, (self.index + 1) * held)


def layout_of(model: nn.Module) -> Layout:
    """The layout of a network: as `parallelize` left it, else that of the whole."""
    layout = getattr(model, "layout", None)
    if layout is not None:
        return layout
    groups = channel_groups(model)
    return Layout(groups, channel_dims(model) if groups > 1 else dict.fromkeys(model.state_dict()))


def set_layout(model: nn.Module, layout: Layout) -> None:
    """Have `layout_of(model)` return this one: of the part that `model` now is."""
    object.__setattr__(model, "layout", layout)


def channel_dims(model: nn.Module) -> dict[str, int | None]:
    """The dimension of every tensor of a network that divides by channel, None where none does.

    Convolutions, normalisations and the first, dense convolution (the stem) divide by output channel at
    dim 0; the first linear layer (the classifier) divides by input feature at dim 1, its bias not at all;
    what is defined after it does not divide.
    """
    dims: dict[str, int | None] = dict.fromkeys(model.state_dict())
    classifier = ends(model)[1]
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        if module is classifier:
            dims[start + "weight"] = 1
            break
        for name, tensor in own_tensors(module).items():
            if tensor.dim() > 0:
                dims[start + name] = 0
    return dims


def channel_groups(model: nn.Module) -> int:
    """The number G of channel groups by which the whole network divides; 1 for one that does not.

    Convolutions with a multiple of G groups (depthwise ones among them) act within G groups too.
    """
    first, *rest = [_groups(conv) for conv in convolutions(model)] or [1]
    return math.gcd(*rest) if rest else first


def _groups(conv: nn.Module) -> int:
    return conv.groups if isinstance(conv, ShardedConv2d | nn.Conv2d) else 1
