"""Kernels that are operations of torch: for every device, type and memory format, and the reference of all others."""

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels import restriction
from twolevel.ops.kernels.base import Gradients, KernelSet, Wanted
from twolevel.ops.kernels.restriction import Way, ways
from twolevel.ops.problem import Problem, channel_groups
from twolevel.ops.strides import memory_format_of


class TorchKernels(KernelSet):
    """Operations of torch, on any device and in any type; `name` is how the restriction is computed."""

    joins_coarse = False

    def __init__(self, name: Way):
        self.name: str = name
        self.way: Way = name
        # The other two restrict in another way: these schedules restrict with the local part, or not at all.
        self.schedules = ("overlapped", "fused", "dense") if name == "grouped" else ("overlapped",)

    def unsupported(self, problem: Problem) -> str | None:
        return (
            None
            if self.way in ways(problem)
            else "they are for channels_last memory and one representative a group"
        )

    def estimate(self, problem: Problem) -> float:
        return 3 + ways(problem).index(self.way)

    def restrict(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return restriction.restrict(x, weight, geometry, self.way)

    def restrict_backward(
        self,
        gz: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        gx: Tensor | None,
        want_weight: bool,
    ) -> Tensor | None:
        return restriction.restrict_backward(gz, x, weight, geometry, gx, want_weight, self.way)

    def local(self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
        stride, padding, dilation = geometry
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    def local_backward(
        self,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        groups: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        return restriction.conv_backward(gy, x, weight, geometry, groups, wanted)

    def local_and_restriction(
        self, x: Tensor, local: Tensor, restriction: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        groups = channel_groups(x, local)
        out = self.local(x, _joined(local, restriction, groups), geometry, groups).unflatten(1, (groups, -1))
        y, z = out.split([len(local) // groups, len(restriction) // groups], 2)
        y = y.flatten(1, 2).contiguous(memory_format=memory_format_of(x))
        return y, z.flatten(1, 2).transpose(0, 1).contiguous()

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
        want_x, want_local, want_restriction = wanted
        groups = channel_groups(x, local)
        of_group = [gradient.unflatten(1, (groups, -1)) for gradient in (gy, gz.transpose(0, 1))]
        gout = torch.cat(of_group, 2).flatten(1, 2)
        gout = gout.contiguous(memory_format=memory_format_of(x))
        both = (want_x, want_local or want_restriction)
        gx, gw = self.local_backward(gout, x, _joined(local, restriction, groups), geometry, groups, both)
        if gw is None:
            return gx, None, None
        rows = gw.unflatten(0, (groups, -1))
        g_local, g_restriction = rows.split([len(local) // groups, len(restriction) // groups], 1)
        return gx, g_local.flatten(0, 1), g_restriction.flatten(0, 1)

    def add_coarse_(self, y: Tensor, z: Tensor, coarse: Tensor) -> Tensor:
        weight = coarse.flatten(1)
        if y.is_contiguous(memory_format=torch.channels_last):
            pixels = y.permute(0, 2, 3, 1).view(y.numel() // len(weight), len(weight))
            pixels.addmm_(z.flatten(1).t(), weight.t())
        else:
            batch = weight.expand(len(y), -1, -1)
            y.view(len(y), len(weight), y.shape[2] * y.shape[3]).baddbmm_(batch, z.flatten(2).transpose(0, 1))
        return y

    def local_and_coarse(
        self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, z: Tensor, coarse: Tensor
    ) -> Tensor:
        return self.add_coarse_(self.local(x, weight, geometry, groups), z, coarse)

    def coarse_input_grad(self, gy: Tensor, coarse: Tensor) -> Tensor:
        batch, _, height, width = gy.shape
        grad = coarse.flatten(1).t() @ gy.transpose(0, 1).flatten(1)
        return grad.view(len(grad), batch, height, width)

    def coarse_weight_grad(self, gy: Tensor, z: Tensor) -> Tensor:
        # The few rows on the left: on CPUs several times as fast as its transpose.
        return (z.flatten(1) @ gy.transpose(0, 1).flatten(1).t()).t()[..., None, None]

    def coarse_grads(self, gy: Tensor, z: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return self.coarse_input_grad(gy, coarse), self.coarse_weight_grad(gy, z)

    def whole(
        self, x: Tensor, local: Tensor, restriction: Tensor, coarse: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        z = self.restrict(x, restriction, geometry)
        return self.local_and_coarse(x, local, geometry, channel_groups(x, local), z, coarse), z

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
        want_x, want_local, want_restriction, want_coarse = wanted
        if want_coarse:
            gz, g_coarse = self.coarse_grads(gy, z, coarse)
        else:
            gz, g_coarse = self.coarse_input_grad(gy, coarse), None
        groups = channel_groups(x, local)
        gx, g_local = self.local_backward(gy, x, local, geometry, groups, (want_x, want_local))
        g_restriction = self.restrict_backward(gz, x, restriction, geometry, gx, want_restriction)
        return gx, g_local, g_restriction, g_coarse


def _joined(local: Tensor, restriction: Tensor, groups: int) -> Tensor:
    """`[m + R G, n/G, k, k]`: representatives are further outputs of their group."""
    return torch.cat([weight.unflatten(0, (groups, -1)) for weight in (local, restriction)], 1).flatten(0, 1)
