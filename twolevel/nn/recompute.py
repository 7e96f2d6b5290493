"""Activation checkpointing: a block keeps its input alone, and computes the rest again when its gradient is wanted."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twolevel.nn.structure import convolutions
from twolevel.nn.two_level import TwoLevelConv2d
from twolevel.ops.tape import Tape


def recompute_blocks(model: nn.Module) -> int:
    """Have the blocks of a network compute their activations again in backward; returns the number of blocks.

    A block is a member of an nn.Sequential with two convolutions or more. In training it stores its input, and of what
    ranks sent each other the results, which are small: nothing is sent twice. Parameters, gradients and running
    statistics are bit for bit those without ("Training Deep Nets with Sublinear Memory Cost", Chen et al., arXiv
    1604.06174; here by torch.utils.checkpoint). Call it after `parallelize`.
    """
    number = 0
    for module in model.modules():
        if type(module) is not nn.Sequential:
            continue
        again = [_is_block(member) for member in module]
        if any(again):
            module.__class__ = RecomputedSequential
            assert isinstance(module, RecomputedSequential)
            module.again = again
            number += sum(again)
    return number


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, nn.Sequential) and len(convolutions(module)) > 1


class RecomputedSequential(nn.Sequential):
    """nn.Sequential of which the members that are marked in `again` compute their activations again in backward."""

    again: list[bool]

    def forward(self, x: Tensor) -> Tensor:
        training = self.training and torch.is_grad_enabled()
        for module, again in zip(self, self.again, strict=True):
            x = _recomputed(module, x) if training and again else module(x)
        return x


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    tape = Tape(_unneeded(block))
    contexts = tape.recording(), _Again(block, tape)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


def _unneeded(block: nn.Module) -> list[Tensor]:
    """Of two-level convolutions whose output the block only adds up the weights C; other kinds stop by themselves."""
    layers = [getattr(block, name) for name in getattr(block, "only_added", ())]
    return [layer.coarse.weight for layer in layers if isinstance(layer, TwoLevelConv2d)]


class _Again:
    """A pass of a block that has been computed before; entered as often as backward is.

    Statistics have followed this batch already: batch norm follows it here in copies that are left behind.
    """

    def __init__(self, block: nn.Module, tape: Tape):
        self.block, self.tape = block, tape
        self.left = ExitStack()

    def __enter__(self) -> None:
        self.left.enter_context(self.tape.replaying())
        for norm in self.block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                buffers = dict(norm._buffers)
                self.left.callback(norm._buffers.update, buffers)
                norm._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *error: object) -> None:
        self.left.close()
