"""Group convolution in channels_last memory: forward with restriction and coarse term, and both gradients.

    y_g  = A_g * x_g (+ C_g z)        z_g = r_g * x_g        sums in float32, results in the dtype of x
    gx_g = A_g^T * gy_g               gA_g[o, i, tap] = sum over pixels of gy_g[o] x_g[i] at the tap, left in float32

Run on CUDA cards from Ampere on, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before the import).
The functions record nothing for autograd; `GroupedConv2d` does. Packed groups (`Problem.pack`) share a product whose
other blocks are zeros, so an infinity or NaN in one of them reaches the others as NaN.
"""

from typing import overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from twolevel.errors import UserError
from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.triton import launches
from twolevel.ops.kernels.triton.configs import Config
from twolevel.ops.kernels.triton.estimate import pick
from twolevel.ops.kernels.triton.launch import check_device, run
from twolevel.ops.kernels.triton.problem import (
    COPY_BYTES,
    MOST_ELEMENTS,
    check_image,
    check_tensor,
    problem_of,
    representatives_of,
)
from twolevel.ops.problem import Problem as Layer


@overload
def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    groups: int,
    restriction: None = None,
    coarse: Tensor | None = None,
    z: Tensor | None = None,
    *,
    config: Config | None = None,
    precision: str = "ieee",
) -> Tensor: ...


@overload
def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    groups: int,
    restriction: Tensor,
    coarse: Tensor | None = None,
    z: Tensor | None = None,
    *,
    config: Config | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]: ...


def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    groups: int,
    restriction: Tensor | None = None,
    coarse: Tensor | None = None,
    z: Tensor | None = None,
    *,
    config: Config | None = None,
    precision: str = "ieee",
) -> Tensor | tuple[Tensor, Tensor]:
    """y `[B, m, H', W']` channels_last; with a restriction, (y, its z `[R G, B, H', W']` contiguous).

    Shapes: x `[B, n, H, W]` channels_last, weight `[m, n/G, kh, kw]`, restriction `[R G, n/G, kh, kw]`;
    coarse `[m, Z]` and z `[Z, B, H', W']` contiguous add the coarse term of Z representatives to y.
    Raises UserError for a tensor that the kernels cannot read, and for a coarse term without z or the reverse.
    """
    representatives = representatives_of(restriction, groups)
    problem = problem_of(x.shape, weight.shape, geometry, groups, x.dtype, representatives)
    check_image("x", x, x.shape, x)
    check_tensor("weight", weight, weight.shape, x)
    if (coarse is None) != (z is None):
        given, missing = ("coarse", "z") if z is None else ("z", "coarse")
        raise UserError(f"{given} is given without {missing}; the coarse term needs both")
    if restriction is not None:
        check_tensor("restriction", restriction, (max(1, representatives) * groups, *weight.shape[1:]), x)
    if coarse is not None and z is not None:
        check_tensor("z", z, (len(z), x.shape[0], *problem.out_size), x)
        check_tensor("coarse", coarse, (problem.outputs, len(z)), x)
        for name, tensor in (("z", z), ("coarse", coarse)):
            if not tensor.is_contiguous():
                raise UserError(
                    f"{name} has strides {tensor.stride()}; it must be contiguous: use .contiguous()"
                )
        if z.numel() >= MOST_ELEMENTS:
            raise UserError(f"z of {z.numel()} elements is beyond 32-bit offsets; split the batch")
    config = pick(problem, "forward", config)
    y = _image(x, problem.outputs, problem.out_size)
    own = None if restriction is None else x.new_empty(len(restriction), x.shape[0], *problem.out_size)
    run(
        launches.forward(problem, config, precision, 0 if z is None else len(z)),
        x,
        x=x,
        w=_last(weight),
        out=y,
        r=x if restriction is None else _last(restriction),
        z_out=_or(own, y),
        coarse=_or(coarse, x),
        z_in=_or(z, x),
    )
    return y if own is None else (y, own)


def input_grad(
    gy: Tensor,
    weight: Tensor,
    x_shape: tuple[int, ...],
    geometry: Geometry,
    groups: int,
    *,
    config: Config | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The gradient of x `[B, n, H, W]` channels_last, from gy `[B, m, H', W']` channels_last and the weight.

    One launch a phase of the stride (`launches.input_grad`). Raises UserError for a tensor that the kernel cannot read.
    """
    problem = problem_of(tuple(x_shape), weight.shape, geometry, groups, gy.dtype)
    check_image("gy", gy, (problem.batch, problem.outputs, *problem.out_size), gy)
    check_tensor("weight", weight, weight.shape, gy)
    config = pick(problem, "input_grad", config)
    gx = _image(gy, problem.inputs, (problem.height, problem.width))
    weight = _last(weight)
    for launch in launches.input_grad(problem, config, precision):
        run(launch, gy, x=gy, w=weight, out=gx, r=gy, z_out=gx, coarse=gy, z_in=gy)
    return gx


def weight_grad(
    gy: Tensor,
    x: Tensor,
    weight_shape: tuple[int, ...],
    geometry: Geometry,
    groups: int,
    *,
    config: Config | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The gradient of the weight `[m, n/G, kh, kw]`, float32 and channels_last.

    Shapes: gy `[B, m, H', W']` and x `[B, n, H, W]`, both channels_last.

    Ranges of pixels are summed apart in float32 and then together, without atomics: the same input and
    configuration give the same bits. Raises UserError for a tensor that the kernel cannot read.
    """
    problem = problem_of(x.shape, tuple(weight_shape), geometry, groups, x.dtype)
    check_image("x", x, x.shape, x)
    check_image("gy", gy, (problem.batch, problem.outputs, *problem.out_size), x)
    config = pick(problem, "weight_grad", config)
    launch, ranges = launches.weight_grad(problem, config, precision)
    shape = (ranges, problem.outputs, *problem.kernel, problem.group_inputs)
    partials = x.new_empty(shape, dtype=torch.float32)
    run(launch, x, x=x, gy=gy, partials=partials)
    return partials.sum(0).permute(0, 3, 1, 2)


def unsupported(layer: Layer) -> str | None:
    """Why they cannot compute a two-level layer here, None where they can; never whether they are the fastest."""
    try:
        check_device(layer.device, layer.dtype)
        x_shape = (layer.batch, layer.inputs, *layer.size)
        problem_of(
            x_shape, layer.local_shape, layer.geometry, layer.groups, layer.dtype, layer.representatives
        )
    except UserError as error:
        return str(error)
    return None if layer.channels_last else "they are for channels_last memory"


class GroupedConv2d(torch.autograd.Function):
    """`GroupedConv2d.apply(x, weight, geometry, groups)`: the convolution with its gradients, all by these kernels.

    x `[B, n, H, W]` channels_last, weight `[m, n/G, kh, kw]`; y and the gradient of x are channels_last.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arguments = (geometry, groups)
        return forward(x, weight, geometry, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gy = gy.contiguous(memory_format=torch.channels_last)
        gx = input_grad(gy, weight, x.shape, *ctx.arguments) if ctx.needs_input_grad[0] else None
        gw = weight_grad(gy, x, weight.shape, *ctx.arguments) if ctx.needs_input_grad[1] else None
        return gx, None if gw is None else gw.to(weight.dtype), None, None


def _image(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _last(weight: Tensor) -> Tensor:
    """A weight as the kernels read it, tap by tap and 16 bytes at a time: no copy of one that is channels_last."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return weight if weight.data_ptr() % COPY_BYTES == 0 else weight.clone()


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """The stand-in is a pointer of the right kind that the kernel does not read."""
    return stand_in if tensor is None else tensor
