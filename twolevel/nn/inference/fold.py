"""Removes channel permutations around convolutions in inference form by permuting neighbouring layers' tensors."""

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from twolevel.errors import UserError
from twolevel.nn.base import ReplicatedConv2d
from twolevel.nn.channels import PermuteChannels
from twolevel.nn.inference.chains import Chains, Layer, Stopped, graph_of, sole_source, sole_user
from twolevel.nn.structure import ACTIVATIONS, DROPOUTS, functions_of, methods_of, own_tensors


class Folding(NamedTuple):
    """What `fold_permutations` did."""

    model: nn.Module
    """The network with the same outputs and fewer permutations."""
    folded: dict[str, tuple[str, ...]]
    """Name of each permutation that was removed, and of the layers whose tensors were permuted instead."""
    kept: dict[str, str]
    """Name of each permutation that stayed, and why; also of layers not in inference form."""


def fold_permutations(model: nn.Module) -> Folding:
    """A copy of `model` without those channel permutations that its layers can absorb, exact to rounding.

    A permutation is pushed against the flow through elementwise activations, BatchNorm2d and depthwise
    convolutions, whose tensors it permutes, into the filters of a dense Conv2d; where that fails, with the
    flow, into the input channels of a dense Conv2d or into the next permutation. Only chains
    are followed: a tensor with two users, a module called twice, a tensor shared by two modules, and a
    layer of any other kind each stop it. The intermediate channels change their order, so a forward
    hook inside such a chain sees them permuted.

    A network that torch.fx cannot trace is left as it is, with a warning. Raises UserError for a network
    in training mode.
    """
    if any(module.training for module in model.modules()):
        raise UserError("fold_permutations needs a network in evaluation mode; call model.eval() first")
    model = copy.deepcopy(model)
    folded: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    present: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, ReplicatedConv2d):
            kept[name] = f"{type(module).__name__} in its training form; replace it by its to_inference()"
        elif isinstance(module, PermuteChannels):
            present.append(name)
    if not present:
        return Folding(model, folded, kept)
    try:
        graph = graph_of(model)
    except Stopped as untraced:
        warnings.warn(f"no permutation is folded, as {untraced}", stacklevel=2)
        return Folding(model, folded, kept | dict.fromkeys(present, str(untraced)))
    kept |= dict.fromkeys(present, "not reached by the trace")
    chains = _Permutations(model, graph)
    for node in graph.nodes:
        layer = chains.layer(node)
        if layer is not None and isinstance(layer.module, PermuteChannels):
            try:
                folded |= chains.fold(node, layer, layer.module.index)
            except Stopped as stopped:
                kept[layer.name] = str(stopped)
    return Folding(model, folded, {name: reason for name, reason in kept.items() if name not in folded})


ELEMENTWISE = (*ACTIVATIONS.values(), *DROPOUTS, nn.Identity)
ELEMENTWISE_FUNCTIONS = functions_of(ACTIVATIONS)
ELEMENTWISE_METHODS = methods_of(ACTIVATIONS)


class _Permutations(Chains):
    """The chains of layers along which a permutation can move."""

    def fold(self, node: fx.Node, permutation: Layer, index: Tensor) -> dict[str, tuple[str, ...]]:
        """Permute the tensors of neighbours instead: names of what was removed, and of the layers that changed.

        Raises Stopped where no neighbour can absorb the permutation.
        """
        self.check_owned(permutation)
        try:
            *passed, last = self._walk(node, sole_source, "before it")
            order, dim = index, 0
        except Stopped as before:
            try:
                *passed, last = self._walk(node, sole_user, "after it")
                order, dim = index.argsort(), 1
            except Stopped as after:
                raise Stopped(f"{before}; {after}") from None
        removed = [permutation.name]
        for layer in passed:
            _reorder(layer.module, order, 0)
        if isinstance(last.module, PermuteChannels):
            together = index[last.module.index]
            if torch.equal(together, torch.arange(len(together), device=together.device)):
                removed.append(last.name)
            else:
                self.model.set_submodule(last.name, PermuteChannels(together).eval())
        else:
            _reorder(last.module, order, dim)
        changed = tuple(layer.name for layer in (*passed, last))
        for name in removed:
            self.model.set_submodule(name, nn.Identity().eval())
        return dict.fromkeys(removed, changed)

    def _walk(self, node: fx.Node, step: Callable[[fx.Node], fx.Node], where: str) -> list[Layer]:
        """The layers from here to the one that absorbs the permutation, which is the last; or Stopped."""
        passed: list[Layer] = []
        while True:
            node = step(node)
            if self._is_elementwise(node):
                continue
            layer = self.layer(node)
            module = None if layer is None else layer.module
            dense = type(module) is nn.Conv2d and module.groups == 1
            # Of two permutations the earlier is folded first, so they meet with the flow alone.
            absorbs = dense or (step is sole_user and isinstance(module, PermuteChannels))
            if layer is None or not (absorbs or _is_channelwise(module)):
                raise Stopped(f"{where} is {_what(node, layer)}")
            self.check_owned(layer)
            passed.append(layer)
            if absorbs:
                return passed

    def _is_elementwise(self, node: fx.Node) -> bool:
        if len(node.all_input_nodes) != 1:
            return False
        layer = self.layer(node)
        return (
            (layer is not None and type(layer.module) in ELEMENTWISE)
            or (node.op == "call_function" and node.target in ELEMENTWISE_FUNCTIONS)
            or (node.op == "call_method" and node.target in ELEMENTWISE_METHODS)
        )


def _is_channelwise(module: nn.Module | None) -> bool:
    """Whether output channel c depends on input channel c and row c of the module's tensors alone."""
    if type(module) is nn.Conv2d:
        return module.groups == module.in_channels == module.out_channels
    return type(module) is nn.BatchNorm2d


def _what(node: fx.Node, layer: Layer | None) -> str:
    if node.op in ("placeholder", "output"):
        return f"the {'input' if node.op == 'placeholder' else 'output'} of the network"
    if layer is None:
        return f"{node.name}, a {node.op.removeprefix('call_')}"
    name, module = layer
    groups = f" of {module.groups} groups" if isinstance(module, nn.Conv2d) else ""
    return f"{name}, {type(module).__name__}{groups}"


@torch.no_grad()
def _reorder(module: nn.Module, order: Tensor, dim: int) -> None:
    """Put the rows (dim 0) of the module's tensors, or the columns (dim 1) of its weight, in this order."""
    for tensor in own_tensors(module).values():
        if tensor.dim() > dim:
            tensor.copy_(tensor.index_select(dim, order))
