"""Batch normalisation by the statistics of a batch, with or without ReLU, in as few passes over memory as there can be.

    forward     x -> mean and variance          (given, where whoever wrote x had it in a cache)
                x -> o = ReLU(weight (x - mean) / std + bias)
    backward    x, go -> sums of go and go (x - mean) where o > 0
                x, go -> gx                     (plus the gradient of x from elsewhere)

x is all of the maps that is stored for backward.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops.kernels.normalise import (
    Moments,
    Normalisation,
    Normaliser,
    Running,
    TorchNormaliser,
    joined,
)


class Replicas(Protocol):
    """The ranks that share the statistics of their images."""

    ranks: int

    def all_gather(self, own: Tensor) -> Tensor:
        """`[n] -> [ranks, n]`, the parts of all ranks in order of rank; without a gradient."""
        ...

    def all_reduce_(self, tensor: Tensor) -> None:
        """The sum over ranks, in place. Raises where its gradient is wanted."""
        ...


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    relu: bool,
    kernels: Normaliser,
    replicas: Replicas | None = None,
    running: Running | None = None,
    moments: Moments | None = None,
) -> tuple[Tensor, Tensor]:
    """o = weight (x - mean) / sqrt(var + eps) + bias, with `relu` 0 where that is below 0; and x.

    x is for whatever else reads it: the gradient from there is added in the pass that computes that of o.

    x `[B, C, H, W]`; weight and bias `[C]` or None. Mean and variance are over all images and pixels, with `replicas`
    those of all ranks, which all must call this: one all-gather forward and one all-reduce backward, of 2 C + 1 and 2 C
    numbers. `moments` are those of x on this rank, where they are known; `running` follows those of all. Second
    derivatives are by operations of torch; across ranks there are none.
    """
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    return _BatchNorm.apply(x, weight, bias, eps, relu, kernels, replicas, running, moments)


def over_replicas(own: Moments, replicas: Replicas | None) -> Moments:
    """The moments of all ranks' maps."""
    if replicas is None:
        return own
    mean, var, count = own
    if not isinstance(count, Tensor):
        # Filled on the device: a copy from the host would wait for it.
        count = mean.new_full((), count)
    every = replicas.all_gather(torch.cat([mean, var, count[None]]))
    return joined(*every.split([len(mean), len(var), 1], 1))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        kernels: Normaliser,
        replicas: Replicas | None,
        running: Running | None,
        moments: Moments | None,
    ) -> tuple[Tensor, Tensor]:
        if replicas is None and moments is None:
            o, by = kernels.forward(x, weight, bias, eps, relu, running)
        else:
            of_all = over_replicas(moments or kernels.moments(x), replicas)
            if running is not None:
                running.follow(of_all)
            by = Normalisation(of_all.mean, torch.rsqrt(of_all.var + eps), weight, bias, relu)
            o = kernels.apply(x, by)
            ctx.count = of_all.count
        ctx.save_for_backward(x, weight, bias, by.mean, by.inv_std)
        ctx.eps, ctx.relu, ctx.kernels, ctx.replicas = eps, relu, kernels, replicas
        ctx.set_materialize_grads(False)
        return o, x

    @staticmethod
    def backward(ctx: Any, go: Tensor | None, more: Tensor | None) -> tuple[Any, ...]:
        x, weight, bias, mean, inv_std = ctx.saved_tensors
        rest = (None,) * 6
        if go is None:
            if ctx.replicas is None:
                return more, None, None, *rest
            go = torch.zeros_like(x)  # the other ranks wait for this one's sums
        # Gradients are recorded where a second derivative is wanted.
        again = torch.is_grad_enabled()
        if again and ctx.replicas is None:
            gx, g_weight, g_bias = _differentiable_grads(go, x, weight, bias, ctx.eps, ctx.relu)
            return gx if more is None or gx is None else gx + more, g_weight, g_bias, *rest
        kernels = TorchNormaliser() if again else ctx.kernels
        by = Normalisation(mean, inv_std, weight, bias, ctx.relu)
        want_x, want_weight, want_bias, *_ = ctx.needs_input_grad
        if want_x and ctx.replicas is None:
            gx, sums = kernels.backward(go, x, more, by)
        else:
            gx, sums = None, kernels.sums(go, x, by)
        if ctx.replicas is not None:
            means = sums / ctx.count
            ctx.replicas.all_reduce_(means)
            gx = kernels.input_grad(go, x, more, by, means) if want_x else None
        g_bias, g_weight = sums
        g_weight = g_weight.to(weight.dtype) if want_weight else None
        return gx, g_weight, g_bias.to(bias.dtype) if want_bias else None, *rest


def _differentiable_grads(
    go: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> list[Tensor | None]:
    """The gradients of x, weight and bias, where they require one, by operations that autograd records."""
    inputs = (x, weight, bias)
    o = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    o = F.relu(o) if relu else o
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(o, wanted, go, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
