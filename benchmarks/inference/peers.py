"""Layers in the form of each peer, as training would leave them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True)
class Layer:
    name: str
    channels: int
    outputs: int
    kernel: int
    stride: int
    height: int

    @property
    def arguments(self) -> tuple[int, ...]:
        return self.channels, self.outputs, self.kernel, self.stride, self.kernel // 2


Build = Callable[[Layer, int, float], nn.Module]
"""(layer, groups, share of channels that dgc drops) -> a module in evaluation form."""


def dense(layer: Layer, groups: int, xi: float) -> nn.Module:
    return nn.Conv2d(*layer.arguments, bias=False)


def gc(layer: Layer, groups: int, xi: float) -> nn.Module:
    return nn.Conv2d(*layer.arguments, groups=groups, bias=False)


def with_norm(build: Build) -> Build:
    def build_both(layer: Layer, groups: int, xi: float) -> nn.Module:
        norm = as_if_trained(nn.BatchNorm2d(layer.channels))
        return nn.Sequential(norm, nn.ReLU(inplace=True), build(layer, groups, xi))

    return build_both


def dgc(layer: Layer, groups: int, xi: float) -> nn.Module:
    module = as_if_trained(DynamicGroupConv2d(*layer.arguments, groups=groups, xi=xi))
    return module.eval().to_inference()


def flgc_drawn(layer: Layer, groups: int, xi: float) -> nn.Module:
    """Groups of the sizes that training starts with, and a trained layer has: as many channels as happen to."""
    return FLGConv2d(*layer.arguments, groups=groups).eval().to_inference()


@torch.no_grad()
def flgc(layer: Layer, groups: int, xi: float) -> nn.Module:
    """Groups of equal size, of channels from anywhere."""
    module = FLGConv2d(*layer.arguments, groups=groups)
    for logits in (module.input_logits, module.output_logits):
        of_channel = torch.arange(len(logits))[torch.randperm(len(logits))] % groups
        logits.copy_(nn.functional.one_hot(of_channel, groups))
    return module.eval().to_inference()


@torch.no_grad()
def dgconv(layer: Layer, groups: int, xi: float) -> nn.Module:
    """Interleaved groups: the gates of the last bits are closed. A network's permutations are not folded away."""
    module = DGConv2d(*layer.arguments)
    module.gates.fill_(1.0)
    module.gates[len(module.gates) - (groups.bit_length() - 1) :] = -1.0
    return module.eval().to_inference()


@torch.no_grad()
def as_if_trained(model: nn.Module) -> nn.Module:
    """In evaluation mode, with the tensors that training moves away from where they all start alike."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.5)
        if isinstance(module, DynamicGroupConv2d):
            module.set_progress(1)
            for offset in module.offset:
                offset.copy_(torch.linspace(0.5, 1.5, len(offset))[torch.randperm(len(offset))])
    return model.eval()


PEERS: dict[str, Build] = {
    "dense": dense,
    "gc": gc,
    "flgc": flgc,
    "flgc drawn": flgc_drawn,
    "dgconv": dgconv,
    "dgc": dgc,
    "dense + BN ReLU": with_norm(dense),
    "gc + BN ReLU": with_norm(gc),
}
"""What to time, by name."""

RATIOS = {
    "dense": ["gc", "flgc", "flgc drawn", "dgconv", "dgc"],
    "dense + BN ReLU": ["gc + BN ReLU", "dgc"],
}
"""Of which peers the times are divided by which one's."""
