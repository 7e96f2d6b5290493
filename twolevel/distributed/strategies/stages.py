"""Cutting a network into stages, one after the other, of as equal work as its graph allows. Nothing is run.

image --stage 0--> one tensor --stage 1--> one tensor --stage 2--> logits
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from twolevel.distributed.separable import read_graph
from twolevel.errors import UserError
from twolevel.nn import Layout, layout_of
from twolevel.nn.layout import set_layout


@dataclass(frozen=True)
class Stage:
    """One stage: `network` keeps its modules under the names that they have in the whole network.

    `received` and `sent` are the shapes for one image of the tensors before and after it (of the first stage
    received: the image; of the last sent: the logits). `macs` are its multiply-accumulates for one image, forward.
    """

    network: fx.GraphModule
    received: tuple[int, ...]
    sent: tuple[int, ...]
    macs: int


def cut_stages(model: nn.Module, stages: int, image_shape: tuple[int, int, int]) -> list[Stage]:
    """The network, on any device, as so many stages; the multiply-accumulates of the largest are the fewest possible.

    It is cut only where a single tensor is all that later operations read. The stages share the model's modules and
    parameters; each has a `layout`, so that `twolevel.nn.initialize` draws it as it draws the whole.

    Raises UserError where torch.fx cannot read the network, it has fewer such places than stages need, or a parameter
    would be in two stages.
    """
    graph = read_graph(model, "pipeline")
    work = _Work(model, graph, image_shape)
    nodes = [*graph.nodes]
    places = _places(nodes, work)
    cuts = balance([work.before[place] for place in places], work.total, stages)
    if cuts is None:
        raise UserError(
            f"stages={stages}: {type(model).__name__} can be cut in {len(places)} places, into {len(places) + 1} "
            f"stages at most; use that many ranks or fewer"
        )
    ends = [places[cut] for cut in cuts] + [len(nodes) - 2]  # the last node is the output
    whole, begin, made = layout_of(model), 1, []
    received, done = image_shape, 0
    for end in ends:
        network = _stage(model, nodes, begin, end)
        set_layout(network, Layout(whole.groups, {name: whole.dims[name] for name in network.state_dict()}))
        network.train(model.training)
        reached = work.total if end == ends[-1] else work.before[end]
        made.append(Stage(network, received, work.shapes[end], reached - done))
        received, done, begin = work.shapes[end], reached, end + 1
    _check_unshared(made)
    return made


def _check_unshared(stages: list[Stage]) -> None:
    owners: dict[int, int] = {}
    for number, stage in enumerate(stages):
        for name, parameter in stage.network.named_parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise UserError(
                    f"stages {owners[id(parameter)]} and {number} share {name}, of which each rank would train its "
                    "own; give each layer a parameter of its own, or replicate the network with --data-parallel"
                )


class _Work(fx.Interpreter):
    """Runs the graph for one image on the meta device: each node's `shapes`, and MACs `before` its end, in `total`."""

    def __init__(self, model: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int]):
        on_meta = all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        meta = model if on_meta else copy.deepcopy(model).to("meta")
        super().__init__(meta, graph=graph)
        self.shapes: list[tuple[int, ...]] = []
        self.before: list[int] = []
        self.total = 0
        training = {module: module.training for module in meta.modules()}
        meta.eval()  # batch norm of one image of one pixel has no statistics
        try:
            dtype = next(p.dtype for p in meta.parameters())
            with torch.no_grad():
                self.run(torch.empty(1, *image_shape, device="meta", dtype=dtype))
        finally:
            for module, mode in training.items():
                module.training = mode

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.op == "call_module":
            assert isinstance(node.target, str)
            pixels = result.shape[2:].numel() if result.dim() == 4 else 1
            weights = [p for p in self.module.get_submodule(node.target).parameters() if p.dim() > 1]
            self.total += pixels * sum(weight.numel() for weight in weights)
        self.shapes.append(tuple(result.shape[1:]) if isinstance(result, Tensor) else ())
        self.before.append(self.total)
        return result


def _places(nodes: list[fx.Node], work: _Work) -> list[int]:
    """The nodes after which only their tensor is read later, in order; of those with equal work before them the best.

    That is the one with the smallest tensor, and of these the last: behind an activation in place, which must not
    change the leaf of autograd that a stage receives.
    """
    best: dict[int, int] = {}
    alive: set[fx.Node] = set()
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    for index, node in enumerate(nodes[:-2]):
        alive = {n for n in (*alive, node) if last_use[n] > index}
        done = work.before[index]
        if alive != {node} or not 0 < done < work.total:
            continue
        there = best.get(done)
        if there is None or _size(work.shapes[index]) <= _size(work.shapes[there]):
            best[done] = index
    return [*best.values()]


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def balance(before: list[int], total: int, stages: int) -> list[int] | None:
    """Which `stages` - 1 of the places to cut at, so that the most work of a stage is least; None: too few places.

    `before` is the work before each place, ascending, and `total` all of it. Of equally good cuts those with the least
    sum of squares are taken.
    """
    # least[j]: (most work, sum of squares, cuts) of the stages before place j, one more stage each round.
    ends = [*before, total]
    least = {j: (work, work**2, ()) for j, work in enumerate(ends)}
    for _ in range(stages - 1):
        following: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for j, end in enumerate(ends):
            options = []
            for i, (most, squares, cuts) in least.items():
                if i < j:
                    work = end - ends[i]
                    options.append((max(most, work), squares + work**2, (*cuts, i)))
            if options:
                following[j] = min(options)
        least = following
    found = least.get(len(before))
    return None if found is None else [*found[2]]


def _stage(model: nn.Module, nodes: list[fx.Node], begin: int, end: int) -> fx.GraphModule:
    """The operations `begin` to `end` of the whole, which read what the one before them sent."""
    graph = fx.Graph()
    copies = {nodes[begin - 1]: graph.placeholder("x")}
    for node in nodes[begin : end + 1]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[end]])
    return fx.GraphModule(model, graph, class_name=type(model).__name__)
