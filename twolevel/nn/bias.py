"""The bias of a converted convolution, apart from it."""

import torch
from torch import Tensor, nn


class ChannelBias(nn.Module):
    """x + b for each channel: x `[B, C, H, W]`, bias `[C]`."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]
