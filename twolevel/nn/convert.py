"""Replace the convolutions of any network."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from twolevel.errors import UserError, unknown
from twolevel.nn.bias import ChannelBias
from twolevel.nn.carry import carry_weights
from twolevel.nn.factory import KINDS, make_conv
from twolevel.nn.init import initialize
from twolevel.nn.layout import convolutions

Skip = Callable[[str, nn.Conv2d], bool] | Iterable[str]


@dataclass
class Conversion:
    """What `convert` did. `replaced`: name and what became of its weights; `left`: name and why."""

    conv: str
    groups: int
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} convolutions became {self.conv}, {len(self.left)} were left"]
        lines += [f"  {name}: {self.conv}, {weights}" for name, weights in self.replaced.items()]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    conv: str = "gc2l",
    groups: int = 4,
    skip: Skip = (),
    *,
    seed: int = 0,
    **options,
) -> nn.Module:
    """Replace, in place, every nn.Conv2d of a network by one of kind `conv`; what was done is in `model.conversion`.

    Stride, padding, dilation, bias, device and type are copied. The weights are kept where the new form can
    represent the old function, and drawn from (seed, name) elsewhere. Left as they are: the first
    convolution (the stem), depthwise convolutions, those whose channels `groups` does not divide, those
    with a padding other than zeros, and what `skip` names: patterns like "layer1.*", or a function of
    (name, module).

    Raises UserError for an unknown kind, or where nothing at all is replaced.
    """
    if conv not in KINDS:
        raise unknown("conv", conv, KINDS)
    done = Conversion(conv, groups)
    skip = (skip,) if isinstance(skip, str) else skip
    became: dict[nn.Module, nn.Module] = {}  # a module may stand under several names
    stem = next(iter(convolutions(model)), None)
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if not isinstance(module, nn.Conv2d) or not _is_free(model, name):
            continue
        if module in became:
            _put(model, name, became[module])
            done.replaced[name] = "shared"
            continue
        why = _why_left(name, module, module is stem, skip)
        try:
            new = why or _same_geometry(module, conv, groups, options)
        except UserError as error:
            why = str(error)
        if why:
            done.left[name] = why
            continue
        initialize(new, seed, prefix=name) if not module.weight.is_meta else None
        done.replaced[name] = carry_weights(module, new)
        if module.bias is not None:
            bias = ChannelBias(module.out_channels, module.bias.device, module.bias.dtype)
            bias.bias = module.bias
            new = nn.Sequential(new, bias)
        became[module] = new.train(module.training)
        _put(model, name, new)
    if not done.replaced:
        reasons = "; ".join(f"{name}: {why}" for name, why in [*done.left.items()][:3]) or "it has none"
        raise UserError(f"no convolution was replaced by conv={conv!r}, groups={groups}: {reasons}")
    model.conversion = done
    return model


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)


def _is_free(model: nn.Module, name: str) -> bool:
    """Whether a convolution stands for itself, and is not part of one of ours."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return not type(parent).__module__.startswith("twolevel.nn")


def _why_left(name: str, module: nn.Conv2d, is_stem: bool, skip: Skip) -> str:
    if is_stem:
        return "the stem"
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__name__}, which may do more than a Conv2d"
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if callable(skip):
        return "skipped" if skip(name, module) else ""
    return "skipped" if any(fnmatchcase(name, pattern) for pattern in skip) else ""


def _same_geometry(module: nn.Conv2d, conv: str, groups: int, options: dict) -> nn.Module:
    with torch.device(module.weight.device):
        new = make_conv(
            conv,
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            groups=groups,
            dilation=module.dilation,
            **options,
        )
    return new.to(module.weight.dtype)
