"""Does a network act within channel groups, from stem to classifier? Its graph is read, nothing is run.

image --stem--> split by channel --grouped convolutions, norms, activations, pools--> classifier --> whole
"""

from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn import TwoLevelConv2d
from twolevel.nn.structure import (
    DROPOUTS,
    PER_CHANNEL,
    PER_CHANNEL_FUNCTIONS,
    PER_CHANNEL_METHODS,
    ends,
    trace_layers,
)

SPATIAL = ({2, 3}, {-1, -2})


def check_within_groups(model: nn.Module, ranks: int) -> None:
    """Raise UserError, naming the module or operation, unless the network can be cut by channel group.

    Allowed between stem and classifier: two-level, group and depthwise convolutions, and what treats every
    channel alone. After the classifier (the first linear layer) everything is whole on every rank, and free.
    A piece of a network without a stem is taken to read this rank's channels.
    """
    if isinstance(model, (TwoLevelConv2d, *PER_CHANNEL)):
        return
    stem, classifier = ends(model)
    graph = trace_layers(model, f"over group={ranks} ranks", f"replicate it with data={ranks}, group=1")
    states: dict[fx.Node, Literal["maps", "features", "whole"]] = {}
    for node in graph.nodes:
        inputs = {states[n] for n in node.all_input_nodes}
        if node.op == "output":
            continue
        split = inputs - {"whole"}
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
            elif not split and isinstance(module, TwoLevelConv2d | nn.Conv2d):
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
            f"use conv='gc' or 'gc2l', or replicate it with data={ranks}, group=1"
        )
    flattens = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if not flattens and not isinstance(module, (nn.Conv2d, TwoLevelConv2d, *PER_CHANNEL)):
        raise _refuse(f"{name} ({type(module).__name__})", ranks)


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


def _refuse(what: str, ranks: int) -> UserError:
    return UserError(
        f"{what} is not known to act within channel groups and cannot be split over group={ranks} ranks; "
        f"replicate the network with data={ranks}, group=1"
    )
