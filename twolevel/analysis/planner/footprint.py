"""Bytes that a rank holds in a training step: what autograd keeps for backward, and the most that is held at once.

The step is walked layer by layer, forward and backward, with the tensors that torch holds: saved ones until the last
layer that saved them is done, gradients of values until the layer that computed the value has used them, gradients of
parameters as they are computed. Not counted: workspaces of libraries, the allocator's rounding, the device's context.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from twolevel.analysis.planner.timing import ITEMSIZE
from twolevel.analysis.planner.workload import KEEPS_INPUT, Layer, Workload
from twolevel.nn.structure import KEEPS_RESULT_IN_PLACE

Saved = tuple[Hashable, int]  # (which tensor, bytes)


@dataclass(frozen=True)
class Part:
    """What one rank holds of a step: `layers` for `batch` images, maps cut in `ranks` by channel.

    `gathers` is the dense convolution on all input channels (channel parallelism). With `recompute` blocks of two
    convolutions or more keep their input and the representatives, and compute the rest again (`train --recompute`).
    """

    workload: Workload
    layers: tuple[Layer, ...]
    batch: int
    ranks: int = 1
    precision: str = "float32"
    gathers: bool = False
    recompute: bool = False

    def bytes_of(self, value: int, *, whole: bool = False) -> int:
        """Bytes of a value for the batch on this rank."""
        parts = self.ranks if self.workload.is_map(value) and not whole else 1
        return self.batch * self.workload.values[value].elements // parts * ITEMSIZE[self.precision]

    def saved(self, layer: Layer) -> list[Saved]:
        """The tensors, by storage, that autograd keeps of a layer besides parameters."""
        values, size = self.workload.values, ITEMSIZE[self.precision]
        first = layer.inputs[0]
        given = (values[first].storage, self.bytes_of(first))
        result = (values[layer.output].storage, self.bytes_of(layer.output))
        out = values[layer.output]
        saved: list[Saved] = []
        if layer.kind == "conv" and self.gathers and first in self.workload.gathered:
            saved.append((("gathered", first), self.bytes_of(first, whole=True)))
        elif layer.kind in ("conv", "two-level", "linear"):
            # Autocast makes a copy of the image; later values are in its type already.
            cast = self.precision != "float32" and first == 0
            saved.append((("cast", 0) if cast else given[0], given[1]))
        if layer.kind == "two-level":
            saved.append((("z", layer.output), self._representatives(layer)))
        if layer.parameters and self.precision != "float32" and layer.kind != "norm":
            biases = sum(prod(shape) for shape in layer.parameters if len(shape) == 1)
            weights = (rank_parameters(layer, self.ranks) - biases) * size
            saved.append((("weights", layer.output), weights))
        if layer.kind == "norm":
            statistics = 2 * 4 * out.shape[0] // (self.ranks if self.workload.is_map(layer.output) else 1)
            saved += [given, (("statistics", layer.output), statistics)]
        if layer.kind == "activation" or layer.operation in KEEPS_INPUT:
            in_place = given[0] == result[0]
            if layer.operation not in KEEPS_INPUT or (in_place and layer.operation in KEEPS_RESULT_IN_PLACE):
                saved.append(result)
            else:  # in place autograd copies the input first
                saved.append((("copy", layer.output), given[1]) if in_place else given)
        if layer.operation == "dropout":
            saved.append((("mask", layer.output), result[1]))
        if layer.operation == "max_pool2d":
            saved.append((("indices", layer.output), result[1] // size * 8))
        if layer.end == "classifier":
            # Of the loss: logarithms of probabilities (float32), labels, and the sum of the weights.
            saved.append(("loss", self.batch * (4 * out.shape[0] + 8) + 4))
        return saved

    def kept(self, layer: Layer) -> list[Saved]:
        """Of `saved` what is kept from forward to backward."""
        if layer.block not in self._blocks:
            return self.saved(layer)
        inputs = self._inputs[layer.block]
        return [(key, size) for key, size in self.saved(layer) if key in inputs or _is_representatives(key)]

    def again(self) -> set[Layer]:
        """The layers that are computed again: those whose result is saved, or read by such a layer."""
        found: set[Layer] = set()
        for name, layers in self._blocks.items():
            needed = {key for layer in layers for key, _ in self.saved(layer)} - self._inputs[name]
            for layer in reversed(layers):
                if self._storage(layer.output) in needed:
                    found.add(layer)
                    needed |= {self._storage(value) for value in layer.inputs}
        return found

    @cached_property
    def _blocks(self) -> dict[str, list[Layer]]:
        """The layers of each block that is computed again."""
        blocks: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if self.recompute and layer.block:
                blocks.setdefault(layer.block, []).append(layer)
        convolutions = Counter(layer.block for layer in self.layers if layer.kind in ("conv", "two-level"))
        return {name: layers for name, layers in blocks.items() if convolutions[name] > 1}

    @cached_property
    def _inputs(self) -> dict[str, set[Hashable]]:
        """The storages that each of these blocks reads and has not written."""
        return {
            name: {self._storage(value) for layer in layers for value in layer.inputs}
            - {self._storage(layer.output) for layer in layers}
            for name, layers in self._blocks.items()
        }

    def _representatives(self, layer: Layer) -> int:
        """Bytes of z, which every rank has whole; 0 of other layers."""
        pixels = prod(self.workload.values[layer.output].shape[1:])
        return self.batch * layer.maps * pixels * ITEMSIZE[self.precision]

    def _storage(self, value: int) -> Hashable:
        return self.workload.values[value].storage

    def activations(self) -> int:
        """Bytes that autograd keeps from forward to backward, each storage once."""
        return sum(dict(kept for layer in self.layers for kept in self.kept(layer)).values())

    def peak(self, *, gradients_persist: bool = False) -> int:
        """The most bytes of activations and gradients held at once in forward and backward.

        With `gradients_persist` (DDP's buckets) gradients of parameters are left out: they are always there.
        """
        return max(self._forward(), self._backward(gradients_persist))

    def _forward(self) -> int:
        values = self.workload.values
        readers = Counter(values[v].storage for layer in self.layers for v in layer.inputs)
        alive: dict[Hashable, int] = {}
        saved: dict[Hashable, int] = {}
        most = 0
        for layer in self.layers:
            saved |= dict(self.kept(layer))
            alive[values[layer.output].storage] = self.bytes_of(layer.output)
            most = max(most, sum((alive | saved).values()))
            for value in layer.inputs:
                storage = values[value].storage
                readers[storage] -= 1
                if not readers[storage]:
                    alive.pop(storage, None)
        return most

    def _backward(self, gradients_persist: bool) -> int:
        keep = Counter(key for layer in self.layers for key, _ in self.saved(layer))
        there = dict(kept for layer in self.layers for kept in self.kept(layer))
        saved, gradients, most = sum(there.values()), _Gradients(), 0
        parameters = 0
        begun: set[str] = set()
        gradients.add(self.layers[-1].output, self.bytes_of(self.layers[-1].output))
        for layer in reversed(self.layers):
            extra = self._representatives(layer)  # their gradient
            if layer.block in self._blocks and layer.block not in begun:
                begun.add(layer.block)
                again = dict(entry for other in self._blocks[layer.block] for entry in self.saved(other))
                saved += sum(size for key, size in again.items() if key not in there)
            if layer.kind == "add" or layer.operation == "cat":
                gradients.share(layer.output, layer.inputs)
            else:
                for value in dict.fromkeys(v for v in layer.inputs if v):
                    whole = self.gathers and layer.kind == "conv" and value in self.workload.gathered
                    gradients.add(value, self.bytes_of(value))
                    extra += self.bytes_of(value, whole=True) if whole else 0
            if not gradients_persist:
                parameters += 4 * rank_parameters(layer, self.ranks)
            most = max(most, saved + gradients.total + gradients.passing + parameters + extra)
            gradients.settle(layer.output)
            for key, size in self.saved(layer):
                keep[key] -= 1
                saved -= 0 if keep[key] else size
        return most


def _is_representatives(key: Hashable) -> bool:
    return isinstance(key, tuple) and key[0] == "z"


class _Gradients:
    """Gradients of values as autograd holds them: a sum needs both of its terms until it is computed."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}  # value -> token
        self.size: dict[int, int] = {}
        self.users: Counter[int] = Counter()
        self.passing = 0

    @property
    def total(self) -> int:
        return sum(self.size.values())

    def add(self, value: int, size: int) -> None:
        """A new gradient of a value, in memory of its own; added to the one that is there."""
        if value in self.of:
            self.passing += size  # the new term
            token = self.of[value]
            if self.users[token] == 1:
                return  # added in place
            self._release(value)
        token = len(self.users)
        self.of[value], self.size[token], self.users[token] = token, size, 1

    def share(self, output: int, inputs: Iterable[int]) -> None:
        """Inputs get the output's own gradient, or it is added to what they have."""
        token = self.of[output]
        for value in inputs:
            if value not in self.of:
                self.of[value] = token
                self.users[token] += 1

    def settle(self, output: int) -> None:
        self.passing = 0
        if output in self.of:
            self._release(output)

    def _release(self, value: int) -> None:
        token = self.of.pop(value)
        self.users[token] -= 1
        if not self.users[token]:
            del self.size[token]


def rank_parameters(layer: Layer, ranks: int) -> int:
    """Parameters of a layer on one of `ranks` ranks that split it; each has the classifier's bias whole."""
    if layer.end != "classifier":
        return layer.size // ranks
    weight, *bias = layer.parameters
    return prod(weight) // ranks + sum(map(prod, bias))


def fsdp_parameters(layers: Iterable[Layer], ranks: int) -> int:
    """Parameters of rank 0 under FSDP2, which cuts every parameter at dim 0 in `ranks` parts, the last ones smaller."""
    shapes = (shape for layer in layers for shape in layer.parameters)
    return sum(-(-shape[0] // ranks) * prod(shape[1:]) for shape in shapes)


def buffers(workload: Workload, layers: Iterable[Layer], ranks: int) -> int:
    """Bytes of running statistics: mean and variance of every channel, and the number of batches."""
    norms = [layer for layer in layers if layer.kind == "norm"]
    return sum(8 * workload.values[layer.output].shape[0] // ranks + 8 for layer in norms)
