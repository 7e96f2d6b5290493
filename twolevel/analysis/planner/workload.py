"""What a training step of a network computes: its layers in order, the values between them, what is kept for backward.

Read by running the network once on the meta device, so from shapes alone. `Workload` is the whole network for one
image; `Work` is one layer of it for a batch, or the part of that layer that one rank computes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from twolevel.errors import UserError
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.base import WholeConv2d
from twolevel.nn.layout import channel_groups
from twolevel.nn.structure import ACTIVATIONS, KEEPS_RESULT, POOLS, ends, functions_of, named_layers

Kind = Literal["conv", "two-level", "norm", "activation", "add", "mean", "pool", "linear", "other"]
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


@dataclass(frozen=True)
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
    input_grad: bool = True

    @property
    def macs(self) -> int:
        """Multiply-accumulates of forward in convolution by the weights of `local` alone, or the linear layer's."""
        if self.kind not in ("conv", "two-level", "linear"):
            return 0
        return self.batch * self.pixels_out * self.taps * self.channels_in * self.channels_out // self.groups

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


@dataclass(frozen=True)
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
    end: Literal["stem", "classifier"] | None = None
    block: str = ""
    """the member of a Sequential that it is in, if any; of what has no name, that of the layer before"""

    @property
    def size(self) -> int:
        return sum(map(prod, self.parameters))


@dataclass(frozen=True)
class Workload:
    """A network's operations on one image; value 0 is the image."""

    values: tuple[Value, ...]
    layers: tuple[Layer, ...]
    groups: int

    @cached_property
    def uses(self) -> Counter:
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
        held = max(1, layer.groups // ranks) if split else layer.groups
        if whole_input and layer.kind == "conv":
            parts_in, held = 1, layer.groups
        return Work(
            layer.kind,
            batch,
            first.shape[0] // parts_in,
            out.shape[0] // parts_out,
            prod(first.shape[1:]),
            prod(out.shape[1:]),
            layer.taps,
            held if layer.groups > 1 else 1,
            layer.groups,
            bool(layer.inputs[0]),
        )

    def join(self, value: int, batch: int, ranks: int = 1) -> Work:
        """The sum of two gradients of a value."""
        shape = self.values[value].shape
        channels, pixels = shape[0] // (ranks if self.is_map(value) else 1), prod(shape[1:])
        return Work("add", batch, channels, channels, pixels, pixels)


def trace(model: nn.Module, input_shape: Shape) -> Workload:
    """The operations of a network, in the order of forward, on an image of `input_shape` (channels, height, width).

    Works on a model of any device, the meta device included, and leaves it as it was.

    Raises UserError for convolutions that choose their connections (flgc, dgconv, dgc) and for shuffle.
    """
    kind = next((type(m).__name__ for m in model.modules() if isinstance(m, WholeConv2d)), None)
    if kind is not None:
        raise UserError(f"the cost model knows conv sc, gc and gc2l, not {kind}; use one of these")
    tracer = _Tracer(model)
    tensors = {k: torch.empty_like(t, device="meta") for k, t in model.state_dict().items()}
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), tracer:
            image = torch.empty(1, *input_shape, device="meta", dtype=dtype)
            tracer.number(image)
            functional_call(model.eval(), tensors, (image,))
    finally:
        tracer.remove()
        for module, mode in modes.items():
            module.training = mode
    groups = channel_groups(model)
    layers, block, blocks = [], "", list(_blocks(model))
    for layer in tracer.layers:
        if layer.name:
            block = next((b for b in blocks if f"{layer.name}.".startswith(f"{b}.")), "")
        layers.append(replace(layer, block=block))
    return Workload(tuple(tracer.values), tuple(layers), groups)


def _blocks(model: nn.Module, name: str = "") -> Iterator[str]:
    """The members of Sequentials that hold a convolution or linear layer: what FSDP gathers at a time."""
    for child, module in model.named_children():
        path = f"{name}.{child}" if name else child
        works = any(isinstance(inner, nn.Conv2d | nn.Linear) for inner in module.modules())
        if isinstance(model, nn.Sequential) and works and not isinstance(module, nn.Sequential):
            yield path
        elif isinstance(module, nn.Sequential):
            yield from _blocks(module, path)


class _Tracer(TorchFunctionMode):
    """Records modules that hold parameters by hooks, and every other operation as torch calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.values: list[Value] = []
        self.layers: list[Layer] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []  # a tensor that has gone could lend its id to another
        self.depth = 0
        self.stem, self.classifier = ends(model)
        self.hooks = []
        for name, module in named_layers(model):
            if isinstance(module, nn.Conv2d | TwoLevelConv2d | nn.BatchNorm2d | nn.Linear):
                self.hooks.append(module.register_forward_pre_hook(self._enter))
                self.hooks.append(module.register_forward_hook(self._leave(name)))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def number(self, tensor: Tensor, storage: int | None = None) -> int:
        index = len(self.values)
        self.values.append(Value(tuple(tensor.shape[1:]), index if storage is None else storage))
        self.numbers[id(tensor)] = index
        self.kept.append(tensor)
        return index

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        self.depth += 1

    def _leave(self, name: str):
        def leave(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.depth -= 1
            kinds: dict[type[nn.Module], Kind] = {
                nn.BatchNorm2d: "norm",
                nn.Linear: "linear",
                TwoLevelConv2d: "two-level",
            }
            kind: Kind = next((k for cls, k in kinds.items() if isinstance(module, cls)), "conv")
            kernel = getattr(module, "kernel_size", (1, 1))
            end = "stem" if module is self.stem else "classifier" if module is self.classifier else None
            self._add(
                Layer(
                    name,
                    kind,
                    kind,
                    (self.numbers[id(inputs[0])],),
                    self.number(output),
                    tuple(tuple(p.shape) for p in module.parameters()),
                    prod(kernel),
                    getattr(module, "groups", 1),
                    end,
                )
            )

        return leave

    def _add(self, layer: Layer) -> None:
        self.layers.append(layer)

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        before = args[0].shape if args and isinstance(args[0], Tensor) else None
        result = function(*args, **(kwargs or {}))
        if self.depth or not isinstance(result, Tensor):
            return result
        given = args[0] if args and isinstance(args[0], list | tuple) else args
        inputs = tuple(self.numbers[id(a)] for a in given if isinstance(a, Tensor) and id(a) in self.numbers)
        if not inputs or result.dim() < 2:
            return result
        name = (
            getattr(function, "__name__", "").rstrip("_")
            if "__" not in function.__name__
            else function.__name__
        )
        if name in VIEWS and before is not None and result.numel() == before.numel():
            self.number(result, self.values[inputs[0]].storage)
            last = self.layers[-1] if self.layers else None
            if last and last.output == inputs[0]:  # a view is no layer: its source is renamed
                self.layers[-1] = replace(last, output=len(self.values) - 1)
            return result
        in_place = any(result is a for a in args)
        storage = self.values[inputs[0]].storage if in_place else None
        self._add(Layer("", KIND_OF.get(name, "other"), name, inputs, self.number(result, storage)))
        return result
