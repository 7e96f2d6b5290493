"""The two ends of a network that is split by channel group: the stem and the classifier."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.distributed.collectives import MeshAxis


class SplitStem(nn.Conv2d):
    """A dense convolution of the image, its output channels split: x `[B, C, H, W] -> [B, m/P, H', W']`.

    weight `[m/P, C, k, k]`. Nothing crosses ranks unless the image needs a gradient.
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
