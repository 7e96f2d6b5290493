"""What a network is: its layers by name, its stem and classifier, its graph, and which operations act per channel."""

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn.base import ReplicatedConv2d, ShardedConv2d
from twolevel.nn.channels import ChannelBias, PermuteChannels
from twolevel.nn.two_level import TwoLevelConv2d
from twolevel.ops.kernels import native

Convolution = ShardedConv2d | ReplicatedConv2d | nn.Conv2d


def convolutions(model: nn.Module) -> list[Convolution]:
    """The convolutions of a network in the order of their definition, each of ours as one."""
    return [module for _, module in named_layers(model) if isinstance(module, Convolution)]


def memory_format(model: nn.Module, device: torch.device | str) -> torch.memory_format:
    """In which a network of float32 computes fastest: contiguous where C kernels compute all of its grouped
    convolutions, as they go along the pixels of a channel; else channels_last.
    """
    layers = convolutions(model)
    two_level = [isinstance(layer, TwoLevelConv2d) for layer in layers]
    dense = [isinstance(layer, nn.Conv2d) and layer.groups == 1 for layer in layers]
    in_c = any(two_level) and all(map(operator.or_, two_level, dense)) and native.available() is None
    on_cpu = torch.device(device).type == "cpu"
    return torch.contiguous_format if in_c and on_cpu else torch.channels_last


def ends(model: nn.Module) -> tuple[nn.Conv2d | None, nn.Linear | None]:
    """The stem (the first convolution, where it is dense) and the classifier (the first linear layer)."""
    first = next(iter(convolutions(model)), None)
    stem = first if isinstance(first, nn.Conv2d) and first.groups == 1 else None
    return stem, next((m for _, m in named_layers(model) if isinstance(m, nn.Linear)), None)


def named_layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without the parts of our convolutions."""
    yield name, module
    if not isinstance(module, ShardedConv2d | ReplicatedConv2d):
        for child, inner in module.named_children():
            yield from named_layers(inner, f"{name}.{child}" if name else child)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, without those of the modules in it."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The members of Sequentials that hold a convolution or linear layer: what parallel=fsdp gathers at a time."""
    for child, module in model.named_children():
        path = f"{name}.{child}" if name else child
        works = any(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())
        if isinstance(model, nn.Sequential) and works and not isinstance(module, nn.Sequential):
            yield path, module
        elif isinstance(module, nn.Sequential):
            yield from blocks(module, path)


class LayerTracer(fx.Tracer):
    """Steps into a network's own blocks, but not into layers: our convolutions and torch's modules.

    With `childless`, any module without children is a layer.
    """

    def __init__(self, *, childless: bool = False):
        super().__init__()
        self.childless = childless

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ShardedConv2d | ReplicatedConv2d | ChannelBias | PermuteChannels):
            return True
        if self.childless and not any(True for _ in m.children()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace_layers(model: nn.Module, how: str, instead: str) -> fx.Graph:
    """The operations of a network, our convolutions and torch's layers as one each.

    Raises UserError, which says `how` it was to be split and what to do `instead`, where torch.fx cannot read it.
    """
    try:
        return LayerTracer().trace(model)
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot be split {how}: torch.fx cannot read its graph "
            f"({type(error).__name__}: {error}); {instead}".replace("\n", " ")
        ) from error


# THE table of operations that treat every channel alone, by module, function and method.
#
# A parameter or tensor of its own, one number a channel, takes an operation out of it (`nn.PReLU`): whoever cuts or
# permutes the channels would have to do so with that tensor. Numbers that all channels share are free.

# Each number of the result depends on one number of the input: by the name of the function, with its module.
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
    "threshold": nn.Threshold,
}
# What autograd keeps of an activation: its result; in place its result, else its input; of all others the input.
KEEPS_RESULT = ("relu", "sigmoid", "tanh")
KEEPS_RESULT_IN_PLACE = ("leaky_relu", "elu", "selu", "celu")

WINDOW_POOLS = {"max_pool2d": nn.MaxPool2d, "avg_pool2d": nn.AvgPool2d}
ADAPTIVE_POOLS = {"adaptive_avg_pool2d": nn.AdaptiveAvgPool2d, "adaptive_max_pool2d": nn.AdaptiveMaxPool2d}
POOLS = WINDOW_POOLS | ADAPTIVE_POOLS

DROPOUTS = (nn.Dropout, nn.Dropout2d)
ARITHMETIC = "add sub mul div pow neg abs square sqrt exp clamp clamp_min clamp_max clip".split()
OPERATORS = "add iadd sub isub mul imul truediv itruediv pow ipow neg pos".split()


def functions_of(names: Iterable[str]) -> set[Any]:
    """What torch calls by these names: functions, methods as functions, and the forms of both that work in place."""
    forms = [form for name in names for form in (name, f"{name}_")]
    return {getattr(space, form) for space in (F, torch, Tensor) for form in forms if hasattr(space, form)}


def methods_of(names: Iterable[str]) -> set[str]:
    """The methods of a tensor by these names, in place too."""
    return {form for name in names for form in (name, f"{name}_") if hasattr(Tensor, form)}


PER_CHANNEL = (*ACTIVATIONS.values(), *POOLS.values(), *DROPOUTS, nn.BatchNorm2d, ChannelBias, nn.Identity)
PER_CHANNEL_FUNCTIONS = functions_of((*ACTIVATIONS, *POOLS, *ARITHMETIC)) | {F.dropout}
PER_CHANNEL_FUNCTIONS |= {getattr(operator, name) for name in OPERATORS}
PER_CHANNEL_METHODS = methods_of((*ACTIVATIONS, *ARITHMETIC)) | {"clone", "contiguous"}
