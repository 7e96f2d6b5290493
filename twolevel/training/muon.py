"""Muon: updates of kernels that are orthogonal matrices, of each channel group a matrix of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# a, b, c of the quintic a x + b x^3 + c x^5, which after five steps brings singular values from 1e-3 to 1 near 1
# (0.7 to 1.2): Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised, for the kernels of convolutions; SGD (`rest`) for what is no kernel.

    A kernel [m, c, k, k] with G groups is G matrices [m/G, c k k], each orthogonalised alone: what a rank does with
    its groups is what one process does with them, and ranks exchange nothing. For the gradient g of a matrix of
    a rows and b columns, momentum mu, weight decay w and learning rate lr

        v <- mu v + g      p <- (1 - lr w) p - lr sqrt(max(1, a/b)) orthogonal(g + mu v)

    The state of a kernel is v, under the name that SGD has for its own. Each of `kernels` is a parameter group with
    its "groups"; the groups of `rest` follow them in `param_groups`.
    """

    def __init__(self, kernels: list[dict[str, Any]], rest: torch.optim.SGD, *, lr: float, momentum: float):
        super().__init__(kernels, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.kernels, self.rest = self.param_groups, rest
        self.param_groups = [*self.kernels, *rest.param_groups]
        rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of everything that has a gradient."""
        assert closure is None
        self.rest.step()
        for group in self.kernels:
            self._step_kernels(group)

    def _step_kernels(self, group: dict[str, Any]) -> None:
        # Kernels of one shape are orthogonalised together.
        alike: dict[torch.Size, list[nn.Parameter]] = {}
        for kernel in group["params"]:
            if kernel.grad is not None:
                alike.setdefault(kernel.shape, []).append(kernel)
        for shape, kernels in alike.items():
            steps = torch.stack([self._momentum_step(kernel, group["momentum"]) for kernel in kernels])
            matrices = steps.view(len(kernels) * group["groups"], shape[0] // group["groups"], -1)
            rows, columns = matrices.shape[1:]
            updates = orthogonal(matrices) * (group["lr"] * max(1, rows / columns) ** 0.5)
            for kernel, update in zip(kernels, updates.view(steps.shape), strict=True):
                kernel.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)

    def _momentum_step(self, kernel: nn.Parameter, factor: float) -> Tensor:
        """g + mu v, contiguous, with this step's v."""
        gradient, momentum = kernel.grad, self._momentum(kernel)
        assert gradient is not None
        momentum.mul_(factor).add_(gradient)
        return gradient.add(momentum, alpha=factor).contiguous()

    def _momentum(self, kernel: nn.Parameter) -> Tensor:
        state = self.state[kernel]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(kernel)
        return state["momentum_buffer"]


def orthogonal(matrices: Tensor) -> Tensor:
    """Near U V^T of each matrix U S V^T of `[N, a, b]`, by five steps of Newton and Schulz."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7 if x.dtype == torch.float32 else 1e-30)
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x.mT if tall else x
