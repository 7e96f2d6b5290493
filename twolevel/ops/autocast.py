"""What torch.autocast does to torch's own convolutions, for those that torch does not know."""

import contextlib

import torch
from torch import Tensor

# Devices of which autocast knows nothing. torch.amp.is_autocast_available says so too, but torch.compile cannot trace
# it in torch 2.11.
UNKNOWN = ("meta",)


def cast_for_convolution(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x and weights in the type in which autocast computes convolutions; as they are where it is off or x is float64.

    Call it outside the autograd function, so that gradients come back in the parameters' own types.
    """
    device = x.device.type
    if device in UNKNOWN or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, *weights
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in (x, *weights))


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Inside, operations on a type of device compute in the types that they are given."""
    return torch.autocast(device, enabled=False) if device not in UNKNOWN else contextlib.nullcontext()
