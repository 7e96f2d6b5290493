"""C kernels for what CPU libraries are slow at in the two-level convolution: its small parts, and narrow groups.

For the CPU, float32 and channels_last memory. They are compiled by the system's C compiler when first used; where there
is none, `available` says so and nothing else may be called.
"""

from twolevel.ops.kernels.native.kernel_set import NarrowKernels, NativeKernels
from twolevel.ops.kernels.native.local import fills_vectors, local, local_backward, local_wins
from twolevel.ops.kernels.native.small import (
    add_coarse_,
    available,
    coarse_grads,
    coarse_input_grad,
    coarse_weight_grad,
    restrict,
    restrict_backward,
    version,
)

__all__ = [
    "NarrowKernels",
    "NativeKernels",
    "add_coarse_",
    "available",
    "coarse_grads",
    "coarse_input_grad",
    "coarse_weight_grad",
    "fills_vectors",
    "local",
    "local_backward",
    "local_wins",
    "restrict",
    "restrict_backward",
    "version",
]
