"""C kernels for what CPU libraries are slow at in the two-level convolution: its small parts, and narrow groups.

For the CPU, float32 and channels_last memory. They are compiled by the system's C compiler when first used; where there
is none, `available` says so and nothing else may be called.
"""

from twolevel.ops.native.local import local, local_backward, local_supports, local_wins
from twolevel.ops.native.parts import (
    add_coarse_,
    available,
    coarse_grads,
    coarse_input_grad,
    coarse_weight_grad,
    restrict,
    restrict_backward,
    supports,
    version,
    why_not,
)

__all__ = [
    "add_coarse_",
    "available",
    "coarse_grads",
    "coarse_input_grad",
    "coarse_weight_grad",
    "local",
    "local_backward",
    "local_supports",
    "local_wins",
    "restrict",
    "restrict_backward",
    "supports",
    "version",
    "why_not",
]
