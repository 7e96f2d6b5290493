"""Running a launch: where Triton is there, on which devices, in which types."""

import contextlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from twolevel.errors import UserError, unknown
from twolevel.ops.kernels.triton.launches import Launch

# "ieee" multiplies float32 exactly; "tf32" rounds it to 10 bits for the tensor cores. Other dtypes ignore it.
PRECISIONS = ("ieee", "tf32")
# Arguments of the kernels that bound their loops.
BOUNDS = ("pixels_per_split", "tiles")


def run(launch: Launch, like: Tensor, **tensors: Tensor) -> None:
    """Run it on the device of `like`, with every tensor of its kernel by name; no program, no launch.

    Raises UserError for a device that cannot run it and for an unknown precision.
    """
    check_device(like.device, like.dtype)
    if (precision := launch.constants["PRECISION"]) not in PRECISIONS:
        raise unknown("precision", str(precision), PRECISIONS)
    if not launch.programs:
        return
    from twolevel.ops.kernels.triton import kernels  # here, so that the package imports without Triton

    start(
        kernels,
        launch.kernel,
        (launch.programs,),
        like,
        **tensors,
        **launch.sizes,
        **launch.constants,
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
    )


def start(
    module: ModuleType, kernel: str, grid: tuple[int, ...], like: Tensor, /, *arguments: Any, **named: Any
) -> None:
    """Start a kernel of a module of kernels, by its name, on the device of `like`."""
    if module.INTERPRETED:
        from triton.language import constexpr

        # The interpreter makes arrays of one element of other arguments, and in Triton 3.6 hands these to range(),
        # which NumPy from 2.4 on refuses.
        named |= {name: constexpr(named[name]) for name in BOUNDS if name in named}
    on_device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with on_device:
        getattr(module, kernel)[grid](*arguments, **named)


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """A UserError unless the kernels run on this device in this type."""
    if not _is_installed():
        raise UserError("Triton is not installed; install it for these kernels, or use those of torch")
    from twolevel.ops.kernels.triton import kernels

    if kernels.INTERPRETED:
        if device.type != "cpu":
            raise UserError(f"x is on {device}; it must be on the CPU, as TRITON_INTERPRET=1 is set")
        if dtype == torch.bfloat16:  # it multiplies the bits as if they were integers
            raise UserError(f"Triton's interpreter cannot multiply {dtype}; use float32 or float16 in it")
    elif device.type != "cuda":
        raise UserError(
            f"x is on {device}; it must be on a CUDA card, or TRITON_INTERPRET=1 set before the start"
        )
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        card = torch.cuda.get_device_name(device)
        raise UserError(f"{card} is older than Ampere, which these kernels need; use those of torch")


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
