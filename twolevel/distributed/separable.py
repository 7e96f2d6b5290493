"""Can a network be split over ranks by its channels, and where? Its graph is read, nothing is run.

    image --stem--> split by channel --convolutions, norms, activations, pools--> classifier --> whole

By channel group, for group convolutions of every kind; by channel, for dense convolutions that gather their input.
"""

from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn.arguments import check_divides
from twolevel.nn.base import ShardedConv2d
from twolevel.nn.structure import (
    DROPOUTS,
    PER_CHANNEL,
    PER_CHANNEL_FUNCTIONS,
    PER_CHANNEL_METHODS,
    ends,
    trace_layers,
)

State = Literal["maps", "features", "whole"]
"""What ranks hold of a tensor: channels of maps, features in the order of channels, or all of it."""
WHOLE: set[State] = {"whole"}

SPATIAL = ({2, 3}, {-1, -2})


def check_within_groups(model: nn.Module, ranks: int) -> None:
    """Raise UserError, naming the module or operation, unless the network can be cut by channel group.

    Allowed between stem and classifier: two-level, balanced, group and depthwise convolutions, and what treats
    every channel alone. After the classifier (the first linear layer) everything is whole on every rank, and free.
    A piece of a network without a stem is taken to read this rank's channels.
    """
    if isinstance(model, (ShardedConv2d, *PER_CHANNEL)):
        return
    stem, classifier = ends(model)
    graph = trace_layers(model, f"over group={ranks} ranks", f"replicate it with data={ranks}, group=1")
    states: dict[fx.Node, State] = {}
    for node in graph.nodes:
        inputs: set[State] = {states[n] for n in node.all_input_nodes}
        if node.op == "output":
            continue
        split = inputs - WHOLE
        states[node] = "maps" if node.op == "placeholder" and stem is None else "whole"
        if node.op == "call_module":
            module = model.get_submodule(node.target)
            if module is stem:
                states[node] = "maps"
            elif split and not (module is classifier and split == {"features"}):
                _check_module(node.target, module, ranks)
                states[node] = "features" if isinstance(module, nn.Flatten) else split.pop()
            elif not split and isinstance(module, DROPOUTS) and module.p > 0:
                raise UserError(
                    f"{node.target} would drop other values on each of group={ranks} ranks of what they all hold; "
                    "set its p to 0"
                )
            elif not split and isinstance(module, ShardedConv2d | nn.Conv2d):
                raise _refuse(f"{node.target}, which reads what is whole on every rank,", ranks)
        elif node.target is F.dropout and not split:
            raise _refuse("a dropout of what is whole on every rank", ranks)
        elif split:
            flattens = node.target in (torch.mean, "mean", torch.flatten, "flatten")
            if len(inputs) > 1 or not is_per_channel(node):
                what = getattr(node.target, "__name__", node.target)
                raise _refuse(f"the operation {what!r} ({node.name})", ranks)
            states[node] = "features" if flattens else split.pop()


def _check_module(name: str, module: nn.Module, ranks: int) -> None:
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        raise UserError(
            f"{name} is a dense convolution and cannot be split over group={ranks} ranks; "
            f"use conv='gc', 'gc2l' or 'bgc', or replicate it with data={ranks}, group=1"
        )
    if not _flattens(module) and not isinstance(module, (nn.Conv2d, ShardedConv2d, *PER_CHANNEL)):
        raise _refuse(f"{name} ({type(module).__name__})", ranks)


def _refuse(what: str, ranks: int) -> UserError:
    return UserError(
        f"{what} is not known to act within channel groups and cannot be split over group={ranks} ranks; "
        f"replicate the network with data={ranks}, group=1"
    )


def gathered_together(model: nn.Module, ranks: int) -> list[list[nn.Conv2d]]:
    """The dense convolutions behind the stem, those that read one activation together, in the order of the graph.

    Raises UserError, naming the module or operation, where the network cannot be split.
    """
    stem, classifier = ends(model)
    if stem is None or classifier is None:
        raise UserError(
            f"parallel=channel needs a dense first convolution and a linear classifier; {type(model).__name__} "
            "has not both; replicate it with --data-parallel"
        )
    readers: dict[fx.Node, list[nn.Conv2d]] = {}
    split: set[fx.Node] = set()  # what ranks hold channels of; everything else is whole on each
    for node in read_graph(model, "channel").nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        inputs = [source for source in node.all_input_nodes if source in split]
        if module is stem:
            check_divides("ranks", ranks, **{f"channels of {node.target}": stem.out_channels})
            split.add(node)
        elif not inputs:
            if isinstance(module, nn.Conv2d):
                raise _refuse_channel(f"{node.target}, a second convolution of the image,")
            if isinstance(module, DROPOUTS) and module.p > 0:
                raise _refuse_channel(f"{node.target}, a dropout of what every rank holds,")
        elif module is classifier:
            check_divides("ranks", ranks, **{f"features of {node.target}": classifier.in_features})
        elif len(inputs) < len(node.all_input_nodes) or not _acts_by_channel(node, module, ranks):
            what = f"{node.target} ({type(module).__name__})" if module else f"the operation {node.name!r}"
            raise _refuse_channel(what)
        else:
            split.add(node)
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                readers.setdefault(inputs[0], []).append(module)
    return [*readers.values()]


def _acts_by_channel(node: fx.Node, module: nn.Module | None, ranks: int) -> bool:
    """Whether each rank can compute its channels of the output; of a convolution also whether ranks divide them."""
    if module is None:
        return node.op != "output" and is_per_channel(node)
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return False
        check_divides("ranks", ranks, **{f"channels of {node.target}": module.out_channels})
        if module.groups > 1:
            check_divides("ranks", ranks, **{f"groups of {node.target}": module.groups})
        return True
    return _flattens(module) or isinstance(module, PER_CHANNEL)


def _flattens(module: nn.Module) -> bool:
    """Whether it makes maps features, channel by channel."""
    return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)


def _refuse_channel(what: str) -> UserError:
    return UserError(
        f"{what} is not known to act channel by channel and cannot be split by parallel=channel; "
        "replicate the network with --data-parallel"
    )


def read_graph(model: nn.Module, parallel: str) -> fx.Graph:
    """The operations of a network that is to be split by `parallel`. Raises UserError where it cannot be read."""
    graph = trace_layers(model, f"by parallel={parallel}", "replicate it with --data-parallel")
    if any(node.target is F.dropout for node in graph.nodes):
        raise UserError(
            f"{type(model).__name__} calls F.dropout, which parallel={parallel} cannot split; use the module nn.Dropout"
        )
    return graph


def is_per_channel(node: fx.Node) -> bool:
    """Whether a function or method treats every channel alone."""
    arguments = (*node.args[1:], *node.kwargs.values())
    if node.target in (torch.mean, "mean"):
        dims = next((a for a in arguments if isinstance(a, tuple | list)), ())
        return set(dims) in SPATIAL
    if node.target in (torch.flatten, "flatten"):
        return arguments == (1,)
    if node.op == "call_method":
        return node.target in PER_CHANNEL_METHODS
    return node.target in PER_CHANNEL_FUNCTIONS
