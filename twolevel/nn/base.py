"""The bases of our convolutions: those that ranks divide by channel group, and those replicated on every rank."""

import math

import torch
from torch import Tensor, nn

from twolevel.nn.arguments import Padding, Size, check_groups, check_no_bias, geometry, pair
from twolevel.ops import LOCAL, Exchange


class ShardedConv2d(nn.Module):
    """A convolution without bias that ranks divide by channel group: `[B, n, H, W] -> [B, m, H', W']`.

    Its parameters are the weights of submodules, which have the rows of group g at dim 0. The submodules are not
    called one by one, so forward hooks belong on this module. `exchange` carries what groups need of each other
    between ranks and is set by `twolevel.distributed.parallelize`, after which this module holds the rows of its
    rank's groups alone; `in_channels`, `out_channels` and `groups` still describe the whole layer.

    Raises UserError where groups does not divide both channel numbers, and for a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        *,
        groups: int,
        dilation: Size = 1,
        bias: bool = False,
    ):
        super().__init__()
        check_no_bias(bias)
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(kernel_size)
        self.groups = groups
        self.geometry = geometry(kernel_size, stride, padding, dilation)
        self.exchange: Exchange = LOCAL

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}"
        )
        return text + (f", ranks={self.exchange.ranks}" if self.exchange.ranks > 1 else "")


class ReplicatedConv2d(nn.Module):
    """A convolution without bias, replicated on every rank: `[B, n, H, W] -> [B, m, H', W']`.

    A subclass calls `reset_parameters` at the end of its `__init__`.
    """

    undecayed: tuple[str, ...] = ()
    """Own parameters that weight decay must spare, by name."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        *,
        dilation: Size = 1,
        bias: bool = False,
    ):
        super().__init__()
        check_no_bias(bias)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(kernel_size)
        self.geometry = geometry(kernel_size, stride, padding, dilation)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial values of this module's own parameters, on the CPU; children draw their own."""
        raise NotImplementedError

    def macs(self, pixels: int, *, nominal: bool = False) -> int:
        """Multiply-accumulates of one image with `pixels` = H' W' outputs.

        As the layer is now, in its inference form; `nominal` as papers count it.
        """
        raise NotImplementedError

    def selection_operations(self) -> int:
        """Operations of one image that choose connections, one an element, beside matrices and activations."""
        return 0

    def used_parameters(self, *, nominal: bool = False) -> int:
        """Parameters that the inference form needs; `nominal` as papers count them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def to_inference(self) -> nn.Module:
        """A frozen module with the same outputs in evaluation mode, to rounding, and less work."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"


@torch.no_grad()
def he_normal_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill with normal values of variance 2 / fan-in (He et al., arXiv 1502.01852), drawn on the CPU in float32."""
    if weight.is_meta:
        return weight
    draws = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    return weight.copy_(draws * math.sqrt(2 / math.prod(weight.shape[1:])))


@torch.no_grad()
def set_blocks_(weight: Tensor, conv: nn.Conv2d) -> None:
    """Set the weights within the groups of an nn.Conv2d, in a dense `weight` `[m, n, k, k]`, to those of it."""
    blocks = zip(weight.chunk(conv.groups), conv.weight.chunk(conv.groups), strict=True)
    for group, (rows, block) in enumerate(blocks):
        rows[:, group * block.shape[1] :][:, : block.shape[1]] = block


def dense_weight_of(conv: nn.Conv2d) -> Tensor:
    """The weight `[m, n, k, k]` of the dense convolution that computes the same: zero between groups."""
    if conv.groups == 1:
        return conv.weight.detach()
    dense = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
    set_blocks_(dense, conv)
    return dense
