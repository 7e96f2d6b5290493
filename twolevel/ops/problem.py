"""One layer to compute on one rank, by its sizes and where its tensors lie: all that a choice of kernels depends on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry, output_size

PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Problem:
    """x `[B, n/P, H, W]` to y `[B, m/P, H', W']` on one of P `ranks`, which holds `groups` = G/P channel groups with
    `representatives` each.
    """

    batch: int
    inputs: int
    size: tuple[int, int]
    outputs: int
    kernel: tuple[int, int]
    groups: int
    geometry: Geometry
    ranks: int
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    representatives: int = 1
    odd: str = ""
    """What is unusual in the tensors, so that memory must not be read directly: a subclass, mixed types or devices."""

    @classmethod
    def of(
        cls, x: Tensor, local: Tensor, restriction: Tensor, coarse: Tensor, geometry: Geometry, ranks: int
    ) -> Self:
        """The problem of these tensors, whose shapes are as in `twolevel.ops.two_level_conv2d`."""
        batch, inputs, height, width = x.shape
        outputs, _, kernel_height, kernel_width = local.shape
        groups = channel_groups(x, local)
        return cls(
            batch=batch,
            inputs=inputs,
            size=(height, width),
            outputs=outputs,
            kernel=(kernel_height, kernel_width),
            groups=groups,
            geometry=geometry,
            ranks=ranks,
            dtype=x.dtype,
            device=x.device,
            channels_last=x.is_contiguous(memory_format=torch.channels_last),
            representatives=len(restriction) // groups,
            odd=_odd(x, local, restriction, coarse),
        )

    @property
    def output(self) -> tuple[int, int]:
        """(H', W')."""
        return output_size(self.size, self.kernel, self.geometry)

    @property
    def local_shape(self) -> tuple[int, int, int, int]:
        """`[m/P, n/G, kh, kw]`."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    @property
    def macs(self) -> int:
        """Multiplications of the local part, forward."""
        stride_height, stride_width = self.geometry.stride
        pixels = self.batch * self.size[0] * self.size[1] // (stride_height * stride_width)
        return pixels * math.prod(self.local_shape)

    def title(self) -> str:
        """The layer in a few words, without its batch and machine: the key under which a run records its form."""
        pairs = zip(Geometry._fields, self.geometry, Geometry(), strict=True)
        parts = [
            f"{self.inputs} to {self.outputs} channels of {_times(self.size)}",
            _times(self.kernel),
            *(f"{name} {_times(pair)}" for name, pair, usual in pairs if tuple(pair) != usual),
            f"{self.groups} groups",
        ]
        if self.representatives > 1:
            parts.append(f"{self.representatives} representatives each")
        if self.ranks > 1:
            parts.append(f"one of {self.ranks} ranks")
        memory = "channels_last" if self.channels_last else "contiguous"
        parts.append(f"{str(self.dtype).removeprefix('torch.')} {memory}")
        return ", ".join(parts)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random x, A, r and C of these sizes; no random stream moves."""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(generator=generator)

        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        x = random(self.batch, self.inputs, *self.size).contiguous(memory_format=memory)
        own = self.groups * self.representatives
        restriction = random(own, *self.local_shape[1:])
        return x, random(*self.local_shape), restriction, random(self.outputs, own * self.ranks, 1, 1)


def channel_groups(x: Tensor, local: Tensor) -> int:
    """The groups of x `[B, n, H, W]`, of which each output of `local` `[m, n/G, k, k]` reads one."""
    return x.shape[1] // local.shape[1]


def batch_class(batch: int) -> int:
    """The power of two that is not below it: what was measured for a batch holds for those of its class, so that a
    smaller last batch is not measured anew.
    """
    return 1 << max(0, batch - 1).bit_length()


def _odd(x: Tensor, *weights: Tensor) -> str:
    for tensor in (x, *weights):
        if type(tensor) not in PLAIN:
            return f"a {type(tensor).__name__}"
        if tensor.dtype != x.dtype or tensor.device != x.device:
            return f"{tensor.dtype} on {tensor.device} beside {x.dtype} on {x.device}"
    return ""


def _times(pair: Sequence[int]) -> str:
    return "x".join(map(str, pair))
