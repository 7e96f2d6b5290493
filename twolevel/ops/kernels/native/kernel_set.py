"""The C kernels as sets: for the small operations of a two-level convolution, and for narrow groups as well."""

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.native import small
from twolevel.ops.kernels.native.local import fills_vectors, local, local_backward, local_wins
from twolevel.ops.kernels.torch import TorchKernels
from twolevel.ops.problem import Problem


class NativeKernels(TorchKernels):
    """Restriction and coarse term by the C kernels, each one pass over x or y; the local part is torch's."""

    name = "native"
    schedules = ("overlapped",)

    def __init__(self):
        pass

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu" or problem.dtype != torch.float32:
            return f"they are for float32 on CPUs, not {problem.dtype} on {problem.device}"
        if problem.odd:
            return f"they are for plain tensors of one type, not {problem.odd}"
        if not problem.channels_last:
            return "they are for channels_last memory"
        return small.available()

    def estimate(self, problem: Problem) -> float:
        return 1

    def restrict(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return small.restrict(x, weight, geometry)

    def add_coarse_(self, y: Tensor, z: Tensor, coarse: Tensor) -> Tensor:
        return small.add_coarse_(y, z, coarse)

    def coarse_input_grad(self, gy: Tensor, coarse: Tensor) -> Tensor:
        return small.coarse_input_grad(gy, coarse)

    def coarse_weight_grad(self, gy: Tensor, z: Tensor) -> Tensor:
        return small.coarse_weight_grad(gy, z)

    def coarse_grads(self, gy: Tensor, z: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return small.coarse_grads(gy, z, coarse)

    def restrict_backward(
        self,
        gz: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        gx: Tensor | None,
        want_weight: bool,
    ) -> Tensor | None:
        if gx is not None and not gx.is_contiguous(memory_format=torch.channels_last):
            return super().restrict_backward(gz, x, weight, geometry, gx, want_weight)
        return small.restrict_backward(gz, x, weight, geometry, gx, want_weight)


class NarrowKernels(NativeKernels):
    """The local part too, whose groups are so narrow that CPU libraries leave vectors empty."""

    name = "narrow"

    def unsupported(self, problem: Problem) -> str | None:
        if (why := super().unsupported(problem)) is not None:
            return why
        if fills_vectors(problem):
            return None
        inputs, outputs = problem.inputs // problem.groups, problem.outputs // problem.groups
        return f"groups of {inputs} to {outputs} channels do not fill their vectors"

    def estimate(self, problem: Problem) -> float:
        return 0 if local_wins(problem) else 2

    def local(self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
        return local(x, weight, geometry, groups)

    def local_backward(
        self,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        groups: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        return local_backward(gy, x, weight, geometry, groups, wanted)
