"""The only place that cuts layers by channel: a rank keeps its rows of every tensor, and the number of them.

    W [m, n/G, k, k]  =  W_0 [m/P, n/G, k, k]  over  W_1  over  ...  over  W_(P-1)         rank p keeps W_p

Which dimension divides is a fact about the network (`twolevel.nn.layout`), and so are the values, which every rank
draws from streams that do not depend on P (`twolevel.nn.initialize`).
"""

from collections.abc import Callable

from torch import nn

from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.layers import SplitClassifier, SplitStem, become
from twolevel.errors import UserError
from twolevel.nn import Layout, layout_of
from twolevel.nn.base import ShardedConv2d
from twolevel.nn.structure import ends, own_tensors


def cut_channels(
    model: nn.Module, layout: Layout, axis: MeshAxis, draw: Callable[[nn.Module, str], object] | None = None
) -> None:
    """Keep of `model`, in place, the part that `layout` describes, for this rank of `axis`.

    Classes change only in how their input or output is exchanged between ranks; tensors keep their names. Where
    given, `draw(layer, name)` is called for each layer with tensors just before that is cut: it may draw a layer of
    the meta device whole, and no rank ever holds more than one.
    """
    stem, classifier = ends(model)
    for name, module in [*model.named_modules()]:
        if own_tensors(module):
            if draw is not None:
                draw(module, name)
            _keep_rows(module, layout.within(name))
        if module is stem:
            split = become(module, SplitStem)
            split.axis = axis
            split.out_channels //= axis.ranks
        elif module is classifier:
            split = become(module, SplitClassifier)
            split.axis = axis
            split.in_features //= axis.ranks
        elif isinstance(module, ShardedConv2d):
            module.exchange = axis
        elif isinstance(module, nn.Conv2d):
            module.out_channels //= axis.ranks
            # One of a single group, a coarse or a gathering convolution, reads all channels.
            if module.groups > 1:
                module.in_channels //= axis.ranks
                module.groups //= axis.ranks
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features //= axis.ranks


def _keep_rows(module: nn.Module, layout: Layout) -> None:
    for name, tensor in own_tensors(module).items():
        part = layout.cut(name, tensor.detach()).clone()
        if isinstance(tensor, nn.Parameter):
            part = nn.Parameter(part, requires_grad=tensor.requires_grad)
        setattr(module, name, part)


def whole_layout(model: nn.Module) -> Layout:
    """The layout of a network that is to be split. Raises UserError for one of which a part is held already."""
    layout = layout_of(model)
    if layout.parts > 1:
        raise UserError("this network is a part already; split a whole one")
    return layout


def check_unshared(model: nn.Module) -> None:
    """Raise UserError where two modules have one parameter: cut, they would be two, and trained apart."""
    owners: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            first = owners.setdefault(id(parameter), name)
            if first != name:
                raise UserError(
                    f"{first} and {name} are one parameter, which cannot be split over ranks; give each module a "
                    "parameter of its own, or replicate the network over the data axis"
                )
