"""Group convolution by Triton kernels; imported without Triton, it supports nothing and says so."""

from twolevel.ops.triton.choices import Choices, tune
from twolevel.ops.triton.configs import CONFIGS, OPERATIONS, Config, candidates, pick
from twolevel.ops.triton.grouped import GroupedConv2d, forward, input_grad, supports, weight_grad, why_not
from twolevel.ops.triton.parts import TritonParts
from twolevel.ops.triton.problem import Problem, problem_of

__all__ = [
    "CONFIGS",
    "OPERATIONS",
    "Choices",
    "Config",
    "GroupedConv2d",
    "Problem",
    "TritonParts",
    "candidates",
    "forward",
    "input_grad",
    "pick",
    "problem_of",
    "supports",
    "tune",
    "weight_grad",
    "why_not",
]
