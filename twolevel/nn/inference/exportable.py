"""Inference forms by operations of torch alone and for any batch: what other programs can be given.

Of a whole batch at once, H heads of K kept channels each:

    t = ReLU(sign x + shift)          [B, n, H, W]
    g = saliency(mean of t)           [B, H, n]
    scale: g where kept, else 0       [B, H, n]       the K largest of each image and head, of equal ones the last
    convolve scale t, in H groups     [B, m, H', W']  all n channels: which are dropped differs from image to image
    shuffle                           [B, m, H', W']
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.nn.inference.dgc import DynamicGroupInference
from twolevel.nn.inference.gathered import GatheredConv2d
from twolevel.nn.structure import named_layers


def exportable(model: nn.Module) -> nn.Module:
    """A network of `for_inference`, whose forms are replaced, in place, by such of torch's operations alone.

    What other layers of this package compute is traced as operations of torch already.
    """
    for name, module in [*named_layers(model)]:
        form = _form(module)
        if form is not None and not name:
            return form
        if form is not None:
            model.set_submodule(name, form)
    return model


def _form(module: nn.Module) -> nn.Module | None:
    if isinstance(module, GatheredConv2d):
        return module.by_torch()
    return DynamicGroupBatch(module).eval() if isinstance(module, DynamicGroupInference) else None


class DynamicGroupBatch(nn.Module):
    """What a `DynamicGroupInference` computes, by operations of torch for all images of a batch together.

    Input `[B, n, H, W]`, output `[B, m, H', W']`, to rounding the same, with the same choice of channels for each
    image. It has buffers only.
    """

    sign: Tensor
    shift: Tensor
    squeeze: Tensor
    excite: Tensor
    offset: Tensor
    threshold: Tensor
    weight: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, form: DynamicGroupInference):
        super().__init__()
        self.heads, self.geometry, self.dropped = form.heads, form.geometry, form.in_channels - form.kept
        self.by_threshold, self.bound, self.flips = form.by_threshold, form.bound, form.flips
        self.relu = form.native.relu
        parts = form.parts() | {"weight": form.weight()}
        for name in ("sign", "shift", "squeeze", "excite", "offset", "threshold", "weight"):
            # In memory of its own, as what writes a file expects.
            self.register_buffer(name, parts[name].clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", parts["bias"].flatten().clone() if "bias" in parts else None)

    def forward(self, x: Tensor) -> Tensor:
        t = ((x * self.sign if self.flips else x) + self.shift).relu()
        scale = self._kept(self._saliency_of(t))
        if self.bound is not None:
            scale = scale.clamp(max=self.bound)
        heads = (t[:, None] * scale[..., None, None]).flatten(1, 2)  # [B, H n, H, W]
        y = F.conv2d(heads, self.weight, self.bias, *self.geometry, self.heads)
        y = y.unflatten(1, (self.heads, -1)).transpose(1, 2).flatten(1, 2)
        return y.relu() if self.relu else y

    def _saliency_of(self, t: Tensor) -> Tensor:
        """`[B, n, H, W] -> [B, H, n]`"""
        hidden = (t.mean((2, 3)) @ self.squeeze).relu().unflatten(1, (self.heads, 1, -1))
        return (hidden @ self.excite + self.offset).relu().squeeze(2)

    def _kept(self, g: Tensor) -> Tensor:
        """g, and 0 for channels that are dropped."""
        if self.by_threshold:
            return g * (g > self.threshold)
        if not self.dropped:
            return g
        # Stable: of equal saliencies the channel of lower index is dropped first.
        values, indices = (part[..., self.dropped :] for part in g.sort(dim=-1, stable=True))
        return torch.zeros_like(g).scatter(-1, indices, values)
