"""A whole network as it runs in inference."""

import copy
import warnings

import torch
from torch import fx, nn

from twolevel.errors import UserError
from twolevel.nn.arguments import geometry
from twolevel.nn.base import ReplicatedConv2d
from twolevel.nn.inference.chains import Chains, Layer, Stopped, graph_of, sole_user
from twolevel.nn.inference.dgc import DynamicGroupInference
from twolevel.nn.inference.fold import fold_permutations
from twolevel.nn.inference.gathered import GatheredConv2d
from twolevel.nn.structure import named_layers
from twolevel.ops.kernels.native import gathered

OURS = (DynamicGroupInference, GatheredConv2d)
"""Convolutions that can add a bias and take ReLU in their own pass over the output."""

NARROW = 8
"""Output channels of a group up to which the C kernels were measured to be faster than oneDNN, of stride 1."""


@torch.no_grad()
def for_inference(model: nn.Module) -> nn.Module:
    """A copy of a network with the same outputs, to rounding, in less time.

    - Every convolution of this package is in its inference form.
    - Group convolutions of few channels are computed by the C kernels, where those can be used.
    - Permutations of channels are folded into their neighbours (`fold_permutations`).
    - A BatchNorm2d after a convolution is folded into that, and into ours a ReLU after it, too.

    Only what follows a convolution alone is folded, as in `fold_permutations`. Modules may be called
    otherwise in the copy, so its state is of no use to `model`.

    A network that torch.fx cannot trace has its layers replaced and nothing folded, with a warning. Raises
    UserError for a network in training mode.
    """
    if any(module.training for module in model.modules()):
        raise UserError("for_inference needs a network in evaluation mode; call model.eval() first")
    if isinstance(model, ReplicatedConv2d):
        return model.to_inference()
    model = copy.deepcopy(model)
    for name, module in list(named_layers(model)):
        form = _form(module)
        if name and form is not module:
            model.set_submodule(name, form)
    model = fold_permutations(model).model
    try:
        graph = graph_of(model, *OURS)
    except Stopped as untraced:
        warnings.warn(f"no normalisation is folded, as {untraced}", stacklevel=2)
        return model
    folding = _Norms(model, graph)
    for node in graph.nodes:
        folding.fold(node)
    _drop_identities(model)
    return model


def _form(module: nn.Module) -> nn.Module:
    """What replaces a layer; itself where it stays."""
    if isinstance(module, ReplicatedConv2d):
        return module.to_inference()
    if type(module) is not nn.Conv2d or module.groups == 1 or module.padding_mode != "zeros":
        return module
    narrow = 1 < module.out_channels // module.groups <= NARROW and module.stride == (1, 1)
    weight = module.weight.detach()
    if not narrow or not gathered.takes(weight, weight):
        return module
    try:
        numbers = geometry(module.kernel_size, module.stride, module.padding, module.dilation)
    except UserError:  # an even kernel whose padding is the same on no two sides
        return module
    return GatheredConv2d.of_conv(module, numbers)


class _Norms(Chains):
    """Convolutions, and the normalisations and activations that follow them."""

    def fold(self, node: fx.Node) -> None:
        """Fold what follows the convolution that this node calls, if it calls one."""
        conv = self.layer(node)
        if conv is None or not (type(conv.module) is nn.Conv2d or isinstance(conv.module, OURS)):
            return
        try:
            self.check_owned(conv)
            node, norm = self._next(node)
            if type(norm.module) is nn.BatchNorm2d and norm.module.running_var is not None:
                _absorb(conv.module, norm.module)
                self.model.set_submodule(norm.name, nn.Identity().eval())
                node, norm = self._next(node)
            if type(norm.module) is nn.ReLU and isinstance(conv.module, OURS):
                conv.module.absorb_relu()
                self.model.set_submodule(norm.name, nn.Identity().eval())
        except Stopped:
            return

    def _next(self, node: fx.Node) -> tuple[fx.Node, Layer]:
        """The only user of this node, and the layer that it calls. Raises Stopped where that is not one alone."""
        user = sole_user(node)
        layer = self.layer(user)
        if layer is None:
            raise Stopped(f"after it is {user.name}, which is no layer")
        self.check_owned(layer)
        return user, layer


def _absorb(conv: nn.Module, norm: nn.BatchNorm2d) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = (variance + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    if isinstance(conv, OURS):
        conv.absorb(scale, shift)
        return
    assert isinstance(conv, nn.Conv2d)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter(bias.clone(), requires_grad=conv.weight.requires_grad)


def _drop_identities(model: nn.Module) -> None:
    """Take modules that do nothing out of Sequentials whose members have numbers for names."""
    for module in model.modules():
        if type(module) is not nn.Sequential:
            continue
        names = [name for name, _ in module.named_children()]
        if names == [str(index) for index in range(len(module))]:
            for index in reversed(range(len(module))):
                if type(module[index]) is nn.Identity:
                    del module[index]
