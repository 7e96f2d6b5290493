"""The Triton kernels as a set, each in the configuration measured on its card."""

from collections.abc import Iterable

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.torch import TorchKernels
from twolevel.ops.kernels.triton import ahead, grouped
from twolevel.ops.kernels.triton.choices import Choices, tune
from twolevel.ops.kernels.triton.configs import Config
from twolevel.ops.kernels.triton.problem import Operation, problem_of, representatives_of
from twolevel.ops.problem import Problem, channel_groups

# Configurations tried for an operation of a layer: each takes a second or two to compile.
MOST = 4


class TritonKernels(TorchKernels):
    """Convolutions by Triton kernels. The products of the coarse term are torch's, unless z has arrived before
    the local convolution starts: then its epilogue adds them.

    A problem's configurations are measured when it is first met, outside of CUDA graphs, and stored in `choices`.
    """

    name = "triton"
    schedules = ("overlapped", "fused")

    def __init__(self, choices: Choices | None = None):
        self._choices = choices

    @property
    def choices(self) -> Choices:
        if self._choices is None:  # reads the disk, which whoever never computes by Triton need not wait for
            self._choices = Choices()
        return self._choices

    def unsupported(self, problem: Problem) -> str | None:
        if problem.odd:
            return f"they are for plain tensors of one type, not {problem.odd}"
        return grouped.unsupported(problem)

    def estimate(self, problem: Problem) -> float:
        return 30  # never a guess: without a measurement its configuration is one too

    def restrict(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return self.local(x, weight, geometry, channel_groups(x, weight)).transpose(0, 1).contiguous()

    def restrict_backward(
        self, gz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, gx: Tensor | None, want_weight: bool
    ) -> Tensor | None:
        wanted = (gx is not None, want_weight)
        groups = channel_groups(x, weight)
        more, gw = self.local_backward(gz.transpose(0, 1), x, weight, geometry, groups, wanted)
        if gx is not None and more is not None:
            gx.add_(more)
        return gw

    def local(self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
        config = self._config("forward", x, weight, geometry, groups)
        return grouped.forward(x, weight, geometry, groups, config=config, precision=_precision())

    def local_backward(
        self,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        groups: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        gy = gy.contiguous(memory_format=torch.channels_last)
        gx = gw = None
        if wanted[0]:
            config = self._config("input_grad", x, weight, geometry, groups)
            gx = grouped.input_grad(
                gy, weight, x.shape, geometry, groups, config=config, precision=_precision()
            )
        if wanted[1]:
            config = self._config("weight_grad", x, weight, geometry, groups)
            gw = grouped.weight_grad(
                gy, x, weight.shape, geometry, groups, config=config, precision=_precision()
            ).to(weight.dtype)
        return gx, gw

    def local_and_restriction(
        self, x: Tensor, local: Tensor, restriction: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        groups = channel_groups(x, local)
        config = self._config("forward", x, local, geometry, groups, restriction)
        return grouped.forward(x, local, geometry, groups, restriction, config=config, precision=_precision())

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
        gx, g_local = self.local_backward(gy, x, local, geometry, channel_groups(x, local), wanted[:2])
        return gx, g_local, self.restrict_backward(gz, x, restriction, geometry, gx, wanted[2])

    def local_and_coarse(
        self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, z: Tensor, coarse: Tensor
    ) -> Tensor:
        config = self._config("forward", x, weight, geometry, groups)
        return grouped.forward(
            x, weight, geometry, groups, coarse=coarse.flatten(1), z=z, config=config, precision=_precision()
        )

    def _config(
        self,
        operation: Operation,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        groups: int,
        restriction: Tensor | None = None,
    ) -> Config | None:
        """The measured configuration; None, the estimate, where none can be measured."""
        if not x.is_cuda:
            return None
        representatives = representatives_of(restriction, groups)
        problem = problem_of(x.shape, weight.shape, geometry, groups, x.dtype, representatives)
        card, precision = torch.cuda.get_device_name(x.device), _precision()
        known = self.choices.get(operation, problem, card, precision)
        if known is not None or torch.cuda.is_current_stream_capturing():
            return known
        times = tune(
            operation,
            x,
            weight,
            geometry,
            groups,
            restriction,
            choices=self.choices,
            most=MOST,
            precision=precision,
        )
        return next(iter(times))

    def compile_ahead(self, layers: Iterable[Problem], processes: int) -> list[str]:
        """Compile in so many processes what is measured for these layers; returns what cannot be compiled, and why."""
        return ahead.compile_ahead(layers, processes, most=MOST, precision=_precision())


def _precision() -> str:
    """Of products of float32 numbers: what torch's own convolutions are allowed."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
