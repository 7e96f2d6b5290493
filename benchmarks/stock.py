"""The two-level layer as one writes it with the layers of PyTorch alone: what ours is to be compared with.

`StockTwoLevelConv2d` is the plain way; the two others are what one comes to after looking at where the time goes.
"""

from torch import Tensor, nn

from twolevel.errors import UserError
from twolevel.nn import TwoLevelConv2d


class StockTwoLevelConv2d(nn.Module):
    """GC-2L as its paper has it: one group convolution with m/G + 1 outputs a group, sliced, and a 1x1.

    Input `[B, n, H, W]`, output `[B, m, H', W']`. `fused.weight [m + G, n/G, k, k]`, whose last row of each group
    is that group's restriction; `coarse.weight [m, G, 1, 1]`. ("Two-level Group Convolution", arXiv 2110.05060.)
    The weights are those of `layer`, copied.
    """

    def __init__(self, layer: TwoLevelConv2d):
        super().__init__()
        self.groups = layer.groups
        outputs = layer.out_channels + layer.groups
        self.fused = _convolution(layer, outputs)
        self.coarse = _like(layer.coarse)
        rows = self.fused.weight.data.unflatten(0, (self.groups, -1))
        rows[:, :-1] = layer.local.weight.data.unflatten(0, (self.groups, -1))
        rows[:, -1] = layer.restriction.weight.data

    def forward(self, x: Tensor) -> Tensor:
        out = self.fused(x).unflatten(1, (self.groups, -1))  # [B, G, m/G + 1, H', W']
        return out[:, :, :-1].flatten(1, 2) + self.coarse(out[:, :, -1])


class TunedTwoLevelConv2d(StockTwoLevelConv2d):
    """The same, added group by group: of four ways to slice and add the fastest on CPUs.

    No tensor is copied to undo the interleaving, and channels_last inputs give channels_last outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = self.fused(x).unflatten(1, (self.groups, -1))
        coarse = self.coarse(out[:, :, -1])
        return (coarse.unflatten(1, (self.groups, -1)) + out[:, :, :-1]).flatten(1, 2)


class ThreeConvolutions(nn.Module):
    """GC-2L as three nn.Conv2d: local `[m, n/G, k, k]`, restriction `[G, n/G, k, k]`, coarse `[m, G, 1, 1]`.

    The weights are those of `layer`, copied.
    """

    def __init__(self, layer: TwoLevelConv2d):
        super().__init__()
        self.local, self.restriction, self.coarse = map(_like, (layer.local, layer.restriction, layer.coarse))

    def forward(self, x: Tensor) -> Tensor:
        return self.local(x) + self.coarse(self.restriction(x))


def to_stock(model: nn.Module, form: type[nn.Module] = StockTwoLevelConv2d) -> nn.Module:
    """Replace, in place, every TwoLevelConv2d of a network on one device by `form`; its function stays the same.

    Raises UserError for a part of a network, whose representatives stock layers cannot exchange.
    """
    for name, module in [*model.named_modules()]:
        if isinstance(module, TwoLevelConv2d):
            if module.exchange.ranks > 1:
                raise UserError(f"{name} is one of {module.exchange.ranks} parts; convert a whole network")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, form(module).train(module.training))
    return model


def _convolution(layer: TwoLevelConv2d, outputs: int) -> nn.Conv2d:
    options = {**layer.geometry._asdict(), "groups": layer.groups, "bias": False}
    weight = layer.local.weight
    return nn.Conv2d(
        layer.in_channels, outputs, layer.kernel_size, **options, device=weight.device, dtype=weight.dtype
    )


def _like(module: nn.Conv2d) -> nn.Conv2d:
    """A copy of one convolution, as a user would have made it."""
    new = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        bias=False,
        device=module.weight.device,
        dtype=module.weight.dtype,
    )
    new.weight.data.copy_(module.weight.data)
    return new
