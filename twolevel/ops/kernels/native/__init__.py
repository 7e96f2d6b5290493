"""C kernels for the two-level convolution and for batch norm on CPUs, in float32.

They are compiled by the system's C compiler when first used; where there is none, `available` says so and nothing else
may be called.
"""

from twolevel.ops.kernels.native.call import available, version
from twolevel.ops.kernels.native.kernel_set import NativeKernels
from twolevel.ops.kernels.native.normalise import NativeNormaliser

__all__ = ["NativeKernels", "NativeNormaliser", "available", "version"]
