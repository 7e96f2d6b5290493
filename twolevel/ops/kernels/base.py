"""What a set of kernels computes, and how it says what it cannot.

Representatives are kept channel-major, z [G, B, H', W']: a rank's share is one contiguous block to gather,
and the coarse term is one matrix product accumulated into y, without a copy, in either memory format.
"""

from typing import Protocol

from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.problem import Problem

Wanted = tuple[bool, bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Those of x, A, r and C, None where not wanted."""


class KernelSet(Protocol):
    """A kernel for each operation. With P ranks and one representative a group: x `[B, n/P, H, W]`,
    y and gy `[B, m/P, H', W']`, A `[m/P, n/G, k, k]`, r `[G/P, n/G, k, k]`, C `[m/P, G, 1, 1]`, z `[G, B, H', W']`;
    with more of them a group, G in the last three is their number.

    It serves the schedules of its `schedules`. `estimate` orders the sets before any is measured.
    """

    name: str
    schedules: tuple[str, ...]
    joins_coarse: bool
    """Of the `fused` schedule: whether the local part goes together with the coarse term, after the exchange; else
    with the restriction, before it."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why these kernels cannot compute the problem here, as what follows "kernels=...: "; None where they can."""
        ...

    def estimate(self, problem: Problem) -> float:
        """Orders the sets before any is measured: lower is faster. The numbers have no other meaning."""
        ...

    def restrict(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """r * x for this rank's groups: `[G/P, B, H', W']`, contiguous."""
        ...

    def restrict_backward(
        self,
        gz: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        gx: Tensor | None,
        want_weight: bool,
    ) -> Tensor | None:
        """Add the gradient of x into `gx` unless that is None; return the weight's if wanted. gz `[G/P, B, H', W']`."""
        ...

    def local(self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
        """A * x, in the memory format of x."""
        ...

    def local_backward(
        self,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        groups: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and A, None where not wanted."""
        ...

    def local_and_restriction(
        self, x: Tensor, local: Tensor, restriction: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """`local` and `restrict` in one pass over x."""
        ...

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
        """The gradients of x, A and r, None where not wanted."""
        ...

    def add_coarse_(self, y: Tensor, z: Tensor, coarse: Tensor) -> Tensor:
        """y + C z, accumulated into y."""
        ...

    def local_and_coarse(
        self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, z: Tensor, coarse: Tensor
    ) -> Tensor:
        """A * x + C z, when z has already arrived."""
        ...

    def coarse_input_grad(self, gy: Tensor, coarse: Tensor) -> Tensor:
        """C^T gy: `[G, B, H', W']`, contiguous."""
        ...

    def coarse_weight_grad(self, gy: Tensor, z: Tensor) -> Tensor:
        """gy z^T summed over images and pixels: `[m/P, G, 1, 1]`."""
        ...

    def coarse_grads(self, gy: Tensor, z: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """`coarse_input_grad` and `coarse_weight_grad`, where no rank waits for the first."""
        ...

    def whole(
        self, x: Tensor, local: Tensor, restriction: Tensor, coarse: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """(y, z) of one rank alone."""
        ...

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
        """The gradients of one rank alone."""
        ...
