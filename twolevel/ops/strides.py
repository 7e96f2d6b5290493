"""Memory formats and strides of results."""

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last, or contiguous where x is both or neither."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def in_strides_of(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the strides of its tensor, as its users expect: compilers, and buckets of DDP."""
    if gradient.stride() == like.stride():
        return gradient
    strides = torch.empty_like(like, device="meta").stride()  # those of `like` unless it has gaps or overlaps
    sizes = zip(like.shape, gradient.stride(), strides, strict=True)
    if all(size == 1 or own == other for size, own, other in sizes):
        return gradient.as_strided(like.shape, strides)
    return torch.empty_strided(like.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(
        gradient
    )
