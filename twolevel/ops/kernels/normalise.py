"""Batch normalisation with or without ReLU: what a set of kernels for it computes, and the set of operations of torch.

    u  = (x - mean) / std      v = weight u + bias      o = ReLU(v), or v
    g  = go where v > 0, or go      s = sum of g      t = sum of g u
    gx = weight / std (g - s / N - u t / N)

with mean and std over the N = B H W numbers of a channel in x `[B, C, H, W]`; s is the gradient of bias, t that of
weight. Backward finds v again, from x: neither o nor where it is above 0 has to be stored.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops.normalise_problem import NormaliseProblem

MAPS = (0, 2, 3)
NOTHING = 1e-30  # added to a variance that includes eps: torch 2.11 refuses 0


class Normalisation(NamedTuple):
    """What the channels are normalised by, a number for each; without weight and bias 1 and 0."""

    mean: Tensor
    inv_std: Tensor
    weight: Tensor | None
    bias: Tensor | None
    relu: bool


class Moments(NamedTuple):
    """Mean and variance of each channel, of `count` numbers: float32, of float64 maps float64."""

    mean: Tensor
    var: Tensor
    count: Tensor | int


class Running(NamedTuple):
    """Running statistics of the channels: in training each batch moves them by `rate` of the way to its own."""

    mean: Tensor | None
    var: Tensor | None
    rate: float | Tensor

    def follow(self, moments: Moments) -> None:
        """Move them, the variance to what the batch says of that of all images (N - 1 for N)."""
        mean, var, count = moments
        for running, of_batch in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            if running is not None:
                rate = self.rate.to(running) if isinstance(self.rate, Tensor) else self.rate
                running.lerp_(of_batch.to(running), rate)


class Normaliser(Protocol):
    """A kernel for each operation on maps x, o and their gradients `[B, C, H, W]`; sums and means are `[2, C]`.

    `estimate` orders the sets before any is measured.
    """

    name: str

    def unsupported(self, problem: NormaliseProblem) -> str | None:
        """Why these kernels cannot compute the problem here, as what follows "kernels=...: "; None where they can."""
        ...

    def estimate(self, problem: NormaliseProblem) -> float:
        """Orders the sets before any is measured: lower is faster. The numbers have no other meaning."""
        ...

    def moments(self, x: Tensor) -> Moments:
        """Of these images."""
        ...

    def apply(self, x: Tensor, by: Normalisation) -> Tensor:
        """o, in the memory format of x."""
        ...

    def sums(self, go: Tensor, x: Tensor, by: Normalisation) -> Tensor:
        """s and t."""
        ...

    def input_grad(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation, means: Tensor
    ) -> Tensor:
        """gx from s / N and t / N, plus `more` unless that is None."""
        ...

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        running: Running | None,
    ) -> tuple[Tensor, Normalisation]:
        """o and what it is normalised by: `moments`, which `running` follows, and `apply`, where no rank waits."""
        ...

    def backward(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation
    ) -> tuple[Tensor, Tensor]:
        """gx, and s and t: `sums` and `input_grad`, where no rank waits."""
        ...


class TorchNormaliser(Normaliser):
    """Operations of torch: for every device, type and memory format."""

    name = "torch"

    def unsupported(self, problem: NormaliseProblem) -> str | None:
        return None

    def estimate(self, problem: NormaliseProblem) -> float:
        return 1

    def moments(self, x: Tensor) -> Moments:
        var, mean = torch.var_mean(wide(x), MAPS, correction=0)
        return Moments(mean, var, numbers(x))

    def apply(self, x: Tensor, by: Normalisation) -> Tensor:
        v = F.batch_norm(x, by.mean, by.inv_std**-2, by.weight, by.bias, False, 0.0, NOTHING)
        return v.relu_() if by.relu else v

    def sums(self, go: Tensor, x: Tensor, by: Normalisation) -> Tensor:
        g = self._passed(go, x, by)
        return torch.stack([g.sum(MAPS), (g * _centred(x, by)).sum(MAPS)])

    def input_grad(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation, means: Tensor
    ) -> Tensor:
        s, t = means
        g = self._passed(go, x, by)
        scale = by.inv_std if by.weight is None else by.inv_std * by.weight
        gx = ((g - across(s) - _centred(x, by) * across(t)) * across(scale)).to(x.dtype)
        return gx if more is None else gx + more

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        running: Running | None,
    ) -> tuple[Tensor, Normalisation]:
        moments = self.moments(x)
        if running is not None:
            running.follow(moments)
        by = Normalisation(moments.mean, torch.rsqrt(moments.var + eps), weight, bias, relu)
        return self.apply(x, by), by

    def backward(
        self, go: Tensor, x: Tensor, more: Tensor | None, by: Normalisation
    ) -> tuple[Tensor, Tensor]:
        sums = self.sums(go, x, by)
        return self.input_grad(go, x, more, by, sums / numbers(x)), sums

    def _passed(self, go: Tensor, x: Tensor, by: Normalisation) -> Tensor:
        if by.relu:
            with torch.no_grad():  # the derivative of a sign is 0
                v = self.apply(x, by._replace(relu=False))
            go = torch.ops.aten.threshold_backward(go, v, 0)
        return wide(go)


def joined(means: Tensor, variances: Tensor, counts: Tensor) -> Moments:
    """Those of sets of numbers together, from `[sets, C]` of each (Chan, Golub, LeVeque, 1979); counts `[sets, 1]`."""
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    # Sums of squares would lose digits.
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / count
    return Moments(mean, var, count)


def numbers(x: Tensor) -> int:
    """Of a channel, on this rank."""
    return x.numel() // x.shape[1]


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def in_rows(x: Tensor) -> bool:
    """Whether x is channels_last, where it could be both."""
    return x.is_contiguous(memory_format=torch.channels_last)


def in_memory_of(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the memory format of x."""
    return gradient.contiguous(memory_format=torch.channels_last if in_rows(x) else torch.contiguous_format)


def across(channels: Tensor) -> Tensor:
    """`[C]` as it is added to maps."""
    return channels[:, None, None]


def _centred(x: Tensor, by: Normalisation) -> Tensor:
    """u."""
    return (wide(x) - across(by.mean)) * across(by.inv_std)
