"""The C kernels as a set: each operation of a two-level convolution alone, and all of one rank in one walk."""

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.base import Gradients, Wanted
from twolevel.ops.kernels.native import call, two_level
from twolevel.ops.kernels.native.two_level import layer_of
from twolevel.ops.kernels.torch import TorchKernels
from twolevel.ops.problem import Problem
from twolevel.ops.strides import memory_format_of


class NativeKernels(TorchKernels):
    """C kernels for the CPU and float32, in either memory format; image by image, so that what one operation leaves in
    the cache is there for the next.
    """

    name = "native"
    schedules = ("overlapped", "fused")
    joins_coarse = True

    def __init__(self):
        pass

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu" or problem.dtype != torch.float32:
            return f"they are for float32 on CPUs, not {problem.dtype} on {problem.device}"
        if problem.odd:
            return f"they are for plain tensors of one type, not {problem.odd}"
        return call.available()

    def estimate(self, problem: Problem) -> float:
        return 0

    def restrict(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        layer = layer_of(x, weight, geometry, restriction=weight)
        z = x.new_empty(len(weight), len(x), *layer.output)
        two_level.forward(layer, x, restriction=weight, own=z)
        return z

    def restrict_backward(
        self,
        gz: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        gx: Tensor | None,
        want_weight: bool,
    ) -> Tensor | None:
        if gx is not None and not gx.is_contiguous(memory_format=memory_format_of(x)):
            return super().restrict_backward(gz, x, weight, geometry, gx, want_weight)
        layer = layer_of(x, weight, geometry, restriction=weight)
        shapes = (None, weight.shape if want_weight else None, None)
        return two_level.backward(layer, None, x, restriction=weight, gz=gz, gx=gx, wanted=shapes)[1]

    def local(self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
        layer = layer_of(x, weight, geometry)
        y = _output(x, layer)
        two_level.forward(layer, x, weight, y=y)
        return y

    def local_backward(
        self,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        groups: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        gx = _like(x) if wanted[0] else None
        shapes = (weight.shape if wanted[1] else None, None, None)
        layer = layer_of(x, weight, geometry)
        return gx, two_level.backward(layer, gy, x, weight, gx=gx, wanted=shapes)[0]

    def local_and_restriction_backward(
        self,
        gy: Tensor,
        gz: Tensor,
        x: Tensor,
        local: Tensor,
        restriction: Tensor,
        geometry: Geometry,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gx = _like(x) if wanted[0] else None
        shapes = (local.shape if wanted[1] else None, restriction.shape if wanted[2] else None, None)
        layer = layer_of(x, local, geometry, restriction=restriction)
        grads = two_level.backward(layer, gy, x, local, restriction, gz=gz, gx=gx, wanted=shapes)
        return gx, *grads[:2]

    def add_coarse_(self, y: Tensor, z: Tensor, coarse: Tensor) -> Tensor:
        y = y.contiguous(memory_format=memory_format_of(y))
        two_level.forward(two_level.coarse_layer_of(y, len(z)), coarse=coarse, z=z, y=y)
        return y

    def local_and_coarse(
        self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, z: Tensor, coarse: Tensor
    ) -> Tensor:
        layer = layer_of(x, weight, geometry, representatives=len(z))
        y = _output(x, layer)
        two_level.forward(layer, x, weight, coarse=coarse, z=z, y=y)
        return y

    def coarse_input_grad(self, gy: Tensor, coarse: Tensor) -> Tensor:
        gz = gy.new_empty(coarse.shape[1], len(gy), *gy.shape[2:])
        two_level.backward(two_level.coarse_layer_of(gy, len(gz)), gy, coarse=coarse, gz_of_all=gz)
        return gz

    def coarse_weight_grad(self, gy: Tensor, z: Tensor) -> Tensor:
        layer = two_level.coarse_layer_of(gy, len(z))
        shape = torch.Size((gy.shape[1], len(z), 1, 1))
        grad = two_level.backward(layer, gy, z=z, wanted=(None, None, shape))[2]
        assert grad is not None
        return grad

    def coarse_grads(self, gy: Tensor, z: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        gz, layer = torch.empty_like(z), two_level.coarse_layer_of(gy, len(z))
        shapes = (None, None, coarse.shape)
        grad = two_level.backward(layer, gy, coarse=coarse, z=z, gz_of_all=gz, wanted=shapes)[2]
        assert grad is not None
        return gz, grad

    def whole(
        self, x: Tensor, local: Tensor, restriction: Tensor, coarse: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        layer = _whole_layer(x, local, restriction, geometry)
        y, z = _output(x, layer), x.new_empty(len(restriction), len(x), *layer.output)
        two_level.forward(layer, x, local, restriction, coarse, z, z, y)
        return y, z

    def whole_backward(
        self,
        gy: Tensor,
        x: Tensor,
        local: Tensor,
        restriction: Tensor,
        coarse: Tensor,
        z: Tensor,
        geometry: Geometry,
        wanted: Wanted,
    ) -> Gradients:
        gx = _like(x) if wanted[0] else None
        weights = (local, restriction, coarse)
        shapes = [weight.shape if want else None for weight, want in zip(weights, wanted[1:], strict=True)]
        layer = _whole_layer(x, local, restriction, geometry)
        return gx, *two_level.backward(layer, gy, x, *weights, z, gx=gx, wanted=shapes)


def _whole_layer(x: Tensor, local: Tensor, restriction: Tensor, geometry: Geometry) -> call.Layer:
    return layer_of(x, local, geometry, representatives=len(restriction), restriction=restriction)


def _output(x: Tensor, layer: call.Layer) -> Tensor:
    """For y, in the memory format of x."""
    return torch.empty(len(x), layer.outputs, *layer.output, memory_format=memory_format_of(x))


def _like(x: Tensor) -> Tensor:
    """For gx, whole and in the memory format of x."""
    return torch.empty(x.shape, memory_format=memory_format_of(x))
