"""Reads a network's operations by running it once on the meta device, so from shapes alone."""

from collections.abc import Callable, Collection
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from twolevel.analysis.planner.workload import KIND_OF, VIEWS, End, Kind, Layer, Shape, Value, Workload
from twolevel.errors import UserError
from twolevel.nn import BalancedConv2d, TwoLevelConv2d
from twolevel.nn.base import ReplicatedConv2d
from twolevel.nn.layout import channel_groups
from twolevel.nn.structure import blocks, ends, named_layers


def trace(model: nn.Module, input_shape: Shape) -> Workload:
    """The operations of a network, in the order of forward, on an image of `input_shape` (channels, height, width).

    Works on a model of any device, the meta device included, and leaves it as it was.

    Raises UserError for convolutions that choose their connections (flgc, dgconv, dgc, lgc), for shuffle and for bgc.
    """
    unknown = (ReplicatedConv2d, BalancedConv2d)
    kind = next((type(m).__name__ for m in model.modules() if isinstance(m, unknown)), None)
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
    layers: list[Layer] = []
    block, names = "", [name for name, _ in blocks(model)]
    for layer in tracer.layers:
        if layer.name:
            block = next((b for b in names if f"{layer.name}.".startswith(f"{b}.")), "")
        layers.append(replace(layer, block=block))
    return Workload(tuple(tracer.values), tuple(layers), channel_groups(model))


class _Tracer(TorchFunctionMode):
    """Records layers with parameters by hooks, and every other operation as torch calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.values: list[Value] = []
        self.layers: list[Layer] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a tensor that is freed could give its id to another
        self.depth = 0
        self.stem, self.classifier = ends(model)
        self.hooks: list[RemovableHandle] = []
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
        self.alive.append(tensor)
        return index

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.depth += 1

    def _leave(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self.depth -= 1
            kind = _kind_of(module)
            self.layers.append(
                Layer(
                    name=name,
                    kind=kind,
                    operation=kind,
                    inputs=(self.numbers[id(inputs[0])],),
                    output=self.number(output),
                    parameters=tuple(tuple(p.shape) for p in module.parameters()),
                    taps=prod(getattr(module, "kernel_size", (1, 1))),
                    groups=getattr(module, "groups", 1),
                    representatives=getattr(module, "representatives", 0),
                    end=self._end_of(module),
                )
            )

        return leave

    def _end_of(self, module: nn.Module) -> End | None:
        if module is self.stem:
            return "stem"
        return "classifier" if module is self.classifier else None

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before = args[0].shape if args and isinstance(args[0], Tensor) else None
        result = function(*args, **(kwargs or {}))
        if self.depth or not isinstance(result, Tensor):
            return result
        given = args[0] if args and isinstance(args[0], list | tuple) else args
        inputs = tuple(self.numbers[id(a)] for a in given if isinstance(a, Tensor) and id(a) in self.numbers)
        if not inputs or result.dim() < 2:
            return result
        name = function.__name__ if "__" in function.__name__ else function.__name__.rstrip("_")
        if name in VIEWS and before is not None and result.numel() == before.numel():
            self.number(result, self.values[inputs[0]].storage)
            last = self.layers[-1] if self.layers else None
            if last and last.output == inputs[0]:  # a view is not a layer: it replaces its source
                self.layers[-1] = replace(last, output=len(self.values) - 1)
            return result
        in_place = any(result is a for a in args)
        storage = self.values[inputs[0]].storage if in_place else None
        self.layers.append(
            Layer(
                name="",
                kind=KIND_OF.get(name, "other"),
                operation=name,
                inputs=inputs,
                output=self.number(result, storage),
            )
        )
        return result


def _kind_of(module: nn.Module) -> Kind:
    """The kind of a layer that has parameters."""
    match module:
        case nn.BatchNorm2d():
            return "norm"
        case nn.Linear():
            return "linear"
        case TwoLevelConv2d():
            return "two-level"
        case _:
            return "conv"
