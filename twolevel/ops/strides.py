"""Memory formats and strides of results."""

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last, or contiguous where x is both or neither."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def in_strides_of(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the strides of its tensor, as compilers expect; a copy where it has others."""
    strides = torch.empty_like(like, device="meta").stride()
    if gradient.stride() == strides:
        return gradient
    return torch.empty_strided(like.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(
        gradient
    )
