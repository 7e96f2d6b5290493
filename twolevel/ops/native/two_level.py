"""The C kernels as the parts of a two-level convolution."""

import torch

from twolevel.ops.native import parts
from twolevel.ops.native.local import local, local_backward
from twolevel.ops.parts import TorchParts


class NativeParts(TorchParts):
    """Restriction and coarse term by the C kernels, each one pass over x or y; the local part is torch's."""

    def __init__(self):
        super().__init__("grouped")

    def restrict(self, x, weight, geometry):
        return parts.restrict(x, weight, geometry)

    def restrict_backward(self, gz, x, weight, geometry, gx, want_weight):
        if gx is not None and not gx.is_contiguous(memory_format=torch.channels_last):
            return super().restrict_backward(gz, x, weight, geometry, gx, want_weight)
        return parts.restrict_backward(gz, x, weight, geometry, gx, want_weight)

    def add_coarse_(self, y, z, coarse):
        if not y.is_contiguous(memory_format=torch.channels_last):
            return super().add_coarse_(y, z, coarse)
        return parts.add_coarse_(y, z, coarse)

    def coarse_input_grad(self, gy, coarse):
        return parts.coarse_input_grad(gy, coarse)

    def coarse_weight_grad(self, gy, z):
        return parts.coarse_weight_grad(gy, z)

    def coarse_grads(self, gy, z, coarse):
        return parts.coarse_grads(gy, z, coarse)


class NarrowParts(NativeParts):
    """The local part too, whose groups are so narrow that libraries leave vectors empty (`native.local_supports`)."""

    def local(self, x, weight, geometry, groups):
        return local(x, weight, geometry, groups)

    def local_backward(self, gy, x, weight, geometry, groups, wanted):
        return local_backward(gy, x, weight, geometry, groups, wanted)
