"""Counting, without running anything: parameters, multiply-accumulates, and data sent between ranks in a step."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from twolevel import models
from twolevel.analysis.elementwise import ElementCounter
from twolevel.analysis.traffic import Collective, logits_sum, mean_exchange, representatives_exchange
from twolevel.errors import UserError
from twolevel.nn import BalancedConv2d, TwoLevelConv2d, layout_of
from twolevel.nn.arguments import check_divides
from twolevel.nn.base import ReplicatedConv2d, ShardedConv2d
from twolevel.nn.convert import CONVOLUTIONS
from twolevel.nn.structure import ends, named_layers


@dataclass(frozen=True, kw_only=True)
class LayerCount:
    """One layer: `parameters` of the whole and `held` by one rank, multiply-accumulates of one image.

    Convolutions that choose their connections are counted as papers do (FLGC: balanced groups; DGC: the final
    share of channels dropped; LGC: the final share of inputs kept); `realised_macs` is what they do as they are now.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    held: int
    macs: int
    held_macs: int
    realised_macs: int
    collectives: tuple[Collective, ...]

    @property
    def bytes_sent(self) -> float:
        return sum(c.bytes_sent for c in self.collectives)


@dataclass(frozen=True, kw_only=True)
class Count:
    """A whole network on `ranks` ranks; sums over `layers`, and two numbers by the conventions of papers.

    `held_whole_ends` are the parameters of a rank with stem and classifier counted whole on every rank, although
    here they are split too. `published_parameters` leave out what a convolution needs only to choose its
    connections (FLGC's S and T, closed connections of DGConv, inputs that LGC drops). `elementwise` are an image's
    operations in activations, pooling, BGC's mean of groups, the choice of channels and the biases of linear layers,
    one an element, which the papers of CondenseNet and DGC count among the MACs.
    """

    groups: int
    ranks: int
    batch_size: int
    layers: tuple[LayerCount, ...]
    held_whole_ends: int
    published_parameters: int
    elementwise: int

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def held(self) -> int:
        return sum(layer.held for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def held_macs(self) -> int:
        return sum(layer.held_macs for layer in self.layers)

    @property
    def realised_macs(self) -> int:
        return sum(layer.realised_macs for layer in self.layers)

    @property
    def collectives(self) -> list[Collective]:
        return [c for layer in self.layers for c in layer.collectives]

    @property
    def bytes_sent(self) -> float:
        return sum(layer.bytes_sent for layer in self.layers)

    def sums(self) -> dict[str, float]:
        names = ("parameters", "published_parameters", "held", "held_whole_ends")
        names += ("macs", "held_macs", "realised_macs", "elementwise", "bytes_sent")
        return {name: getattr(self, name) for name in names}

    def collectives_by_kind(self) -> Counter[str]:
        return Counter(c.kind for c in self.collectives)


def countable(**options: Any) -> nn.Module:
    """`models.create(**options)` without memory where it can do without: groups of FLGC and DGConv are values."""
    with torch.device("cpu" if options["conv"] in ("flgc", "dgconv") else "meta"):
        return models.create(**options)


def count(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    *,
    ranks: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Count:
    """Count a whole network on images of `input_shape` (channels, height, width).

    `ranks` is the size P of the group axis (as many as there are groups, unless given), `batch_size` the
    images of one step on one data-parallel replica, `dtype` that of the activations. Works on a model of
    any device, the meta device included (but for FLGC and DGConv, whose groups are values): only shapes are
    computed. Multiply-accumulates are those of convolutions and linear layers, for one image, forward.

    Raises UserError where `ranks` does not divide the groups, for a model that is a part already or whose shapes
    depend on values, for a ReplicatedConv2d without `macs`, and for convolutions other than of images, or transposed.
    """
    layout = layout_of(model)
    if layout.parts > 1:
        raise UserError(
            f"this network is part {layout.index} of {layout.parts}; count the whole with ranks=P"
        )
    ranks = layout.groups if ranks is None else ranks
    check_divides("ranks", ranks, groups=layout.groups)

    stem, classifier = ends(model)
    inputs, outputs, elementwise = _map_shapes(model, input_shape)
    layers: list[LayerCount] = []
    held_whole_ends, published = 0, 0
    for name, module in named_layers(model):
        if name not in outputs:
            continue
        tensors = dict(module.named_parameters())
        split = {k: layout.dims[f"{name}.{k}" if name else k] is not None for k in tensors}
        held = sum(t.numel() // (ranks if split[k] else 1) for k, t in tensors.items())
        parameters = sum(t.numel() for t in tensors.values())
        held_whole_ends += parameters if module in (stem, classifier) else held
        published += (
            module.used_parameters(nominal=True) if isinstance(module, ReplicatedConv2d) else parameters
        )
        macs, realised = _macs(name, module, outputs[name])
        elementwise += _elementwise(module)
        layers.append(
            LayerCount(
                name=name,
                kind=type(module).__name__,
                output=outputs[name],
                parameters=parameters,
                held=held,
                macs=macs,
                held_macs=macs // ranks if any(split.values()) else macs,
                realised_macs=realised,
                collectives=_collectives(
                    module,
                    inputs[name],
                    outputs[name],
                    batch_size=batch_size,
                    itemsize=dtype.itemsize,
                    ranks=ranks,
                    is_classifier=module is classifier,
                ),
            )
        )
    return Count(
        groups=layout.groups,
        ranks=ranks,
        batch_size=batch_size,
        layers=tuple(layers),
        held_whole_ends=held_whole_ends,
        published_parameters=published,
        elementwise=elementwise,
    )


def _map_shapes(
    model: nn.Module, input_shape: tuple[int, int, int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], int]:
    """Input and output shapes, without the batch, of every layer that has parameters; elementwise operations in all."""
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, tuple[int, ...]] = {}
    hooks: list[RemovableHandle] = []
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = (*args, *kwargs.values())[0]
        inputs[names[module]] = tuple(given.shape[1:])
        outputs[names[module]] = tuple(output.shape[1:])

    for _, module in named_layers(model):
        ours = isinstance(module, ShardedConv2d | ReplicatedConv2d)
        if ours or any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(record, with_kwargs=True))
    training = {module: module.training for module in model.modules()}
    tensors = {k: torch.empty_like(t, device="meta") for k, t in model.state_dict().items()}
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    try:
        with torch.no_grad(), ElementCounter() as counter:
            image = torch.empty(1, *input_shape, device="meta", dtype=dtype)
            functional_call(model.eval(), tensors, (image,))
    except NotImplementedError as error:  # by torch, of an operation whose result's shape depends on values
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"{type(model).__name__} cannot be counted from shapes alone: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return inputs, outputs, counter.operations


def _macs(name: str, module: nn.Module, output: tuple[int, ...]) -> tuple[int, int]:
    """(as papers count, as the module is now): every weight of a convolution is used once for each output pixel."""
    if isinstance(module, nn.Linear):
        return module.weight.numel(), module.weight.numel()
    if isinstance(module, ReplicatedConv2d):
        kind = type(module)
        if kind.macs is ReplicatedConv2d.macs:
            raise UserError(
                f"{name} is of {kind.__name__}, whose work is unknown; "
                f"define {kind.__name__}.macs(pixels, *, nominal=False)"
            )
        pixels = output[1] * output[2]
        return module.macs(pixels, nominal=True), module.macs(pixels)
    if isinstance(module, nn.Conv2d | ShardedConv2d):
        weights = sum(t.numel() for k, t in module.named_parameters() if k.endswith("weight"))
        return output[1] * output[2] * weights, output[1] * output[2] * weights
    if isinstance(module, CONVOLUTIONS):
        raise UserError(
            f"{name} is a {type(module).__name__}, which is not counted; count a network whose convolutions are Conv2d"
        )
    return 0, 0


def _elementwise(module: nn.Module) -> int:
    """Operations of one image in a layer besides multiply-accumulates and activations."""
    if isinstance(module, nn.Linear):
        return 0 if module.bias is None else module.bias.numel()
    return module.selection_operations() if isinstance(module, ReplicatedConv2d) else 0


def _collectives(
    module: nn.Module,
    given: tuple[int, ...],
    output: tuple[int, ...],
    *,
    batch_size: int,
    itemsize: int,
    ranks: int,
    is_classifier: bool,
) -> tuple[Collective, ...]:
    if ranks == 1:
        return ()
    if isinstance(module, TwoLevelConv2d):
        return representatives_exchange(
            batch=batch_size,
            representatives=module.groups * module.representatives,
            pixels=output[1] * output[2],
            itemsize=itemsize,
            ranks=ranks,
        )
    if isinstance(module, BalancedConv2d):
        return mean_exchange(
            batch=batch_size,
            channels=given[0] // module.groups,
            pixels=given[1] * given[2],
            itemsize=itemsize,
            ranks=ranks,
        )
    if is_classifier:
        return (logits_sum(batch=batch_size, classes=output[0], itemsize=itemsize, ranks=ranks),)
    return ()
