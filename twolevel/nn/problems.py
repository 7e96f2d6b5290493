"""The layers of a network that have several forms, by their problems."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from twolevel.nn.batch_norm import watched_norms
from twolevel.nn.two_level import TwoLevelConv2d
from twolevel.ops.normalise_problem import NormaliseProblem
from twolevel.ops.problem import Problem

LayerProblem = Problem | NormaliseProblem


@contextmanager
def layer_problems(model: nn.Module) -> Iterator[dict[nn.Module, LayerProblem]]:
    """Inside, a forward pass of `model` fills the dict with the problems of its layers, in the order of their calls.

    Those are two-level convolutions, and norms that choose their kernels.
    """
    problems: dict[nn.Module, LayerProblem] = {}

    def before_forward(layer: TwoLevelConv2d, inputs: tuple[Tensor, ...]) -> None:
        problems[layer] = layer.problem(inputs[0])

    convolutions = [module for module in model.modules() if isinstance(module, TwoLevelConv2d)]
    hooks = [layer.register_forward_pre_hook(before_forward) for layer in convolutions]
    try:
        with watched_norms(problems.__setitem__):
            yield problems
    finally:
        for hook in hooks:
            hook.remove()
