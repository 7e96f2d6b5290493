"""Weights of public checkpoints, by the keys of the code that wrote them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from twolevel.errors import UserError, unknown
from twolevel.models.condensenet import CondenseNet, DenseLayer
from twolevel.models.wide_resnet import WideResNet
from twolevel.nn import DynamicGroupConv2d, TwoLevelConv2d
from twolevel.nn.base import ReplicatedConv2d
from twolevel.nn.structure import named_layers, own_tensors

PublicLayout = Literal["wrn", "dgc"]

# Parts of a wide residual network and of its blocks, in ours and in the public code.
WRN = {"stem": "conv0", "bn": "bn", "classifier": "fc"}
WRN_BLOCK = {"bn1": "bn0", "conv1": "conv0", "bn2": "bn1", "conv2": "conv1", "shortcut": "convdim"}
# Parts of CondenseNet's dense layer, by their place in ours.
DENSE_LAYER = {0: "conv_1", 1: "conv_2.norm", 3: "conv_2.conv"}

OURS = (TwoLevelConv2d, ReplicatedConv2d)

Paths = Iterator[tuple[str, nn.Module]]


@torch.no_grad()
def load_public(model: nn.Module, state_dict: Mapping[str, Any], layout: PublicLayout) -> None:
    """Copy the weights of a public checkpoint into a whole network of the same function.

    `wrn`  szagoruyko/wide-residual-networks (PyTorch), into `wrn-D-k` with dense convolutions:
               conv0   group0.block0.bn0.weight   group0.block0.conv0   group1.block0.convdim   bn.bias   fc.weight
    `dgc`  hellozhuo/dgc, into `resnet18` and `condensenet-*` with `dgc`, of the same heads and xi:
               layer1.0.conv1.headconv_0.fc1.weight   features.denseblock_1.denselayer_1.conv_2.conv.weight

    `state_dict` has tensors or numpy arrays by these keys, or is the dictionary that the public training writes, which
    has them in `params` (and `stats`) or in `state_dict`. A prefix `module.` is left out; in `wrn` a convolution may
    end in `.weight`, and `convdim` be `conv_dim`, as in the files that were exported to HDF5.

    A checkpoint of `dgc` has the number of channels that each layer drops, which must be round(xi n): that of any time
    from 3/4 of the training on. Where saliencies other than 0 tie at the last of them, the public code drops all these,
    ours only as many as it should.

    Raises UserError for another layout or network and, before anything is copied, with all that is missing, left over
    or of another shape.
    """
    if layout not in get_args(PublicLayout):
        raise unknown("layout", layout, get_args(PublicLayout))
    layers = [*(_wrn(model) if layout == "wrn" else _dgc(model))]
    given = _given(state_dict, ("params", "stats") if layout == "wrn" else ("state_dict",))
    places = {f"{path}.{name}": place for path, module in layers for name, place in _places(module).items()}
    if layout == "wrn":
        given, places = ({_bare(name): value for name, value in of.items()} for of in (given, places))
    if any(place.is_meta for place in places.values()):
        raise UserError("the network is on the meta device; create it where it has memory")
    _check_fit(given, places, layout)
    dynamic = {module: path for path, module in layers if isinstance(module, DynamicGroupConv2d)}
    _check_share(
        {m: int(torch.as_tensor(given[f"{path}._inactive_channels"])) for m, path in dynamic.items()}
    )
    for name in places.keys() & given.keys():
        places[name].copy_(torch.as_tensor(given[name]))
    for module in dynamic:
        module.set_progress(1)


def _given(state_dict: Mapping[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
    """What a checkpoint has by name, of the dictionary itself or of these parts of it."""
    if parts[0] in state_dict:
        state_dict = {name: value for part in parts for name, value in state_dict.get(part, {}).items()}
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def _bare(name: str) -> str:
    """The name of a convolution's weight as the public training of wide residual networks writes it."""
    match = re.fullmatch(r"(.*\b)(conv0|conv1|conv_?dim)(\.weight)?", name)
    return match[1] + match[2].replace("_", "") if match else name


def _wrn(model: nn.Module) -> Paths:
    """Every layer by its path in the public code."""
    if not isinstance(model, WideResNet):
        raise UserError(f"layout='wrn' is of wrn-D-k, not of {type(model).__name__}")
    for path, module in named_layers(model):
        if not isinstance(module, OURS) and not own_tensors(module):
            continue
        match = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(\w+)", path)
        if isinstance(module, OURS) or not (match or path in WRN):
            raise UserError(
                f"layout='wrn' has no {path} of {type(module).__name__}; use wrn-D-k with conv='sc'"
            )
        yield f"group{match[1]}.block{match[2]}.{WRN_BLOCK[match[3]]}" if match else WRN[path], module


def _dgc(model: nn.Module) -> Paths:
    """Every layer by its path in the public code."""
    dynamic = [module for module in model.modules() if isinstance(module, DynamicGroupConv2d)]
    if not dynamic or not isinstance(model, ResNet | CondenseNet):
        kind = type(model).__name__ + ("" if dynamic else " without dgc")
        raise UserError(f"layout='dgc' is of resnet18 and condensenet-* with conv='dgc', not of {kind}")
    if any(module.by_threshold for module in dynamic):
        raise UserError("threshold='global' is not in layout='dgc'; use threshold='head'")
    if isinstance(model, ResNet):
        for path, module in named_layers(model):
            if isinstance(module, OURS) or own_tensors(module):
                yield path.replace("downsample.1", "downsample.1.norm"), module
        return
    yield "features.init_conv", model.features[0]
    stage, layer = 1, 0
    for module in model.features[1:]:
        if isinstance(module, nn.AvgPool2d):
            stage, layer = stage + 1, 0
        elif isinstance(module, DenseLayer):
            layer += 1
            for place, part in DENSE_LAYER.items():
                yield f"features.denseblock_{stage}.denselayer_{layer}.{part}", module.layers[place]
        elif isinstance(module, nn.BatchNorm2d):
            yield "bn_last", module
    yield "classifier", model.classifier


def _places(module: nn.Module) -> dict[str, Tensor]:
    """Where a layer has what the public code calls by these names: its tensors, or views of them."""
    if not isinstance(module, DynamicGroupConv2d):
        return dict(module.state_dict())
    places = {"_inactive_channels": torch.zeros(1)}
    places |= {f"norm.{name}": tensor for name, tensor in module.norm.state_dict().items()}
    parts = {"conv.weight": module.weight, "fc1.weight": module.squeeze, "fc2.weight": module.excite}
    for name, whole in parts.items():
        heads = whole.detach().chunk(module.groups)
        places |= {f"headconv_{i}.{name}": head for i, head in enumerate(heads)}
    return places | {f"headconv_{i}.fc2.bias": head for i, head in enumerate(module.offset.detach())}


def _check_fit(given: Mapping[str, Any], places: Mapping[str, Tensor], layout: str) -> None:
    """Raise UserError unless what is given has the names and shapes of the places."""
    shapes = {name: [*getattr(given[name], "shape", ())] for name in given.keys() & places.keys()}
    # Old versions of torch did not count batches.
    missing = [n for n in places if n not in given and not n.endswith("num_batches_tracked")]
    other = [
        f"{n} {shapes[n]} where it has {[*places[n].shape]}"
        for n in places
        if n in given and shapes[n] != [*places[n].shape]
    ]
    wrong = {
        "missing": missing,
        "left over": [n for n in given if n not in places],
        "of another shape": other,
    }
    if any(wrong.values()):
        some = {
            what: ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
            for what, names in wrong.items()
        }
        lists = "; ".join(f"{what}: {names}" for what, names in some.items() if names)
        raise UserError(f"the checkpoint does not fit this network by layout={layout!r}: {lists}")


def _check_share(dropped: Mapping[DynamicGroupConv2d, int]) -> None:
    """Raise UserError unless each layer drops in the end as many channels as its checkpoint does."""
    for layer, number in dropped.items():
        if number != round(layer.xi * layer.in_channels):
            shares = (xi / 100 for xi in range(100))
            fits = [xi for xi in shares if all(round(xi * m.in_channels) == n for m, n in dropped.items())]
            advice = f"create the network with xi={fits[0]}" if fits else "use one of the end of its training"
            raise UserError(
                f"the checkpoint drops {number} of {layer.in_channels} channels, and xi={layer.xi} means "
                f"{round(layer.xi * layer.in_channels)}; {advice}"
            )
