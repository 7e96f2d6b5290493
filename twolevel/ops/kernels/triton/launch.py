"""Starting a kernel: on which device, with what; and the phases of an input gradient with strides."""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twolevel.errors import UserError, unknown
from twolevel.ops.kernels.triton.configs import Config
from twolevel.ops.kernels.triton.problem import Problem

# "ieee" multiplies float32 exactly; "tf32" rounds it to 10 bits for the tensor cores. Other dtypes ignore it.
PRECISIONS = ("ieee", "tf32")


def launch(
    kernel: str,
    like: Tensor,
    programs: int,
    config: Config,
    *arguments: Iterable[Any],
    bounds: dict[str, int],
    precision: str,
    **constants: int,
) -> None:
    """Run the kernel of this name in `kernels` on the device of `like`; no program, no launch.

    `bounds` are the arguments that bound loops. Raises UserError for a device that cannot run it and for an unknown
    precision.
    """
    check_device(like.device, like.dtype)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if not programs:
        return
    from twolevel.ops.kernels.triton import kernels  # here, so that the package imports without Triton

    if kernels.INTERPRETED:
        from triton.language import constexpr

        # The interpreter makes arrays of one element of other arguments, and in Triton 3.6 hands these to range(),
        # which NumPy from 2.4 on refuses.
        bounds = {name: constexpr(bound) for name, bound in bounds.items()}  # pyright: ignore[reportAssignmentType] they stand for ints
    on_device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with on_device:
        getattr(kernels, kernel)[(programs,)](
            *(argument for part in arguments for argument in part),
            **bounds,
            **constants,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """A UserError unless the kernels run on this device in this type."""
    if not _is_installed():
        raise UserError("Triton is not installed; these kernels need it, torch.nn.functional.conv2d does not")
    from twolevel.ops.kernels.triton import kernels

    if kernels.INTERPRETED:
        if device.type != "cpu":
            raise UserError(f"x is on {device}; Triton's interpreter was asked for, so it must be on the CPU")
        if dtype == torch.bfloat16:  # it multiplies the bits as if they were integers
            raise UserError(f"Triton's interpreter cannot multiply {dtype}; use float32 or float16 in it")
    elif device.type != "cuda":
        raise UserError(
            f"x is on {device}; it must be on a CUDA card, or TRITON_INTERPRET=1 set before the start"
        )
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"{torch.cuda.get_device_name(device)} is older than Ampere; use conv2d of torch")


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class Phase(NamedTuple):
    """Pixels `place, place + stride, ...` of one axis of x, and the taps that reach them."""

    place: int
    size: int  # pixels
    taps: int
    tap_start: int
    tap_step: int
    start: int  # where in gy the first pixel meets its first tap
    step: int  # from there to the next tap


def phases(problem: Problem, axis: int) -> Iterator[Phase]:
    """The phases of an axis (0 height, 1 width); pixel i meets tap k where stride divides i + padding - k dilation."""
    stride, padding, dilation = (pair[axis] for pair in problem.geometry)
    kernel, size = problem.kernel[axis], (problem.height, problem.width)[axis]
    tap_step = stride // gcd(stride, dilation)
    for place in range(min(stride, size)):
        pixels = -(-(size - place) // stride)
        first = next((k for k in range(kernel) if (place + padding - k * dilation) % stride == 0), None)
        if first is None:
            yield Phase(place, pixels, 0, 0, 0, 0, 0)
            continue
        yield Phase(
            place,
            pixels,
            taps=-(-(kernel - first) // tap_step),
            tap_start=first,
            tap_step=tap_step,
            start=(place + padding - first * dilation) // stride,
            step=-tap_step * dilation // stride,
        )
