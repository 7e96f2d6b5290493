"""Replace the convolutions of any network."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from twolevel.errors import UserError, unknown
from twolevel.nn.base import dense_weight_of
from twolevel.nn.carry import DRAWN, carry_weights
from twolevel.nn.channels import ChannelBias
from twolevel.nn.factory import KINDS, make_conv
from twolevel.nn.init import initialize
from twolevel.nn.nearest import HAVE_NEAREST, set_nearest_
from twolevel.nn.structure import convolutions

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Where a tensor keeps its hooks: torch has no public way to ask whether there are any.
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
Skip = Callable[[str, nn.Conv2d], bool] | Iterable[str]


@dataclass
class Conversion:
    """What `convert` did. By name, `replaced`: what became of the weights; `left`: why a convolution stayed.

    `errors` are those of nearest weights W', ||W - W'|| / ||W||.
    """

    conv: str
    groups: int
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

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
    nearest: bool = False,
    **options: Any,
) -> nn.Module:
    """Replace, in place, every nn.Conv2d of a network by one of kind `conv`; what was done is in `model.conversion`.

    Stride, padding, dilation, bias, device, type, memory format and training mode are copied. The weights are
    kept where the new form can represent the old function, frozen if they were, and drawn from (seed, name)
    elsewhere; with `nearest`, for gc, gc2l and bgc, they are those nearest to the old ones in the least-squares sense
    (`twolevel.nn.nearest.set_nearest_` has the formulas), a start for fine-tuning. A convolution under several names
    stays one. These are left as they are:

    - the first convolution (the stem), and depthwise convolutions;
    - those that are not an nn.Conv2d (ConvTranspose2d, Conv1d, ...), whose channels `groups` does not divide, or
      whose padding is other than zeros;
    - those that own what the new form cannot take over: a shared or a computed weight, hooks, or a frozen weight
      that would be drawn anew;
    - what `skip` names under one of its names: patterns like "layer1.*", or a function of (name, module).

    Raises UserError for an unknown kind, for one without nearest weights or a network without values where those are
    asked for, and where nothing at all is replaced.
    """
    if conv not in KINDS:
        raise unknown("conv", conv, KINDS)
    if nearest and conv not in HAVE_NEAREST:
        raise UserError(f"nearest=True is invalid for conv={conv!r}; use one of {', '.join(HAVE_NEAREST)}")
    if nearest and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("nearest=True needs the network's weights; one of the meta device has none yet")
    done = Conversion(conv, groups)
    if not callable(skip):
        skip = (skip,) if isinstance(skip, str) else tuple(skip)
    stem, holders = next(iter(convolutions(model)), None), _holders(model)
    for module, names in _free_convolutions(model).items():
        why = "the stem" if module is stem else _why_left(module, names, holders, skip)
        if not why:
            assert isinstance(module, nn.Conv2d)  # `_why_left` leaves all others
            try:
                new, weights, error = _replacement(module, names[0], conv, groups, options, seed, nearest)
            except UserError as refused:
                why = str(refused)
            else:
                if error is not None:
                    done.errors[names[0]] = error
                for name in names:
                    parent, _, attribute = name.rpartition(".")
                    setattr(model.get_submodule(parent), attribute, new)
                done.replaced |= dict.fromkeys(names, "shared") | {names[0]: weights}
        if why:
            done.left |= dict.fromkeys(names, why)
    if not done.replaced:
        left = [f"{name or 'the network itself'}: {why}" for name, why in [*done.left.items()][:3]]
        reasons = "; ".join(left) or "it has none"
        raise UserError(f"no convolution was replaced by conv={conv!r}, groups={groups}: {reasons}")
    model.conversion = done  # pyright: ignore[reportArgumentType] nn.Module declares tensors and modules only
    return model


def _free_convolutions(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The convolutions that are not part of a convolution of this package, with all their names."""
    names: dict[nn.Module, list[str]] = {}
    parts: set[nn.Module] = set()
    ours: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__module__.startswith("twolevel.nn"):
            ours += (f"{name}." if name else "",)
        elif isinstance(module, CONVOLUTIONS):
            names.setdefault(module, []).append(name)
            if name.startswith(ours):
                parts.add(module)
    return {module: found for module, found in names.items() if module not in parts}


def _holders(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of the modules that hold each parameter."""
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name or "the network itself")
    return holders


def _why_left(module: nn.Module, names: list[str], holders: dict[nn.Parameter, list[str]], skip: Skip) -> str:
    if is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        return f"its {' and '.join(module.parametrizations)} is parametrized"
    if not isinstance(module, nn.Conv2d):
        return f"a {type(module).__name__}, not a Conv2d"
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__name__}, which may do more than a Conv2d"
    # Weight normalisation of the old kind, pruning and their like compute the weight from other tensors.
    others = {name for name, _ in (*module.named_parameters(), *module.named_buffers())} - {"weight", "bias"}
    if others:
        return f"it has tensors of its own: {', '.join(sorted(others))}"
    if any(value for name, value in vars(module).items() if name.endswith("_hooks")):
        return "it has hooks, which belong to it; register them after the conversion"
    if "forward" in vars(module):
        return "its forward was replaced"
    for name, parameter in module.named_parameters():
        sharers = [holder for holder in holders[parameter] if holder not in names]
        if sharers:
            return f"its {name} is shared with {', '.join(sharers)}"
    if any(getattr(module.weight, kind, None) for kind in TENSOR_HOOKS):
        return "its weight has hooks, which belong to it; register them after the conversion"
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if callable(skip):
        return "skipped" if any(skip(name, module) for name in names) else ""
    return "skipped" if any(fnmatchcase(name, pattern) for name in names for pattern in skip) else ""


def _replacement(
    module: nn.Conv2d, name: str, conv: str, groups: int, options: dict[str, Any], seed: int, nearest: bool
) -> tuple[nn.Module, str, float | None]:
    """The replacement of a convolution, what became of its weights, and the error of nearest ones.

    Raises UserError where there is none.
    """
    new = _same_geometry(module, conv, groups, options)
    if not module.weight.is_meta:
        initialize(new, seed, prefix=name)
    weights = carry_weights(module, new)
    if not module.weight.requires_grad:
        if weights == DRAWN:
            raise UserError(f"its weight is frozen, and {conv} of groups={groups} cannot represent it")
        new.requires_grad_(False)
    error = None
    if nearest and weights == DRAWN:
        error = set_nearest_(new, dense_weight_of(module))
        weights = f"nearest weights, relative error {error:.3f}"
    if not module.weight.is_contiguous():
        new = new.to(memory_format=torch.channels_last)
    if module.bias is not None:
        bias = ChannelBias(module.out_channels, module.bias.device, module.bias.dtype)
        bias.bias = module.bias
        new = nn.Sequential(new, bias)
    return new.train(module.training), weights, error


def _same_geometry(module: nn.Conv2d, conv: str, groups: int, options: dict[str, Any]) -> nn.Module:
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
