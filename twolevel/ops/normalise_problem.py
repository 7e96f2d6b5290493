"""One batch normalisation on one rank, by sizes and where tensors lie: all that a choice of kernels depends on."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from twolevel.ops.problem import PLAIN


@dataclass(frozen=True)
class NormaliseProblem:
    """x `[B, C, H, W]` to o; `replicas` ranks share its statistics."""

    batch: int
    channels: int
    size: tuple[int, int]
    relu: bool
    replicas: int
    dtype: torch.dtype
    device: torch.device
    memory: str
    """channels_last, contiguous, or another"""
    odd: str = ""
    """What is unusual in the tensors, so that memory must not be read directly: a subclass, mixed types or devices."""

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool, replicas: int) -> Self:
        """The problem of these tensors."""
        batch, channels, height, width = x.shape
        return cls(
            batch=batch,
            channels=channels,
            size=(height, width),
            relu=relu,
            replicas=replicas,
            dtype=x.dtype,
            device=x.device,
            memory=memory_of(x),
            odd=_odd(x, weight, bias),
        )

    @property
    def values(self) -> int:
        """Numbers of x."""
        return self.batch * self.channels * self.size[0] * self.size[1]

    def title(self) -> str:
        """The layer in a few words, without its batch and machine: the key under which a run records its form."""
        what = "batch norm and ReLU" if self.relu else "batch norm"
        parts = [f"{what} of {self.channels} channels of {self.size[0]}x{self.size[1]}"]
        if self.replicas > 1:
            parts.append(f"over {self.replicas} ranks")
        parts.append(f"{str(self.dtype).removeprefix('torch.')} {self.memory}")
        return ", ".join(parts)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random x, weight and bias of these sizes; no random stream moves."""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device).normal_(generator=generator)

        memory = torch.channels_last if self.memory == "channels_last" else torch.contiguous_format
        x = random(self.dtype, self.batch, self.channels, *self.size).contiguous(memory_format=memory)
        parameters = self.dtype if self.dtype == torch.float64 else torch.float32
        return x, random(parameters, self.channels), random(parameters, self.channels)


def memory_of(x: Tensor) -> str:
    """The memory format of maps, channels_last where x has both."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "contiguous" if x.is_contiguous() else "strided"


def _odd(x: Tensor, *parameters: Tensor | None) -> str:
    for tensor in (x, *parameters):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return f"a {type(tensor).__name__}"
        if tensor.device != x.device or tensor.dtype not in (x.dtype, torch.float32):
            return f"{tensor.dtype} on {tensor.device} beside {x.dtype} on {x.device}"
    return ""
