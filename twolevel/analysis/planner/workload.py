"""What a training step of a network computes: its layers in order, the values between them, what is kept for backward.

`Workload` is the whole network for one image, as `tracing` reads it; `Work` is one layer of it for a batch, or the part
of that layer that one rank computes.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from twolevel.nn.structure import ACTIVATIONS, KEEPS_RESULT, POOLS, functions_of

Kind = Literal["conv", "two-level", "norm", "activation", "add", "mean", "pool", "linear", "other"]
End = Literal["stem", "classifier"]
Shape = tuple[int, ...]


def _names(operations: Iterable[str]) -> set[str]:
    """By name: torch gives the same operation several functions (F.relu, Tensor.relu_, ...)."""
    return {function.__name__.rstrip("_") for function in functions_of(operations)}


KIND_OF: dict[str, Kind] = dict.fromkeys(_names(ACTIVATIONS), "activation")
KIND_OF |= {"add": "add", "__add__": "add", "__iadd__": "add", "mean": "mean"}
KIND_OF |= dict.fromkeys((*_names(POOLS), "cat"), "pool")
VIEWS = {"flatten", "view", "reshape", "unflatten", "squeeze", "contiguous"}
KEEPS_INPUT = _names((*ACTIVATIONS, *POOLS)) - _names(KEEPS_RESULT)


@dataclass(frozen=True)
class Value:
    """A tensor between layers, without the batch; what an operation in place writes shares its `storage`."""

    shape: Shape
    storage: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A layer as one rank computes it for `batch` images: `groups` of the layer's `all_groups` groups."""

    kind: Kind
    batch: int
    channels_in: int
    channels_out: int
    pixels_in: int
    pixels_out: int
    taps: int = 1
    groups: int = 1
    all_groups: int = 1
    representatives: int = 0
    """of a group, in a two-level convolution"""
    input_grad: bool = True

    @property
    def macs(self) -> int:
        """Multiply-accumulates of forward: of a convolution by the weights of `local`, or of the linear layer."""
        if self.kind not in ("conv", "two-level", "linear"):
            return 0
        return self.batch * self.pixels_out * self.taps * self.channels_in * self.channels_out // self.groups

    @property
    def maps(self) -> int:
        """Channels of z: the representatives of all groups."""
        return self.all_groups * self.representatives

    @property
    def elements_in(self) -> int:
        return self.batch * self.channels_in * self.pixels_in

    @property
    def elements_out(self) -> int:
        return self.batch * self.channels_out * self.pixels_out

    @property
    def widths(self) -> tuple[float, float]:
        """Input and output channels of a group."""
        return self.channels_in / self.groups, self.channels_out / self.groups


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operation: `inputs` and `output` are indices of the workload's values; parameters by shape."""

    name: str
    kind: Kind
    operation: str
    inputs: tuple[int, ...]
    output: int
    parameters: tuple[Shape, ...] = ()
    taps: int = 1
    groups: int = 1
    representatives: int = 0
    """of a group, in a two-level convolution"""
    end: End | None = None
    block: str = ""
    """the member of a Sequential that contains it, if any; for an operation without a name, that of the layer before"""

    @property
    def size(self) -> int:
        return sum(map(prod, self.parameters))

    @property
    def maps(self) -> int:
        """Channels of z: the representatives of all groups."""
        return self.groups * self.representatives


@dataclass(frozen=True)
class Workload:
    """A network's operations on one image; value 0 is the image."""

    values: tuple[Value, ...]
    layers: tuple[Layer, ...]
    groups: int

    @cached_property
    def representatives(self) -> int:
        """Of a group in a two-level convolution; 1 where there is none."""
        return max((layer.representatives for layer in self.layers), default=0) or 1

    @cached_property
    def uses(self) -> Counter[int]:
        """How many layers read each value."""
        return Counter(v for layer in self.layers for v in layer.inputs)

    @cached_property
    def gathered(self) -> tuple[int, ...]:
        """Values that dense convolutions behind the stem read: what channel parallelism gathers, once each."""
        read = (layer.inputs[0] for layer in self.layers if layer.kind == "conv" and layer.groups == 1)
        return tuple(dict.fromkeys(value for value in read if value))

    @cached_property
    def joins(self) -> tuple[int, ...]:
        """Values whose gradient is a sum, once for every reader after the first."""
        return tuple(v for v, readers in self.uses.items() for _ in range(readers - 1) if v)

    def is_map(self, value: int) -> bool:
        """Whether a value divides by channel: what is between the image and the classifier."""
        last = next((layer.output for layer in self.layers if layer.end == "classifier"), len(self.values))
        return 0 < value < last

    def work(
        self, layer: Layer, batch: int, ranks: int = 1, *, whole_input: bool = False, split: bool = True
    ) -> Work:
        """What one of `ranks` ranks computes of a layer that is split by channel, for `batch` images.

        `whole_input` is the channel-parallel dense convolution: all input channels, 1/P of the filters.
        """
        first, out = self.values[layer.inputs[0]], self.values[layer.output]
        parts_in = ranks if split and self.is_map(layer.inputs[0]) else 1
        parts_out = ranks if split and self.is_map(layer.output) else 1
        groups = max(1, layer.groups // ranks) if split else layer.groups
        if whole_input and layer.kind == "conv":
            parts_in, groups = 1, layer.groups
        return Work(
            kind=layer.kind,
            batch=batch,
            channels_in=first.shape[0] // parts_in,
            channels_out=out.shape[0] // parts_out,
            pixels_in=prod(first.shape[1:]),
            pixels_out=prod(out.shape[1:]),
            taps=layer.taps,
            groups=groups,
            all_groups=layer.groups,
            representatives=layer.representatives,
            input_grad=bool(layer.inputs[0]),
        )

    def join(self, value: int, batch: int, ranks: int = 1) -> Work:
        """The sum of two gradients of a value."""
        shape = self.values[value].shape
        channels, pixels = shape[0] // (ranks if self.is_map(value) else 1), prod(shape[1:])
        return Work(
            kind="add",
            batch=batch,
            channels_in=channels,
            channels_out=channels,
            pixels_in=pixels,
            pixels_out=pixels,
        )
