"""Chains of layers in a network, each the only user of the one before it: what one layer can take over for another."""

from collections import Counter
from typing import NamedTuple

from torch import fx, nn

from twolevel.nn.channels import PermuteChannels
from twolevel.nn.structure import LayerTracer, own_tensors

TENSORS: dict[type[nn.Module], set[str]] = {
    PermuteChannels: {"index"},
    nn.Conv2d: {"weight", "bias"},
    nn.BatchNorm2d: {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
}
"""The tensors of the modules that may be changed, where nothing else computes them."""


class Stopped(Exception):
    """Why a chain ends."""


class Layer(NamedTuple):
    """A module of the network and its name."""

    name: str
    module: nn.Module


class Chains:
    """A network and its graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.model = model
        self.uses = Counter(node.target for node in graph.nodes if node.op in ("call_module", "get_attr"))
        modules = [module for _, module in model.named_modules(remove_duplicate=False)]
        self.holders = Counter(id(tensor) for module in modules for tensor in own_tensors(module).values())

    def layer(self, node: fx.Node) -> Layer | None:
        """The layer that this node calls, as it is now."""
        if node.op != "call_module":
            return None
        assert isinstance(node.target, str)
        return Layer(node.target, self.model.get_submodule(node.target))

    def check_owned(self, layer: Layer) -> None:
        """Raise Stopped unless this one call is all that depends on the module's tensors."""
        name, tensors = layer.name, own_tensors(layer.module)
        elsewhere = any(use.startswith(f"{name}.") for use in self.uses)
        shared = any(self.holders[id(t)] > 1 for m in layer.module.modules() for t in own_tensors(m).values())
        if self.uses[name] > 1 or elsewhere or shared:
            raise Stopped(f"{name} or a tensor of it is used more than once")
        # Weight normalisation and its like compute the weight from other tensors, under other names.
        if not tensors.keys() <= TENSORS.get(type(layer.module), tensors.keys()):
            raise Stopped(f"{name} has tensors of its own: {', '.join(tensors)}")


def graph_of(model: nn.Module, *whole: type[nn.Module]) -> fx.Graph:
    """The calls of layers: modules without children, ours, and those of the types `whole`. Raises Stopped."""
    try:
        return _Tracer(whole).trace(model)
    except Exception as error:  # whatever the network's own code raises on torch.fx's stand-ins for tensors
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise Stopped(f"torch.fx cannot trace the network: {reason}") from error


class _Tracer(LayerTracer):
    def __init__(self, whole: tuple[type[nn.Module], ...]):
        super().__init__(childless=True)
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.whole) or super().is_leaf_module(m, module_qualified_name)


def sole_source(node: fx.Node) -> fx.Node:
    """The only producer of this node's input, which nothing else uses. Raises Stopped."""
    source = node.all_input_nodes[0]
    if len(source.users) > 1:
        raise Stopped(f"before it, {source} has {len(source.users)} users")
    return source


def sole_user(node: fx.Node) -> fx.Node:
    """The only user of this node. Raises Stopped."""
    if len(node.users) != 1:
        raise Stopped(f"after it, {node} has {len(node.users)} users")
    return next(iter(node.users))
