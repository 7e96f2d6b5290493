"""Stem, classifier and dense convolution as a rank holds them; `batch_norm.py` has the normalisation of replicas."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.distributed.collectives import MeshAxis, refuse_second_derivative
from twolevel.nn.arguments import pair
from twolevel.ops.autocast import cast_for_convolution
from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.restriction import conv_backward

Layer = TypeVar("Layer", bound=nn.Module)


def become(module: nn.Module, layer: type[Layer]) -> Layer:
    """The same module, its tensors under the same names, with the forward of `layer`, a subclass of its class."""
    module.__class__ = layer
    assert isinstance(module, layer)
    return module


class SplitStem(nn.Conv2d):
    """A dense convolution of the image, its output channels split: x `[B, C, H, W] -> [B, m/P, H', W']`.

    weight `[m/P, C, k, k]`. Ranks exchange nothing unless the image needs a gradient.
    """

    axis: MeshAxis

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.axis.share_input(x) if x.requires_grad else x)


class SplitClassifier(nn.Linear):
    """A linear layer split by input feature: x `[B, f/P]` -> logits `[B, classes]`, whole on every rank.

        logits = sum over ranks of x_p W_p^T, plus the bias

    weight `[classes, f/P]`, bias `[classes]` on every rank.
    """

    axis: MeshAxis

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x, self.weight)
        if partial.dtype != torch.float64:
            partial = partial.float()  # few numbers, so no reason to round the parts before they are added
        logits = self.axis.sum_logits(partial)
        return logits if self.bias is None else logits + self.bias


class GatheringConv2d(nn.Conv2d):
    """A dense convolution whose filters are split: x `[B, n/P, H, W]` -> y `[B, m/P, H', W']`, weight `[m/P, n, k, k]`.

    The first of those that read one activation computes for all of them (`together`, itself the first); the others
    give back what it computed for them.
    """

    axis: MeshAxis
    together: tuple["GatheringConv2d", ...] = ()
    computed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.together:
            outputs = gathered_convolutions(x, self.together, self.axis)
            for conv, y in zip(self.together, outputs, strict=True):
                conv.computed = y
        y, self.computed = self.computed, None
        assert y is not None
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


def gathered_convolutions(x: Tensor, convs: tuple[nn.Conv2d, ...], axis: MeshAxis) -> tuple[Tensor, ...]:
    """W_p * x of each convolution, for x `[B, n/P, H, W]` gathered once."""
    # Before x is sent: half the bytes.
    x, *weights = cast_for_convolution(x, *(conv.weight for conv in convs))
    geometries = [_geometry(conv) for conv in convs]
    return _GatheredConvolutions.apply(x, axis, geometries, *weights)


def _geometry(conv: nn.Conv2d) -> Geometry:
    assert not isinstance(conv.padding, str)  # `gathered_together` refuses it
    return Geometry(pair(conv.stride), pair(conv.padding), pair(conv.dilation))


class _GatheredConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis, geometries: list[Geometry], *weights: Tensor) -> Any:
        whole = _join(axis.gather(_channels_inmost(x)).wait(), axis.ranks)
        ctx.save_for_backward(whole, *weights)
        ctx.axis, ctx.geometries = axis, geometries
        return tuple(F.conv2d(whole, w, None, *g) for w, g in zip(weights, geometries, strict=True))

    @staticmethod
    def backward(ctx: Any, *gys: Tensor) -> Any:
        whole, *weights = ctx.saved_tensors
        need_x, _, _, *need_weights = ctx.needs_input_grad
        gathered = [*zip(gys, weights, ctx.geometries, need_weights, strict=True)]
        scattering = None
        if need_x:
            gx = None
            for gy, w, g, _ in gathered:
                part, _ = conv_backward(gy, whole, w, g, 1, (True, False))
                assert part is not None
                gx = part if gx is None else gx + part
            assert gx is not None
            refuse_second_derivative(gx)
            scattering = ctx.axis.scatter_sum(_part(gx, ctx.axis.ranks))
        g_weights = [
            conv_backward(gy, whole, w, g, 1, (False, True))[1] if need else None
            for gy, w, g, need in gathered
        ]
        gx = None if scattering is None else scattering.wait().permute(0, 3, 1, 2)
        return gx, None, None, *g_weights


def _channels_inmost(x: Tensor) -> Tensor:
    """`[B, c, H, W] -> [B, H, W, c]` contiguous: no copy of what is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _join(parts: Tensor, ranks: int) -> Tensor:
    """`[P B, H, W, c]`, the parts of all ranks, as x `[B, P c, H, W]` in channels_last memory."""
    return parts.unflatten(0, (ranks, -1)).permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _part(gx: Tensor, ranks: int) -> Tensor:
    """`[B, P c, H, W]` as `[P B, H, W, c]` contiguous: the inverse of `_join`."""
    return gx.permute(0, 2, 3, 1).unflatten(3, (ranks, -1)).permute(3, 0, 1, 2, 4).flatten(0, 1).contiguous()
