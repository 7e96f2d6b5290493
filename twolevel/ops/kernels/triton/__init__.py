"""Group convolution and batch norm by Triton kernels; imported without Triton, it supports nothing and says so."""

from twolevel.ops.kernels.triton.choices import Choices, tune, version
from twolevel.ops.kernels.triton.configs import CONFIGS, OPERATIONS, Config
from twolevel.ops.kernels.triton.estimate import candidates, pick
from twolevel.ops.kernels.triton.grouped import GroupedConv2d, forward, input_grad, unsupported, weight_grad
from twolevel.ops.kernels.triton.kernel_set import TritonKernels
from twolevel.ops.kernels.triton.normalise import TritonNormaliser
from twolevel.ops.kernels.triton.problem import Problem, problem_of

__all__ = [
    "CONFIGS",
    "OPERATIONS",
    "Choices",
    "Config",
    "GroupedConv2d",
    "Problem",
    "TritonKernels",
    "TritonNormaliser",
    "candidates",
    "forward",
    "input_grad",
    "pick",
    "problem_of",
    "tune",
    "unsupported",
    "version",
    "weight_grad",
]
