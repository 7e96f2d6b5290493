"""THE table of operations that treat every channel alone, by module, function and method.

A parameter or tensor of its own, one number a channel, takes an operation out of it (`nn.PReLU`): whoever cuts or
permutes the channels would have to do so with that tensor. Numbers that all channels share are free.
"""

import operator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.nn.bias import ChannelBias

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


def functions_of(names: object) -> set:
    """What torch calls by these names: functions, methods as functions, and the forms of both that work in place."""
    forms = [form for name in names for form in (name, f"{name}_")]
    return {getattr(space, form) for space in (F, torch, Tensor) for form in forms if hasattr(space, form)}


def methods_of(names: object) -> set[str]:
    """The methods of a tensor by these names, in place too."""
    return {form for name in names for form in (name, f"{name}_") if hasattr(Tensor, form)}


PER_CHANNEL = (*ACTIVATIONS.values(), *POOLS.values(), *DROPOUTS, nn.BatchNorm2d, ChannelBias, nn.Identity)
PER_CHANNEL_FUNCTIONS = functions_of((*ACTIVATIONS, *POOLS, *ARITHMETIC)) | {F.dropout}
PER_CHANNEL_FUNCTIONS |= {getattr(operator, name) for name in OPERATORS}
PER_CHANNEL_METHODS = methods_of((*ACTIVATIONS, *ARITHMETIC)) | {"clone", "contiguous"}
